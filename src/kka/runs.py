"""Run folders: never silently reused, locked while in use, with everything needed to repeat the run."""

import fcntl
import hashlib
import json
import logging
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kka.errors import UserError
from kka.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch", "torchvision", "numpy", "scikit-learn", "pillow", "transformers", "diffusers", "trl", "peft",
)  # fmt: skip
LOCK = "run.lock"
CONFIG = "config.json"
RESULTS = "results.json"
LOG = "log.txt"


def fingerprint(value: Any) -> str:
    """Short hash of JSON values that identifies a run's settings or data."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_results(path: Path) -> dict[str, Any]:
    """results.json without the scores of single images, which are nearly all of it and slow to parse.

    Raises UserError if it is damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
        begin = text.find('"test_scores": [')
        end = text.find("]]", begin)
        if begin >= 0 and end >= 0:
            text = f'{text[:begin]}"test_scores": null{text[end + 2 :]}'
        value = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not from a run of this program")
    return value


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; raises UserError if another process has it or the folder cannot be written.

    The lock goes with the process, so that a killed run leaves none behind.
    """
    _refuse_foreign(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise UserError(
            f"the run folder {folder} {reason}; choose another one with --xp_path or --out"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by {file.read().strip()}; wait for it or choose another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _refuse_foreign(folder: Path) -> None:
    """Raises UserError if the folder holds files but no run, so that nobody's files are touched."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"the run folder {folder} is a file; choose another one with --xp_path")
    # A killed process may leave hidden temporary files.
    others = [p.name for p in folder.iterdir() if p.name not in (LOCK, CONFIG) and not p.name.startswith(".")]
    config = folder / CONFIG
    if others and not config.exists():
        raise UserError(f"{folder} holds other files ({others[0]}) and no run; choose another folder")
    if config.exists() and not isinstance(_identity(config), dict):
        raise UserError(f"{config} is not from a run of this program; choose another folder")


def _identity(config: Path) -> Any:
    value = read_json(config)
    return value.get("identity") if isinstance(value, dict) else None


def claim(folder: Path, identity: Mapping[str, Any], overwrite: bool) -> bool:
    """Make the (locked) folder this run's own; True if the same run has finished there.

    Raises UserError, showing the difference, if it belongs to another run that has begun to train.
    """
    config = folder / CONFIG
    if not config.exists():
        return False
    difference = compare(_identity(config), json.loads(json.dumps(identity, default=str)))
    if overwrite or (difference and not _has_begun(folder)):
        clear(folder)
        return False
    if difference:
        raise UserError(
            f"{folder} holds a run with other settings ({difference}); "
            "choose another folder or give --overwrite to replace it"
        )
    return (folder / RESULTS).exists()


def _has_begun(folder: Path) -> bool:
    """Whether a run has left more there than its configuration and its log."""
    others = [p for p in folder.iterdir() if p.name not in (LOCK, CONFIG, LOG) and not p.name.startswith(".")]
    return any(p.is_dir() or p.stat().st_size for p in others)


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs, as "lr 0.1 there, 0.01 now; ..."; empty if nothing does."""
    keys = sorted({*old, *new})
    return "; ".join(f"{k} {old.get(k)} there, {new.get(k)} now" for k in keys if old.get(k) != new.get(k))


def clear(folder: Path) -> None:
    """Remove all but the lock; the config goes last, so that an interrupted clearing can be repeated."""
    for path in sorted(folder.iterdir(), key=lambda p: p.name == CONFIG):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


class LogFile(logging.FileHandler):
    """A log whose failure ends the run; Python's own prints a traceback for each line and goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        raise


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append the log of the package to a file within the block."""
    handler = LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("kka")
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()


def write_config(folder: Path, identity: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Settings (what was asked for), identity (what decides the numbers) and where the run was made."""
    config = {
        "settings": settings,
        "identity": identity,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "git_commit": git_commit(),
        "machine": machine(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    write_json(folder / CONFIG, json.loads(json.dumps(config, default=str)), indent=2)


def machine() -> dict[str, Any]:
    """Processor, threads and accelerator."""
    import torch  # seconds, which those who only look for runs do not need

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def peak_memory() -> float:
    """The most memory that this process has had, MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def git_commit() -> str | None:
    """Commit of this code, with a mark if it was changed since; None outside a checkout."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
