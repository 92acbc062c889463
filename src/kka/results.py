"""What a finished run leaves behind: scores, hard and easy anomalies, the model."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from kka.augment import IMAGENET_MEAN, IMAGENET_STD
from kka.errors import TrainingError, UserError
from kka.files import read_json, write_bytes, write_json
from kka.metrics import aupr, auroc

MODEL, MODEL_CARD = "model.safetensors", "model.json"
HARD, EASY = "d_samples.json", "e_samples.json"
MODEL_VERSION = 1  # of what these two mean; a model without a version is of the first

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """Generated anomalies with their scores and the split of Eq. (6)."""

    index: tuple[int, ...]
    """place of each image in the list of the anomaly folder"""
    captions: tuple[tuple[str, ...], ...]
    """captions of each image"""
    scores: np.ndarray
    """(N,) higher = more anomalous"""
    hard: np.ndarray
    """(N,) bool, Eq. (6)"""
    easy: np.ndarray
    """positions of the easy ones"""
    threshold: float
    """score of the detector below which an image is hard"""

    def counts(self) -> dict[str, Any]:
        """For results.json."""
        n_hard, n_easy = int(self.hard.sum()), len(self.easy)
        return {
            "threshold": self.threshold,
            "n_generated": len(self.index),
            "n_hard": n_hard,
            "n_easy": n_easy,
        }

    def rows(self, positions: np.ndarray) -> list[Any]:
        """The official format: [[index, label, score], [caption, ...]] for each position."""
        return [
            [[self.index[i], 1, float(self.scores[i])], list(self.captions[i])] for i in map(int, positions)
        ]


def write_split(folder: Path, split: Scored) -> None:
    """Write d_samples.json (hard) and e_samples.json (easy); they list generated images only."""
    write_json(folder / HARD, split.rows(np.flatnonzero(split.hard)))
    write_json(folder / EASY, split.rows(split.easy))


def read_rows(path: Path) -> list[tuple[int, float, list[Any]]]:
    """Index, score and captions of each row of d_samples.json or e_samples.json.

    Raises UserError naming file and place of a row that is none.
    """
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path} must hold a list, it holds a {type(rows).__name__}")
    found = []
    for place, row in enumerate(rows):
        try:
            (index, _label, score), captions = row
            if not isinstance(index, int) or index < 0:
                raise ValueError
            found.append((index, float(score), captions if isinstance(captions, list) else [captions]))
        except (TypeError, ValueError):
            raise UserError(
                f"{path}: item {place} must be [[index, label, score], [captions]]; make the run again"
            ) from None
    return found


def test_metrics(targets: tuple[int, ...], scores: Tensor) -> dict[str, Any]:
    """AUC, average precision and scores of the test set under the official keys, in test order."""
    rows = [
        [i, target, score] for i, (target, score) in enumerate(zip(targets, scores.tolist(), strict=True))
    ]
    values = scores.numpy()
    return {"test_auc": auroc(targets, values), "test_aupr": aupr(targets, values), "test_scores": rows}


def check_scores(name: str, *scores: Tensor) -> None:
    """Raises TrainingError if the scores of a detector are not finite or, rounded to 1e-8, all the same."""
    values = torch.cat(scores).double()
    if not values.isfinite().all():
        raise TrainingError("some scores are not finite; lower the learning rate")
    if len(values) > 1 and len(values.mul(1e8).round().unique()) < 2:
        raise TrainingError(
            f"{'hypersphere' if name == 'deep_sad' else name} collapsed: all images have the same score, so "
            "no AUC is reported; lower the learning rate, or add generated anomalies"
        )


def save_model(folder: Path, state: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Write the weights as safetensors and beside them what is needed to use them."""
    weights = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    write_bytes(folder / MODEL, safetensors.torch.save(weights))
    normalization = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    card = {"version": MODEL_VERSION, **card, "normalization": normalization}
    write_json(folder / MODEL_CARD, card, indent=2)


def digest_weights(state: dict[str, Tensor]) -> str:
    """Short hash of a model's tensors."""
    return hashlib.sha256(safetensors.torch.save(state)).hexdigest()[:12]


def load_weights(path: Path, flag: str = "--load_model: ") -> dict[str, Tensor]:
    """Weights and centre from a run folder, a model.safetensors or an official model.tar.

    Raises UserError if there is no model or it is damaged; never unpickles foreign objects.
    """
    path = path / MODEL if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{flag}{path} does not exist; give a run folder, model.safetensors or model.tar")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(path.read_bytes())
        official = torch.load(path, map_location="cpu", weights_only=True)
        weights = {f"net.{key}": value for key, value in official["net_dict"].items()}
        return {**weights, "center": torch.tensor(official["c"])}
    except Exception as error:  # the two libraries raise many kinds for a damaged file
        raise UserError(f"{flag}{path} holds no model of this project ({type(error).__name__})") from None


def report(results: Mapping[str, Any]) -> None:
    """Log what came of a run."""
    if results["test_auc"] is None:
        log.info("test AUC n/a: the test set has one class only")
    else:
        log.info(
            "test AUC %.2f %%, average precision %.2f %%",
            *(100 * results[k] for k in ("test_auc", "test_aupr")),
        )
    if results["n_generated"]:
        log.info("generated anomalies: %d hard, %d easy", results["n_hard"], results["n_easy"])
    log.info("training %.1f s, testing %.2f s", results["train_time"], results["test_time"])
