"""Folder 0, the generated anomalies X_a: images, manifest and name lists.

The manifest is the record: `image.json` and the caption list are written from it, so that image and caption
cannot fall out of step.
"""

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, get_type_hints

from kka.datasets.layout import NAME_LIST, DataSetSpec, list_images, write_class_folder
from kka.errors import UserError
from kka.files import sha256, write_bytes
from kka.settings import fits

if TYPE_CHECKING:
    from kka.results import Scored

MANIFEST = "manifest.jsonl"
LOCK = ".lock"
MAX_NUMBER = 99_999
STATUSES = ("new", "hard", "easy", "between")
_NAME = re.compile(r"image_\d{5}\.png")


@dataclass(frozen=True)
class Item:
    """A generated image: one line of the manifest."""

    file: str
    """its name in the folder"""
    sha256: str
    """of the file"""
    caption: str
    prompt_sha256: str | None
    """of the request that the LLM answered with the caption; None for captions from elsewhere"""
    examples: list[str]
    """captions of normal images in that request"""
    llm: str | None
    adapter: str | None
    drawer: str
    """text-to-image model"""
    drawer_settings: dict[str, Any]
    seed: int
    """of the image"""
    round: int
    """in which it was made"""
    source: str | None = None
    """image of the bank that was taken"""
    status: str = "new"
    """Eq. (6): new (not judged), hard, easy, or between (neither, with --easy_top_k)"""
    score: float | None = None
    """that the evaluator gave it, higher = more anomalous"""
    replaced: int | None = None
    """round whose update took it out of the set"""


_HINTS = get_type_hints(Item)


def file_name(number: int) -> str:
    """Name of image `number`, from 1 on: 15 characters, to which the official code cuts all names."""
    return f"image_{number:05d}.png"


def file_number(name: str) -> int:
    """The inverse of `file_name`."""
    return int(name[6:11])


def read_items(folder: Path) -> list[Item]:
    """All items of a folder, replaced ones too, in the order of their numbers; [] without a manifest.

    Several processes leave one manifest each until they are merged. Raises UserError naming file and line.
    """
    found: dict[str, Item] = {}
    # A newer line for the same image is in the manifest of a process, or further down.
    for path in sorted(folder.glob("manifest*.jsonl"), key=lambda path: path.name != MANIFEST):
        for number, value in read_lines(path):
            item = _parse(value, f"{path}, line {number}")
            found[item.file] = item
    return [found[name] for name in sorted(found)]


def read_lines(path: Path) -> list[tuple[int, Any]]:
    """Number and JSON value of each line of a .jsonl file; an unfinished last line is passed over.

    Raises UserError naming file and line.
    """
    lines = path.read_bytes().split(b"\n")
    values = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                values.append((number, json.loads(line)))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is not valid JSON ({error})") from None
    return values


def has_manifest(folder: Path) -> bool:
    """Whether this project has drawn into the folder, by one process or several."""
    return any(folder.glob("manifest*.jsonl"))


def live(items: Sequence[Item]) -> list[Item]:
    """The items that are in the set, in the order of `image.json`."""
    return [item for item in items if item.replaced is None]


def _parse(value: Any, where: str) -> Item:
    try:
        item = Item(**value)
    except TypeError:
        raise UserError(f"{where} is no record of a generated image; restore it or remove the line") from None
    check_fields(value, where)
    if not _NAME.fullmatch(item.file):
        raise UserError(f"{where} names the file {item.file!r}; names are {file_name(1)} and so on")
    if item.status not in STATUSES:
        raise UserError(f"{where} has the status {item.status!r}; it is one of {', '.join(STATUSES)}")
    return item


def check_fields(value: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a value that is not of the type of the field of `Item` with its name."""
    for name, hint in _HINTS.items():
        if name in value and not fits(value[name], hint):
            found = json.dumps(value[name])[:60]
            raise UserError(f"{where} has {found} as {name!r}; restore it or remove the line")


def refuse_foreign(folder: Path) -> None:
    """Raises UserError if the folder holds images that this project did not make: they are never touched."""
    if has_manifest(folder) or not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; choose a folder")
    if (folder / NAME_LIST["train"]).exists() or list_images(folder):
        raise UserError(
            f"{folder} holds images but no {MANIFEST}; they stay as they are, so choose another folder"
        )


@contextmanager
def held(folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold the folder, which is made if it is missing, against all others that would write there.

    The processes of one launch share it. Raises UserError if another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "ab") as file:
        _lock(file, folder, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


def _lock(file: BinaryIO, folder: Path, kind: int) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"{folder} is being filled by another process; wait for it or choose another folder"
        ) from None


@contextmanager
def appending(folder: Path, shard: tuple[int, int] = (0, 1)) -> Iterator[Callable[[Sequence[Item]], None]]:
    """A function that appends items to the manifest and returns when they are safe on disk.

    Args:
        folder: made if it is missing, and held.
        shard: (i, n), process i of n; each has a manifest of its own until `write_set` merges them.

    Raises UserError if another process fills the folder.
    """
    index, n = shard
    name = MANIFEST if n == 1 else f"manifest.{index}.jsonl"
    with held(folder, shared=n > 1), open(folder / name, "a+b") as file:
        _lock(file, folder, fcntl.LOCK_EX)  # another launch would share the folder, but not this
        end_line(file)
        yield lambda items: _append(file, items)


def write_manifest(folder: Path, items: Sequence[Item]) -> None:
    """Replace all manifests of the folder, which the caller holds, by one."""
    write_bytes(folder / MANIFEST, "".join(map(_line, items)).encode())
    for shard in folder.glob("manifest.*.jsonl"):
        shard.unlink()


def write_set(folder: Path, items: Sequence[Item], spec: DataSetSpec) -> None:
    """Write the manifest, and `image.json` and the caption list from it; the caller holds the folder.

    The caption of an image is repeated `spec.captions_per_image` times, as in the official code.
    """
    write_manifest(folder, items)
    current = live(items)
    blocks = [[item.caption] * spec.captions_per_image for item in current]
    write_class_folder(folder, "train", [item.file for item in current], blocks, spec)
    for pattern in (".image*.tmp", ".manifest*.tmp", f".{spec.caption_stem}*.tmp"):
        for left in folder.glob(pattern):  # by a killed process, in the middle of a file
            left.unlink()


def record_split(folder: Path, split: "Scored") -> None:
    """Record in the manifest which images are hard and which easy (Eq. 6), with their scores.

    Raises UserError if other images were scored, or another process writes there.
    """
    if not folder.is_dir():
        raise UserError(f"the anomaly folder {folder} does not exist; give the one that was scored")
    with held(folder):
        items = read_items(folder)
        current, easy = live(items), set(split.easy.tolist())
        judged = {}
        for k, index in enumerate(split.index):
            item = _scored_item(folder, current, index, split.captions[k])
            status = "hard" if split.hard[k] else "easy" if k in easy else "between"
            judged[item.file] = replace(item, status=status, score=float(split.scores[k]))
        write_manifest(folder, [judged.get(item.file, item) for item in items])


def _scored_item(folder: Path, current: Sequence[Item], index: int, captions: Sequence[str]) -> Item:
    """The item of a scored image; raises UserError if it is another image than was scored."""
    if index >= len(current):
        raise UserError(
            f"{folder} has {len(current)} images in its manifest, fewer than were scored; "
            "give the folder that the run was trained on"
        )
    item = current[index]
    if captions and item.caption not in captions:
        raise UserError(
            f"{folder / item.file} shows {item.caption!r}, scored was an image of {captions[0]!r}; "
            "give the folder that the run was trained on"
        )
    return item


def check_image(folder: Path, item: Item) -> None:
    """Raises UserError if the image of an item is not there or was changed since it was drawn."""
    path = folder / item.file
    if not path.is_file():
        raise UserError(f"{path} is in {MANIFEST} but does not exist; restore it or draw it again")
    if sha256(path) != item.sha256:
        raise UserError(
            f"{path} was changed since it was drawn; restore it, or remove it to have it drawn again"
        )


def _line(item: Item) -> str:
    return json.dumps(asdict(item), ensure_ascii=False, allow_nan=False) + "\n"


def _append(file: BinaryIO, items: Sequence[Item]) -> None:
    file.write("".join(map(_line, items)).encode())
    file.flush()
    os.fsync(file.fileno())


def end_line(file: BinaryIO) -> None:
    """Finish the last line, or cut off the part of an object that a killed process has left.

    Raises UserError for a last line that is no beginning of an object: it is somebody else's.
    """
    file.seek(0)
    data = file.read()
    start = data.rfind(b"\n") + 1
    try:
        if data[start:].strip():
            json.loads(data[start:])
            file.write(b"\n")
    except ValueError:
        if not data[start:].startswith((b"{", b"\0")):  # zeros: a power cut
            raise UserError(
                f"{file.name}: the last line is no JSON; remove it or choose another place"
            ) from None
        file.truncate(start)
