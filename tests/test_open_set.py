"""MVTec's format by class, and real anomalies that are known in training."""

import pytest
from toy import read_json, refused, results, run_main, toy_flags, write_toy_folder

from kka.datasets import mvtec
from kka.datasets.task import Choice, read_task
from kka.errors import UserError
from kka.experiment import choose_task
from kka.options import ExperimentSettings

KINDS = ("bent", "crack")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two classes, one of them with two kinds of three anomalies each and a folder 0."""
    root = tmp_path_factory.mktemp("mvtec")
    write_toy_folder(root / "screw", KINDS, n_anomalies=4)
    write_toy_folder(root / "nut")
    return root


def command(root, folder, **flags):
    own = {"dataset_name": "mvtec", "normal_class": "screw", "user_dict": None, "pretrain": False}
    return toy_flags(root, folder, **{**own, **flags})


def task(root, seed=0, **choice):
    return read_task(mvtec.SPEC, root, Choice(category=("screw",), n_anomalies=0, seed=seed, **choice))


def test_without_known_anomalies_all_are_tested(root):
    whole = task(root)
    assert (len(whole.normals), len(whole.known), whole.test.targets.count(1)) == (8, 0, 6)
    assert {path.parents[2].name for path in whole.test.paths} == {"screw"}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_general_setting_takes_any_kind_out_of_the_test_set(root, seed):
    whole, part = task(root), task(root, n_known=4, seed=seed)
    assert set(part.known.targets) == {1}
    assert len(part.known) == len(set(part.known.paths)) == 4
    assert not set(part.known.paths) & set(part.test.paths)
    assert set(part.known.paths) | set(part.test.paths) == set(whole.test.paths)
    assert part.test.targets.count(0) == 4
    assert set(part.known.classes) == set(KINDS)  # 4 of 3 + 3


def test_seed_decides_which_are_known(root):
    drawn = [task(root, n_known=2, seed=seed).known.paths for seed in (0, 0, *range(1, 8))]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 2


def test_hard_setting_tests_unseen_kinds_only(root):
    part = task(root, n_known=2, known_kind="crack")
    assert part.known.classes == ("crack", "crack")
    assert set(part.test.classes) == {"good", "bent"}
    assert part.test.targets.count(1) == 3


def test_generated_images_are_never_taken_as_known(root):
    choice = Choice(category=("screw",), iterate=True, n_known=1)
    with pytest.raises(Exception, match="only 0 anomalies"):
        read_task(mvtec.SPEC, root, choice)


def test_known_anomalies_are_trained_on_as_labelled_and_resume_by_content(root, tmp_path):
    outcome = run_main(command(root, tmp_path / "run", n_anomaly=2, split="crossfit"))
    assert outcome.code == 0, outcome.stderr
    assert "8 normals, 4 generated and 2 known anomalies; 6 labelled anomalies" in outcome.log
    values = results(tmp_path / "run")
    assert len(values["test_scores"]) == 8
    assert values["n_hard"] + values["n_easy"] == values["n_generated"] == 4
    assert len(read_json(tmp_path / "run" / "config.json")["identity"]["data"]) > 0
    other = run_main(command(root, tmp_path / "run", n_anomaly=2, split="crossfit", know_class="bent"))
    refused(other, "other settings", "know_class")


def test_several_seeds_know_other_anomalies(root, tmp_path):
    outcome = run_main(command(root, tmp_path / "runs", n_anomaly=1, runs=3, n_anomalies=0))
    assert outcome.code == 0, outcome.stderr
    assert len(read_json(tmp_path / "runs" / "summary.json")["test_auc"]) == 3


def test_numbered_data_sets_have_known_anomalies_too(toy_set, tmp_path):
    outcome = run_main(toy_flags(toy_set, tmp_path / "run", n_anomaly=3, know_class="2", n_anomalies=0))
    assert outcome.code == 0, outcome.stderr
    assert len(results(tmp_path / "run")["test_scores"]) == 8  # 4 normals, 4 of class 3


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (
            {"normal_class": None},
            ["needs one --normal_class", "nut, screw", "--dataset_name folder --data_path", "/nut)"],
        ),
        ({"normal_class": "bolt"}, ["has no class 'bolt'", "nut, screw"]),
        ({"normal_class": ["screw", "nut"]}, ["needs one --normal_class"]),
        ({"n_anomaly": 7}, ["--n_anomaly 7", "screw has only 6 anomalies; give at most 5"]),
        ({"n_anomaly": 6}, ["--n_anomaly 6 leaves no anomaly in the test set of", "screw"]),
        (
            {"n_anomaly": 4, "know_class": "crack"},
            ["screw has only 3 anomalies of kind crack; give at most 3"],
        ),
        ({"n_anomaly": 1, "know_class": "scratch"}, ["--know_class 'scratch'", "bent, crack"]),
        ({"know_class": "crack"}, ["--know_class needs --n_anomaly"]),
        ({"n_anomaly": -1}, ["--n_anomaly must not be negative"]),
    ],
)
def test_bad_protocols_are_one_sentence(root, tmp_path, flags, parts):
    refused(run_main(command(root, tmp_path / "run", **flags)), *parts)


def test_class_names_and_empty_folders_are_refused(root, toy_set, tmp_path):
    refused(run_main(toy_flags(toy_set, tmp_path / "run", normal_class="cat")), "'cat'", "are numbers")
    refused(run_main(command(root / "screw", tmp_path / "run")), "holds no classes of MVTec AD")


def test_numbers_name_classes_of_mvtec_too(tmp_path):
    write_toy_folder(tmp_path / "7")
    settings = ExperimentSettings(dataset_name="mvtec", normal_class=(7,), n_anomalies=0)
    assert len(choose_task(settings, mvtec.SPEC, tmp_path).normals) == 8


def test_the_only_kind_cannot_be_known(tmp_path):
    write_toy_folder(tmp_path / "nut", ("bent",))
    choice = Choice(category=("nut",), n_anomalies=0, n_known=1, known_kind="bent")
    with pytest.raises(UserError, match=r"--know_class 'bent' leaves no anomaly in the test set of .*nut"):
        read_task(mvtec.SPEC, tmp_path, choice)
