"""What a training run remembers: its epochs, its log, and a checkpoint from which it continues.

A killed run that is started again goes on after its last checkpoint and ends with the same numbers, because
every random draw comes from a stream of its own for each epoch (seeds.py).
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
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


class Journal:
    """Epoch by epoch record of one training; without a folder it lives in memory only.

    Args:
        folder: gets `metrics.jsonl`, `checkpoint.pt` and `checkpoint.previous.pt`.
        every: seconds between two checkpoints; 0 writes one after each epoch.
        fingerprint: identifies settings and data; a checkpoint of another one is refused.
    """

    def __init__(self, folder: Path | None = None, every: float = 10, fingerprint: str = "") -> None:
        self.folder, self.every, self.fingerprint = folder, every, fingerprint
        self.rows: list[dict[str, Any]] = []
        """one for each epoch of each phase, as in metrics.jsonl"""
        self.facts: dict[str, Any] = {}
        """results of whole phases that a resumed run must not lose"""
        self._seconds: dict[str, float] = {}
        self._finished: list[str] = []
        self._state: dict[str, Any] | None = None
        self._saved_at = time.monotonic()
        if folder is not None:
            self._resume()

    @property
    def resumed(self) -> bool:
        """Whether a checkpoint of an earlier start was found."""
        return bool(self.rows or self._finished)

    def epochs(self, phase: str, n_epochs: int, parts: Mapping[str, Stateful]) -> Iterator[int]:
        """Yield the epochs of a phase that are still to do; between them the parts may be checkpointed.

        The parts get the state of the checkpoint, if it is of this phase. A phase that lies behind the
        checkpoint yields nothing and leaves the parts as they are.
        """
        start = 0
        if self._state is not None and self._state["phase"] == phase:
            for name, part in parts.items():
                part.load_state_dict(self._state["parts"][name])
            start, self._state = self._state["epoch"], None
        elif phase in self._finished:
            return
        bar = tqdm(total=n_epochs, initial=start, desc=phase, unit="epoch", disable=None, leave=False)
        with bar:
            for epoch in range(start, n_epochs):
                began = time.monotonic()
                yield epoch
                self._seconds[phase] = self.seconds(phase) + time.monotonic() - began
                bar.set_postfix_str(f"loss {self.rows[-1]['loss']:.4g}" if self.rows else "")
                bar.update()
                if time.monotonic() - self._saved_at >= self.every and epoch + 1 < n_epochs:
                    self._save(phase, epoch + 1, parts)
        self._finished.append(phase)
        self._save(phase, n_epochs, parts)

    def record(self, phase: str, epoch: int, **values: float | None) -> None:
        """Add one row to metrics.jsonl."""
        row = {"phase": phase, "epoch": epoch, **values}
        self.rows.append(row)
        if self.folder is not None:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def series(self, phase: str, key: str) -> list[Any]:
        """The recorded values of one key, epoch by epoch, where there are any."""
        return [row[key] for row in self.rows if row["phase"] == phase and key in row]

    def seconds(self, phase: str) -> float:
        """Training time of a phase over all starts of the run."""
        return self._seconds.get(phase, 0.0)

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
            "finished": self._finished,
        }
        newest, previous = self._checkpoints()
        if newest.exists():
            os.replace(newest, previous)
        write_atomically(newest, lambda file: torch.save(value, file))

    def _resume(self) -> None:
        for path in self._checkpoints():
            state = self._load(path)
            if state is not None:
                self.rows, self.facts = state["rows"], state["facts"]
                self._seconds, self._finished = state["seconds"], state["finished"]
                self._state = state
                log.info("continuing after epoch %d of %s", state["epoch"], state["phase"])
                break
        assert self.folder is not None
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
