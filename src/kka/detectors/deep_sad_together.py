"""Deep SAD for several seeds at once: their networks side by side in one.

Each seed draws its batches, crops and colours from its own streams, so that it sees what it would see alone;
the sum of the losses has each seed's own gradient, and Adam treats every weight by itself. What differs from
`DeepSAD.fit` is the order in which a convolution adds up.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR

from kka.augment import draw, join, normalize, transform
from kka.detectors.contract import Detector, DetectorSettings, Evaluate
from kka.detectors.deep_sad import ADVICE, DeepSAD, DeepSADSettings, deep_sad_loss, make_optimizer, shown
from kka.detectors.parts import gradient_step
from kka.detectors.side_by_side import Share, side_by_side
from kka.errors import UserError
from kka.journal import Journal, Stateful, align, epochs_in_step
from kka.networks.lenet import NETWORKS
from kka.seeds import generator
from kka.train_set import TrainSet


@dataclass(frozen=True)
class Training:
    """A detector and what its `fit` is called with."""

    detector: Detector
    train: TrainSet
    journal: Journal
    evaluate: Evaluate | None = None


def check_together(settings: DetectorSettings) -> None:
    """Raises UserError for a detector whose seeds cannot be trained together."""
    if not isinstance(settings, DeepSADSettings):
        raise UserError("--vmap_seeds trains only --detector deep_sad; use --runs for other detectors")
    if settings.net_name not in NETWORKS:
        raise UserError(
            f"--vmap_seeds takes only small networks ({', '.join(NETWORKS)}), not --net_name "
            f"{settings.net_name}; use --runs"
        )
    if settings.precision != "float32":
        raise UserError(
            "--vmap_seeds gives the numbers of single runs only with --precision float32, not with "
            f"{settings.precision}; use --runs"
        )


def fit_together(trainings: Sequence[Training]) -> None:
    """`detector.fit` of Deep SADs that differ in their seeds and images only.

    Raises UserError if the sets have different sizes or are too small, TrainingError if a loss is not finite.
    """
    sizes = sorted({len(each.train) for each in trainings})
    if len(sizes) > 1:
        raise UserError(f"--vmap_seeds needs training sets of one size, they have {sizes} images; use --runs")
    align([each.journal for each in trainings])
    group = Group(trainings)
    first = group.detectors[0]
    first.check_size(group.trains[0])
    if first.settings.pretrain and not first.warm_start:
        group.pretrain()
    if not first.warm_start:
        for detector, train in zip(group.detectors, group.trains, strict=True):
            detector.model.center.copy_(detector.find_center(train))
    group.train()


class Stack:
    """N models side by side with optimizer and schedule."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        optimizer: str,
        lr: float,
        weight_decay: float,
        drops: Sequence[int],
    ) -> None:
        self.models, self.model = models, side_by_side(models)
        self.optimizer = make_optimizer(optimizer, self.model, lr, weight_decay)
        self.scheduler = MultiStepLR(self.optimizer, list(drops), gamma=0.1)

    def parts(self) -> list[dict[str, Stateful]]:
        """For the checkpoint of each, as `DeepSAD` alone writes it."""
        n = len(self.models)
        return [
            {
                "net": Share(self.model, k, n),
                "optimizer": Share(self.optimizer, k, n),
                "scheduler": self.scheduler,
            }
            for k in range(n)
        ]

    def hand_back(self) -> None:
        """Give every model its weights."""
        for k, model in enumerate(self.models):
            model.load_state_dict(Share(self.model, k, len(self.models)).state_dict())


class Group:
    """Trainings that go side by side; the methods are those of `DeepSAD`."""

    def __init__(self, trainings: Sequence[Training]) -> None:
        self.detectors = [cast(DeepSAD, each.detector) for each in trainings]
        self.settings, self.n = self.detectors[0].settings, len(trainings)
        self.trains = [each.train.to(self.detectors[0].device) for each in trainings]
        self.journals = [each.journal for each in trainings]
        self.evaluates = [each.evaluate for each in trainings]

    def pretrain(self) -> None:
        """Train the autoencoders and hand their encoders to the detectors."""
        s = self.settings
        models = [cast(nn.Module, detector.autoencoder) for detector in self.detectors]
        stack = Stack(models, s.ae_optimizer_name, s.ae_lr, s.ae_weight_decay, s.ae_lr_milestone)

        def losses(_: Tensor, images: Tensor) -> Tensor:
            inputs = normalize(images)
            targets = self._wide(inputs if s.official_pretrain else images)
            return (
                (stack.model(self._wide(inputs)) - targets)
                .square()
                .unflatten(1, (self.n, -1))
                .mean((0, 2, 3, 4))
            )

        for epoch in epochs_in_step(self.journals, "pretrain", s.ae_n_epochs, stack.parts()):
            self._train_epoch(stack, losses, "pretrain", epoch, s.ae_batch_size)
        stack.hand_back()
        for detector, journal, evaluate in zip(self.detectors, self.journals, self.evaluates, strict=True):
            detector.finish_pretraining(journal, evaluate)

    def train(self) -> None:
        """Minimise Eq. (5) around the fixed centres."""
        s = self.settings
        models = [detector.model for detector in self.detectors]
        stack = Stack(models, s.optimizer_name, s.lr, s.weight_decay, s.lr_milestone)

        def losses(rows: Tensor, images: Tensor) -> Tensor:
            outputs = stack.model.net(self._wide(normalize(images))) - stack.model.center
            distances = outputs.unflatten(1, (self.n, -1)).square().sum(2)  # (B, N)
            semi = torch.stack([t.semi_targets[own] for t, own in zip(self.trains, rows, strict=True)], 1)
            return deep_sad_loss(distances, semi, s.eta).mean(0)

        for epoch in epochs_in_step(self.journals, "train", s.n_epochs or 0, stack.parts()):
            curve = bool(s.test_every) and (epoch + 1) % s.test_every == 0
            self._train_epoch(stack, losses, "train", epoch, s.batch_size, curve)
        stack.hand_back()

    def _train_epoch(
        self,
        stack: Stack,
        losses: Callable[[Tensor, Tensor], Tensor],
        phase: str,
        epoch: int,
        size: int,
        curve: bool = False,
    ) -> None:
        """One epoch of all; `losses` takes what `_batches` yields and gives (N,)."""
        stack.model.train()
        totals, n_images = [0.0] * self.n, 0
        for rows, images in self._batches(phase, epoch, size):
            values = losses(rows, images)
            gradient_step(values.sum(), [stack.optimizer], f"epoch {epoch} of {phase}ing", ADVICE)
            n_images += rows.shape[1]
            totals = [t + rows.shape[1] * v for t, v in zip(totals, values.tolist(), strict=True)]
        stack.scheduler.step()
        if curve:
            stack.hand_back()
        for detector, journal, evaluate, total in zip(
            self.detectors, self.journals, self.evaluates, totals, strict=True
        ):
            more: dict[str, Any] = {"test_auc": evaluate(detector.score)} if curve and evaluate else {}
            journal.record(phase, epoch, loss=total / n_images, **more)

    def _batches(self, phase: str, epoch: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (N, B) indices and (N B, C, H, W) augmented images in [0, 1], as each detector alone."""
        first, n_images = self.detectors[0], self.detectors[0].epoch_size(self.trains[0], size)
        streams = [generator(detector.seed, phase, epoch) for detector in self.detectors]
        orders = [torch.randperm(len(self.trains[0]), generator=stream)[:n_images] for stream in streams]
        for rows in torch.stack(orders).split(size, 1):
            chosen = list(zip(self.trains, rows, streams, strict=True))
            draws = join([draw(train.native_sizes[own], stream) for train, own, stream in chosen])
            images = torch.cat([train.images[own] for train, own, _ in chosen])
            yield rows, shown(transform(images, draws, first.image_size), first.model.net.channels)

    def _wide(self, images: Tensor) -> Tensor:
        """(N B, C, H, W) -> (B, N C, H, W)."""
        wide = images.unflatten(0, (self.n, -1)).transpose(0, 1).flatten(1, 2)
        return wide.contiguous(memory_format=torch.channels_last)
