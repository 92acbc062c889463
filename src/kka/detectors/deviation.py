"""What DevNet, DRA and AHL share: the deviation loss, scores of the most deviating places, image pyramids."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from kka.augment import normalize, to_unit
from kka.networks.backbones import Backbone

N_REFERENCES = 5000  # draws from the prior of normal scores
MARGIN = 5.0  # standard deviations that an anomaly must be away


def draw_references(stream: Generator) -> Tensor:
    """(5000,) draws of the prior N(0, 1)."""
    return torch.randn(N_REFERENCES, generator=stream)


def deviation_losses(scores: Tensor, anomalous: Tensor, references: Tensor, margin: float = MARGIN) -> Tensor:
    """Loss of each image: |dev| of a normal, max(0, margin - dev) of an anomaly (DevNet, Eq. 7).

    (N,) scores, (N,) bool or 0 and 1, (R,) draws of the prior -> (N,).
    """
    deviation = (scores - references.mean()) / references.std()
    return torch.where(anomalous.bool(), (margin - deviation).clamp(min=0), deviation.abs())


def top_mean(scores: Tensor, share: float) -> Tensor:
    """Mean of an image's largest absolute scores; the plain mean for a share of 0. (N, 1, h, w) -> (N,)."""
    places = scores.flatten(1)
    if share == 0:
        return places.mean(1)
    return places.abs().topk(max(1, int(share * places.shape[1])), dim=1).values.mean(1)


def pyramid(backbone: Backbone, images: Tensor, n_scales: int) -> list[Tensor]:
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
