"""A trained detector, found by a path and checked: what scores new images."""

import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kka.datasets.images import content_digest, decode
from kka.datasets.layout import Images
from kka.datasets.native import Native
from kka.detectors import DETECTORS
from kka.detectors.contract import Detector
from kka.errors import UserError
from kka.files import read_json
from kka.results import MODEL, MODEL_CARD, MODEL_VERSION
from kka.run import load_detector, load_native
from kka.runs import CONFIG, RESULTS
from kka.settings import check_keys

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """The detector of a finished run, and what its scores mean."""

    run: Path
    name: str
    """the detector's"""
    detector: Detector
    threshold: float
    """of Eq. (6): an image is normal if its score is below"""
    bgr: bool
    """whether it was trained with red and blue swapped"""
    native: Native | None
    """what generated images were made like in training; None: they stayed as they were"""


def open_model(path: Path, device: torch.device) -> Trained:
    """The trained detector that --model means; raises UserError if there is none that can be used."""
    return open_run(find_run(path), device)


def open_run(run: Path, device: torch.device, flag: str = "--model") -> Trained:
    """The trained detector of a run folder; raises UserError naming the flag if it cannot be used."""
    if not is_finished(run):
        raise UserError(f"{flag} {run} is no finished run; give the folder of one, of src/main.py")
    try:
        card = read_json(run / MODEL_CARD)
        _check_card(card)
        detector, size = load_detector(run, device), card["image_size"]
        if detector.image_size != size:
            raise UserError(
                f"{MODEL_CARD} says images of {size} px, the detector takes {detector.image_size}"
            )
        detector.score(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        bgr = card["channels"] == "BGR"
        return Trained(run, card["detector"], detector, float(card["threshold"]), bgr, load_native(run))
    except (UserError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = str(error).splitlines()[0] if str(error) else ""
        reason = what if isinstance(error, UserError) else f"{type(error).__name__}: {what}"
        raise UserError(
            f"{flag} {run} is damaged or of another version of this program ({reason}); train it anew"
        ) from None


def views(run: Path, detector: Detector, images: Images, name: str) -> Tensor:
    """(N, 3, S, S) uint8: what the run's detector is given; generated images made like its normals."""
    decoded = decode(
        images.paths, content_digest(images.paths), 0, detector.image_size, name=name,
        native=load_native(run), generated=images.generated,
    )  # fmt: skip
    return decoded.resized.flip(1) if read_json(run / MODEL_CARD)["channels"] == "BGR" else decoded.resized


def find_run(path: Path) -> Path:
    """The finished run at a path: a run folder, a round of a loop, or a loop, whose last round counts.

    Raises UserError for anything else, naming the seeds of a folder of several.
    """
    if not path.is_dir():
        there = f"is a file; give its folder, {path.parent}" if path.exists() else "does not exist"
        raise UserError(f"--model {path} {there}")
    if is_finished(path):
        return path
    rounds = sorted(path.glob("round_*/detector"), key=lambda folder: _number(folder.parent))
    inner = [folder for folder in [*rounds, path / "detector"] if is_finished(folder)]
    if inner:
        log.info("--model %s is not a run itself; taking %s", path, inner[-1])
        return inner[-1]
    several = [folder for kind in ("seed_*", "class_*") for folder in path.glob(kind) if folder.is_dir()]
    if several:
        several.sort(key=_number)
        names = ", ".join(folder.name for folder in several)
        raise UserError(f"--model {path} holds several runs, {names}; give one of them, --model {several[0]}")
    if (path / CONFIG).exists():
        raise UserError(f"--model {path} is no finished run; give the command that made it once more")
    raise UserError(f"--model {path} is no run folder; it has no {MODEL_CARD}")


def is_finished(folder: Path) -> bool:
    """Whether a run has left its model and, at last, its results."""
    return all((folder / name).is_file() for name in (MODEL, MODEL_CARD, RESULTS))


def _number(folder: Path) -> int:
    """5 of seed_5 or round_5."""
    digits = re.findall(r"\d+", folder.name)
    return int(digits[-1]) if digits else -1


def _check_card(card: Any) -> None:
    """Raises UserError or KeyError for a model.json that this program did not write."""
    if not isinstance(card, dict):
        raise UserError(f"{MODEL_CARD} is no object")
    version = card.get("version", 1)
    if version != MODEL_VERSION:
        raise UserError(f"{MODEL_CARD} is of version {version}, this program reads {MODEL_VERSION}")
    if card["detector"] not in DETECTORS:
        raise UserError(f"there is no detector {card['detector']!r}")
    if not math.isfinite(card["threshold"]):
        raise UserError(f"its threshold is {card['threshold']}")
    check_keys(card["settings"], DETECTORS[card["detector"]][0])
