"""SSD (Sehwag, Chiang and Mittal, ICLR 2021): contrastive training on normals, Mahalanobis distance as score.

Two random views of an image attract each other, views of other images repel (SimCLR). An image is scored by
its distance to the nearest cluster of normal features. Given known anomalies the score is the distance to the
normals less the distance to the anomalies (the paper's SSD_k; with generated anomalies it is our extension).
"""

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import scipy.linalg
import torch
from sklearn.cluster import KMeans
from sklearn.covariance import empirical_covariance, ledoit_wolf
from torch import Tensor, nn

from kka.augment import augment, normalize, to_unit
from kka.detectors.contract import Evaluate
from kka.detectors.deep_sad import SCORE_BATCH
from kka.detectors.parts import gradient_step, score_images
from kka.errors import UserError
from kka.journal import Journal, Stateful
from kka.networks.resnet import ENCODERS, ProjectedEncoder
from kka.seeds import derive_seed, generator, seeded
from kka.settings import option
from kka.train_set import TrainSet

BASE_TEMPERATURE = 0.07  # scales the loss and its gradient by temperature / 0.07, as SupCon's code
FINAL_LR = 1e-4
LR_BATCH = 512  # the batch for which lr 0.5 was chosen
TINY = 1e-10  # in the divisions of the official code
A = TypeVar("A", np.ndarray, Tensor)
COVARIANCES = {"ledoit_wolf": lambda x: ledoit_wolf(x)[0], "pinv": empirical_covariance}


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SSDSettings:
    """SSD's options; defaults are the official code's, presets small (images) and cpu (network)."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "small": {"arch": "resnet18", "batch_size": 128, "scale_lr": True, "n_epochs": None},
        "cpu": {"arch": "cifar10_LeNet", "batch_size": 128, "scale_lr": True, "n_epochs": None},
    }

    arch: str = option("resnet50", "encoder", ENCODERS)
    temperature: float = option(0.5, "temperature of the contrastive loss")
    lr: float = option(0.5, "highest learning rate")
    scale_lr: bool = option(False, "multiply --lr by the images per step / 512")
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(1e-4, "L2 penalty")
    batch_size: int = option(512, "images per training step, each in two views")
    n_epochs: int | None = option(
        500, "training epochs; None: 150 CIFAR-100, 200 Oxford-102, 300 UCM-Caption"
    )
    warmup: int = option(10, "epochs before these in which the learning rate rises")
    warmup_lr: float = option(0.01, "learning rate at their start")
    clusters: int = option(1, "clusters of normal features (k-means); the nearest counts")
    covariance: str = option(
        "ledoit_wolf", "ledoit_wolf: shrunk; pinv: pseudo-inverse (official code)", tuple(COVARIANCES)
    )
    copies: int = option(10, "augmented copies of each known anomaly for their mean and covariance")
    precision: str = option(
        "float32", "of the training steps; scores are always float32", ("float32", "bfloat16")
    )
    test_every: int = option(0, "epochs between two test AUCs for curves, never used for selection; 0: none")


def check_settings(settings: SSDSettings) -> None:
    """Raises UserError naming the flag of the first value out of range."""
    for name in ("lr", "warmup_lr", "temperature"):
        if not getattr(settings, name) > 0:
            raise UserError(f"--{name} must be above 0, it is {getattr(settings, name)}")
    for name, least in (("batch_size", 2), ("clusters", 1), ("copies", 1)):
        if getattr(settings, name) < least:
            raise UserError(f"--{name} must be at least {least}, it is {getattr(settings, name)}")
    if not 0 <= settings.momentum < 1:
        raise UserError(f"--momentum must lie in [0, 1), it is {settings.momentum}")
    for name in ("weight_decay", "n_epochs", "warmup", "test_every"):
        if (getattr(settings, name) or 0) < 0:
            raise UserError(f"--{name} must not be negative, it is {getattr(settings, name)}")


# SupCon (Khosla et al., 2020), Eq. (2); without labels NT-Xent of SimCLR
def contrastive_loss(
    first: Tensor, second: Tensor, temperature: float, labels: Tensor | None = None
) -> Tensor:
    """The mean over all views of -log p(positive | view), times temperature / BASE_TEMPERATURE.

    Args:
        first: (B, D) of length 1, the first view of each image.
        second: (B, D) the second one, or its caption.
        temperature: divides the cosine similarities.
        labels: (B,) views of the same label are positives; None: the two views of one image only.
    """
    z = torch.cat([first, second])
    labels = torch.arange(len(first), device=z.device) if labels is None else labels
    labels = labels.repeat(2)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels) & ~itself
    similarity = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    log_p = similarity.log_softmax(1).masked_fill(~positive, 0)
    return -(temperature / BASE_TEMPERATURE) * (log_p.sum(1) / positive.sum(1)).mean()


def learning_rate(step: int, n_warmup: int, n_steps: int, low: float, high: float) -> float:
    """Linear from `low` to `high` in `n_warmup` steps, then half a cosine to FINAL_LR at `n_steps`."""
    low, final = min(low, high), min(FINAL_LR, high)
    if step < n_warmup:
        return low + (high - low) * step / n_warmup
    share = (step - n_warmup) / (n_steps - n_warmup)
    return final + (high - final) * (1 + math.cos(math.pi * share)) / 2


def to_unit_length(features: A) -> A:
    """(N, D) -> rows of length 1."""
    return features / ((features * features).sum(1)[:, None] ** 0.5 + TINY)


def standardize(features: A, mean: A, std: A) -> A:
    """(N, D) features of any length -> of unit length, less the normals' mean, over their deviation."""
    return (to_unit_length(features) - mean) / (std + TINY)


def fit_gaussians(features: np.ndarray, clusters: np.ndarray, covariance: str) -> dict[str, np.ndarray]:
    """Means (K, D) and inverse covariances (K, D, D) of clusters. (N, D), (N,) numbers of clusters."""
    groups = [features[clusters == number] for number in np.unique(clusters)]
    # The pseudo-inverse is the inverse wherever there is one; otherwise directions without spread count 0.
    precisions = [scipy.linalg.pinvh(COVARIANCES[covariance](group)) for group in groups]
    return {"means": np.stack([group.mean(0) for group in groups]), "precisions": np.stack(precisions)}


# KKA Eq. (1), and its minimum over the clusters
def nearest_distance(features: Tensor, means: Tensor, precisions: Tensor) -> Tensor:
    """Squared Mahalanobis distance to the nearest of K clusters. (N, D), (K, D), (K, D, D) -> (N,)."""
    centred = [features - mean for mean in means]
    distances = [((x @ p) * x).sum(1) for x, p in zip(centred, precisions, strict=True)]
    return torch.stack(distances).amin(0)


def find_clusters(features: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    """k-means; fewer clusters where one would have a single member and so no covariance. (N, D) -> (N,)."""
    for n in range(n_clusters, 0, -1):
        labels = KMeans(n, n_init=10, max_iter=100, random_state=seed).fit_predict(features)
        if np.bincount(labels).min() > 1:
            break
    if n < n_clusters:
        log.warning("%d clusters of normals instead of %d, as one of these had a single image", n, n_clusters)
    return labels


class GaussianDistance(nn.Module):
    """Distance to the normals, less that to known anomalies. (N, 3, 32, 32) uint8 -> (N,).

    `statistics` are those of SSD; everything behind the encoder is in double precision.
    """

    def __init__(self, encoder: nn.Module, statistics: dict[str, Tensor]) -> None:
        super().__init__()
        self.encoder, self.has_known = encoder, "known_means" in statistics
        for name, value in statistics.items():
            self.register_buffer(name, value)

    def forward(self, images: Tensor) -> Tensor:
        s = dict(self.named_buffers(recurse=False))
        inputs = normalize(to_unit(images)).contiguous(memory_format=torch.channels_last)
        features = standardize(self.encoder(inputs).double(), s["mean"], s["std"])
        scores = nearest_distance(features, s["means"], s["precisions"])
        if self.has_known:
            scores = scores - nearest_distance(features, s["known_means"], s["known_precisions"])
        return scores.float()


class SSD:
    """SSD on images; with generated anomalies SSD_k."""

    def __init__(self, settings: SSDSettings, seed: int = 0, device: str | torch.device = "cpu") -> None:
        check_settings(settings)
        self.settings, self.seed, self.device = settings, seed, torch.device(device)
        with seeded(seed, "init"):
            self.model = ProjectedEncoder(settings.arch)
        self.model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.statistics: dict[str, np.ndarray] = {}
        """of the training features: mean, std, means, precisions, and known_* of known anomalies"""

    @property
    def image_size(self) -> int:
        """Side of the images."""
        return 32

    def fit(self, train: TrainSet, journal: Journal | None = None, evaluate: Evaluate | None = None) -> None:
        """Train the encoder on all images that are not labelled anomalies, then describe their features.

        Raises UserError if there are too few images, TrainingError if a loss is not finite.
        """
        self.check_train_set(train)
        self.train(train, journal or Journal(), evaluate)
        self.describe(train)

    def check_train_set(self, train: TrainSet) -> None:
        """Raises UserError for a set that this detector cannot be trained on."""
        n = int((train.semi_targets >= 0).sum())
        if n < 2:
            raise UserError(f"training needs at least 2 images that are no labelled anomalies, there is {n}")
        if self.settings.clusters > n:
            raise UserError(f"--clusters {self.settings.clusters} is more than the {n} normal images")

    def train(self, train: TrainSet, journal: Journal, evaluate: Evaluate | None = None) -> None:
        """Contrastive training of encoder and head."""
        normals = train.take(torch.nonzero(train.semi_targets >= 0).squeeze(1)).to(self.device)
        optimizer = self._make_optimizer(self.model.parameters())
        parts: dict[str, Stateful] = {"net": self.model, "optimizer": optimizer}
        for epoch in journal.epochs("train", self._n_epochs, parts):
            self.model.train()
            total = 0.0
            for batch, first, second in self._batches(normals, epoch, [optimizer]):
                a, b = self.project(first, second)
                loss = contrastive_loss(a, b, self.settings.temperature)
                total += len(batch) * gradient_step(loss, [optimizer], f"epoch {epoch}")
            curve = self._curve(train, epoch, evaluate)
            journal.record("train", epoch, loss=total / self._epoch_size(len(normals)), **curve)

    def project(self, *views: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, S, S) normalised, several times -> (B, 128) of length 1 each; one batch to BatchNorm."""
        joined = torch.cat(views).contiguous(memory_format=torch.channels_last)
        with self.autocast():
            projected = self.model(joined)
        return projected.float().split([len(view) for view in views])

    def autocast(self) -> torch.autocast:
        """The precision of training steps."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    def describe(self, train: TrainSet) -> None:
        """Mean, deviation and clusters of the normals' features, and the Gaussian of known anomalies."""
        s, known = self.settings, train.semi_targets < 0
        raw = self._features(train.resized[~known])
        unit = to_unit_length(raw)
        scale = {"mean": unit.mean(0), "std": unit.std(0)}
        features = standardize(raw, **scale)
        clusters = find_clusters(features, s.clusters, derive_seed(self.seed, "clusters") % 2**32)
        self.statistics = {**scale, **fit_gaussians(features, clusters, s.covariance)}
        if known.any():
            anomalies = train.take(torch.nonzero(known).squeeze(1)).to(self.device)
            features = standardize(self._copied_features(anomalies), **scale)
            gaussian = fit_gaussians(features, np.zeros(len(features)), s.covariance)
            self.statistics |= {f"known_{name}": value for name, value in gaussian.items()}

    def _copied_features(self, anomalies: TrainSet) -> np.ndarray:
        """Features of random views of anomalies: (copies * N, D)."""
        stream, features = generator(self.seed, "copies"), []
        for _ in range(self.settings.copies):
            views = augment(anomalies.images, anomalies.native_sizes, self.image_size, stream)
            features.append(self._features_of_unit(views))
        return np.concatenate(features)

    def score(self, images: Tensor) -> Tensor:
        """(N, 3, 32, 32) uint8 -> (N,) distance to the normals, less that to known anomalies, on the CPU."""
        return score_images(self.scorer(), images, self.device, SCORE_BATCH)

    def scorer(self) -> nn.Module:
        """(N, 3, 32, 32) uint8 -> (N,), as one module."""
        statistics = {name: torch.from_numpy(value) for name, value in self.statistics.items()}
        return GaussianDistance(self.model.encoder, statistics).to(self.device)

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, 32, 32) uint8 -> (N, D) features of the encoder, on the CPU."""
        return torch.from_numpy(self._features(images)).float()

    def state_dict(self) -> dict[str, Any]:
        """Encoder, head and statistics."""
        weights = {f"net.{name}": value for name, value in self.model.state_dict().items()}
        return weights | {name: torch.from_numpy(value) for name, value in self.statistics.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Score with these statistics, or train on from these weights."""
        weights = {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")}
        self.model.load_state_dict(weights, strict=True)
        self.statistics = {k: v.cpu().numpy() for k, v in state.items() if not k.startswith("net.")}

    @property
    def _n_epochs(self) -> int:
        return self.settings.n_epochs + self.settings.warmup if self.settings.n_epochs else 0

    def _make_optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.SGD:
        s = self.settings
        return torch.optim.SGD(parameters, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay)

    def _batches(
        self, normals: TrainSet, epoch: int, optimizers: list[torch.optim.SGD]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (indices, view, other view) of one epoch, normalised; sets the rate of each step."""
        stream = generator(self.seed, "train", epoch)
        order = torch.randperm(len(normals), generator=stream)[: self._epoch_size(len(normals))]
        batches = order.split(self.settings.batch_size)
        for step, batch in enumerate(batches):
            self._set_rate(optimizers, epoch * len(batches) + step, len(batches), len(batches[0]))
            chosen = normals.images[batch], normals.native_sizes[batch], self.image_size, stream
            yield batch, normalize(augment(*chosen)), normalize(augment(*chosen))

    def _set_rate(self, optimizers: list[torch.optim.SGD], step: int, per_epoch: int, n_images: int) -> None:
        s = self.settings
        high = s.lr * n_images / LR_BATCH if s.scale_lr else s.lr
        rate = learning_rate(step, s.warmup * per_epoch, self._n_epochs * per_epoch, s.warmup_lr, high)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate

    def _epoch_size(self, n: int) -> int:
        """Images used in an epoch: all, but for a last batch of one, which has nothing to repel."""
        return n - (n % self.settings.batch_size == 1)

    def _curve(self, train: TrainSet, epoch: int, evaluate: Evaluate | None) -> dict[str, float | None]:
        every = self.settings.test_every
        if evaluate is None or not every or (epoch + 1) % every:
            return {}
        self.describe(train)
        return {"test_auc": evaluate(self.score)}

    def _features(self, images: Tensor) -> np.ndarray:
        """(N, 3, S, S) uint8 -> (N, D) float64, of the encoder in eval mode."""
        parts = images.split(SCORE_BATCH)
        return np.concatenate([self._features_of_unit(to_unit(part.to(self.device))) for part in parts])

    @torch.no_grad()
    def _features_of_unit(self, images: Tensor) -> np.ndarray:
        """(N, 3, S, S) in [0, 1] -> (N, D) float64."""
        self.model.eval()
        inputs = normalize(images).contiguous(memory_format=torch.channels_last)
        features = torch.cat([self.model.encoder(part) for part in inputs.split(SCORE_BATCH)])
        return features.double().cpu().numpy()
