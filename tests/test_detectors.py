"""Every detector through main.py: flags, presets, run folders, resume, models that are loaded again."""

from dataclasses import fields

import pytest
import safetensors.torch
import torch
from torchvision.models import get_model
from toy import read_json, refused, results, run_main, run_toy, snapshot

from kka.datasets import ucm_caption
from kka.datasets.images import content_digest, decode
from kka.datasets.task import Choice, parse_user_dict, read_task
from kka.detectors import DETECTORS, build_detector, detector_name
from kka.detectors.cmda import CMDASettings
from kka.detectors.deep_sad import DeepSADSettings
from kka.detectors.ssd import SSDSettings
from kka.experiment import fill_epochs, find_device
from kka.files import write_json
from kka.journal import Journal
from kka.run import load_detector
from kka.settings import _element_type, make_settings

NO_AUTOENCODER = {"ae_n_epochs": None, "ae_batch_size": None}
CONTRASTIVE = {**NO_AUTOENCODER, "preset": "cpu", "warmup": 0, "copies": 1}
BACKBONE = {**NO_AUTOENCODER, "preset": "cpu", "backbone_init": "random", "image_size": 48}
PATCHES = {"pretrain_embed_dimension": 32, "target_embed_dimension": 16, "dsc_hidden": 8, "feature_std": 0.1}
EPISODES = {"base_epochs": 1, "inner_steps": 2, "query_batches": 2, "n_clusters": 3, "memory": 1}
# The flags of a quick run of each detector; a new one needs a line here and in LENGTH.
QUICK = {
    "deep_sad": {},
    "ssd": CONTRASTIVE,
    "cmda": {**CONTRASTIVE, "text_width": 8},
    "simplenet": {**BACKBONE, **PATCHES},
    "recontrast": {**BACKBONE, "n_epochs": None, "width": 0.1},
    "frozen": {**BACKBONE, "n_epochs": None, "batch_size": None},
    "devnet": {**BACKBONE, "steps_per_epoch": 2, "views": 2},
    "dra": {**BACKBONE, "steps_per_epoch": 2, "views": 2, "residual_stride": 1},
    "ahl": {**BACKBONE, **EPISODES, "steps_per_epoch": 2, "views": 2, "residual_stride": 1},
}
OTHERS = tuple(name for name in QUICK if name != "deep_sad")
# The flag that says how long is trained, and its value for two epochs.
LENGTH = {**dict.fromkeys(QUICK, ("n_epochs", 2)), "recontrast": ("n_iterations", 4), "frozen": None}
# How the group of its flags begins in --help.
TITLES = (
    "Deep SAD's", "SSD's", "CMDA's", "SimpleNet's", "ReContrast's", "Frozen features'", "DevNet's", "DRA's",
    "AHL's",
)  # fmt: skip


def two_epochs(name):
    return dict([LENGTH[name]]) if LENGTH[name] else {}


def no_training(name):
    return dict.fromkeys(two_epochs(name), 0)


def quick(root, folder, name, **flags):
    return run_toy(root, folder, **{"detector": name, **QUICK[name], **flags})


def ran(outcome):
    assert outcome.code == 0, outcome.stderr
    return outcome


@pytest.fixture(scope="module")
def runs(toy_set, tmp_path_factory):
    """The folder of a finished run of each detector, two epochs, with anomalies."""
    folder = tmp_path_factory.mktemp("runs")
    for name in QUICK:
        ran(quick(toy_set, folder / name, name, **two_epochs(name)))
    return folder


def test_every_detector_is_tested_here():
    assert set(QUICK) == set(DETECTORS)


@pytest.mark.parametrize("name", QUICK)
def test_run_folder_is_complete_and_found_again(toy_set, runs, name):
    folder, values = runs / name, results(runs / name)
    names = {path.name for path in folder.iterdir()} - {"ae_results.json"}
    assert names == {
        "config.json", "log.txt", "metrics.jsonl", "results.json", "epoch_results.json", "d_samples.json",
        "e_samples.json", "model.safetensors", "model.json", "run.lock",
    }  # fmt: skip
    assert len(values["test_scores"]) == 12
    assert values["n_hard"] + values["n_easy"] == values["n_generated"] == 8
    assert read_json(folder / "model.json")["detector"] == name
    config = read_json(folder / "config.json")
    assert (config["settings"]["detector"], config["identity"]["detector"]) == (name, name)
    assert two_epochs(name).items() <= config["settings"].items()
    losses = read_json(folder / "epoch_results.json")["train_losses"]
    assert losses
    before = snapshot(folder)
    assert "is finished" in ran(quick(toy_set, folder, name, **two_epochs(name))).log
    assert snapshot(folder) == before


@pytest.mark.parametrize("name", QUICK)
def test_loaded_detector_gives_the_scores_of_its_run(toy_set, runs, name):
    detector = load_detector(runs / name, torch.device("cpu"))
    assert type(detector) is DETECTORS[name][1]
    user_dict = parse_user_dict('{"0": [1, 0], "1": [1, 2, 3]}')
    test = read_task(ucm_caption.SPEC, toy_set, Choice(user_dict=user_dict)).test
    images = decode(test.paths, content_digest(test.paths), 0, detector.image_size).resized
    expected = [row[2] for row in results(runs / name)["test_scores"]]
    assert detector.score(images).tolist() == pytest.approx(expected, rel=1e-5)
    features = detector.embed(images)
    assert (len(features), features.ndim, features.isfinite().all()) == (12, 2, True)


@pytest.mark.parametrize("name", OTHERS)
def test_interrupted_run_continues_to_the_same_numbers(toy_set, runs, name, tmp_path, monkeypatch):
    def record_and_stop(self, phase, epoch, **values):
        record(self, phase, epoch, **values)
        if epoch == last:
            raise KeyboardInterrupt

    last = 1 if LENGTH[name] else 0
    record = Journal.record
    monkeypatch.setattr(Journal, "record", record_and_stop)
    flags = {**two_epochs(name), "checkpoint_every": 0}
    assert quick(toy_set, tmp_path / "run", name, **flags).code == 130
    monkeypatch.setattr(Journal, "record", record)
    log = ran(quick(toy_set, tmp_path / "run", name, **flags)).log
    assert ("continuing after epoch 1 of train" in log) == (last == 1)
    assert results(tmp_path / "run") == results(runs / name)
    for file in ("model.safetensors", "metrics.jsonl", "d_samples.json"):
        assert (tmp_path / "run" / file).read_bytes() == (runs / name / file).read_bytes()


@pytest.mark.parametrize("name", OTHERS)
def test_crossfit_and_no_anomalies_work(toy_set, runs, name, tmp_path):
    ran(quick(toy_set, tmp_path / "crossfit", name, split="crossfit", **two_epochs(name)))
    values = results(tmp_path / "crossfit")
    assert values["test_scores"] == results(runs / name)["test_scores"]
    assert values["n_hard"] + values["n_easy"] == 8
    ran(quick(toy_set, tmp_path / "none", name, n_anomalies=0, **two_epochs(name)))
    assert results(tmp_path / "none")["n_generated"] == 0


@pytest.mark.parametrize("name", OTHERS)
def test_model_that_is_loaded_scores_as_before(toy_set, runs, name, tmp_path):
    ran(quick(toy_set, tmp_path / "run", name, load_model=runs / name, **no_training(name)))
    assert results(tmp_path / "run")["test_scores"] == results(runs / name)["test_scores"]


@pytest.mark.parametrize("name", OTHERS)
def test_model_of_another_detector_is_refused(toy_set, runs, name, tmp_path):
    network = "--backbone squeezenet1_0" if "backbone_init" in QUICK[name] else "--arch cifar10_LeNet"
    parts = ["--load_model", f"holds another network than --detector {name} {network}"]
    refused(quick(toy_set, tmp_path / "run", name, load_model=runs / "deep_sad"), *parts)
    parts = ["--load_model", "holds another network than --detector deep_sad --net_name cifar10_LeNet"]
    refused(quick(toy_set, tmp_path / "run", "deep_sad", load_model=runs / name), *parts)
    assert not (tmp_path / "run").exists()


def test_weights_of_a_backbone_count_by_content(toy_set, tmp_path):
    flags = {"backbone_init": None, "backbone_weights": tmp_path / "weights.pth"}
    refused(quick(toy_set, tmp_path / "run", "frozen", **flags), "weights.pth does not exist")
    torch.save(get_model("squeezenet1_0").state_dict(), flags["backbone_weights"])
    ran(quick(toy_set, tmp_path / "run", "frozen", **flags))
    other = tmp_path / "elsewhere" / "other.pth"
    other.parent.mkdir()
    (tmp_path / "weights.pth").rename(other)
    again = quick(toy_set, tmp_path / "run", "frozen", **{**flags, "backbone_weights": other})
    assert "is finished" in ran(again).log
    assert load_detector(tmp_path / "run", torch.device("cpu")).image_size == 48  # its own copy of them
    torch.save(get_model("squeezenet1_0").state_dict(), other)
    outcome = quick(toy_set, tmp_path / "run", "frozen", **{**flags, "backbone_weights": other})
    refused(outcome, "other settings", "backbone_weights")


def test_config_of_a_run_repeats_it_with_its_detector(runs, tmp_path):
    config = str(runs / "ssd" / "config.json")
    ran(run_main(["--load_config", config, "--xp_path", str(tmp_path / "again")]))
    assert results(tmp_path / "again") == results(runs / "ssd")
    outcome = run_main(["--load_config", config, "--detector", "deep_sad"])
    refused(outcome, f"--load_config {config} is for --detector ssd, not for deep_sad")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--detector", "ssd", "--net_name", "x"], "--net_name belongs to --detector deep_sad, not to ssd"),
        (["--detector=ssd", "--ae_lr=1"], "--ae_lr belongs to --detector deep_sad, not to ssd"),
        (["--copies", "3"], "--copies belongs to --detector ssd or cmda, not to deep_sad"),
        (["--text_dim", "3", "--detector", "ssd"], "--text_dim belongs to --detector cmda, not to ssd"),
        (["--detector", "ssd", "--copeis", "3"], "unrecognized arguments: --copeis 3; see --help"),
        (["--detector", "sdd"], "argument --detector: invalid choice: 'sdd'"),
        (["--detector"], "argument --detector: expected one argument"),
        (["--detector", "ssd", "--preset", "large"], "ssd has no --preset 'large'; it has small, cpu"),
        (["--preset", "small"], "--detector deep_sad has no --preset 'small'; it has none"),
        (["--detector", "ssd", "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--detector", "ssd", "--clusters", "0"], "--clusters must be at least 1"),
        (["--detector", "ssd", "--arch", "vgg"], "argument --arch: invalid choice: 'vgg'"),
    ],
)  # fmt: skip
def test_flags_that_do_not_fit_are_refused(toy_set, tmp_path, words, part):
    outcome = run_main([*words, "--dataset_name", "ucm_caption", "--data_path", str(toy_set)])
    refused(outcome, part)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"detector": "ssd", "net_name": "x"}, "config.json: net_name belongs to --detector deep_sad"),
        ({"clusters": 2}, "config.json: clusters belongs to --detector ssd or cmda, not to deep_sad"),
        ({"detector": "sdd"}, "setting 'detector' must be one of"),
        ({"detector": 3}, "setting 'detector' must be of type str"),
        ({"detector": "ssd", "preset": "large"}, "no --preset 'large'"),
        ({"detector": "ssd", "clusters": "2"}, "'clusters' must be of type int"),
    ],
)  # fmt: skip
def test_values_of_a_config_that_do_not_fit_are_refused(tmp_path, config, part):
    write_json(tmp_path / "config.json", config)
    refused(run_main(["--load_config", str(tmp_path / "config.json")]), part)


def given(monkeypatch, *words):
    """The detector's settings that these words mean."""
    from kka.command_line import parse_command
    from kka.options import ExperimentSettings

    monkeypatch.setattr("sys.argv", ["main.py", *words])
    return parse_command("", ExperimentSettings)[1]


def test_shared_flags_have_the_default_of_each_detector(monkeypatch):
    assert given(monkeypatch) == DeepSADSettings()
    assert given(monkeypatch, "--detector", "ssd") == SSDSettings()
    assert given(monkeypatch, "--detector", "cmda") == CMDASettings()
    words = ("--lr", "0.25", "--n_epochs", "3", "--batch_size", "4")
    for name in ("deep_sad", "ssd", "cmda"):
        settings = given(monkeypatch, "--detector", name, *words)
        assert (settings.lr, settings.n_epochs, settings.batch_size) == (0.25, 3, 4)


def test_flags_win_over_presets_and_presets_over_the_config(monkeypatch, tmp_path):
    preset = SSDSettings.PRESETS["small"]
    assert given(monkeypatch, "--detector", "ssd", "--preset", "small") == SSDSettings(**preset)
    settings = given(monkeypatch, "--preset", "small", "--detector", "ssd", "--batch_size", "7")
    assert (settings.batch_size, settings.arch) == (7, "resnet18")
    config = {"detector": "ssd", "arch": "resnet34", "copies": 3}
    write_json(tmp_path / "config.json", config)
    path = str(tmp_path / "config.json")
    settings = given(monkeypatch, "--load_config", path, "--preset", "small")
    assert (settings.arch, settings.copies) == ("resnet18", 3)
    write_json(tmp_path / "config.json", {**config, "preset": "small"})
    settings = given(monkeypatch, "--load_config", path)
    assert (settings.arch, settings.batch_size) == ("resnet34", 128)


@pytest.mark.parametrize("name", QUICK)
def test_presets_make_valid_settings(name):
    settings_class = DETECTORS[name][0]
    for values in getattr(settings_class, "PRESETS", {}).values():
        settings = fill_epochs(make_settings(settings_class, values), ucm_caption.SPEC)
        assert detector_name(settings) == name
        if hasattr(settings, "n_epochs"):
            assert settings.n_epochs == (values.get("n_epochs", settings_class().n_epochs) or 300)
        assert build_detector(settings).image_size >= 28


def test_shared_flags_have_one_meaning_of_their_type():
    """A flag must not be a number for one detector and a word for another."""
    kinds = {}
    for settings_class, _ in DETECTORS.values():
        for field in fields(settings_class):
            kind = _element_type(field.type)
            assert kinds.setdefault(field.name, kind) == kind


@pytest.mark.parametrize("words", [["--help"], ["--detector", "cmda", "-h"]])
def test_help_lists_the_flags_of_every_detector_in_groups(words, capsys):
    assert run_main(words).code == 0
    text = capsys.readouterr().out
    groups = [text.index(f"\n{title} options") for title in TITLES]
    assert len(set(groups)) == len(DETECTORS)
    for name, (settings_class, _) in DETECTORS.items():
        assert f"{name}" in text
        start = groups[list(DETECTORS).index(name)]
        end = min([place for place in groups if place > start], default=len(text))
        assert all(f"--{field.name} " in text[start:end] for field in fields(settings_class))


def test_default_folder_is_named_by_the_detector(toy_set, checkout):
    ran(quick(toy_set, None, "ssd", n_epochs=0))
    (folder,) = (checkout / "log" / "ucm_caption").iterdir()
    assert folder.name.startswith("ssd_1_anomalies8_seed0_")


def test_collapse_names_the_detector(toy_set, runs, tmp_path):
    weights = safetensors.torch.load_file(runs / "ssd" / "model.safetensors")
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    safetensors.torch.save_file(zeros, tmp_path / "zeros.safetensors")
    outcome = quick(
        toy_set, tmp_path / "run", "ssd", n_epochs=0, n_anomalies=0, load_model=tmp_path / "zeros.safetensors"
    )
    refused(outcome, "ssd collapsed: all images have the same score", code=1)


def test_float32_on_a_gpu_is_neither_shortened_nor_added_up_in_any_order(monkeypatch):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    monkeypatch.setattr(cudnn, "deterministic", False)
    find_device("cuda", strict=False)
    assert (cudnn.allow_tf32, cudnn.deterministic) == (False, True)
