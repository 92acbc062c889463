"""The generated anomalies of a page: what is known of each, and a small picture inside the page."""

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from kka.anomalies import Item, live, read_items
from kka.datasets.images import read_image
from kka.errors import UserError
from kka.report.data import NoDataError, split_images
from kka.report.sources import UNTUNED, Group, LoopRecord

BUDGET = 11_000_000  # bytes of base64 in a page
SIZES = ((160, 80), (128, 75), (112, 70), (96, 65), (80, 55), (64, 50))  # longer side in pixels, WebP quality
SAMPLE = 40  # thumbnails from which the size of all is told


@dataclass(frozen=True)
class Picture:
    """One generated anomaly."""

    path: Path
    caption: str
    round: str
    """that it was drawn in, or whose LLM; empty if it is not known"""
    status: str
    """hard, easy, between or new"""
    score: float | None
    fate: str = ""
    """what became of it"""


@dataclass(frozen=True)
class Thumbnails:
    """Pictures as they go into a page."""

    uris: tuple[str | None, ...]
    """data: URIs of WebP; None for a file that is gone or cannot be read"""
    side: int
    """their longer side, in pixels"""


def collect(
    loops: Sequence[LoopRecord], groups: Sequence[Group], data_path: str | None
) -> tuple[list[Picture], list[str]]:
    """The pictures of loops, and of the first seed of each group; and sentences about what is missing."""
    pictures, problems = [], []
    several = len(loops) + len(groups) > 1
    for loop in loops:
        try:
            pictures += _of_loop(loop, f"{loop.name}, " if several else "")
        except UserError as error:
            problems.append(f"{loop.name}: its generated anomalies cannot be shown: {error}")
    for group in groups:
        if group.n_generated:
            try:
                pictures += _of_group(group, f"{group.name}, " if several else "", data_path)
            except (NoDataError, UserError) as error:
                problems.append(f"{group.name}: its generated anomalies cannot be shown: {error}")
    return pictures, problems


def _of_loop(loop: LoopRecord, mark: str) -> list[Picture]:
    final = loop.items(loop.place(len(loop.rounds) - 1, "0"))
    fates = {item.sha256: _fate(item) for item in final}
    pictures = []
    for name, folder in loop.fresh().items():
        title = f"{mark}untuned LLM" if name == UNTUNED else f"{mark}round {name}"
        never = "drawn for comparison only" if name == UNTUNED else "never came into the set"
        pictures += [
            Picture(folder / i.file, i.caption, title, i.status, i.score, fates.get(i.sha256, never))
            for i in _by_score(loop.items(folder))
        ]
    return pictures


def _by_score(items: Sequence[Item]) -> list[Item]:
    return sorted(items, key=lambda item: (item.score is None, item.score or 0.0))


def _fate(item: Item) -> str:
    return "in the last set" if item.replaced is None else f"left the set in round {item.replaced}"


def _of_group(group: Group, mark: str, data_path: str | None) -> list[Picture]:
    run = group.runs[0]
    items = {item.file: item for item in live(read_items(run.anomalies))} if run.anomalies else {}
    shown = split_images(run, data_path)
    return [
        Picture(each.path, each.caption, _round(items.get(each.path.name), mark), each.status, score)
        for each, score in shown
    ]


def _round(item: Item | None, mark: str) -> str:
    return f"{mark}round {item.round}" if item else mark.rstrip(", ")


def make_thumbnails(paths: Sequence[Path], budget: int = BUDGET) -> Thumbnails:
    """Small pictures of all files, in the largest of SIZES at which they keep to `budget` bytes.

    Raises UserError if they are too many even at the smallest.
    """
    sample = paths[:: max(1, len(paths) // SAMPLE)]
    for side, quality in SIZES:
        expected = _encode_all(sample, side, quality, quiet=True)
        if sum(len(uri or "") for uri in expected) * len(paths) / max(1, len(sample)) > 0.95 * budget:
            continue
        uris = _encode_all(paths, side, quality)
        if sum(len(uri or "") for uri in uris) <= budget:
            return Thumbnails(tuple(uris), side)
    raise UserError(
        f"{len(paths)} images are too many for one page; give fewer runs, or give them one by one"
    )


def _encode_all(paths: Sequence[Path], side: int, quality: int, quiet: bool = False) -> list[str | None]:
    # Pillow releases the interpreter lock while it decodes and encodes.
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda path: encode(path, side, quality), paths)
        hidden = True if quiet else None
        return list(
            tqdm(made, total=len(paths), desc="thumbnails", unit="image", disable=hidden, leave=False)
        )


def encode(path: Path, side: int, quality: int) -> str | None:
    """An image file as a data: URI of WebP, shrunk to that side; None if it cannot be read."""
    try:
        picture = read_image(path)
    except UserError:
        return None
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "webp", quality=quality, method=4)
    return data_uri(file.getvalue())


def data_uri(webp: bytes) -> str:
    """A WebP file as a data: URI."""
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"
