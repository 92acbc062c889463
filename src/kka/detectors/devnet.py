"""DevNet on images (Pang et al., 2021): a few known anomalies must score far above a prior of normal scores.

A backbone, a 1x1 convolution that scores each place, and the mean of the most deviating places at two sizes.
Differences from the official code are in docs/implementation_details.md.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import StepLR

from kka.augment import to_unit
from kka.detectors.contract import Evaluate
from kka.detectors.deviation import MARGIN, deviation_losses, draw_references, pyramid, rotate, top_mean
from kka.detectors.parts import cycled, gradient_step, in_batches, split_labels
from kka.errors import UserError
from kka.journal import Journal, Stateful
from kka.networks.backbones import Backbone, BackboneSettings
from kka.seeds import generator, seeded
from kka.settings import option
from kka.train_set import TrainSet

FEATURE_BATCH = 16
MAX_NORM = 1.0  # of a gradient
DECAY_EVERY = 10  # epochs

Features = list[Tensor]
"""One (N, C, h, w) for each size of the images"""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DevNetSettings(BackboneSettings):
    """DevNet's options; defaults are the official code's, preset cpu trains the scorer on kept features."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": {"backbone": "squeezenet1_0", "image_size": 224, "fine_tune": False, "lr": 2e-3},
    }

    backbone: str = option("resnet18", "network of torchvision that gives the features")
    image_size: int = option(448, "side of the images")
    n_scales: int = option(2, "sizes at which an image is scored: full, half, ...")
    topk: float = option(0.1, "share of the places whose scores are averaged; 0: all, without absolute value")
    n_epochs: int = option(50, "training epochs")
    steps_per_epoch: int = option(20, "training steps of an epoch")
    batch_size: int = option(48, "images per step, half of them known anomalies")
    lr: float = option(2e-4, "learning rate, a tenth after every tenth epoch")
    weight_decay: float = option(1e-5, "L2 penalty")
    fine_tune: bool = option(True, "train the backbone; False: only the scorer, on features that are kept")
    views: int = option(4, "turned copies of each image whose features are kept, without --fine_tune")
    max_angle: float = option(180.0, "training images are turned by up to this angle, in degrees")
    rotation_fill: str = option(
        "reflection", "corners of a turned image (official code: zeros)", ("reflection", "zeros")
    )
    precision: str = option(
        "float32", "of the training steps; scores are always float32", ("float32", "bfloat16")
    )
    test_every: int = option(0, "epochs between two test AUCs for curves, never used for selection; 0: none")


def check_settings(settings: DevNetSettings) -> None:
    """Raises UserError naming the flag of the first value out of range."""
    s = settings
    for name in ("image_size", "n_scales", "steps_per_epoch", "lr", "views"):
        if not getattr(s, name) > 0:
            raise UserError(f"--{name} must be above 0, it is {getattr(s, name)}")
    for name in ("n_epochs", "weight_decay", "max_angle", "test_every"):
        if getattr(s, name) < 0:
            raise UserError(f"--{name} must not be negative, it is {getattr(s, name)}")
    if s.batch_size < 2:
        raise UserError(f"--batch_size must be at least 2, half of them anomalies, it is {s.batch_size}")
    if not 0 <= s.topk <= 1:
        raise UserError(f"--topk must lie in [0, 1], it is {s.topk}")


class DeviationNetwork(nn.Module):
    """Backbone and scorer."""

    def __init__(self, settings: DevNetSettings, seed: int) -> None:
        super().__init__()
        s = settings
        self.backbone = Backbone(s, s.image_size, seed=seed, trainable=s.fine_tune)
        self.backbone.check_maps()
        with seeded(seed, "init"):
            self.scorer = nn.Conv2d(self.backbone.shapes[0][0], 1, 1)


def image_scores(scorer: nn.Module, features: Features, topk: float) -> Tensor:
    """Mean over the sizes of the mean of the most deviating places. -> (N,)."""
    return torch.stack([top_mean(scorer(maps), topk) for maps in features]).mean(0)


class DevNet:
    """DevNet on images; known and generated anomalies are the labelled ones."""

    def __init__(self, settings: DevNetSettings, seed: int = 0, device: str | torch.device = "cpu") -> None:
        check_settings(settings)
        self.settings, self.seed, self.device = settings, seed, torch.device(device)
        self.model = DeviationNetwork(settings, seed).to(self.device)
        self.warm_start = False  # weights were loaded: the backbone's, too

    @property
    def image_size(self) -> int:
        """Side of the images that the network takes."""
        return self.settings.image_size

    def fit(self, train: TrainSet, journal: Journal | None = None, evaluate: Evaluate | None = None) -> None:
        """Train scorer and backbone; resumes from the journal's checkpoint.

        Raises UserError for too few images or unfit weights, TrainingError if a loss is not finite.
        """
        journal, s, model = journal or Journal(), self.settings, self.model
        normals, anomalies = split_labels(train)
        if not len(anomalies):
            log.warning("DevNet learns from labelled anomalies, and there are none; see --n_anomaly")
        if not self.warm_start:
            model.backbone.load_pretrained()
        optimizer = torch.optim.Adam(model.parameters(), s.lr, weight_decay=s.weight_decay)
        scheduler = StepLR(optimizer, DECAY_EVERY, gamma=0.1)
        parts: dict[str, Stateful] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        kept: Features | None = None
        for epoch in journal.epochs("train", s.n_epochs, parts):
            if not s.fine_tune:
                kept = kept or self._keep_features(train)
            model.train()
            losses = []
            stream = generator(self.seed, "train", epoch)
            for rows in self._batches(normals, anomalies, stream):
                features = self._features(train, kept, rows, stream)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=s.precision == "bfloat16"):
                    scores = image_scores(model.scorer, features, s.topk)
                labels = (train.semi_targets[rows] < 0).to(self.device)
                references = draw_references(stream).to(self.device)
                loss = deviation_losses(scores.float(), labels, references, MARGIN).mean()
                where = f"epoch {epoch} of training"
                losses.append(gradient_step(loss, [optimizer], where, max_norm=MAX_NORM))
            scheduler.step()
            curve = {}
            if evaluate is not None and s.test_every and (epoch + 1) % s.test_every == 0:
                curve = {"test_auc": evaluate(self.score)}
            journal.record("train", epoch, loss=sum(losses) / len(losses), **curve)

    def score(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N,), on the CPU."""
        self.model.eval()

        def scores(part: Tensor) -> Tensor:
            features = pyramid(self.model.backbone, part.to(self.device), self.settings.n_scales)
            return image_scores(self.model.scorer, features, self.settings.topk).cpu()

        return in_batches(scores, images, FEATURE_BATCH)

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, C) mean of the features at full size, on the CPU."""
        self.model.eval()
        return in_batches(
            lambda part: pyramid(self.model.backbone, part.to(self.device), 1)[0].mean((2, 3)).cpu(),
            images,
            FEATURE_BATCH,
        )

    def state_dict(self) -> dict[str, Any]:
        """Weights of backbone and scorer."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start from these weights."""
        self.model.load_state_dict(state, strict=True)
        self.warm_start = True

    def _batches(self, normals: Tensor, anomalies: Tensor, stream: Generator) -> Iterator[Tensor]:
        """Rows of each step of an epoch, half of them anomalies; without any, all are normal."""
        s = self.settings
        n_anomalies = s.batch_size // 2 if len(anomalies) else 0
        n_normals = s.batch_size - n_anomalies
        chosen = cycled(normals, s.steps_per_epoch * n_normals, stream).split(n_normals)
        if not n_anomalies:
            yield from chosen
            return
        known = cycled(anomalies, s.steps_per_epoch * n_anomalies, stream).split(n_anomalies)
        yield from map(torch.cat, zip(chosen, known, strict=True))

    def _features(self, train: TrainSet, kept: Features | None, rows: Tensor, stream: Generator) -> Features:
        s = self.settings
        if kept is not None:
            view = torch.randint(s.views, (len(rows),), generator=stream)
            return [maps[view, rows].float().to(self.device) for maps in kept]
        images = self._turned(train.resized[rows], stream)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=s.precision == "bfloat16"):
            return pyramid(self.model.backbone, images, s.n_scales)

    def _turned(self, images: Tensor, stream: Generator) -> Tensor:
        """(N, 3, S, S) uint8 -> turned ones in [0, 1], on the device."""
        s = self.settings
        angles = s.max_angle * (2 * torch.rand(len(images), generator=stream) - 1)
        return rotate(to_unit(images.to(self.device)), angles.tolist(), s.rotation_fill)

    @torch.no_grad()
    def _keep_features(self, train: TrainSet) -> Features:
        """(views, N, C, h, w) for each size, in half precision on the CPU."""
        s, views = self.settings, []
        for view in range(s.views):
            stream = generator(self.seed, "views", view)
            batches = [
                pyramid(self.model.backbone, self._turned(part, stream), s.n_scales)
                for part in train.resized.split(FEATURE_BATCH)
            ]
            views.append([torch.cat(size).half().cpu() for size in zip(*batches, strict=True)])
        return [torch.stack(size) for size in zip(*views, strict=True)]
