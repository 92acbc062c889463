"""Settings from flags and JSON: types, choices, unknown names, the official config.json."""

import json
from dataclasses import asdict, dataclass, fields

import pytest
from toy import USER_DICT, read_json, refused, results, run_main, run_toy

from kka.detectors.deep_sad import DeepSADSettings, check_settings
from kka.errors import UserError
from kka.options import PLACE, ExperimentSettings, check_options
from kka.settings import build_parser, check_keys, make_settings, option

# Every option of the official code with its default; its seed is -1 and its data has another user_dict.
OFFICIAL = {
    "dataset_name": "flower", "net_name": "cifar10_LeNet", "xp_path": "/home/x/log", "data_path": "/home/x",
    "load_config": None, "load_model": None, "eta": 1.0, "ratio_known_normal": 0.0,
    "ratio_known_outlier": 0.01, "ratio_pollution": 0.1, "device": "cuda", "seed": -1,
    "optimizer_name": "adam", "lr": 1e-4, "n_epochs": 200, "lr_milestone": [50], "batch_size": 32,
    "weight_decay": 0.5e-6, "pretrain": True, "ae_optimizer_name": "adam", "ae_lr": 1e-3, "ae_n_epochs": 200,
    "ae_lr_milestone": [0], "ae_batch_size": 32, "ae_weight_decay": 0.5e-3, "num_threads": 0,
    "n_jobs_dataloader": 0, "normal_class": 0, "known_outlier_class": 1, "n_known_outlier_classes": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Toy:
    """Toy settings."""

    count: int = option(3, "a number")
    rate: float = option(0.5, "100 % of a rate")
    flag: bool = option(False, "a switch")
    words: tuple[str, ...] = option((), "several words")
    limit: int | None = option(None, "perhaps a number")
    kind: str = option("a", "one of two", ("a", "b"), alias="sort")


def parse(*words):
    return make_settings(Toy, vars(build_parser("Toy.", Toy).parse_args(list(words))))


def test_defaults_and_flags():
    assert parse() == Toy()
    given = parse(
        "--count", "4", "--rate", "2", "--words", "x", "y", "--words", "z", "--limit", "7", "--kind", "b"
    )
    assert given == Toy(4, 2.0, False, ("x", "y", "z"), 7, "b")
    assert parse("--words") == Toy()
    assert parse("--sort", "b") == parse("--kind", "b") == Toy(kind="b")


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--flag"], True),
        (["--flag", "True"], True),
        (["--flag", "yes"], True),
        (["--flag", "1"], True),
        (["--flag", "false"], False),
        (["--flag", "NO"], False),
        (["--flag", "0"], False),
    ],
)
def test_switches(words, flag):
    assert parse(*words).flag is flag


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--count", "x"], "--count"),
        (["--count", "1.5"], "--count"),
        (["--rate", "fast"], "--rate"),
        (["--flag", "maybe"], "'maybe' is neither True nor False"),
        (["--kind", "c"], "--kind"),
        (["--cuont", "1"], "--cuont"),
        (["--co", "1"], "--co"),
        (["--count"], "--count"),
        (["stray"], "stray"),
    ],
)
def test_bad_flags_are_one_sentence(words, part):
    with pytest.raises(UserError) as error:
        parse(*words)
    assert part in str(error.value)
    assert str(error.value).endswith("see --help")
    assert "\n" not in str(error.value)


def test_help_names_every_flag_with_its_default():
    text = build_parser("Toy.", Toy).format_help()
    assert "100 % of a rate (default: 0.5)" in " ".join(text.split())
    assert all(f"--{field.name}" in text for field in fields(Toy))


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"count": "3"}, "'count' must be of type int, it is '3'"),
        ({"count": 3.0}, "'count'"),
        ({"count": True}, "'count'"),
        ({"flag": 1}, "'flag' must be of type bool"),
        ({"rate": "1"}, "'rate'"),
        ({"rate": False}, "'rate'"),
        ({"count": None}, "'count' must not be null"),
        ({"words": [1]}, "'words'"),
        ({"limit": [1]}, "'limit'"),
        ({"kind": "c"}, "must be one of a, b; it is 'c'"),
        ({"kind": {}}, "'kind'"),
    ],
)
def test_wrong_types_in_json_are_named(values, part):
    with pytest.raises(UserError) as error:
        make_settings(Toy, values)
    assert part in str(error.value)


def test_json_may_hold_whole_numbers_for_floats_and_one_value_for_several():
    assert make_settings(Toy, {"rate": 2, "words": "x", "limit": None}) == Toy(rate=2.0, words=("x",))


def test_unknown_key_suggests_the_close_one():
    check_keys({"count": 1, "lr": 0.1}, Toy, DeepSADSettings)
    with pytest.raises(UserError, match="unknown setting 'cuont'; did you mean 'count'"):
        check_keys({"cuont": 1}, Toy)
    with pytest.raises(UserError, match=r"unknown setting 'zzz'$"):
        check_keys({"zzz": 1}, Toy)


@pytest.mark.parametrize(
    "settings",
    [
        Toy(1, 0.25, True, ("ü",), 2, "b"),
        ExperimentSettings(normal_class=(3, 4), runs=2),
        DeepSADSettings(lr_milestone=()),
    ],
)
def test_settings_survive_json(settings):
    assert make_settings(type(settings), json.loads(json.dumps(asdict(settings)))) == settings


def test_settings_of_place_exist():
    names = {field.name for field in fields(ExperimentSettings)}
    assert names > PLACE


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"runs": 0}, "--runs"),
        ({"seed": -2}, "--seed"),
        ({"n_anomalies": -2}, "--n_anomalies"),
        ({"threshold_quantile": 0.0}, "--threshold_quantile"),
        ({"threshold_quantile": 1.1}, "--threshold_quantile"),
        ({"threshold_quantile": float("nan")}, "--threshold_quantile"),
        ({"easy_top_k": 0}, "--easy_top_k"),
        ({"known_outlier_class": 2}, "--known_outlier_class"),
        ({"n_known_outlier_classes": 0}, "can only be 1"),
        ({"name": ""}, "--name"),
        ({"xp_path": ""}, "--xp_path"),
        ({"name": "../x"}, "--name"),
        ({"name": ".."}, "--name"),
    ],
)
def test_options_out_of_range_name_their_flag(options, flag):
    check_options(ExperimentSettings())
    with pytest.raises(UserError, match=flag):
        check_options(ExperimentSettings(**options))


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"lr": 0.0}, "--lr"),
        ({"lr": float("nan")}, "--lr"),
        ({"ae_lr": -1.0}, "--ae_lr"),
        ({"eta": 0.0}, "--eta"),
        ({"batch_size": 1}, "--batch_size"),
        ({"ae_batch_size": 0}, "--ae_batch_size"),
        ({"n_epochs": -1}, "--n_epochs"),
        ({"weight_decay": -0.1}, "--weight_decay"),
        ({"test_every": -1}, "--test_every"),
        ({"lr_milestone": (-1,)}, "--lr_milestone"),
        ({"ae_lr_milestone": (-5,)}, "--ae_lr_milestone"),
    ],
)
def test_detector_settings_out_of_range_name_their_flag(options, flag):
    check_settings(DeepSADSettings())
    with pytest.raises(UserError, match=flag):
        check_settings(DeepSADSettings(**options))


def write_config(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ({"batchsize": 4}, ["unknown setting 'batchsize'", "did you mean 'batch_size'"]),
        ({"settings": {"eat": 2.0}}, ["unknown setting 'eat'", "'eta'"]),
        ({"lr": "0.1"}, ["'lr' must be of type float, it is '0.1'"]),
        ({"drop_last": 1}, ["'drop_last' must be of type bool"]),
        ({"seed": "a"}, ["'seed' must be of type int, it is 'a'"]),
        ({"detector": 5}, ["'detector' must be of type str, it is 5"]),
        ({"temperature": 0.5}, ["temperature belongs to --detector ssd"]),
        ({"split": "both"}, ["'split' must be one of own, crossfit"]),
        ([], ["--load_config", "must hold an object"]),
        ({"settings": 3}, ["--load_config", "must hold an object"]),
        ("{", ["config.json is not valid JSON"]),
    ],
)
def test_bad_config_is_refused(toy_set, tmp_path, value, parts):
    path = write_config(tmp_path / "config.json", value)
    refused(run_toy(toy_set, tmp_path / "run", load_config=path), "--load_config", path, *parts)
    assert not (tmp_path / "run").exists()


def test_missing_config_is_refused(toy_set, tmp_path):
    refused(
        run_toy(toy_set, tmp_path / "run", load_config=tmp_path / "gone.json"), "gone.json does not exist"
    )


def test_folder_as_config_is_refused(toy_set, tmp_path):
    refused(run_toy(toy_set, tmp_path / "run", load_config=tmp_path), "--load_config", tmp_path)


def test_flags_win_over_the_config(toy_set, tmp_path):
    config = {"n_epochs": 3, "batch_size": 5, "xp_path": "/nowhere", "overwrite": True}
    path = write_config(tmp_path / "config.json", config)
    outcome = run_toy(toy_set, tmp_path / "run", load_config=path, batch_size=None)
    assert outcome.code == 0, outcome.stderr
    settings = read_json(tmp_path / "run" / "config.json")["settings"]
    assert (settings["n_epochs"], settings["batch_size"], settings["overwrite"]) == (1, 5, False)


def test_config_of_a_run_repeats_it(finished, tmp_path):
    outcome = run_main(["--load_config", str(finished / "config.json"), "--xp_path", str(tmp_path / "again")])
    assert outcome.code == 0, outcome.stderr
    assert results(tmp_path / "again") == results(finished)


@pytest.mark.parametrize(
    "milestone",
    [
        [],
        pytest.param([0]),
    ],
)
def test_official_config_is_accepted(toy_set, tmp_path, milestone):
    path = write_config(tmp_path / "config.json", {**OFFICIAL, "ae_lr_milestone": milestone})
    chosen = {"dataset_name": "ucm_caption", "data_path": toy_set, "n_epochs": 1, "ae_n_epochs": 1}
    words = [str(word) for key, value in chosen.items() for word in (f"--{key}", value)]
    words += [
        "--user_dict",
        json.dumps(USER_DICT),
        "--xp_path",
        str(tmp_path / "run"),
        "--load_config",
        str(path),
    ]
    outcome = run_main(words)
    assert outcome.code == 0, outcome.stderr
    settings = read_json(tmp_path / "run" / "config.json")["settings"]
    assert (settings["ratio_pollution"], settings["ae_lr"], settings["normal_class"]) == (0.1, 1e-3, [0])
    assert settings["seed"] >= 0
    assert "--ratio_known_outlier 0.01 labels no anomaly at all" in outcome.log


def test_unknown_flag_is_refused(toy_set, tmp_path):
    refused(run_toy(toy_set, tmp_path / "run", batchsize=3), "--batchsize")
    assert not (tmp_path / "run").exists()
