"""`prepare` on tiny archives of the three original formats."""

import io
import json
import pickle
import runpy
import shutil
import struct
import sys
import tarfile
import threading
import zipfile
from collections import namedtuple
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR100, Flowers102
from torchvision.datasets.utils import calculate_md5

import kka.prepare
from kka.archives import load_pickle, unpack
from kka.datasets import cifar100, flower, ucm_caption
from kka.datasets.layout import read_class_folder
from kka.errors import UserError
from kka.prepare import photo_caption, prepare, shuffled_split

SCRIPT = Path(__file__).parents[1] / "src" / "prepare.py"
FINE_LABELS = (0, 1, 25)  # apple, aquarium_fish, couch
FLOWERS = {26: 41, 57: 67, 102: 4}  # images of a class; 26 and 57 as in Oxford-102
UCM_NUMBERS = (*range(1, 6), *range(1996, 2006))  # agricultural, storagetanks, tenniscourt


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    monkeypatch.setattr("kka.files.os.fsync", lambda descriptor: None)


# The originals, tiny ----------------------------------------------------------------------------------------


def python2_pickle(images: np.ndarray, labels: list[int]) -> bytes:
    """{"data": images, "fine_labels": labels} as Python 2 and its numpy wrote it for CIFAR-100."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    rows, columns = (b"J" + struct.pack("<i", size) for size in images.shape)
    dtype = b"cnumpy\ndtype\n" + text("u1") + b"K\x00K\x01\x87R(K\x03" + text("|") + b"NNN"
    dtype += 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    raw = b"T" + struct.pack("<i", images.size) + images.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87R"
    array += b"(K\x01" + rows + columns + b"\x86" + dtype + b"\x89" + raw + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text("data") + array + text("fine_labels") + numbers + b"u."


def make_tar(path: Path, folder: Path) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    return path


def make_cifar(root: Path) -> Path:
    folder = root / CIFAR100.base_folder
    folder.mkdir(parents=True)
    for seed, (name, each) in enumerate((("train", 3), ("test", 2))):
        labels = list(FINE_LABELS) * each
        images = np.random.default_rng(seed).integers(256, size=(len(labels), 3072), dtype=np.uint8)
        (folder / name).write_bytes(python2_pickle(images, labels))
    names = [f"oak_{label}" for label in range(100)]
    names[0], names[1], names[25] = "apple", "aquarium_fish", "couch"
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, protocol=2))
    return make_tar(root / CIFAR100.filename, folder)


def trust_cifar(monkeypatch, archive: Path) -> None:
    """Make the sums of a fake archive the published ones."""
    folder = archive.parent / CIFAR100.base_folder
    monkeypatch.setattr(CIFAR100, "tgz_md5", calculate_md5(archive))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", calculate_md5(folder / "train")]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", calculate_md5(folder / "test")]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": calculate_md5(folder / "meta")})


def picture(kind: str, number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 0)).save(buffer, format=kind)
    return buffer.getvalue()


def make_flowers(root: Path) -> Path:
    labels = [class_id for class_id, count in FLOWERS.items() for _ in range(count)]
    (root / "jpg").mkdir(parents=True)
    for number in range(1, len(labels) + 1):
        (root / "jpg" / f"image_{number:05d}.jpg").write_bytes(picture("jpeg", number))
    savemat(root / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    make_tar(root / "102flowers.tgz", root / "jpg")
    shutil.rmtree(root / "jpg")
    return root


def make_texts(root: Path) -> Path:
    folder = root / "cvpr2016_flowers"
    number = 0
    for class_id, count in FLOWERS.items():
        of_class = folder / "text_c10" / f"class_{class_id:05d}"
        of_class.mkdir(parents=True)
        for _ in range(count):
            number += 1
            lines = [f"flower {number}, line  {line}, caf\u00e9" for line in range(10)]
            (of_class / f"image_{number:05d}.txt").write_text(
                "\r\n".join(lines) + "\n\n", encoding="utf-8-sig"
            )
    return make_tar(root / "cvpr2016_flowers.tar.gz", folder)


def make_ucm(root: Path, images: str = "imgs") -> Path:
    (root / images).mkdir(parents=True)
    entries = []
    for number in UCM_NUMBERS:
        (root / images / f"{number}.tif").write_bytes(picture("tiff", number))
        sentences = [{"raw": f" Image {number}, sentence {k} . ", "tokens": []} for k in range(5)]
        entries.append(
            {"filename": f"{number}.tif", "imgid": number - 1, "split": "train", "sentences": sentences}
        )
    (root / "dataset.json").write_text(json.dumps({"images": entries, "dataset": "UCM"}))
    return root


def edit_ucm(root: Path, **changes) -> None:
    content = json.loads((root / "dataset.json").read_text())
    content["images"][2].update(changes)
    (root / "dataset.json").write_text(json.dumps(content))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupt(monkeypatch, after: int) -> None:
    """Let the images fail like Ctrl-C once `after` of them are written."""
    written = []

    def write(path: Path, data: bytes) -> None:
        if len(written) >= after:
            raise KeyboardInterrupt
        written.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    monkeypatch.setattr(kka.prepare, "write_bytes", write)


def run_until(monkeypatch, after: int, name: str, out: Path, source: Path) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(KeyboardInterrupt):
            no_check(name, out, source)


def no_check(name: str, out: Path, source: Path | None, **more) -> None:
    prepare(name, out, source, check=False, **more)


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


# Archives ---------------------------------------------------------------------------------------------------


def test_wrong_md5_unpacks_nothing(tmp_path):
    archive = make_cifar(tmp_path / "in")
    content = archive.read_bytes()
    with pytest.raises(UserError, match=f"{calculate_md5(archive)}, the original has {CIFAR100.tgz_md5}"):
        prepare("cifar100", tmp_path / "out", archive)
    assert archive.read_bytes() == content
    assert list(tree(tmp_path / "out")) == ["prepared.partial.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html></html>", "no tar or zip archive but a web page"),
        (b"", "no tar or zip archive; get"),
        (b"Rar!\x1a\x07\x00", "rar archive, which is not supported"),
    ],
)
def test_other_files_are_no_archive(tmp_path, content, message):
    (tmp_path / "a.tgz").write_bytes(content)
    with pytest.raises(UserError, match=message):
        unpack(tmp_path / "a.tgz", tmp_path / "work")
    assert not any((tmp_path / "work").iterdir())


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_cut_archive_leaves_nothing(tmp_path, kind):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "noise").write_bytes(np.random.default_rng(0).bytes(50_000))
    whole = make_tar(tmp_path / "a.tgz", folder).read_bytes()
    if kind == "zip":
        whole = bytearray(Path(shutil.make_archive(str(tmp_path / "a"), "zip", folder)).read_bytes())
        whole[20_000] ^= 1
    (tmp_path / "cut").write_bytes(whole[:40_000] if kind == "tar" else whole)
    with pytest.raises(UserError, match="is damaged"):
        unpack(tmp_path / "cut", tmp_path / "work")
    assert not any((tmp_path / "work").iterdir())


def evil_member(name: str, link: str = "") -> tuple[tarfile.TarInfo, io.BytesIO]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
    member.size = 0 if link else 4
    return member, io.BytesIO(b"evil")


@pytest.mark.parametrize("link", ["", "../../evil", "/etc"])
def test_tar_that_leads_outside_is_refused(tmp_path, link):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(*evil_member("good"))
        tar.addfile(*evil_member("link", link) if link else evil_member("../../evil"))
    with pytest.raises(UserError, match="not safe to unpack"):
        unpack(tmp_path / "a.tar", tmp_path / "work")
    assert list(tree(tmp_path)) == ["a.tar"]


def test_harmless_links_of_a_tar_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(*evil_member("good"))
        tar.addfile(*evil_member("link", "good"))
    assert [path.name for path in unpack(tmp_path / "a.tar", tmp_path / "work").iterdir()] == ["good"]


@pytest.mark.parametrize("name", ["../evil", "/evil", "..\\evil", "link"])
def test_zip_that_leads_outside_is_refused(tmp_path, name):
    member = zipfile.ZipInfo(name)
    if name == "link":
        member.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(member, "/etc")
    with pytest.raises(UserError, match="not safe to unpack"):
        unpack(tmp_path / "a.zip", tmp_path / "work")
    assert list(tree(tmp_path)) == ["a.zip"]


def test_full_disk_is_noticed_before_unpacking(tmp_path, monkeypatch):
    archive = make_cifar(tmp_path / "in")
    usage = namedtuple("usage", "free")(3 * archive.stat().st_size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"MB free, .* MB are needed"):
        no_check("cifar100", tmp_path / "out", archive)
    assert list(tree(tmp_path / "out")) == ["prepared.partial.json"]


# Downloads --------------------------------------------------------------------------------------------------


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """(folder that is served, its URL)."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_cifar_is_downloaded_and_checked(tmp_path, site, monkeypatch):
    folder, url = site
    archive = make_cifar(folder)
    trust_cifar(monkeypatch, archive)
    monkeypatch.setattr(CIFAR100, "url", url + archive.name)
    monkeypatch.setattr(kka.prepare, "Original", partial_size(kka.prepare.Original))
    prepare("cifar100", tmp_path / "out")
    prepare("cifar100", tmp_path / "given", archive)
    assert tree(tmp_path / "out") == tree(tmp_path / "given")


def partial_size(original):
    """The same without asking the disk for the size of the real archive."""
    return lambda *fields, size=0: original(*fields)


def test_flowers_are_downloaded_and_checked(tmp_path, site, monkeypatch):
    folder, url = site
    make_flowers(folder)
    files = {key: (name, name) for key, (name, _) in Flowers102._file_dict.items()}
    for key in ("image", "label"):
        files[key] = (files[key][0], calculate_md5(folder / files[key][0]))
    monkeypatch.setattr(Flowers102, "_file_dict", files)
    monkeypatch.setattr(Flowers102, "_download_url_prefix", url)
    monkeypatch.setattr(kka.prepare, "Original", partial_size(kka.prepare.Original))
    prepare("flower", tmp_path / "out")
    assert len(read_class_folder(tmp_path / "out" / "57", "train", 0, flower.SPEC)) == 51


def test_web_page_instead_of_the_archive(tmp_path, site, monkeypatch):
    folder, url = site
    (folder / "cifar-100-python.tar.gz").write_text("<html>please log in</html>")
    monkeypatch.setattr(CIFAR100, "url", url + "cifar-100-python.tar.gz")
    monkeypatch.setattr(kka.prepare, "Original", partial_size(kka.prepare.Original))
    with pytest.raises(
        UserError, match=rf"{url}\S+ gave a file with MD5 .* the original has {CIFAR100.tgz_md5}"
    ):
        prepare("cifar100", tmp_path / "out")
    assert list(tree(tmp_path / "out")) == ["prepared.partial.json"]


def test_half_download_is_started_again(tmp_path, site, monkeypatch):
    folder, url = site
    archive = make_cifar(folder)
    trust_cifar(monkeypatch, archive)
    monkeypatch.setattr(CIFAR100, "url", url + archive.name)
    monkeypatch.setattr(kka.prepare, "Original", partial_size(kka.prepare.Original))

    def cut(url: str, folder: Path, name: str, md5: str) -> None:
        folder.mkdir(parents=True)
        (folder / name).write_bytes(archive.read_bytes()[:100])
        raise ConnectionResetError("cut")

    with monkeypatch.context() as patch:
        patch.setattr("kka.archives.download_url", cut)
        with pytest.raises(UserError, match=r"cannot download .*cut"):
            prepare("cifar100", tmp_path / "out")
    assert not list((tmp_path / "out").glob(f".source/{archive.name}"))
    prepare("cifar100", tmp_path / "out")
    assert (tmp_path / "out" / "prepared.json").exists()


def test_unreachable_server_is_explained(tmp_path, site, monkeypatch):
    monkeypatch.setattr(CIFAR100, "url", site[1] + "missing.tar.gz")
    monkeypatch.setattr(kka.prepare, "Original", partial_size(kka.prepare.Original))
    with pytest.raises(UserError, match=r"cannot download .*404.*--source"):
        prepare("cifar100", tmp_path / "out")


# Arguments and the script -----------------------------------------------------------------------------------


def test_bad_arguments_are_explained(tmp_path):
    out, nowhere = tmp_path / "out", tmp_path / "nowhere"
    with pytest.raises(UserError, match="no data set 'mnist'"):
        prepare("mnist", out)
    with pytest.raises(UserError, match=r"--source .*nowhere does not exist"):
        prepare("flower", out, nowhere)
    with pytest.raises(UserError, match=r"--captions .*nowhere does not exist"):
        prepare("flower", out, captions=nowhere)
    with pytest.raises(UserError, match="--captions is for flower"):
        prepare("cifar100", out, captions=tmp_path)
    with pytest.raises(UserError, match="--seed must be 0 or larger"):
        prepare("cifar100", out, seed=-1)
    assert not out.exists()
    with pytest.raises(UserError, match=r"--source is missing.*UCM_captions"):
        prepare("ucm_caption", out)


def run_script(monkeypatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, flags)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_script_prepares(tmp_path, monkeypatch, capsys):
    source = make_ucm(tmp_path / "in")
    run_script(
        monkeypatch, "ucm_caption", "--source", source, "--out", tmp_path / "out", "--seed", 3, "--no_check"
    )
    assert "12 training and 3 test images" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "prepared.json").read_text())["seed"] == 3


def test_script_reports_bad_input_in_one_sentence(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_script(monkeypatch, "ucm_caption", "--out", tmp_path / "out")
    assert capsys.readouterr().err.startswith("error: --source is missing")
