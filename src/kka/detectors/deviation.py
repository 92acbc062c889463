"""What DevNet, DRA and AHL share: the deviation loss, the heads on feature maps, image pyramids."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from kka.augment import normalize, to_unit
from kka.detectors.parts import split_labels
from kka.networks.backbones import Backbone
from kka.train_set import TrainSet

N_DRAWS = 5000  # from the prior of normal scores
MARGIN = 5.0  # standard deviations that an anomaly must be away
HIDDEN = 256  # width of the head of normality
NORMAL, SEEN, PSEUDO = 0, 1, 2  # labels of images

Features = list[Tensor]
"""One (N, C, h, w) for each size of the images"""


def draw_prior(stream: Generator, n: int = 1) -> Tensor:
    """(n, 5000) draws of the prior N(0, 1)."""
    return torch.randn(n, N_DRAWS, generator=stream)


def deviation_losses(scores: Tensor, anomalous: Tensor, draws: Tensor, margin: float = MARGIN) -> Tensor:
    """Loss of each image: |dev| of a normal, max(0, margin - dev) of an anomaly (DevNet, Eq. 7).

    (N,) scores, (N,) bool or 0 and 1, (R,) draws of the prior -> (N,).
    """
    deviation = (scores - draws.mean()) / draws.std()
    return torch.where(anomalous.bool(), (margin - deviation).clamp(min=0), deviation.abs())


def top_mean(scores: Tensor, share: float) -> Tensor:
    """Mean of an image's largest absolute scores; the plain mean for a share of 0. (N, 1, h, w) -> (N,)."""
    places = scores.flatten(1)
    if share == 0:
        return places.mean(1)
    return places.abs().topk(max(1, int(share * places.shape[1])), dim=1).values.mean(1)


class PlaceHead(nn.Module):
    """A 1x1 convolution scores each place; the most deviating ones decide. (N, C, h, w) -> (N,)."""

    def __init__(self, channels: int, topk: float) -> None:
        super().__init__()
        self.scoring, self.topk = nn.Conv2d(channels, 1, 1), topk

    def forward(self, maps: Tensor) -> Tensor:
        return top_mean(self.scoring(maps), self.topk)


class NormalityHead(nn.Module):
    """How normal the mean of all places is (DRA, head of holistic normality). (N, C, h, w) -> (N,)."""

    def __init__(self, channels: int, absolute: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.absolute = nn.Linear(channels, HIDDEN), nn.Linear(HIDDEN, 1), absolute

    def forward(self, maps: Tensor) -> Tensor:
        scores = self.fc2(self.fc1(maps.mean((2, 3))).relu()).squeeze(1)
        return scores.abs() if self.absolute else scores


class ResidualHead(nn.Module):
    """Places whose features deviate from those of normal reference images (DRA, latent residual)."""

    def __init__(self, channels: int, topk: float, stride: int, fixed_norm: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride, padding=1 if stride == 1 else 0),
            FixedNorm(channels) if fixed_norm else nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        self.scoring, self.topk = nn.Conv2d(channels, 1, 1), topk

    def forward(self, maps: Tensor, reference: Tensor) -> Tensor:
        """(N, C, h, w), (C, h, w) mean of the references -> (N,)."""
        return top_mean(self.scoring(self.conv(reference - maps)), self.topk)


class FixedNorm(nn.Module):
    """Batch normalisation with mean 0 and variance 1 for ever: a scale and a shift of each channel."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.factor = 1 / math.sqrt(1 + eps)

    def forward(self, maps: Tensor) -> Tensor:
        return self.factor * self.weight.view(-1, 1, 1) * maps + self.bias.view(-1, 1, 1)


class DevNetHeads(nn.Module):
    """DevNet's only head; its loss tells all kinds of anomalies from normals."""

    n_draws = 2

    def __init__(self, channels: int, topk: float) -> None:
        super().__init__()
        self.head = PlaceHead(channels, topk)

    def forward(self, features: Features, references: Features) -> Tensor:
        """Mean over the sizes. -> (N, 1); DevNet needs no references."""
        return torch.stack([self.head(maps) for maps in features]).mean(0)[:, None]

    def loss(self, scores: Tensor, labels: Tensor, draws: Tensor) -> Tensor:
        """Of seen and of pseudo anomalies against the normals, one after the other (AHL's code).

        (N, 1) scores, (N,) labels, (2, R) draws -> scalar; both terms are means over all N images.
        """
        terms = zip((SEEN, PSEUDO), draws, strict=True)
        return torch.stack([
            (deviation_losses(scores[:, 0], labels > 0, row) * (labels != left_out)).mean()
            for left_out, row in terms
        ]).sum()  # fmt: skip

    @staticmethod
    def combine(scores: Tensor) -> Tensor:
        """(N, 1) -> (N,), higher = more anomalous."""
        return scores[:, 0]


class DRAHeads(nn.Module):
    """Normality, seen anomalies, pseudo anomalies, residual to normal references (DRA, section 3)."""

    n_draws = 4

    def __init__(
        self, channels: int, topk: float, stride: int = 1, fixed_norm: bool = False, absolute: bool = True
    ) -> None:
        super().__init__()
        self.normality = NormalityHead(channels, absolute)
        self.seen, self.pseudo = PlaceHead(channels, topk), PlaceHead(channels, topk)
        self.residual = ResidualHead(channels, topk, stride, fixed_norm)

    def forward(self, features: Features, references: Features) -> Tensor:
        """Mean over the sizes of each head's score. N x C x h x w, C x h x w of each size -> (N, 4)."""
        sizes = [
            torch.stack(
                [self.normality(maps), self.seen(maps), self.pseudo(maps), self.residual(maps, reference)], 1
            )
            for maps, reference in zip(features, references, strict=True)
        ]
        return torch.stack(sizes).mean(0)

    @staticmethod
    def loss(scores: Tensor, labels: Tensor, draws: Tensor) -> Tensor:
        """Sum of the deviation losses of the heads, each over the images that it learns from.

        (N, 4) scores, (N,) labels, (4, R) draws -> scalar. A head without images counts nothing.
        """
        kept = (labels >= 0, labels != PSEUDO, labels != SEEN, labels >= 0)
        targets = (labels == NORMAL, labels == SEEN, labels == PSEUDO, labels != NORMAL)
        heads = zip(scores.unbind(1), targets, kept, draws, strict=True)
        losses = [deviation_losses(s[rows], target[rows], row) for s, target, rows, row in heads]
        return torch.stack([part.mean() for part in losses if len(part)]).sum()

    @staticmethod
    def combine(scores: Tensor) -> Tensor:
        """(N, 4) -> (N,): abnormality less normality."""
        return scores[:, 1:].sum(1) - scores[:, 0]


class DeviationNetwork(nn.Module):
    """Backbone, heads, and the mean features of some normal images, by which the residual is told."""

    feature_scale: Tensor

    def __init__(self, backbone: Backbone, heads: DevNetHeads | DRAHeads, n_scales: int) -> None:
        super().__init__()
        self.backbone, self.heads, self.n_scales = backbone, heads, n_scales
        self.register_buffer("feature_scale", torch.ones(()))
        blank = torch.zeros(1, 3, backbone.size, backbone.size)
        with torch.no_grad():
            for k, maps in enumerate(pyramid(backbone, blank, n_scales)):
                self.register_buffer(f"reference_{k}", torch.zeros_like(maps[0]))

    @property
    def references(self) -> Features:
        """(C, h, w) of each size."""
        return [getattr(self, f"reference_{k}") for k in range(self.n_scales)]

    @torch.no_grad()
    def set_references(self, images: Tensor) -> None:
        """Take the mean features of normal images, (N, 3, S, S) uint8."""
        self.eval()
        for reference, maps in zip(self.references, self.pyramid(images), strict=True):
            reference.copy_(maps.mean(0))

    def pyramid(self, images: Tensor) -> Features:
        """Features at full, half, ... size of (N, 3, S, S) uint8 or in [0, 1]."""
        return [self.feature_scale * maps for maps in pyramid(self.backbone, images, self.n_scales)]

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N,) anomaly scores."""
        return self.heads.combine(self.heads(self.pyramid(images), self.references))


def pyramid(backbone: Backbone, images: Tensor, n_scales: int) -> Features:
    """Features at full, half, ... size: (N, 3, S, S) uint8 or in [0, 1] -> [(N, C, h, w), ...]."""
    unit = normalize(to_unit(images) if images.dtype == torch.uint8 else images)
    side, layer = images.shape[-1], backbone.layers[0]
    scales = [unit] + [F.interpolate(unit, side // 2**k) for k in range(1, n_scales)]
    return [backbone.net(x.contiguous(memory_format=torch.channels_last))[layer] for x in scales]


def rotate(images: Tensor, angles: Sequence[float], fill: str) -> Tensor:
    """Each image turned about its centre. (N, 3, S, S) in [0, 1], N angles in degrees -> the same."""
    turns = torch.tensor([math.radians(angle) for angle in angles], device=images.device)
    cos, sin, zero = turns.cos(), turns.sin(), torch.zeros_like(turns)
    turn = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode=fill, align_corners=False)


@dataclass(frozen=True)
class Groups:
    """Rows of a training set by what they are.

    Behind its N images stand the pseudo anomalies that are made of its normals, in their order.
    """

    normals: Tensor
    seen: Tensor
    """labelled anomalies"""
    generated: Tensor
    """those of them that count as pseudo anomalies instead"""
    labels: Tensor
    """(N + number of normals,) NORMAL, SEEN or PSEUDO"""


def find_groups(train: TrainSet, generated_are_pseudo: bool) -> Groups:
    """Raises UserError for fewer than 2 normals."""
    normals, anomalies = split_labels(train)
    is_pseudo = ~train.known[anomalies] & generated_are_pseudo
    labels = torch.zeros(len(train) + len(normals), dtype=torch.long)
    labels[anomalies] = torch.where(is_pseudo, PSEUDO, SEEN)
    labels[len(train) :] = PSEUDO
    return Groups(normals, anomalies[~is_pseudo], anomalies[is_pseudo], labels)
