"""Eq. (4): draw captions into an anomaly folder, and go on with it after any interruption.

Place and seed of an image follow from its caption's place in the list alone: neither failures, batches nor
the number of processes shift them.
"""

import io
import json
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from kka.anomalies import (
    MAX_NUMBER,
    Item,
    appending,
    check_fields,
    check_image,
    file_name,
    file_number,
    held,
    live,
    read_items,
    read_lines,
    refuse_foreign,
    write_set,
)
from kka.datasets.layout import DataSetSpec
from kka.drawers import Drawer
from kka.errors import UserError
from kka.files import sha256, write_bytes
from kka.prompts import prompt_digest
from kka.runs import compare
from kka.seeds import derive_seed
from kka.settings import option

log = logging.getLogger(__name__)

# What a record of captions.jsonl says beside the caption, and its value for captions written by hand.
PROVENANCE: dict[str, Any] = {"prompt_sha256": None, "examples": [], "llm": None, "adapter": None, "round": 0}


@dataclass(frozen=True)
class ImageSettings:
    """Captions and anomaly folder."""

    captions: str | None = option(
        None, "captions.jsonl of create/use_glm4.py, or text with one caption per line"
    )
    dataset_name: str = option(
        "flower", "data set whose anomalies they are; decides style and caption format"
    )
    out: str | None = option(None, "anomaly folder to write, e.g. <data_path>/0")
    used: tuple[str, ...] = option((), "anomaly folders whose images of the bank are not taken again")
    batch_size: int = option(8, "images drawn at once; halved when the GPU's memory is full")
    seed: int = option(
        0, "seed of the images; another one for each round where captions may come again (--repeats)"
    )


@dataclass(frozen=True)
class Drawn:
    """What a call of `draw_captions` did."""

    new: int
    """images drawn"""
    kept: int
    """images that had been drawn before"""
    missing: int
    """captions without an image; the same call tries them again"""
    reasons: dict[str, int]
    """why attempts gave no image"""


def read_captions(path: Path, flag: str = "--captions") -> list[dict[str, Any]]:
    """Records of captions.jsonl, or of a text file with one caption per line (the official flower.txt).

    Raises UserError naming the flag and file, and the line, if it is missing, empty or malformed.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path} does not exist; make it with create/use_glm4.py")
    if path.suffix == ".jsonl":
        records = [_check_record(value, f"{path}, line {number}") for number, value in read_lines(path)]
    else:
        records = [{"caption": line.strip()} for line in _read_text(path, flag).splitlines() if line.strip()]
    if not records:
        raise UserError(f"{flag} {path} holds no caption")
    return records


def _read_text(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path} is not UTF-8 text ({error})") from None


def _check_record(value: Any, where: str) -> dict[str, Any]:
    caption = value.get("caption") if isinstance(value, dict) else None
    if not isinstance(caption, str) or not caption.strip():
        raise UserError(f'{where} must be an object with a "caption", it is {json.dumps(value)[:80]}')
    check_fields({key: value[key] for key in PROVENANCE if key in value}, where)  # the manifest gets them
    return value


def image_seed(seed: int, caption: str, number: int, attempt: int = 0) -> int:
    """Seed of the image of the `number`-th caption; a redrawn one has another for each attempt."""
    return derive_seed(seed, "draw", prompt_digest(caption), number, *[attempt] * (attempt > 0))


def draw_captions(
    drawer: Drawer,
    records: Sequence[dict[str, Any]],
    folder: Path,
    spec: DataSetSpec,
    seed: int = 0,
    batch_size: int = 8,
    shard: tuple[int, int] = (0, 1),
) -> Drawn:
    """Draw the captions that have no image in `folder` yet.

    Args:
        drawer: makes the images.
        records: "caption" and PROVENANCE of each image, as in captions.jsonl.
        folder: of an earlier call with the same arguments, or new; image k is `file_name(k)`.
        spec: format of the caption list.
        seed: of all images.
        batch_size: captions drawn at once; they are also stored at once.
        shard: (i, n), this process draws every n-th caption from the i-th on; with n > 1 the caller calls
            `finish` once, after all processes.

    Raises UserError if the folder holds images of other captions or settings, or no caption could be drawn.
    """
    if len(records) > MAX_NUMBER:
        raise UserError(f"{len(records)} captions are more than the {MAX_NUMBER} that file names allow")
    refuse_foreign(folder)
    read_items(folder)  # a damaged manifest is refused before its last line is mended
    mine = range(1 + shard[0], len(records) + 1, shard[1])
    size, new = 1 if drawer.one_at_a_time else batch_size, 0
    with appending(folder, shard) as append:
        done = _drawn_before(drawer, records, folder, seed)
        pending = [number for number in mine if file_name(number) not in done]
        with _progress(len(mine), len(pending), shard) as bar:
            for start in range(0, len(pending), size):
                items = _draw_batch(drawer, records, pending[start : start + size], seed, folder)
                append(items)  # only now, when the images are in place
                new += len(items)
                bar.update(min(size, len(pending) - start))
        if shard[1] == 1:
            _write_drawn(folder, spec, drawer.failures)
    return Drawn(new, len(mine) - len(pending), len(pending) - new, dict(drawer.failures))


def finish(folder: Path, spec: DataSetSpec, failures: Counter[str]) -> None:
    """Merge the manifests of several processes and write the lists.

    Raises UserError with the failures if there is no image, or if another process writes there.
    """
    with held(folder):
        _write_drawn(folder, spec, failures)


def _write_drawn(folder: Path, spec: DataSetSpec, failures: Counter[str]) -> None:
    items = read_items(folder)
    if not live(items):
        raise UserError(f"none of the captions could be drawn ({describe_failures(failures)})")
    write_set(folder, items, spec)


def describe_failures(failures: dict[str, int]) -> str:
    """{"black image": 2} -> "black image: 2"."""
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(failures.items())) or "no attempt"


def _progress(total: int, left: int, shard: tuple[int, int]) -> tqdm:
    # One bar is enough; the processes are equally fast.
    off = True if shard[0] else None
    return tqdm(total=total, initial=total - left, desc="drawing", unit="image", disable=off)


def _drawn_before(drawer: Drawer, records: Sequence[dict[str, Any]], folder: Path, seed: int) -> set[str]:
    """Names of the images that are there and fit; a lost one is drawn again."""
    settings = json.loads(json.dumps({"drawer": drawer.id, **drawer.settings}))
    done = set()
    for item in read_items(folder):
        number = file_number(item.file)
        if number > len(records) or item.caption != records[number - 1]["caption"]:
            raise UserError(f"{folder} holds images of other captions ({item.file}); choose another folder")
        difference = compare({"drawer": item.drawer, **item.drawer_settings}, settings)
        if item.seed not in [image_seed(seed, item.caption, number, k) for k in range(drawer.attempts)]:
            difference = difference or "another --seed"
        if difference:
            raise UserError(
                f"{folder} holds images drawn with other settings ({difference}); choose another folder"
            )
        if (folder / item.file).exists():
            check_image(folder, item)
            done.add(item.file)
    return done


def _draw_batch(
    drawer: Drawer, records: Sequence[dict[str, Any]], numbers: Sequence[int], seed: int, folder: Path
) -> list[Item]:
    """Draw some captions, failed ones again with another seed, and store the images."""
    drawn: dict[int, tuple[Image.Image, int]] = {}
    for attempt in range(drawer.attempts):
        left = [number for number in numbers if number not in drawn]
        if not left:
            break
        captions = [records[number - 1]["caption"] for number in left]
        seeds = [image_seed(seed, *place, attempt) for place in zip(captions, left, strict=True)]
        for number, own_seed, image in zip(left, seeds, drawer.draw(captions, seeds), strict=True):
            if image is not None:
                drawn[number] = image, own_seed

    def store(number: int) -> Item:
        return _store(*drawn[number], folder / file_name(number), records[number - 1], drawer)

    with ThreadPoolExecutor() as pool:  # compresses images and waits for the disk at the same time
        return list(pool.map(store, sorted(drawn)))


def _store(image: Image.Image, seed: int, path: Path, record: dict[str, Any], drawer: Drawer) -> Item:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "png")
    write_bytes(path, buffer.getvalue())
    provenance = {key: record.get(key, default) for key, default in PROVENANCE.items()}
    return Item(
        file=path.name, sha256=sha256(path), caption=record["caption"], **provenance, drawer=drawer.id,
        drawer_settings=drawer.settings, seed=seed, source=image.info.get("source"),
    )  # fmt: skip
