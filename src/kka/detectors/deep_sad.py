"""Deep SAD (Ruff et al., ICLR 2020), the confusion evaluator of KKA (Eq. 5).

An encoder without biases maps normal images near a fixed centre c and labelled anomalies away from it; the
score is the squared distance to c. Implementation details are numbered in docs/implementation_details.md.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR

from kka.augment import augment, luma, normalize, to_unit
from kka.detectors.contract import Evaluate
from kka.detectors.parts import gradient_step, score_images
from kka.errors import UserError
from kka.journal import Journal, Stateful
from kka.networks.backbones import BackboneSettings, PooledBackbone, check_backbone
from kka.networks.lenet import NETWORKS, Autoencoder, build_network
from kka.seeds import generator, seeded
from kka.settings import option
from kka.train_set import TrainSet

EPS = 1e-6  # in the inverse of Eq. (5)
MIN_CENTER = 0.1  # no coordinate of c is closer to 0: a bias-free network would reach it by zero weights
SCORE_BATCH = 256
LARGE_SCORE_BATCH = 32  # of a torchvision network
REP_DIM = 128  # dimensions of the sphere of a torchvision network, as of the LeNet's
ADVICE = "lower --lr or --eta"
OPTIMIZERS = ("adam", "amsgrad")

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class DeepSADSettings:
    """Deep SAD's options; names are the official code's, defaults are the paper's."""

    net_name: str = option(
        "cifar10_LeNet", f"network: {', '.join(NETWORKS)}, or any of torchvision, e.g. resnet18"
    )
    net_size: int = option(224, "side of the images for a network of torchvision; a LeNet has its own")
    fine_tune: bool = option(
        True, "train a network of torchvision; False: only a linear map of its frozen features"
    )
    backbone_weights: str | None = option(
        None, "file of its ImageNet weights; None: torchvision's, downloaded once"
    )
    eta: float = option(1.0, "weight of the labelled images")
    optimizer_name: str = option("adam", "optimizer of the detector", OPTIMIZERS)
    lr: float = option(1e-4, "learning rate of the detector")
    n_epochs: int | None = option(
        None, "training epochs; None: 150 CIFAR-100, 200 Oxford-102, 300 UCM-Caption"
    )
    lr_milestone: tuple[int, ...] = option((50,), "epochs after which the learning rate drops to a tenth")
    batch_size: int = option(32, "images per training step")
    weight_decay: float = option(0.5e-6, "L2 penalty (lambda) of the detector")
    pretrain: bool = option(
        True, "start from the encoder of an autoencoder; a network of torchvision, from its ImageNet weights"
    )
    ae_optimizer_name: str = option("adam", "optimizer of the autoencoder", OPTIMIZERS)
    ae_lr: float = option(1e-4, "learning rate of the autoencoder")
    ae_n_epochs: int = option(200, "epochs of the autoencoder")
    ae_lr_milestone: tuple[int, ...] = option((), "epochs after which its learning rate drops to a tenth")
    ae_batch_size: int = option(32, "images per step of the autoencoder")
    ae_weight_decay: float = option(0.5e-3, "L2 penalty of the autoencoder")
    official_pretrain: bool = option(
        False, "pre-train as the official code: normalised target, weights dropped"
    )
    center_from: str = option("normals", "images whose mean is the centre c", ("normals", "all"))
    drop_last: bool = option(False, "drop the last incomplete batch of an epoch, as the official code")
    precision: str = option(
        "float32", "of the training steps; scores are always float32", ("float32", "bfloat16")
    )
    test_every: int = option(0, "epochs between two test AUCs for curves, never used for selection; 0: none")


def check_settings(settings: DeepSADSettings) -> None:
    """Raises UserError naming the flag of the first value out of range."""
    if settings.net_name not in NETWORKS:
        check_backbone(BackboneSettings(settings.net_name), flag="net_name", others=tuple(NETWORKS))
        if settings.backbone_weights is not None and not settings.pretrain:
            raise UserError(
                "--pretrain False leaves the weights of --net_name random, so that --backbone_weights means "
                "nothing; leave one of them out"
            )
    for name in ("lr", "ae_lr", "eta", "net_size"):
        if not getattr(settings, name) > 0:
            raise UserError(f"--{name} must be above 0, it is {getattr(settings, name)}")
    for name in ("batch_size", "ae_batch_size"):
        if getattr(settings, name) < 2:
            raise UserError(
                f"--{name} must be at least 2 (batch normalisation), it is {getattr(settings, name)}"
            )
    for name in ("weight_decay", "ae_weight_decay", "n_epochs", "ae_n_epochs", "test_every"):
        if (getattr(settings, name) or 0) < 0:
            raise UserError(f"--{name} must not be negative, it is {getattr(settings, name)}")
    if any(epoch < 0 for epoch in (*settings.lr_milestone, *settings.ae_lr_milestone)):
        raise UserError(
            "--lr_milestone and --ae_lr_milestone are epochs; 0 is the start, none at all is no drop"
        )


# Eq. (5), the part of one image
def deep_sad_loss(distances: Tensor, semi_targets: Tensor, eta: float = 1.0) -> Tensor:
    """(N,) squared distances, (N,) semi targets -> (N,) losses: d if unlabelled, else eta (d + eps)^semi."""
    labelled = eta * (distances + EPS) ** semi_targets.to(distances)
    return torch.where(semi_targets == 0, distances, labelled)


def move_from_zero(center: Tensor) -> Tensor:
    """(D,) -> (D,) with every coordinate at least MIN_CENTER from 0, an exact 0 included."""
    sign = torch.where(center < 0, -1.0, 1.0)
    return torch.where(center.abs() < MIN_CENTER, sign * MIN_CENTER, center)


def reconstruction_error(reconstructions: Tensor, targets: Tensor) -> Tensor:
    """(N, C, H, W) twice -> (N,) mean squared error."""
    return (reconstructions - targets).square().flatten(1).mean(1)


class Hypersphere(nn.Module):
    """An encoder and the centre of its sphere; forward gives squared distances."""

    center: Tensor
    net: Any

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("center", torch.zeros(self.net.rep_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) normalised -> (N,)."""
        return (self.net(x) - self.center).square().sum(1)


class ImageDistance(nn.Module):
    """The same on images as they are, (N, 3, H, W) uint8 -> (N,)."""

    def __init__(self, model: Hypersphere) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(normalize(unit_images(images, self.model.net.channels)))


def unit_images(images: Tensor, channels: int) -> Tensor:
    """uint8 -> float in [0, 1], channels last in memory; 1 channel is the brightness."""
    return shown(to_unit(images), channels).contiguous(memory_format=torch.channels_last)


def shown(images: Tensor, channels: int) -> Tensor:
    """(N, 3, H, W) -> what a network of 1 or 3 channels sees."""
    return luma(images) if channels == 1 else images


class DeepSAD:
    """Deep SAD on images; the same class with and without generated anomalies."""

    def __init__(self, settings: DeepSADSettings, seed: int = 0, device: str | torch.device = "cpu") -> None:
        check_settings(settings)
        self.settings, self.seed, self.device = settings, seed, torch.device(device)
        self.autoencoder: Autoencoder | None = None
        with seeded(seed, "init"):
            if settings.net_name in NETWORKS:
                self.autoencoder = _channels_last(Autoencoder(settings.net_name).to(self.device))
                net: nn.Module = build_network(settings.net_name)
            else:
                backbone = BackboneSettings(settings.net_name, settings.backbone_weights)
                net = PooledBackbone(backbone, settings.net_size, REP_DIM, settings.fine_tune, seed)
            self.model = _channels_last(Hypersphere(net).to(self.device))
        self.score_batch = SCORE_BATCH if self.autoencoder else LARGE_SCORE_BATCH
        self.warm_start = False  # weights and centre were loaded: no pre-training, no new centre

    @property
    def image_size(self) -> int:
        """Side of the images that the network takes."""
        return self.model.net.size

    def fit(self, train: TrainSet, journal: Journal | None = None, evaluate: Evaluate | None = None) -> None:
        """Pre-train the encoder, fix the centre, train; resumes from the journal's checkpoint.

        Raises UserError if there are too few images, TrainingError if a loss is not finite.
        """
        journal = journal or Journal()
        self.check_size(train)
        train = train.to(self.device)
        if self.settings.pretrain and not self.warm_start:
            if self.autoencoder is None:
                self.model.net.backbone.load_pretrained()
            else:
                self.pretrain(self.autoencoder, train, journal)
                self.finish_pretraining(journal, evaluate)
        if not self.warm_start:
            self.model.center.copy_(self.find_center(train))
        self.train(train, journal, evaluate)

    def pretrain(self, autoencoder: Autoencoder, train: TrainSet, journal: Journal) -> None:
        """Train the autoencoder on all training images."""
        s = self.settings
        optimizer = make_optimizer(s.ae_optimizer_name, autoencoder, s.ae_lr, s.ae_weight_decay)
        scheduler = MultiStepLR(optimizer, list(s.ae_lr_milestone), gamma=0.1)
        parts: dict[str, Stateful] = {"net": autoencoder, "optimizer": optimizer, "scheduler": scheduler}
        for epoch in journal.epochs("pretrain", s.ae_n_epochs, parts):
            autoencoder.train()
            total = 0.0
            for batch, images in self._batches(train, "pretrain", epoch, s.ae_batch_size):
                inputs = normalize(images).contiguous(memory_format=torch.channels_last)
                targets = inputs if s.official_pretrain else images
                with self._autocast():
                    reconstructions = autoencoder(inputs)
                loss = F.mse_loss(reconstructions.float(), targets)
                total += len(batch) * gradient_step(
                    loss, [optimizer], f"epoch {epoch} of pre-training", ADVICE
                )
            scheduler.step()
            journal.record("pretrain", epoch, loss=total / self.epoch_size(train, s.ae_batch_size))

    def finish_pretraining(self, journal: Journal, evaluate: Evaluate | None = None) -> None:
        """Test the autoencoder and hand its encoder to the detector."""
        autoencoder = self.autoencoder
        assert autoencoder is not None
        if evaluate is not None and "ae" not in journal.facts:
            began = time.monotonic()
            journal.facts["ae"] = {"test_auc": evaluate(partial(self.autoencoder_score, autoencoder))}
            journal.facts["ae"]["test_time"] = time.monotonic() - began
        if not self.settings.official_pretrain:
            self.model.net.load_state_dict(autoencoder.encoder.state_dict(), strict=True)

    def train(self, train: TrainSet, journal: Journal, evaluate: Evaluate | None = None) -> None:
        """Minimise Eq. (5) around the fixed centre."""
        s, model = self.settings, self.model
        optimizer = make_optimizer(s.optimizer_name, model, s.lr, s.weight_decay)
        scheduler = MultiStepLR(optimizer, list(s.lr_milestone), gamma=0.1)
        parts: dict[str, Stateful] = {"net": model, "optimizer": optimizer, "scheduler": scheduler}
        for epoch in journal.epochs("train", s.n_epochs or 0, parts):
            model.train()
            total = 0.0
            for batch, images in self._batches(train, "train", epoch, s.batch_size):
                inputs = normalize(images).contiguous(memory_format=torch.channels_last)
                with self._autocast():
                    distances = model(inputs)
                loss = deep_sad_loss(distances.float(), train.semi_targets[batch], s.eta).mean()
                total += len(batch) * gradient_step(loss, [optimizer], f"epoch {epoch} of training", ADVICE)
            scheduler.step()
            curve = {}
            if evaluate is not None and s.test_every and (epoch + 1) % s.test_every == 0:
                curve = {"test_auc": evaluate(self.score)}
            journal.record("train", epoch, loss=total / self.epoch_size(train, s.batch_size), **curve)

    @torch.no_grad()
    def find_center(self, train: TrainSet) -> Tensor:
        """Mean output for the presumed normals (test transform, eval mode), moved away from 0. -> (D,)"""
        self.model.eval()
        chosen = train.resized
        if self.settings.center_from == "normals":
            chosen = chosen[train.semi_targets >= 0]
        outputs = [self.model.net(normalize(self._unit(part))) for part in chosen.split(self.score_batch)]
        return move_from_zero(torch.cat(outputs).mean(0))

    def score(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 at the network's size -> (N,) squared distance to the centre, on the CPU."""
        return score_images(self.scorer(), images, self.device, self.score_batch)

    def scorer(self) -> nn.Module:
        """(N, 3, H, W) uint8 -> (N,) squared distance to the centre, as one module."""
        return ImageDistance(self.model)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> (N, D) features phi(x), on the CPU."""
        self.model.eval()
        return torch.cat(
            [self.model.net(normalize(self._unit(part))) for part in images.split(self.score_batch)]
        ).cpu()

    @torch.no_grad()
    def autoencoder_score(self, autoencoder: Autoencoder, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> (N,) reconstruction error of the pre-trained autoencoder, on the CPU."""
        autoencoder.eval()
        errors = []
        for part in images.split(self.score_batch):
            unit = self._unit(part)
            inputs = normalize(unit)
            targets = inputs if self.settings.official_pretrain else unit
            errors.append(reconstruction_error(autoencoder(inputs), targets))
        return torch.cat(errors).cpu()

    def state_dict(self) -> dict[str, Any]:
        """Weights and centre."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start from these weights and this centre; `fit` then neither pre-trains nor moves the centre."""
        self.model.load_state_dict(state, strict=True)
        self.warm_start = True

    def _batches(self, train: TrainSet, phase: str, epoch: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (indices, augmented images in [0, 1]) of one epoch in random order."""
        stream = generator(self.seed, phase, epoch)
        order = torch.randperm(len(train), generator=stream)[: self.epoch_size(train, size)]
        for batch in order.split(size):
            images = augment(train.images[batch], train.native_sizes[batch], self.image_size, stream)
            yield batch, shown(images, self.model.net.channels)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    def epoch_size(self, train: TrainSet, batch_size: int) -> int:
        """Images used in an epoch: all, but for an incomplete batch that is unwanted or a single image."""
        rest = len(train) % batch_size
        return len(train) - rest if rest == 1 or self.settings.drop_last else len(train)

    def check_size(self, train: TrainSet) -> None:
        """Raises UserError for a set that is too small to train on."""
        sizes = [self.settings.batch_size] + [self.settings.ae_batch_size] * self.settings.pretrain
        if not (train.semi_targets >= 0).any():
            raise UserError("there are no normal images to train on")
        if len(train) < 2:
            raise UserError("training needs at least 2 images (batch normalisation), there is 1")
        if not all(self.epoch_size(train, size) for size in sizes):
            raise UserError(
                f"{len(train)} training images do not fill one batch of {max(sizes)}; "
                "lower --batch_size and --ae_batch_size or leave out --drop_last"
            )

    def _unit(self, images: Tensor) -> Tensor:
        return unit_images(images.to(self.device), self.model.net.channels)


def _channels_last(module: M) -> M:
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def make_optimizer(name: str, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Adam:
    return torch.optim.Adam(
        model.parameters(), lr=lr, weight_decay=weight_decay, amsgrad=name == "amsgrad", fused=True
    )
