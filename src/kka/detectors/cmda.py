"""CMDA (Chen et al., IEEE Transactions on Multimedia 2023): SSD with images mixed by their captions.

For every caption of a batch the images are mixed with the similarities of image and caption as weights, and
the mixture is one more view in contrastive training. The mixtures are augmented normals, not anomalies. The
score is SSD's; captions are needed for training only.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kka.detectors.contract import Evaluate
from kka.detectors.parts import gradient_step
from kka.detectors.ssd import SSD, SSDSettings, contrastive_loss
from kka.errors import UserError
from kka.journal import Journal, Stateful
from kka.seeds import derive_seed, generator, seeded
from kka.sentence_vectors import TFIDF, encode_sentences
from kka.settings import option
from kka.train_set import TrainSet

MIX_WEIGHTS = ("abs", "softmax", "official")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CMDASettings(SSDSettings):
    """CMDA's options; defaults are the official code's, presets small (images) and cpu (network)."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "small": {"arch": "resnet18", "n_epochs": None},
        "cpu": {"arch": "cifar10_LeNet", "n_epochs": None, "text_width": 512},
    }

    lr: float = option(1e-2, "highest learning rate")
    batch_size: int = option(128, "images per training step, each in two views and one mixture")
    n_epochs: int | None = option(
        200, "training epochs; None: 150 CIFAR-100, 200 Oxford-102, 300 UCM-Caption"
    )
    warmup: int = option(0, "epochs before these in which the learning rate rises (official: 0 or 10)")
    warmup_lr: float = option(1e-3, "learning rate at their start")
    text_encoder: str = option(
        TFIDF, "what makes vectors of captions: tfidf, or folder or hub id of a text model on this machine"
    )
    text_dim: int = option(128, "dimensions of the vectors of tfidf (SVD)")
    text_width: int = option(4096, "hidden units of the text network")
    cross_weight: float = option(0.1, "weight of the loss between images and captions")
    all_captions: bool = option(
        False, "an epoch shows every caption with its image (official code), not one at random per image"
    )
    constant_cross_lr: bool = option(
        False, "no schedule for the step of the first loss, as the official code"
    )
    mix_weights: str = option(
        "abs", "abs or softmax of the cosines, rows sum to 1; official: columns are divided", MIX_WEIGHTS
    )
    mix_space: str = option(
        "apart",
        "what is mixed: pixels, where mixtures pass BatchNorm apart (official code) or joint with the second "
        "views; or features",
        ("apart", "joint", "features"),
    )
    mix_detach: bool = option(True, "mixing weights get no gradient")


# CMDA: W = |h(c) g(v1)^T| with rows that sum to 1
def mixing_weights(texts: Tensor, images: Tensor, kind: str, temperature: float) -> Tensor:
    """(B, D) captions and (B, D) images, of length 1 -> (B, B), a row for each caption.

    "official" divides column i by the sum of row i, as its code does by mistake.
    """
    cosines = texts @ images.T
    if kind == "softmax":
        return (cosines / temperature).softmax(1)
    sums = cosines.abs().sum(1, keepdim=True).clamp(min=1e-12)
    return cosines.abs() / (sums.T if kind == "official" else sums)


def mix(weights: Tensor, views: Tensor) -> Tensor:
    """(B, B) weights, (B, ...) images or features -> (B, ...): row j is sum_i W[j, i] * view_i."""
    return (weights @ views.flatten(1)).view_as(views)


def mixing_entropy(weights: Tensor) -> float:
    """Mean entropy of the rows over log B: 0 copies an image, 1 is the gray mean of the batch."""
    p = weights / weights.sum(1, keepdim=True)
    return float(torch.special.entr(p).sum(1).mean()) / math.log(len(p))


class TextNetwork(nn.Sequential):
    """(N, D) sentence vectors -> (N, 128) of length 1."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__(
            nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128)
        )

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(x))


class CMDA(SSD):
    """CMDA on images with captions; with generated anomalies its score is that of SSD_k."""

    settings: CMDASettings

    def __init__(self, settings: CMDASettings, seed: int = 0, device: str | torch.device = "cpu") -> None:
        super().__init__(settings, seed, device)
        for name in ("text_dim", "text_width"):
            if getattr(settings, name) < 1:
                raise UserError(f"--{name} must be at least 1, it is {getattr(settings, name)}")
        if settings.cross_weight < 0:
            raise UserError(f"--cross_weight must not be negative, it is {settings.cross_weight}")

    def check_train_set(self, train: TrainSet) -> None:
        """As SSD's, and every image that is no labelled anomaly needs a caption."""
        super().check_train_set(train)
        normals = train.take(torch.nonzero(train.semi_targets >= 0).squeeze(1))
        captions = normals.captions or ((),) * len(normals)
        without = [i for i, texts in enumerate(captions) if not any(text.strip() for text in texts)]
        if without:
            raise UserError(
                f"--detector cmda needs captions of the normal images; {len(without)} of {len(normals)} have "
                f"none, the first of them number {without[0]}; mend the caption lists or take --detector ssd"
            )

    def train(self, train: TrainSet, journal: Journal, evaluate: Evaluate | None = None) -> None:
        """Two steps per batch: views against each other and captions, then mixtures against views."""
        normals, vectors, first, counts = self._pair(train)
        with seeded(self.seed, "text"):
            text = TextNetwork(vectors.shape[1], self.settings.text_width).to(self.device)
        cross = self._make_optimizer([*self.model.parameters(), *text.parameters()])
        image = self._make_optimizer(self.model.parameters())
        parts: dict[str, Stateful] = {"net": self.model, "text": text, "cross": cross, "image": image}
        scheduled = [image] if self.settings.constant_cross_lr else [cross, image]
        n = self._epoch_size(len(normals))
        for epoch in journal.epochs("train", self._n_epochs, parts):
            draws = torch.rand(len(counts), generator=generator(self.seed, "captions", epoch))
            captions = vectors[first + (draws * counts).long()]
            totals = torch.zeros(3)
            for batch, *views in self._batches(normals, epoch, scheduled):
                self.model.train()
                values = self._step(views, captions[batch].to(self.device), text, cross, image, epoch)
                totals += len(batch) * torch.tensor(values)
            views_loss, mixed_loss, entropy = (totals / n).tolist()
            losses = {"loss": views_loss + mixed_loss, "loss_views": views_loss, "loss_mixed": mixed_loss}
            curve = self._curve(train, epoch, evaluate)
            journal.record("train", epoch, **losses, entropy=entropy, mixed=n, **curve)
        self._report(journal)

    def _step(
        self,
        views: list[Tensor],
        captions: Tensor,
        text: nn.Module,
        cross: torch.optim.Optimizer,
        image: torch.optim.Optimizer,
        epoch: int,
    ) -> tuple[float, float, float]:
        """Two gradient steps; returns both losses and the entropy of the mixing weights."""
        s, (first, second) = self.settings, views
        a, b = self.project(first, second)
        loss = contrastive_loss(a, b, s.temperature)
        loss = loss + s.cross_weight * contrastive_loss(a, text(captions), s.temperature)
        views_loss = gradient_step(loss, [cross], f"epoch {epoch}")
        weights = self.weigh(first, captions, text)
        a, b = self._project_mixed(weights, first, second)
        loss = contrastive_loss(a, b, s.temperature)
        mixed_loss = gradient_step(loss, [image], f"epoch {epoch}")
        return views_loss, mixed_loss, mixing_entropy(weights.detach())

    def weigh(self, images: Tensor, captions: Tensor, text: nn.Module) -> Tensor:
        """(B, 3, S, S) normalised, (B, D) sentence vectors -> (B, B) weights, by networks in eval mode."""
        s = self.settings
        self.model.eval()
        with torch.set_grad_enabled(not s.mix_detach):
            (projected,) = self.project(images)
            weights = mixing_weights(text(captions), projected, s.mix_weights, s.temperature)
        self.model.train()
        return weights

    def _project_mixed(self, weights: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        """(B, 128) twice: of the mixtures of the first views, and of the second views."""
        if self.settings.mix_space == "apart":
            return (*self.project(mix(weights, first)), *self.project(second))
        if self.settings.mix_space == "joint":
            return self.project(mix(weights, first), second)
        with self.autocast():
            a, b = self.model.encoder(torch.cat([first, second])).float().split(len(first))
            heads = self.model.head(torch.cat([mix(weights, a), b])).float()
        return nn.functional.normalize(heads).split(len(first))

    def _pair(self, train: TrainSet) -> tuple[TrainSet, Tensor, Tensor, Tensor]:
        """Normals on the device, vectors of their captions, place of each one's first caption and number."""
        normals = train.take(torch.nonzero(train.semi_targets >= 0).squeeze(1))
        captions = [[text for text in texts if text.strip()] for texts in normals.captions]
        counts = torch.tensor([len(texts) for texts in captions])
        first = counts.cumsum(0) - counts
        s, seed = self.settings, derive_seed(self.seed, "text_vectors") % 2**32
        flat = [text for texts in captions for text in texts]
        vectors = encode_sentences(flat, s.text_encoder, s.text_dim, seed, self.device)
        if s.all_captions:
            normals = normals.take(torch.arange(len(counts)).repeat_interleave(counts))
            first, counts = torch.arange(len(flat)), torch.ones(len(flat), dtype=torch.long)
        return normals.to(self.device), vectors, first, counts

    def _report(self, journal: Journal) -> None:
        """Log how many images were mixed and how evenly."""
        entropies, mixed = journal.series("train", "entropy"), journal.series("train", "mixed")
        if mixed:
            log.info(
                "%d images were mixed; entropy of the weights: %.3f in the first epoch, %.3f in the last "
                "(1: every mixture is the mean of the batch)", sum(mixed), entropies[0], entropies[-1],
            )  # fmt: skip
