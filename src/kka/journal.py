"""What a training run remembers: its epochs, its log, and a checkpoint from which it continues.

A killed run that is started again goes on after its last checkpoint and ends with the same numbers, because
every random draw comes from a stream of its own for each epoch (seeds.py).
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from kka.errors import UserError
from kka.files import write_atomically, write_bytes

SCHEMA = 1  # of the checkpoint file
CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """Anything that a checkpoint can hold: a module, an optimizer, a scheduler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Tracks(Protocol):
    """Shows the rows elsewhere (tracking.py)."""

    def follow(self, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def close(self) -> None: ...


class Journal:
    """Epoch by epoch record of one training; without a folder it lives in memory only.

    Args:
        folder: gets `metrics.jsonl`, `checkpoint.pt` and `checkpoint.previous.pt`.
        every: seconds between two checkpoints; 0 writes one after each epoch.
        fingerprint: identifies settings and data; a checkpoint of another one is refused.
        tracker: is shown all rows after each new one.
        began: when this start of the run began, by time.monotonic(); None: now.
    """

    def __init__(
        self,
        folder: Path | None = None,
        every: float = 10,
        fingerprint: str = "",
        tracker: Tracks | None = None,
        began: float | None = None,
    ) -> None:
        self.folder, self.every, self.fingerprint, self.tracker = folder, every, fingerprint, tracker
        self.rows: list[dict[str, Any]] = []
        """one for each epoch of each phase, as in metrics.jsonl"""
        self.facts: dict[str, Any] = {}
        """results of whole phases that a resumed run must not lose"""
        self._seconds: dict[str, float] = {}
        self._finished: list[str] = []
        self._state: dict[str, Any] | None = None
        self._saved_at = time.monotonic()
        self.began = self._saved_at if began is None else began
        self.earlier = 0.0
        """seconds of the whole run in its earlier starts, up to the last checkpoint of each"""
        self._resume()

    def epochs(self, phase: str, n_epochs: int, parts: Mapping[str, Stateful]) -> Iterator[int]:
        """Yield the epochs of a phase that are still to do; between them the parts may be checkpointed.

        The parts get the state of the checkpoint, if it is of this phase. A phase that lies behind the
        checkpoint yields nothing and leaves the parts as they are.
        """
        return epochs_in_step([self], phase, n_epochs, [parts])

    def record(self, phase: str, epoch: int, **values: float | None) -> None:
        """Add one row to metrics.jsonl."""
        row = {"phase": phase, "epoch": epoch, **values}
        self.rows.append(row)
        if self.folder is not None:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.tracker is not None:
            self.tracker.follow(self.rows)

    def close(self) -> None:
        """The training is over; what a tracker has not been shown, because of a kill, it is shown now."""
        if self.tracker is not None:
            self.tracker.follow(self.rows)
            self.tracker.close()

    def series(self, phase: str, key: str) -> list[Any]:
        """The recorded values of one key, epoch by epoch, where there are any."""
        return [row[key] for row in self.rows if row["phase"] == phase and key in row]

    def seconds(self, phase: str) -> float:
        """Training time of a phase over all starts of the run."""
        return self._seconds.get(phase, 0.0)

    @property
    def elapsed(self) -> float:
        """Seconds of the whole run over all its starts, with all that is no epoch of a phase."""
        return self.earlier + time.monotonic() - self.began

    def _begin(self, phase: str, parts: Mapping[str, Stateful]) -> int | None:
        """The first epoch to do, after the parts got their state; None for a phase that lies behind."""
        if self._state is not None and self._state["phase"] == phase:
            for name, part in parts.items():
                part.load_state_dict(self._state["parts"][name])
            start, self._state = self._state["epoch"], None
            return start
        return None if phase in self._finished else 0

    def _end(self, phase: str, n_epochs: int, parts: Mapping[str, Stateful]) -> None:
        self._finished.append(phase)
        self._save(phase, n_epochs, parts)

    def _took(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self.seconds(phase) + seconds

    def _checkpoints(self) -> tuple[Path, Path]:
        assert self.folder is not None
        newest, previous = CHECKPOINTS
        return self.folder / newest, self.folder / previous

    def _save(self, phase: str, epoch: int, parts: Mapping[str, Stateful]) -> None:
        self._saved_at = time.monotonic()
        if self.folder is None:
            return
        value = {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "phase": phase,
            "epoch": epoch,
            "parts": {name: part.state_dict() for name, part in parts.items()},
            "rows": self.rows,
            "facts": self.facts,
            "seconds": self._seconds,
            "elapsed": self.elapsed,
            "finished": self._finished,
        }
        newest, previous = self._checkpoints()
        if newest.exists():
            os.replace(newest, previous)
        write_atomically(newest, lambda file: torch.save(value, file))

    def _found(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The whole checkpoints, the newest first."""
        if self.folder is None:
            return
        for path in self._checkpoints():
            state = self._load(path)
            if state is not None:
                yield path, state

    def _places(self) -> Iterator[tuple[Path, tuple[str, int]]]:
        return ((path, (state["phase"], state["epoch"])) for path, state in self._found())

    def _go_back(self, to: tuple[str, int] | None) -> None:
        """Continue from the checkpoint of this phase and epoch, or from the start."""
        for path, place in list(self._places()):
            if place == to:
                break
            path.unlink()
        self.rows, self.facts, self._seconds, self._finished, self.earlier = [], {}, {}, [], 0.0
        self._resume()

    def _resume(self) -> None:
        self._state = state = next((state for _, state in self._found()), None)
        if state is not None:
            self.rows, self.facts = state["rows"], state["facts"]
            self._seconds, self._finished = state["seconds"], state["finished"]
            self.earlier = state.get("elapsed", sum(self._seconds.values()))  # which older versions lack
            log.info("continuing after epoch %d of %s", state["epoch"], state["phase"])
        if self.folder is None:
            return
        # Rows written after the checkpoint belong to epochs that are done again.
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_bytes(self.folder / "metrics.jsonl", lines.encode())

    def _load(self, path: Path) -> dict[str, Any] | None:
        """The checkpoint, or None if there is none or it is damaged; never unpickles foreign objects."""
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds, all of which mean the same here
            log.warning("%s is damaged (%s); using the one before it, if any", path, type(error).__name__)
            return None
        if not isinstance(state, dict) or state.get("schema") != SCHEMA:
            raise UserError(f"{path} was written by another version; give --overwrite to start the run anew")
        if state["fingerprint"] != self.fingerprint:
            raise UserError(
                f"{path} belongs to other settings or data; give --overwrite to start the run anew"
            )
        return state


def epochs_in_step(
    journals: Sequence[Journal], phase: str, n_epochs: int, parts: Sequence[Mapping[str, Stateful]]
) -> Iterator[int]:
    """`Journal.epochs` of trainings that are made together; each has its share of the time.

    They must stand at the same epoch (`align`); checkpoints are written after the same epochs.
    """
    starts = [journal._begin(phase, own) for journal, own in zip(journals, parts, strict=True)]
    start, first = starts[0], journals[0]
    assert starts == [start] * len(starts)
    if start is None:
        return
    bar = tqdm(total=n_epochs, initial=start, desc=phase, unit="epoch", disable=None, leave=False)
    with bar:
        for epoch in range(start, n_epochs):
            began = time.monotonic()
            yield epoch
            for journal in journals:
                journal._took(phase, (time.monotonic() - began) / len(journals))
            bar.set_postfix_str(f"loss {first.rows[-1]['loss']:.4g}" if first.rows else "")
            bar.update()
            if time.monotonic() - first._saved_at >= first.every and epoch + 1 < n_epochs:
                for journal, own in zip(journals, parts, strict=True):
                    journal._save(phase, epoch + 1, own)
    for journal, own in zip(journals, parts, strict=True):
        journal._end(phase, n_epochs, own)


def align(journals: Sequence[Journal]) -> None:
    """Let trainings that are made together continue at the newest checkpoint that each of them has.

    A kill between two of their checkpoints leaves some ahead; these lose their newest. Without a checkpoint
    that all have, all begin anew.
    """
    places = [[place for _, place in journal._places()] for journal in journals]
    common = next((place for place in places[0] if all(place in own for own in places)), None)
    for journal, own in zip(journals, places, strict=True):
        if own and own[0] != common:
            journal._go_back(common)
