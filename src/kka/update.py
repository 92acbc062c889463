"""Eq. (8): the next anomaly set, by adding hard anomalies or by replacing easy ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kka.anomalies import (
    Item,
    appending,
    check_image,
    file_name,
    file_number,
    live,
    read_items,
    refuse_foreign,
    write_set,
)
from kka.datasets.layout import DataSetSpec
from kka.errors import UserError
from kka.files import sha256, write_bytes

PER_ROUND = 59  # new hard anomalies per round: the paper's sets of 200 grow to 318 in two rounds
MODES = ("add", "rep")


@dataclass(frozen=True)
class Updated:
    """What an update of the set did."""

    added: int
    replaced: int
    size: int
    """images in the new set"""


# Eq. (8)
def update(
    folder: Path,
    fresh: Path,
    out: Path,
    spec: DataSetSpec,
    mode: str,
    round: int,
    rng: np.random.Generator,
    per_round: int = PER_ROUND,
) -> Updated:
    """Write the next anomaly set: hard ones of `fresh` are added, or replace easy ones.

    Args:
        folder: the current set; mode rep needs its `record_split`.
        fresh: images of captions by the tuned LLM, after `record_split`.
        out: the new set, another folder. An interrupted update is repeated with an equal `rng`.
        mode: see `choose_update`.
        round: recorded with the images that leave.

    Raises UserError if an image was changed since it was drawn, or the mode cannot work.
    """
    if out.resolve() in (folder.resolve(), fresh.resolve()):
        raise UserError(f"{out} is an input of the update; the new set needs a folder of its own")
    for place in (folder, fresh, out):
        refuse_foreign(place)
    items = read_items(folder)
    leaving, entering = choose_update(items, read_items(fresh), mode, per_round, rng)
    gone = {item.file for item in leaving}
    updated = [replace(item, replaced=round) if item.file in gone else item for item in items]
    first = 1 + max((file_number(item.file) for item in items), default=0)
    with appending(out):  # the folder is marked as ours, and locked
        for item in live(updated):
            _copy(folder, item, out / item.file)
        for number, item in enumerate(entering, first):
            _copy(fresh, item, out / file_name(number))
            updated.append(replace(item, file=file_name(number)))
        write_set(out, updated, spec)
    return Updated(len(entering), len(leaving), len(live(updated)))


def choose_update(
    items: Sequence[Item], fresh: Sequence[Item], mode: str, per_round: int, rng: np.random.Generator
) -> tuple[list[Item], list[Item]]:
    """The items that leave and those that enter.

    Mode "add": none leaves; up to `per_round` hard ones of `fresh` enter, random ones if there are more.
    Mode "rep": as many random easy ones leave as hard ones enter, so that the size stays.
    An image that the set has or had does not enter again. Raises UserError if images were not split yet.
    """
    if mode not in MODES or per_round < 0:
        raise UserError(f"--mode must be add or rep and --per_round at least 0; they are {mode}, {per_round}")
    _check_judged(fresh, "the fresh images")
    known = {item.sha256 for item in items}
    hard = [item for item in fresh if item.status == "hard" and item.sha256 not in known]
    n = min(per_round, len(hard))
    if mode == "add":
        return [], _sample(hard, n, rng)
    _check_judged(live(items), "the images of the current set")
    easy = [item for item in live(items) if item.status == "easy"]
    n = min(n, len(easy))
    return _sample(easy, n, rng), _sample(hard, n, rng)


def _check_judged(items: Sequence[Item], what: str) -> None:
    if items and all(item.status == "new" for item in items):
        raise UserError(f"{what} have not been split into hard and easy ones; score them first")


def _sample(items: list[Item], n: int, rng: np.random.Generator) -> list[Item]:
    return [items[i] for i in sorted(rng.choice(len(items), n, replace=False).tolist())]


def _copy(folder: Path, item: Item, target: Path) -> None:
    check_image(folder, item)
    if not target.exists() or sha256(target) != item.sha256:
        write_bytes(target, (folder / item.file).read_bytes())
