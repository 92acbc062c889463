"""Tiny archives of the three original formats, and what tests of `prepare` do with them."""

import io
import json
import pickle
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR100
from torchvision.datasets.utils import calculate_md5

import kka.prepare
from kka.prepare import prepare

SCRIPT = Path(__file__).parents[1] / "src" / "prepare.py"
FINE_LABELS = (0, 1, 25)  # apple, aquarium_fish, couch
FLOWERS = {26: 41, 57: 67, 102: 4}  # images of a class; 26 and 57 as in Oxford-102
UCM_NUMBERS = (*range(1, 6), *range(1996, 2006))  # agricultural, storagetanks, tenniscourt


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
