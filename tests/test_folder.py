"""Any image folder in MVTec's format."""

import json
import shutil

import pytest
from PIL import Image
from toy import read_json, refused, results, run_toy, write_toy_folder

from kka.datasets import folder as module
from kka.datasets.folder import read_folder, read_kind
from kka.datasets.images import decode
from kka.datasets.task import Choice, read_task
from kka.errors import UserError

SPEC = module.SPEC


def run(root, folder, **flags):
    return run_toy(root, folder, dataset_name="folder", user_dict=None, **flags)


def test_kinds_of_anomaly_are_tested_and_never_trained_on(tmp_path):
    root = write_toy_folder(tmp_path, ("scratch", "dent"))
    train, test = read_folder(root)
    assert train.classes == ("good",) * 8
    assert train.targets == (0,) * 8
    assert test.classes == ("good",) * 4 + ("dent",) * 3 + ("scratch",) * 3
    assert test.targets == (0,) * 4 + (1,) * 6
    assert test.paths[4] == root / "test" / "dent" / "000.png"


def test_captions_are_one_or_several_for_each_file(tmp_path):
    root = write_toy_folder(tmp_path)
    captions = {"000.png": "one", "002.png": ["two", "drei: ü"]}
    (root / "train" / "good" / "captions.json").write_text(json.dumps(captions), encoding="utf-8-sig")
    train, _ = read_folder(root)
    assert train.captions[:4] == (("one",), (), ("two", "drei: ü"), ())


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[]", "must hold an object of file names and captions, it holds a list"),
        ("{", "is not valid JSON"),
        ('{"000.png": 3}', "'000.png' must have a caption or a list of captions, it has 3"),
        ('{"000.png": ["a", null]}', "it has ['a', None]"),
        ('{"gone.png": "a"}', "names 'gone.png', which is not an image in"),
        ('{"../test/good/000.png": "a"}', "which is not an image in"),
    ],
)
def test_malformed_captions_are_named(tmp_path, text, part):
    root = write_toy_folder(tmp_path)
    path = root / "train" / "good" / "captions.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_folder(root)
    assert str(path) in str(error.value)
    assert part in str(error.value)


@pytest.mark.parametrize("needed", ["train/good", "test/good"])
def test_missing_and_empty_folders_are_named(tmp_path, needed):
    root = write_toy_folder(tmp_path)
    for path in (root / needed).iterdir():
        path.unlink()
    with pytest.raises(UserError, match=f"{root / needed} holds no images"):
        read_folder(root)
    (root / needed).rmdir()
    with pytest.raises(UserError, match=f"has no folder {needed}; put images into"):
        read_folder(root)


@pytest.mark.parametrize("taken", ["test/scratch", "test/good"])
def test_test_images_are_not_trained_on(tmp_path, taken):
    root = write_toy_folder(tmp_path / "set", n_anomalies=2)
    shutil.copy(root / taken / "001.png", root / "0" / "renamed.png")
    outcome = run(root, tmp_path / "run")
    refused(outcome, root / "0" / "renamed.png", f"is a test image, {root / taken / '001.png'}")
    outcome = run(root, tmp_path / "run", anomaly_path=root / taken)
    refused(outcome, "is a test image", "give another --anomaly_path")


@pytest.mark.parametrize("name", ["a.HEIC", "a.npy", "a.avif", "a", "0/a.heic"])
def test_image_types_that_are_not_read_are_named(tmp_path, name):
    root = write_toy_folder(tmp_path, n_anomalies=2)
    path = root / ("train/good" if "/" not in name else "") / name
    path.touch()
    with pytest.raises(UserError, match=f"{path.parent} holds '{path.name}', whose type is not read"):
        read_task(SPEC, root, Choice())


@pytest.mark.parametrize("place", ["test", "test/scratch/more", "train/good/more"])
def test_images_where_none_are_read_are_named(tmp_path, place):
    root = write_toy_folder(tmp_path, ("scratch",))
    (root / place).mkdir(exist_ok=True)
    shutil.copy(root / "train" / "good" / "000.png", root / place / "new.png")
    with pytest.raises(UserError, match=rf"{root / place}.* move"):
        read_folder(root)


def test_hidden_folders_are_no_kinds_of_anomaly(tmp_path):
    root = write_toy_folder(tmp_path, ("scratch",))
    shutil.copytree(root / "test" / "scratch", root / "test" / ".thumbnails")
    assert set(read_folder(root)[1].classes) == {"good", "scratch"}


def test_other_image_types_are_read_and_side_files_are_passed_over(tmp_path):
    root = write_toy_folder(tmp_path)
    picture = Image.open(root / "train/good/000.png")
    for kind, suffix in (("jpeg", "JFIF"), ("jpeg", "jpe"), ("ppm", "pgm"), ("jpeg2000", "jp2")):
        picture.convert("L").save(root / "train/good" / f"x.{suffix}", kind)
    for name in ("Thumbs.db", ".DS_Store", "LICENSE", "notes.txt", "desktop.ini"):
        (root / "train/good" / name).write_text("x")
    train, _ = read_folder(root)
    assert [path.name for path in train.paths[8:]] == ["x.JFIF", "x.jp2", "x.jpe", "x.pgm"]
    assert decode(train.paths, "", 0, 32).good.all()


def test_kind_without_images_is_named(tmp_path):
    root = write_toy_folder(tmp_path)
    (root / "test" / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no images"):
        read_folder(root)
    (root / "test" / "empty" / "notes.txt").touch()
    with pytest.raises(UserError, match="empty holds no images"):
        read_kind(root / "test" / "empty", 1)


def test_generated_anomalies_are_optional(tmp_path):
    root = write_toy_folder(tmp_path / "plain")
    task = read_task(SPEC, root, Choice())
    assert (len(task.normals), len(task.generated), task.generated_index) == (8, 0, ())
    with pytest.raises(UserError, match="there is no folder"):
        read_task(SPEC, root, Choice(n_anomalies=2))
    root = write_toy_folder(tmp_path / "generated", n_anomalies=5)
    assert len(read_task(SPEC, root, Choice()).generated) == 5
    assert len(read_task(SPEC, root, Choice(n_anomalies=2)).generated) == 2
    assert len(read_task(SPEC, root, Choice(n_anomalies=0)).generated) == 0


def test_iterate_tests_on_good_and_generated_images(tmp_path):
    root = write_toy_folder(tmp_path, n_anomalies=5)
    task = read_task(SPEC, root, Choice(iterate=True))
    assert task.test.classes == ("good",) * 4 + ("0",) * 5
    assert task.test.targets == (0,) * 4 + (1,) * 5


def test_run_with_generated_anomalies(tmp_path):
    root = write_toy_folder(tmp_path / "set", n_anomalies=6)
    outcome = run(root, tmp_path / "run")
    assert outcome.code == 0, outcome.stderr
    values = results(tmp_path / "run")
    assert [row[1] for row in values["test_scores"]] == [0] * 4 + [1] * 3
    assert values["n_generated"] == 6
    rows = read_json(tmp_path / "run" / "d_samples.json") + read_json(tmp_path / "run" / "e_samples.json")
    assert sorted(row[0][0] for row in rows) == list(range(6))
    assert all(captions == [] for _, captions in rows)


def test_numbered_classes_do_not_exist_here(tmp_path):
    root = write_toy_folder(tmp_path / "set")
    refused(run(root, tmp_path / "run", normal_class=3), "--normal_class is for numbered class folders")
    assert not (tmp_path / "run").exists()
