"""Frozen features: nearest neighbours (DN2, Bergman et al., 2020) or a linear head, no training at all.

Not in the paper; it tells what today's plain way reaches. Pooled features of a backbone, scaled to length 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from kka.detectors.contract import Evaluate
from kka.detectors.parts import in_batches, score_images, split_labels
from kka.errors import UserError
from kka.journal import Journal
from kka.networks.backbones import Backbone, BackboneSettings
from kka.settings import option
from kka.train_set import TrainSet

FEATURE_BATCH = 32
SAME = 1e-4  # features closer than this are of the same image


@dataclass(frozen=True)
class FrozenSettings(BackboneSettings):
    """Frozen features' options; not in the paper."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"cpu": {"backbone": "squeezenet1_0", "image_size": 160}}

    image_size: int = option(224, "side of the images")
    head: str = option("knn", "with anomalies: difference of two distances, or logistic", ("knn", "logistic"))
    n_neighbors: int = option(2, "neighbours whose distances are averaged")
    logistic_c: float = option(10.0, "inverse strength of the penalty of the logistic head")


def check_settings(settings: FrozenSettings) -> None:
    """Raises UserError naming the flag of the first value out of range."""
    for name in ("image_size", "n_neighbors", "logistic_c"):
        if not getattr(settings, name) > 0:
            raise UserError(f"--{name} must be above 0, it is {getattr(settings, name)}")


def neighbour_distance(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    """Mean distance to the k nearest features of the bank. (M, D), (N, D) -> (N,).

    An image that is in the bank itself is judged by the others, or all training images would seem normal.
    """
    k = min(k, len(bank) - 1) or 1
    squares = (queries**2).sum(1)[:, None] + (bank**2).sum(1) - 2 * queries @ bank.T
    found = squares.clamp(min=0).sqrt().topk(min(k + 1, len(bank)), largest=False).values
    return torch.where(found[:, :1] < SAME, found[:, -k:], found[:, :k]).mean(1)


def score_features(features: Tensor, kept: Mapping[str, Tensor], k: int) -> Tensor:
    """(N, D) features, what is kept of the training images -> (N,), by the head that was fitted."""
    if "weight" in kept:
        return features @ kept["weight"] + kept["bias"]
    queries = features.double()
    scores = neighbour_distance(kept["normals"].double(), queries, k)
    if "anomalies" in kept:
        scores = scores - neighbour_distance(kept["anomalies"].double(), queries, k)
    return scores.float()


def pooled_features(backbone: nn.Module, images: Tensor) -> Tensor:
    """(N, 3, S, S) uint8 -> (N, D) of length 1, the means of all layers."""
    means = [layer if layer.dim() == 2 else spatial_mean(layer) for layer in backbone(images)]
    return F.normalize(torch.cat(means, 1))


class Memory:
    """What is kept of the training images, by name: features, and the weights of the logistic head."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors."""
        return dict(self.tensors)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace all tensors."""
        self.tensors = dict(state)


class FeatureScorer(nn.Module):
    """Backbone and head. (N, 3, S, S) uint8 -> (N,)."""

    def __init__(self, backbone: nn.Module, kept: Mapping[str, Tensor], k: int) -> None:
        super().__init__()
        self.backbone, self.k = backbone, k
        for name, value in kept.items():
            self.register_buffer(name, value)

    def forward(self, images: Tensor) -> Tensor:
        kept = dict(self.named_buffers(recurse=False))
        return score_features(pooled_features(self.backbone, images), kept, self.k)


class Frozen:
    """Frozen features on images; the same class with and without generated anomalies."""

    def __init__(self, settings: FrozenSettings, seed: int = 0, device: str | torch.device = "cpu") -> None:
        check_settings(settings)
        self.settings, self.device = settings, torch.device(device)
        self.backbone = Backbone(settings, settings.image_size, seed=seed).to(self.device)
        self.memory = Memory()
        self.warm_start = False  # weights were loaded

    @property
    def image_size(self) -> int:
        """Side of the images that the backbone takes."""
        return self.settings.image_size

    def fit(self, train: TrainSet, journal: Journal | None = None, evaluate: Evaluate | None = None) -> None:
        """Keep the features of the training images; fit the logistic head where one is wanted.

        Raises UserError for too few images or unfit weights.
        """
        journal, s = journal or Journal(), self.settings
        normals, anomalies = split_labels(train)
        if not self.warm_start:
            self.backbone.load_pretrained()
        for epoch in journal.epochs("train", 1, {"memory": self.memory}):
            kept = {"normals": self.embed(train.resized[normals])}
            if len(anomalies):
                kept["anomalies"] = self.embed(train.resized[anomalies])
                if s.head == "logistic":
                    kept |= fit_logistic(kept["normals"], kept["anomalies"], s.logistic_c)
            self.memory.load_state_dict(kept)
            scores = score_features(kept["normals"], kept, s.n_neighbors)
            journal.record("train", epoch, loss=float(scores.mean()))

    def score(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N,), on the CPU."""
        return score_images(self.scorer(), images, self.device, FEATURE_BATCH)

    def scorer(self) -> nn.Module:
        """(N, 3, S, S) uint8 -> (N,), as one module."""
        return FeatureScorer(self.backbone, self.memory.tensors, self.settings.n_neighbors).to(self.device)

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, D) features of length 1, on the CPU."""
        return in_batches(
            lambda part: pooled_features(self.backbone, part.to(self.device)).cpu(), images, FEATURE_BATCH
        )

    def state_dict(self) -> dict[str, Any]:
        """Weights of the backbone, and what is kept of the training images."""
        return {
            **{f"backbone.{key}": value for key, value in self.backbone.state_dict().items()},
            **{f"memory.{key}": value for key, value in self.memory.state_dict().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start from these weights; raises RuntimeError if they are those of another network."""
        backbone, memory = (
            {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            for start in ("backbone.", "memory.")
        )
        if "normals" not in memory:
            raise RuntimeError("there are no features of normal images")
        self.backbone.load_state_dict(backbone, strict=True)
        self.memory.load_state_dict(memory)
        self.warm_start = True


def spatial_mean(features: Tensor) -> Tensor:
    """Mean over places: (N, C, h, w) maps, or (N, T, C) tokens, -> (N, C)."""
    return features.mean((2, 3)) if features.dim() == 4 else features.mean(1)


def fit_logistic(normals: Tensor, anomalies: Tensor, c: float) -> dict[str, Tensor]:
    """Weight (D,) and bias () of a logistic regression that scores anomalies high; both kinds weigh alike."""
    head = LogisticRegression(C=c, class_weight="balanced", max_iter=1000)
    targets = np.r_[np.zeros(len(normals)), np.ones(len(anomalies))]
    head.fit(torch.cat([normals, anomalies]).double().numpy(), targets)
    weight, bias = torch.from_numpy(head.coef_[0]), torch.from_numpy(head.intercept_)[0]
    return {"weight": weight.float(), "bias": bias.float()}
