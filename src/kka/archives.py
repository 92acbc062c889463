"""Archives from elsewhere: download, checksum, safe unpacking, and the file formats inside."""

import gzip
import lzma
import os
import pickle
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import URLError

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat
from torchvision.datasets.utils import calculate_md5, check_integrity, download_url

from kka.datasets.layout import list_images
from kka.errors import UserError
from kka.files import read_json, sha256

ROOM = 3  # free space to ask for, in sizes of the archive: the archive, its content, the prepared copy

UCM_IMAGES = 2100

# What Python's readers raise for archives that are cut, altered or locked with a password.
_DAMAGE: tuple[type[Exception], ...] = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile)
_DAMAGE += (lzma.LZMAError, zlib.error, EOFError, RuntimeError)

# All that the pickles of CIFAR-100 name; anything else in a pickle is a call that we do not want.
_ADMITTED = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "_reconstruct"),  # its name before numpy 2, when CIFAR-100 was written
}


@dataclass(frozen=True)
class Original:
    """A data set as its authors give it away."""

    archive: str
    """file name of the archive"""
    marker: str
    """a file in the folder that we want"""
    where: str
    """what to tell a person who has to get it"""
    url: str = ""
    """empty if a program may not download it"""
    md5: str = ""
    """of the archive; empty if the authors give none"""
    size: int = 0
    """of the archive, bytes"""


def open_original(
    original: Original, source: Path | None, work: Path, check: bool = True
) -> tuple[Path, dict[str, str]]:
    """The folder that holds the marker, and {archive name: SHA-256} if it was unpacked.

    Args:
        source: the archive, or a folder that holds it or its content; None downloads it.
        work: folder for downloads and unpacked archives.
        check: compare the archive with its published MD5.

    Raises UserError if the source does not hold it.
    """
    if source is not None and source.is_dir():
        if marker := find(source, original.marker):
            return marker.parent, {}
        if (archive := find(source, original.archive)) is None:
            raise UserError(
                f"{source} holds neither {original.marker} nor {original.archive}; {original.where}"
            )
    elif source is not None:
        archive = source
    elif original.url:
        archive = download(original.url, original.md5, work, original.size)
    else:
        raise UserError(f"--source is missing; {original.where}")
    if check and original.md5:
        check_md5(archive, original.md5)
    if (marker := find(unpack(archive, work), original.marker)) is None:
        raise UserError(f"{archive} holds no {original.marker}; {original.where}")
    return marker.parent, {archive.name: sha256(archive)}


def find(root: Path, name: str) -> Path | None:
    """The first file or folder called `name` (a glob pattern) in `root` or up to two folders below it."""
    for pattern in (name, f"*/{name}", f"*/*/{name}"):
        for found in sorted(root.glob(pattern)):
            return found
    return None


def check_md5(path: Path, expected: str) -> None:
    """Raise UserError with both sums unless the file has the expected MD5."""
    actual = calculate_md5(path)
    if actual != expected:
        raise UserError(
            f"{path} has MD5 {actual}, the original has {expected}; get the original again, "
            "or use --no_check if it is meant to differ"
        )


def check_free_space(folder: Path, archive_bytes: int) -> None:
    """Raise UserError unless the disk of `folder` has room for an archive of that size and its content."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < ROOM * archive_bytes:
        raise UserError(
            f"{folder} has {free / 1e6:,.0f} MB free, {ROOM * archive_bytes / 1e6:,.0f} MB are needed; "
            "free some space or choose an --out on another disk"
        )


def download(url: str, md5: str, folder: Path, size: int = 0) -> Path:
    """Fetch a file of `size` bytes with torchvision, which checks the MD5; one that is in `folder` is kept.

    Only a whole file gets its final name. Raises UserError naming a URL that gives nothing or another file.
    """
    name = url.rsplit("/", 1)[1]
    partial = folder / "download.partial" / name
    if not check_integrity(folder / name, md5):
        check_free_space(folder, size)
        try:
            download_url(url, partial.parent, name, md5)
        except (URLError, HTTPException, ConnectionError, TimeoutError, RecursionError) as error:
            raise UserError(
                f"cannot download {url} ({error}); try again, or fetch it elsewhere and give it with --source"
            ) from None
        except RuntimeError:  # torchvision found another MD5
            actual = calculate_md5(partial)
            partial.unlink()
            raise UserError(
                f"{url} gave a file with MD5 {actual}, the original has {md5}; try again later, "
                "or fetch it elsewhere and give it with --source"
            ) from None
        os.replace(partial, folder / name)
    return folder / name


def unpack(archive: Path, parent: Path) -> Path:
    """Unpack a tar or zip archive into a new folder of `parent` and return that folder.

    The folder is named after the content of the archive, so a second call finds it. Raises UserError, leaving
    nothing behind, for what is no archive or a damaged one, a member that leads outside, or too little space.
    """
    folder = parent / sha256(archive)[:16]
    if folder.exists():
        return folder
    check_free_space(parent, archive.stat().st_size)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _extract(archive, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    os.replace(partial, folder)
    return folder


def _extract(archive: Path, folder: Path) -> None:
    try:
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter=_files_only)
        elif zipfile.is_zipfile(archive):
            _extract_zip(archive, folder)
        else:
            raise UserError(_no_archive(archive))
    except tarfile.FilterError as error:
        raise UserError(f"{archive} is not safe to unpack ({error}); get the original archive") from None
    except _DAMAGE as error:
        raise UserError(f"{archive} is damaged ({error}); get it again") from None


def _files_only(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """Refuse what leads outside, as the filter "data" does, and pass over the links that it would admit."""
    checked = tarfile.data_filter(member, folder)
    return checked if member.isfile() or member.isdir() else None


def _extract_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            path = PurePosixPath(member.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
                raise UserError(
                    f"{archive} is not safe to unpack ({member.filename!r} leads outside); get the original"
                )
        file.extractall(folder)


def _no_archive(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(64).lstrip()
    if start.startswith(b"Rar!"):
        return _rar(path)
    web_page = " but a web page" if start.startswith(b"<") else ""
    return f"{path} is no tar or zip archive{web_page}; get the original archive"


def _rar(path: Path) -> str:
    return f"{path.name} is a rar archive, which is not supported; unpack it (unrar, 7z) and give the folder"


class _ArraysOnly(pickle.Unpickler):
    """Reads numbers, strings, lists, dictionaries and numpy arrays; refuses to name anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def load_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle of Python 2 or 3 that holds plain values and numpy arrays only.

    Raises UserError for everything else; nothing in the file is executed.
    """
    try:
        with open(path, "rb") as file:
            value = _ArraysOnly(file, encoding="latin1").load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(f"{path} is no file of arrays and plain values ({error}); get the original") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__} instead of a dictionary; get the original")
    return value


def read_cifar(path: Path) -> tuple[NDArray[np.uint8], list[int]]:
    """Images (N, 32, 32, 3), RGB, and fine labels, 0..99, of the file `train` or `test` of CIFAR-100."""
    content = load_pickle(path)
    images, labels = content.get("data"), content.get("fine_labels")
    if (
        not isinstance(images, np.ndarray)
        or not isinstance(labels, list)
        or images.dtype != np.uint8
        or images.shape != (len(labels), 3 * 32 * 32)
        or not set(labels) <= set(range(100))
    ):
        raise UserError(
            f"{path} is no file of CIFAR-100 (data (N, 3072), fine_labels 0..99); get the original"
        )
    return images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def read_flower_labels(path: Path) -> list[int]:
    """Class, 1..102, of each image of Oxford-102, in order of the image numbers; from `imagelabels.mat`."""
    try:
        labels = loadmat(path)["labels"].ravel().tolist()
    except OSError:
        raise
    except Exception as error:  # scipy has no error of its own for what is no MATLAB file
        raise UserError(
            f"{path} holds no flower labels ({error}); get the original imagelabels.mat"
        ) from None
    if not set(labels) <= set(range(1, 103)):
        raise UserError(f"{path} holds labels outside 1..102; get the original imagelabels.mat")
    return labels


def read_flower_texts(
    source: Path | None, work: Path, each: int
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Reed's captions: `text_c10/class_00001/image_00001.txt` of a folder or archive, one caption per line.

    What is no UTF-8 becomes a space. Returns {"image_00001": its captions} and {archive name: SHA-256};
    nothing without a source. Raises UserError naming a file without exactly `each` captions.
    """
    if source is None:
        return {}, {}
    folder = source if source.is_dir() else unpack(source, work)
    texts = {}
    for file in sorted((find(folder, "text_c10") or folder).glob("class_*/image_*.txt")):
        text = file.read_text(encoding="utf-8-sig", errors="replace").replace(
            "\N{REPLACEMENT CHARACTER}", " "
        )
        texts[file.stem] = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
        if len(texts[file.stem]) != each:
            raise UserError(f"{file} holds {len(texts[file.stem])} captions, expected {each}; get it again")
    if not texts:
        raise UserError(f"{source} holds no text_c10/class_00001/image_*.txt; give Reed's captions")
    return texts, {} if source.is_dir() else {source.name: sha256(source)}


def read_ucm(dataset: Path, each: int) -> dict[int, tuple[Path, tuple[str, ...]]]:
    """{number: (image file, sentences)} of UCM-Caption, from `dataset.json` and `imgs` or `images` beside it.

    Raises UserError naming an entry of another form, without exactly `each` sentences, or without its image.
    """
    content = read_json(dataset)
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{dataset} has no list 'images'; get the original dataset.json")
    files = {file.stem: file for file in _ucm_images(dataset.parent)}
    found: dict[int, tuple[Path, tuple[str, ...]]] = {}
    for index, entry in enumerate(entries):
        try:
            name = str(entry["filename"])
            sentences = tuple(" ".join(sentence["raw"].split()) for sentence in entry["sentences"])
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{dataset}: image {index} lacks 'filename' or 'sentences' with 'raw'") from None
        number = re.fullmatch(r"(\d+)\.\w+", name)
        if not number or not 1 <= int(number[1]) <= UCM_IMAGES or int(number[1]) in found:
            raise UserError(
                f"{dataset}: image {index} is {name!r}, expected each of 1..{UCM_IMAGES} at most once"
            )
        if len(sentences) != each:
            raise UserError(f"{dataset}: {name} has {len(sentences)} sentences, expected {each}")
        if number[1] not in files:
            raise UserError(
                f"{dataset} lists {name!r}, but the folder of images beside it lacks it; restore it"
            )
        found[int(number[1])] = files[number[1]], sentences
    return found


def _ucm_images(folder: Path) -> list[Path]:
    for name in ("imgs", "images", "Images"):
        if (folder / name).is_dir():
            return list_images(folder / name)
    if rar := find(folder, "*.rar"):
        raise UserError(f"{_rar(rar)}, with imgs beside dataset.json")
    raise UserError(f"{folder} holds dataset.json but no folder imgs or images; put the images there")
