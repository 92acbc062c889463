"""--each_class: one experiment for each normal class, trained together where their sets have one shape."""

import json
import shutil

import pytest
from PIL import Image
from test_vmap_seeds import flags
from toy import USER_DICT, read_json, refused, results, run_toy, write_toy_class, write_toy_folder

from kka.datasets import get_spec
from kka.errors import UserError
from kka.report.sources import read_group
from kka.trained import find_run


@pytest.fixture(scope="module")
def classes(toy_set, tmp_path_factory):
    """Folder and outcome of two seeds of each of three classes, four of these runs at once."""
    folder = tmp_path_factory.mktemp("classes") / "runs"
    return folder, run_toy(toy_set, folder, **flags(runs=2, vmap_seeds=4), each_class=True)


def test_each_class_is_an_experiment_of_its_own(toy_set, classes, tmp_path):
    folder, outcome = classes
    assert outcome.code == 0, outcome.stderr
    assert sorted(path.name for path in folder.iterdir()) == [
        "class_1", "class_2", "class_3", "summary.json",
    ]  # fmt: skip
    words = flags(seed=1, user_dict=json.dumps({"0": [2, 0], "1": USER_DICT["1"]}))
    assert run_toy(toy_set, tmp_path / "alone", **words).code == 0
    one, other = tmp_path / "alone", folder / "class_2" / "seed_1"
    first, second = (read_json(each / "config.json")["identity"] for each in (one, other))
    assert second == first | {"normal_class": [2]}
    scores = [[row[2] for row in results(each).pop("test_scores")] for each in (one, other)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-2)
    summary = read_json(folder / "summary.json")
    assert summary["normal_classes"] == ["1", "1", "2", "2", "3", "3"]
    for k in (0, 2, 4):
        own = read_json(folder / f"class_{k // 2 + 1}" / "summary.json")
        assert own["test_auc"] == summary["test_auc"][k : k + 2]
    assert "3 normal classes, 6 runs" in outcome.log


def test_runs_of_each_class_are_found_finished_one_by_one(toy_set, classes):
    outcome = run_toy(toy_set, classes[0], **flags(runs=2), each_class=True, normal_class=[3])
    assert outcome.code == 0, outcome.stderr
    assert outcome.log.count("is finished") == 2


def test_report_and_predict_name_the_folders_of_the_classes(classes):
    with pytest.raises(UserError, match=r"class_1 \S*class_2 \S*class_3$"):
        read_group(classes[0])
    with pytest.raises(UserError, match="class_1, class_2, class_3; give one"):
        find_run(classes[0])


def test_classes_of_other_sizes_are_trained_apart(toy_set, tmp_path):
    root = shutil.copytree(toy_set, tmp_path / "data")
    shutil.rmtree(root / "2")
    write_toy_class(root / "2", get_spec("ucm_caption"), {"train": 12, "test": 4}, bright=True)
    outcome = run_toy(root, tmp_path / "runs", **flags(vmap_seeds=3), each_class=True)
    assert outcome.code == 0, outcome.stderr
    assert len(read_json(tmp_path / "runs" / "summary.json")["test_auc"]) == 3


def test_classes_of_smaller_images_are_trained_apart(toy_set, tmp_path):
    root = shutil.copytree(toy_set, tmp_path / "data")
    for path in (root / "2").glob("*.png"):
        with Image.open(path) as picture:
            picture.resize((24, 24)).save(path)
    outcome = run_toy(root, tmp_path / "runs", **flags(vmap_seeds=3), each_class=True)
    assert outcome.code == 0, outcome.stderr
    words = flags(user_dict=json.dumps({"0": [2, 0], "1": USER_DICT["1"]}))
    assert run_toy(root, tmp_path / "alone", **words).code == 0
    assert results(tmp_path / "runs" / "class_2") == results(tmp_path / "alone")


def test_each_class_of_a_data_set_without_classes_is_refused(tmp_path):
    root = write_toy_folder(tmp_path / "data")
    more = {"dataset_name": "folder", "user_dict": None, "each_class": True}
    refused(run_toy(root, tmp_path / "run", **more), "--each_class", "only `good`")


def test_the_folder_of_a_single_run_is_no_folder_of_classes(toy_set, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    refused(run_toy(toy_set, folder, each_class=True), folder, "single run", "--each_class")
