"""`prepare` on tiny archives of the three original formats."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from originals import (
    edit_ucm,
    interrupt,
    make_cifar,
    make_flowers,
    make_texts,
    make_ucm,
    no_check,
    picture,
    run_until,
    tree,
    trust_cifar,
)
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR100

import kka.prepare
from kka.archives import load_pickle
from kka.datasets import cifar100, flower, get_spec, sources, ucm_caption
from kka.datasets.layout import read_class_folder
from kka.errors import UserError
from kka.prepare import PARTIAL, photo_caption, prepare, shuffled_split


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    monkeypatch.setattr("kka.files.os.fsync", lambda descriptor: None)


# CIFAR-100 --------------------------------------------------------------------------------------------------


def test_cifar_becomes_class_folders(tmp_path, monkeypatch):
    archive = make_cifar(tmp_path / "in")
    trust_cifar(monkeypatch, archive)
    out = tmp_path / "out dir \u00e9"
    prepare("cifar100", out, archive)
    assert sorted(path.name for path in out.iterdir()) == ["1", "100", "25", "classes.json", "prepared.json"]
    train = read_class_folder(out / "100", "train", 1, cifar100.SPEC)
    assert [path.name for path in train.paths] == ["image_00001.png", "image_00004.png", "image_00007.png"]
    assert train.captions == (("a photo of an apple",),) * 3
    test = read_class_folder(out / "25", "test", 0, cifar100.SPEC)
    assert len(test) == 2
    assert test.captions[0] == ("a photo of a couch",)
    assert json.loads((out / "classes.json").read_text())["100"] == "apple"
    record = json.loads((out / "prepared.json").read_text())
    assert record["counts"] == {"classes": 3, "train": 9, "test": 6}
    assert set(record["sources"]) == {"cifar-100-python.tar.gz", "train", "test", "meta"}


def test_cifar_pixels_are_rgb(tmp_path):
    archive = make_cifar(tmp_path / "in")
    no_check("cifar100", tmp_path / "out", archive)
    row = np.random.default_rng(0).integers(256, size=(9, 3072), dtype=np.uint8)[1]  # first aquarium fish
    with Image.open(tmp_path / "out" / "1" / "image_00002.png") as image:
        np.testing.assert_array_equal(np.asarray(image), row.reshape(3, 32, 32).transpose(1, 2, 0))


def test_folder_and_archive_give_the_same_images(tmp_path):
    archive = make_cifar(tmp_path / "in")
    no_check("cifar100", tmp_path / "a", archive)
    no_check("cifar100", tmp_path / "b", archive.parent / "cifar-100-python")
    a, b = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert {name: a[name] for name in a if name != "prepared.json"} == {
        name: b[name] for name in b if name != "prepared.json"
    }


def test_pickle_is_opened_only_after_its_md5_matched(tmp_path, monkeypatch):
    archive = make_cifar(tmp_path / "in")
    trust_cifar(monkeypatch, archive)
    monkeypatch.setattr(CIFAR100, "test_list", [["test", "0" * 32]])
    monkeypatch.setattr("kka.archives.load_pickle", lambda path: pytest.fail("opened"))
    with pytest.raises(UserError, match=r"test has MD5 .* the original has 0{32}"):
        prepare("cifar100", tmp_path / "out", archive.parent / "cifar-100-python")


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("content", [pickle.dumps({"data": Evil()}), b"", b"<html>", pickle.dumps([1])])
def test_other_pickles_are_refused(tmp_path, capsys, content):
    (tmp_path / "train").write_bytes(content)
    with pytest.raises(UserError, match="get the original"):
        load_pickle(tmp_path / "train")
    assert "executed" not in capsys.readouterr().out


def test_captions_use_the_right_article():
    assert photo_caption("oak_tree") == "a photo of an oak tree"
    assert photo_caption("couch") == "a photo of a couch"


# Oxford-102 -------------------------------------------------------------------------------------------------


def test_split_has_the_counts_of_the_paper():
    train, test = shuffled_split(range(1, 68), kka.prepare.SHARE["flower"], 0, 57)
    assert (len(train), len(test)) == (51, 16)
    assert sorted(train + test) == list(range(1, 68))
    assert len(shuffled_split(range(41), kka.prepare.SHARE["flower"], 0, 26)[0]) == 31
    assert len(shuffled_split(range(100), kka.prepare.SHARE["ucm_caption"], 0, 20)[0]) == 79
    assert shuffled_split(range(67), 0.7612, 1, 57) != shuffled_split(range(67), 0.7612, 0, 57)


def test_flowers_with_captions(tmp_path):
    source, texts, out = make_flowers(tmp_path / "in"), make_texts(tmp_path / "texts"), tmp_path / "out"
    no_check("flower", out, source, captions=texts)
    train = read_class_folder(out / "57", "train", 0, flower.SPEC)
    assert len(train) == 51
    assert len(read_class_folder(out / "26", "train", 0, flower.SPEC)) == 31
    for path, captions in zip(train.paths, train.captions, strict=True):
        number = int(path.stem.removeprefix("image_"))
        assert captions == tuple(f"flower {number}, line {line}, caf\u00e9" for line in range(10))
        assert path.read_bytes() == picture("jpeg", number)
    assert json.loads((out / "classes.json").read_text())["57"] == "gaura"


def test_captions_are_added_later_without_the_images(tmp_path, monkeypatch, capsys):
    source, texts = make_flowers(tmp_path / "in"), make_texts(tmp_path / "texts")
    no_check("flower", tmp_path / "at once", source, captions=texts)
    capsys.readouterr()
    no_check("flower", tmp_path / "later", source / "102flowers.tgz")
    assert "cvpr2016_flowers.tar.gz" in capsys.readouterr().err
    assert read_class_folder(tmp_path / "later" / "57", "test", 0, flower.SPEC).captions == ((),) * 16
    interrupt(monkeypatch, after=0)  # no image is written again
    shutil.rmtree(source)
    no_check("flower", tmp_path / "later", None, captions=texts)
    assert tree(tmp_path / "later") == tree(tmp_path / "at once")


def test_captions_in_the_source_are_found(tmp_path):
    source = make_flowers(tmp_path / "in")
    make_texts(source)
    no_check("flower", tmp_path / "out", source)
    assert len(read_class_folder(tmp_path / "out" / "102", "train", 1, flower.SPEC).captions[0]) == 10


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "the captions lack image_00003.txt"),
        (lambda file: file.write_text("one\ntwo\n"), "image_00003.txt holds 2 captions, expected 10"),
    ],
)
def test_incomplete_captions_add_nothing(tmp_path, damage, message):
    source, out = make_flowers(tmp_path / "in"), tmp_path / "out"
    no_check("flower", out, source)
    before = tree(out)
    make_texts(tmp_path / "texts")
    folder = tmp_path / "texts" / "cvpr2016_flowers"
    damage(folder / "text_c10" / "class_00026" / "image_00003.txt")
    with pytest.raises(UserError, match=message):
        no_check("flower", out, None, captions=folder)
    assert tree(out) == before


def test_missing_flower_files_are_named(tmp_path):
    source = make_flowers(tmp_path / "in")
    savemat(source / "imagelabels.mat", {"labels": np.full((1, 200), 3)})
    with pytest.raises(UserError, match=r"image_00113.jpg does not exist"):
        no_check("flower", tmp_path / "a", source)
    (source / "imagelabels.mat").write_text("<html>")
    with pytest.raises(UserError, match="holds no flower labels"):
        no_check("flower", tmp_path / "b", source)
    (source / "imagelabels.mat").unlink()
    with pytest.raises(UserError, match=r"there is no imagelabels.mat"):
        no_check("flower", tmp_path / "c", source)


# UCM-Caption ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_ucm_becomes_class_folders(tmp_path, form):
    source, out = make_ucm(tmp_path / "in" / "UCM_captions", "images"), tmp_path / "out"
    if form == "zip":
        source = Path(shutil.make_archive(str(tmp_path / "ucm"), "zip", tmp_path / "in"))
    no_check("ucm_caption", out, source)
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["1", "20", "21"]
    tennis = read_class_folder(out / "21", "train", 0, ucm_caption.SPEC)
    assert len(tennis) == 4
    number = int(tennis.paths[0].stem.removeprefix("image_"))
    assert 2001 <= number <= 2005
    assert tennis.captions[0] == tuple(f"Image {number}, sentence {k} ." for k in range(5))
    assert tennis.paths[0].read_bytes() == picture("tiff", number)
    assert json.loads((out / "classes.json").read_text())["20"] == "storagetanks"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sentences": [{"raw": "one"}]}, r"3.tif has 1 sentences, expected 5"),
        ({"sentences": None}, "image 2 lacks"),
        ({"filename": "../../3.tif"}, "image 2 is '../../3.tif'"),
        ({"filename": "2101.tif"}, "image 2 is '2101.tif'"),
        ({"filename": "1.tif"}, "image 2 is '1.tif', expected each of 1..2100 at most once"),
        ({"filename": "77.tif"}, "lists '77.tif', but the folder of images beside it lacks it"),
    ],
)
def test_bad_entries_of_ucm_are_named(tmp_path, changes, message):
    source = make_ucm(tmp_path / "in")
    edit_ucm(source, **changes)
    with pytest.raises(UserError, match=message):
        no_check("ucm_caption", tmp_path / "out", source)


def test_incomplete_ucm_is_refused_unless_meant(tmp_path):
    with pytest.raises(UserError, match="15 of 2100 images"):
        prepare("ucm_caption", tmp_path / "out", make_ucm(tmp_path / "in"))


def test_rar_is_explained(tmp_path):
    source = make_ucm(tmp_path / "in")
    shutil.rmtree(source / "imgs")
    (source / "imgs.rar").write_bytes(b"Rar!\x1a\x07\x00")
    with pytest.raises(UserError, match=r"imgs.rar is a rar archive.*unpack it"):
        no_check("ucm_caption", tmp_path / "out", source)
    with pytest.raises(UserError, match=r"imgs.rar is a rar archive.*unpack it"):
        no_check("ucm_caption", tmp_path / "out", source / "imgs.rar")


# Interruptions and the output folder ------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 8, 14])
def test_interrupted_run_continues_to_the_same_files(tmp_path, monkeypatch, after):
    archive = make_cifar(tmp_path / "in")
    no_check("cifar100", tmp_path / "whole", archive)
    out = tmp_path / "cut"
    run_until(monkeypatch, after, "cifar100", out, archive)
    assert not (out / "prepared.json").exists()
    (out / ".classes.json.x.tmp").write_text("left by a kill")
    done = {path: path.stat().st_mtime_ns for path in out.glob("*/image.json")}
    no_check("cifar100", out, archive)
    assert tree(out) == tree(tmp_path / "whole")
    assert done == {path: path.stat().st_mtime_ns for path in done}


def test_finished_run_does_nothing(tmp_path, monkeypatch, capsys):
    source, out = make_ucm(tmp_path / "in"), tmp_path / "out"
    no_check("ucm_caption", out, source)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    prepare("ucm_caption", out)
    assert "already holds UCM-Caption; nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_other_contents_of_out_are_refused(tmp_path, monkeypatch):
    source, out = make_ucm(tmp_path / "in"), tmp_path / "out"
    no_check("ucm_caption", out, source)
    with pytest.raises(UserError, match="prepared with seed 0, not 1"):
        no_check("ucm_caption", out, source, seed=1)
    with pytest.raises(UserError, match="prepared with name 'ucm_caption', not 'flower'"):
        no_check("flower", out, source)
    with pytest.raises(UserError, match="something else"):
        no_check("ucm_caption", source, source)
    with pytest.raises(UserError, match="something else"):
        no_check("ucm_caption", source / "dataset.json", source)
    run_until(monkeypatch, 3, "ucm_caption", tmp_path / "cut", source)
    edit_ucm(source, imgid=7)
    with pytest.raises(UserError, match=r"begun with another dataset.json"):
        no_check("ucm_caption", tmp_path / "cut", source)


def test_bad_source_does_not_bind_the_folder(tmp_path):
    with pytest.raises(UserError, match="holds neither"):
        no_check("ucm_caption", tmp_path / "out", tmp_path)
    no_check("ucm_caption", tmp_path / "out", make_ucm(tmp_path / "in"), seed=1)


def test_a_data_set_that_was_only_begun_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    spec, folder = get_spec("flower"), tmp_path / "data" / "flower"
    assert not sources.is_here(spec)
    folder.mkdir(parents=True)
    (folder / PARTIAL).write_text("{}")
    assert not sources.is_here(spec)
    (folder / PARTIAL).unlink()
    assert sources.is_here(spec)
