"""Tiny data sets in the official layout, and main.py on them."""

import contextlib
import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main
from kka.datasets import ucm_caption
from kka.datasets.layout import ANOMALY_FOLDER, NAME_LIST, DataSetSpec, write_class_folder
from kka.errors import run_script

MAIN = Path(main.__file__)
TIMES = ("seconds", "train_time", "test_time", "peak_mib")
DAMAGED = ("truncated", "empty", "html", "noise")
USER_DICT = {"0": [1, 0], "1": [1, 2, 3]}


def draw(rng: np.random.Generator, bright: bool, size: tuple[int, int] | None = None) -> Image.Image:
    """Noise of 20 to 40 px; bright pictures overlap a little with dark ones."""
    width, height = size or map(int, rng.integers(20, 41, 2))
    pixels = rng.integers(0, 100, (height, width, 3)) + rng.integers(0, 90) + 60 * bright
    return Image.fromarray(pixels.astype(np.uint8))


def write_toy_set(
    root: Path,
    spec: DataSetSpec = ucm_caption.SPEC,
    classes: tuple[int, ...] = (1, 2, 3, 4),
    n_train: int = 10,
    n_test: int = 4,
    n_anomalies: int = 8,
) -> Path:
    """Write the official layout: the first class is dark, other classes and folder 0 are bright."""
    for class_id in classes:
        bright = class_id != classes[0]
        write_toy_class(root / str(class_id), spec, {"train": n_train, "test": n_test}, bright)
    if n_anomalies:
        write_toy_class(root / str(ANOMALY_FOLDER), spec, {"train": n_anomalies}, bright=True)
    return root


def write_toy_class(folder: Path, spec: DataSetSpec, counts: dict[str, int], bright: bool) -> None:
    """One class folder; names do not sort in the order of the list."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(int(folder.name))
    for split, count in counts.items():
        names = [f"{split}_{(7 * k) % 31:02d}.png" for k in range(count)]
        captions = [[f"caption {i} of {name}" for i in range(spec.captions_per_image)] for name in names]
        for name in names:
            draw(rng, bright).save(folder / name)
        write_class_folder(folder, split, names, captions, spec)


def write_toy_folder(root: Path, kinds: tuple[str, ...] = ("scratch",), n_anomalies: int = 0) -> Path:
    """MVTec's tree: dark images in good, bright ones in each kind of anomaly and in folder 0."""
    counts = {"train/good": 8, "test/good": 4, **{f"test/{kind}": 3 for kind in kinds}, "0": n_anomalies}
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        for k in range(count):
            path = root / name / f"{k:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(rng, bright="good" not in name).save(path)
    return root


def write_damaged(path: Path, kind: str) -> Path:
    """A file that is no whole image, whatever it is called."""
    jpeg = io.BytesIO()
    draw(np.random.default_rng(3), bright=True, size=(40, 40)).save(jpeg, "jpeg")
    noise = np.random.default_rng(4).bytes(300)
    html = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    contents = {"truncated": jpeg.getvalue()[:-400], "empty": b"", "html": html, "noise": noise}
    path.write_bytes(contents[kind])
    return path


def image_path(root: Path, class_id: int = 1, k: int = 0, split: str = "train") -> Path:
    """The k-th file of a class's list."""
    folder = root / str(class_id)
    return folder / read_json(folder / NAME_LIST[split])[k]


@dataclass(frozen=True)
class Outcome:
    """How a call of main.py ended."""

    code: int
    stderr: str
    """without the log"""
    log: str


def run_main(words: list[str]) -> Outcome:
    """main.py in this process."""
    return call_script(main.main, ["main.py", *words])


def call_script(script: Callable[[], None], words: list[str]) -> Outcome:
    """A script's main function in this process."""
    stderr, log, code = io.StringIO(), io.StringIO(), 0
    logger, handler = logging.getLogger("kka"), logging.StreamHandler(log)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", words)
        level = logger.level
        logger.setLevel(logging.INFO)  # also forgets which loggers were silent
        logger.addHandler(handler)
        try:
            run_script(script)
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
    return Outcome(code, stderr.getvalue(), log.getvalue())


def run_command(words: list[str]) -> Outcome:
    """main.py in a process of its own; its log is in stderr."""
    done = subprocess.run([sys.executable, str(MAIN), *words], capture_output=True, text=True, timeout=120)
    return Outcome(done.returncode, done.stderr, "")


def toy_flags(root: Path, folder: Path | None, **flags: object) -> list[str]:
    """The words of a small run of `write_toy_set`; a flag of None is left out, a list gives several words."""
    small: dict[str, object] = {
        "dataset_name": "ucm_caption", "data_path": root, "xp_path": folder, "device": "cpu",
        "user_dict": json.dumps(USER_DICT), "n_epochs": 1, "ae_n_epochs": 1, "batch_size": 8,
        "ae_batch_size": 8, "num_threads": 1, "n_jobs_dataloader": 1,
    }  # fmt: skip
    words = []
    for name, value in {**small, **flags}.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run_toy(root: Path, folder: Path | None, **flags: object) -> Outcome:
    """`run_main` with `toy_flags`."""
    return run_main(toy_flags(root, folder, **flags))


def refused(outcome: Outcome, *parts: object, code: int = 2) -> None:
    """Assert that the call ended with one sentence that has these parts."""
    assert outcome.code == code, outcome
    assert outcome.stderr.count("\n") == 1, outcome.stderr
    assert outcome.stderr.startswith("error: ")
    for part in parts:
        assert str(part) in outcome.stderr


def read_json(path: Path) -> object:
    """JSON of a file, read without the code under test."""
    return json.loads(path.read_text(encoding="utf-8"))


def results(folder: Path) -> dict[str, object]:
    """results.json without its times."""
    return {key: value for key, value in read_json(folder / "results.json").items() if key not in TIMES}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content of all files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
