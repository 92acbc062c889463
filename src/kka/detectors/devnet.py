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
from kka.detectors.deviation import (
    SEEN,
    DeviationNetwork,
    DevNetHeads,
    DRAHeads,
    Features,
    Groups,
    deviation_losses,
    draw_prior,
    find_groups,
    rotate,
)
from kka.detectors.parts import SCALE_IMAGES, cycled, feature_scale, gradient_step, in_batches, score_images
from kka.errors import UserError
from kka.journal import Journal, Stateful
from kka.networks.backbones import Backbone, BackboneSettings
from kka.seeds import generator, seeded
from kka.settings import option
from kka.train_set import TrainSet

FEATURE_BATCH = 16
MAX_NORM = 1.0  # of a gradient
DECAY_EVERY = 10  # epochs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DevNetSettings(BackboneSettings):
    """DevNet's options; defaults are the official code's, preset cpu trains the scorer on kept features."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": {
            "backbone": "squeezenet1_0",
            "image_size": 224,
            "fine_tune": False,
            "lr": 2e-3,
            "feature_std": 1.0,
        },
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
    fine_tune: bool = option(True, "train the backbone; False: only what is on it, on features that are kept")
    views: int = option(
        4, "turned copies of each image whose features are kept: by AHL, and without --fine_tune"
    )
    feature_std: float = option(
        0.0, "deviation to which features are scaled, as the learning rates are made for; 0: as they are"
    )
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
    for name in ("n_epochs", "weight_decay", "feature_std", "max_angle", "test_every"):
        if getattr(s, name) < 0:
            raise UserError(f"--{name} must not be negative, it is {getattr(s, name)}")
    if s.batch_size < 2:
        raise UserError(f"--batch_size must be at least 2, half of them anomalies, it is {s.batch_size}")
    if not 0 <= s.topk <= 1:
        raise UserError(f"--topk must lie in [0, 1], it is {s.topk}")


class DevNet:
    """DevNet on images; known and generated anomalies are the labelled ones."""

    anomaly_share = 2  # one in so many images of a batch is an anomaly
    generated_are_pseudo = False

    def __init__(self, settings: Any, seed: int = 0, device: str | torch.device = "cpu") -> None:
        self._check(settings)
        self.settings, self.seed, self.device = settings, seed, torch.device(device)
        s = settings
        backbone = Backbone(s, s.image_size, seed=seed, trainable=s.fine_tune)
        backbone.check_maps()
        with seeded(seed, "init"):
            heads = self._new_heads(backbone.shapes[0][0])
        self.model = DeviationNetwork(backbone, heads, s.n_scales).to(self.device)
        self.warm_start = False  # weights were loaded: the backbone's, too

    @property
    def image_size(self) -> int:
        """Side of the images that the network takes."""
        return self.settings.image_size

    def fit(self, train: TrainSet, journal: Journal | None = None, evaluate: Evaluate | None = None) -> None:
        """Train scorer and backbone; resumes from the journal's checkpoint.

        Raises UserError for too few images or unfit weights, TrainingError if a loss is not finite.
        """
        self.fit_phase("train", train, journal or Journal(), evaluate)

    def fit_phase(
        self, phase: str, train: TrainSet, journal: Journal, evaluate: Evaluate | None = None
    ) -> None:
        """The same under another name in the journal."""
        s, model = self.settings, self.model
        groups = find_groups(train, self.generated_are_pseudo)
        if not len(groups.seen):
            log.warning(
                "%s learns from labelled anomalies, and there are none; see --n_anomaly", type(self).__name__
            )
        if not self.warm_start:
            model.backbone.load_pretrained()
            some = train.resized[groups.normals[:SCALE_IMAGES]]
            scale = feature_scale(s.feature_std, self._features_of, some, FEATURE_BATCH)
            model.feature_scale.fill_(scale)
        optimizer = torch.optim.Adam(model.parameters(), s.lr, weight_decay=s.weight_decay)
        scheduler = StepLR(optimizer, DECAY_EVERY, gamma=0.1)
        parts: dict[str, Stateful] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        kept: Features | None = None
        for epoch in journal.epochs(phase, s.n_epochs, parts):
            if not s.fine_tune:
                kept = kept or self._keep_features(train, groups)
            model.train()
            losses, stream = [], generator(self.seed, "train", epoch)
            for rows in self._batches(groups, stream):
                loss = self._loss(train, groups, kept, rows, stream)
                losses.append(gradient_step(loss, [optimizer], f"epoch {epoch}", max_norm=MAX_NORM))
            scheduler.step()
            curve = {}
            if evaluate is not None and s.test_every and (epoch + 1) % s.test_every == 0:
                self.set_references(train, groups)
                curve = {"test_auc": evaluate(self.score)}
            journal.record(phase, epoch, loss=sum(losses) / len(losses), **curve)
        if s.n_epochs or not self.warm_start:
            self.set_references(train, groups)

    @torch.no_grad()
    def _features_of(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, C, h, w) at full size."""
        return self.model.eval().pyramid(images.to(self.device))[0]

    def set_references(self, train: TrainSet, groups: Groups) -> None:
        """DevNet has none."""

    def score(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N,), on the CPU."""
        return score_images(self.scorer(), images, self.device, FEATURE_BATCH)

    def scorer(self) -> nn.Module:
        """(N, 3, S, S) uint8 -> (N,), as one module."""
        return self.model

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, C) mean of the features at full size, on the CPU."""
        return in_batches(lambda part: self._features_of(part).mean((2, 3)).cpu(), images, FEATURE_BATCH)

    def state_dict(self) -> dict[str, Any]:
        """Weights of backbone and heads, and the references."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start from these weights."""
        self.model.load_state_dict(state, strict=True)
        self.warm_start = True

    def _check(self, settings: Any) -> None:
        check_settings(settings)

    def _new_heads(self, channels: int) -> DevNetHeads | DRAHeads:
        return DevNetHeads(channels, self.settings.topk)

    def _batches(self, groups: Groups, stream: Generator) -> Iterator[Tensor]:
        """Rows of each step of an epoch, normals first; without seen anomalies all are normal."""
        s = self.settings
        n_seen = s.batch_size // self.anomaly_share if len(groups.seen) else 0
        n_normals = s.batch_size - n_seen
        normals = cycled(groups.normals, s.steps_per_epoch * n_normals, stream).split(n_normals)
        if not n_seen:
            yield from normals
            return
        seen = cycled(groups.seen, s.steps_per_epoch * n_seen, stream).split(n_seen)
        yield from map(torch.cat, zip(normals, seen, strict=True))

    def _loss(
        self, train: TrainSet, groups: Groups, kept: Features | None, rows: Tensor, stream: Generator
    ) -> Tensor:
        features = self._features(train, groups, kept, rows, stream)
        with self._autocast():
            scores = self.model.heads(features, [])[:, 0]
        labels = (groups.labels[rows] == SEEN).to(self.device)
        return deviation_losses(scores.float(), labels, draw_prior(stream)[0].to(self.device)).mean()

    def _autocast(self) -> torch.autocast:
        enabled = self.settings.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _features(
        self, train: TrainSet, groups: Groups, kept: Features | None, rows: Tensor, stream: Generator
    ) -> Features:
        if kept is not None:
            view = torch.randint(self.settings.views, (len(rows),), generator=stream)
            return [maps[view, rows].float().to(self.device) for maps in kept]
        images = self.turn(self._images(train, groups, rows, stream), stream)
        with self._autocast():
            return self.model.pyramid(images)

    def _images(self, train: TrainSet, groups: Groups, rows: Tensor, stream: Generator) -> Tensor:
        """(N, 3, S, S) in [0, 1] on the device."""
        return to_unit(train.resized[rows].to(self.device))

    def turn(self, images: Tensor, stream: Generator) -> Tensor:
        """Each image turned by up to --max_angle. (N, 3, S, S) in [0, 1] -> the same."""
        s = self.settings
        angles = s.max_angle * (2 * torch.rand(len(images), generator=stream) - 1)
        return rotate(images, angles.tolist(), s.rotation_fill)

    def _rows_kept(self, train: TrainSet, groups: Groups) -> Tensor:
        return torch.arange(len(train))

    @torch.no_grad()
    def _keep_features(self, train: TrainSet, groups: Groups) -> Features:
        """(views, N, C, h, w) for each size, in half precision on the CPU."""
        self.model.eval()
        views = []
        for view in range(self.settings.views):
            stream, sizes = generator(self.seed, "views", view), []
            for rows in self._rows_kept(train, groups).split(FEATURE_BATCH):
                images = self.turn(self._images(train, groups, rows, stream), stream)
                sizes.append([maps.half().cpu() for maps in self.model.pyramid(images)])
            views.append([torch.cat(size) for size in zip(*sizes, strict=True)])
        return [torch.stack(size) for size in zip(*views, strict=True)]
