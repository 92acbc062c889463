"""What the trainings of stand-ins share: where they write, how they resume, how a checkpoint is published."""

import logging
import math
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kka.errors import TrainingError, UserError
from kka.files import read_json, user_path, write_bytes, write_json
from kka.journal import Journal
from kka.runs import claim, compare, fingerprint, locked, machine, write_config
from kka.settings import option

TRAINING = "training.json"  # in a finished checkpoint: what decided its weights, and what was measured
WARMUP = 0.05  # share of the steps until the learning rate is reached

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputSettings:
    """Where the checkpoint goes, and how it is computed."""

    out: str | None = option(None, "folder of the finished checkpoint")
    work: str | None = option(None, "folder of the unfinished training; None: <out>.training")
    overwrite: bool = option(False, "replace what other settings left in these folders")
    checkpoint_every: float = option(60.0, "seconds after which the state is saved")
    num_threads: int = option(0, "threads of PyTorch; 0: its default")


def train_into(
    output: OutputSettings, identity: dict[str, Any], train: Callable[[Journal, Path], dict[str, Any]]
) -> None:
    """Train and publish a checkpoint; a finished one is left alone, an interrupted training continued.

    Args:
        output: the folders.
        identity: all that decides the weights, as JSON values.
        train: `train(journal, folder)` trains, writes the checkpoint's files into the empty folder, which
            lies beside the journal's, and returns the figures measured.

    Raises UserError if a folder holds something else.
    """
    out, work = _folders(output)
    if _is_finished(out, identity, output.overwrite):
        log.info("%s is finished; give --overwrite to train it again", out)
        return
    if output.num_threads:
        torch.set_num_threads(output.num_threads)
    # Weights that shrink towards 0 would make a CPU compute with denormal numbers, many times slower.
    torch.set_flush_denormal(True)
    with locked(work):
        claim(work, identity, output.overwrite)
        write_config(work, identity, asdict(output))
        journal = Journal(work, output.checkpoint_every, fingerprint(identity))
        fresh = work / "checkpoint.partial"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        figures = train(journal, fresh)
        _publish(fresh, out, {"identity": identity, "figures": figures, **_circumstances(journal)})
    log.info("%s is written; %s may be removed", out, work)


def scheduled_rate(step: int, n_steps: int, peak: float) -> float:
    """Learning rate of a step: linear warm-up, then half a cosine to a hundredth of the peak."""
    warmup = max(1, round(WARMUP * n_steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, n_steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def descend(
    loss: torch.Tensor, optimizer: torch.optim.Optimizer, step: int, n_steps: int, peak: float
) -> float:
    """One step down the gradient of the loss, clipped; returns the loss.

    Raises TrainingError if it is not finite.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(f"the loss is {value} in step {step}; lower the learning rate")
    for group in optimizer.param_groups:
        group["lr"] = scheduled_rate(step, n_steps, peak)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()
    return value


def check_positive(settings: Any, *names: str) -> None:
    """Raises UserError naming the first of these flags that is not above 0."""
    for name in names:
        if not getattr(settings, name) > 0:
            raise UserError(f"--{name} must be above 0, it is {getattr(settings, name)}")


def _folders(output: OutputSettings) -> tuple[Path, Path]:
    if not output.out:
        raise UserError("--out DIR is needed: the folder of the checkpoint; see --help")
    out = user_path(output.out)
    work = user_path(output.work) if output.work else out.with_name(out.name + ".training")
    if out.resolve() == work.resolve():
        raise UserError(f"--work and --out are the same folder, {out}; choose another one for --work")
    for flag, folder in (("out", out), ("work", work)):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--{flag} {folder} cannot be written ({error.strerror}); choose another folder"
            ) from None
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--{flag} {folder} is a file; choose another folder")
    return out, work


def _is_finished(out: Path, identity: dict[str, Any], overwrite: bool) -> bool:
    if not out.exists() or not any(out.iterdir()) or overwrite:
        return False
    if not (out / TRAINING).exists():
        raise UserError(f"--out {out} holds other files; choose another folder or give --overwrite")
    there = read_json(out / TRAINING)
    difference = compare(there.get("identity", {}) if isinstance(there, dict) else {}, identity)
    if difference:
        raise UserError(
            f"--out {out} holds a checkpoint of other settings ({difference}); choose another folder or "
            "give --overwrite to replace it"
        )
    return True


def _publish(fresh: Path, out: Path, record: dict[str, Any]) -> None:
    """Move the finished folder into its place; the record goes in first, so that it is never missing."""
    write_json(fresh / TRAINING, record, indent=2)
    write_bytes(fresh / "README.md", _card(record).encode())
    for path in fresh.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # some writers make files that others cannot read
    if out.exists():
        shutil.rmtree(out)
    try:
        os.replace(fresh, out)
    except OSError:  # another file system
        shutil.move(fresh, out)


def _circumstances(journal: Journal) -> dict[str, Any]:
    phases = dict.fromkeys(row["phase"] for row in journal.rows)
    return {
        "command": shlex.join(["python", *_without_places(sys.argv)]),
        "minutes": {phase: round(journal.seconds(phase) / 60, 1) for phase in phases},
        "machine": {**machine(), "system": platform.system()},  # published: no word of whose machine it was
    }


def _without_places(words: list[str]) -> list[str]:
    """A command without the folders of this machine: the unfinished training's, those above the others."""
    kept = [w for i, w in enumerate(words) if w != "--work" and words[max(0, i - 1)] != "--work"]
    return [
        os.path.relpath(w) if i == 0 else Path(w).name if os.path.isabs(w) else w for i, w in enumerate(kept)
    ]


def _card(record: dict[str, Any]) -> str:
    identity, figures = record["identity"], record["figures"]
    minutes = ", ".join(f"{phase} {value} minutes" for phase, value in record["minutes"].items())
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return (
        f"# {identity['title']}\n\n"
        "A stand-in, trained in minutes on a CPU, so that the loop runs where there is no network, GPU or "
        "data. It knows nothing but its training set.\n\n"
        f"Made by `{record['command']}` on {record['machine']['threads']} thread(s) of "
        f"{record['machine']['system']}: {minutes}.\n\n"
        f"| Figure | Value |\n|---|---|\n{rows}\n\n"
        f"All settings are in `{TRAINING}`.\n"
    )
