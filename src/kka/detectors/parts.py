"""What several detectors share: labels to batches, guards, smoothing of anomaly maps."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Generator, Tensor, nn

from kka.errors import TrainingError, UserError
from kka.train_set import TrainSet

SCALE_IMAGES = 64  # normals whose features give the scale of --feature_std


def split_labels(train: TrainSet) -> tuple[Tensor, Tensor]:
    """Rows of the presumed normals (unlabelled ones too) and of the labelled anomalies.

    Raises UserError for fewer than 2 normals.
    """
    normals, anomalies = (torch.nonzero(chosen).squeeze(1) for chosen in _chosen(train))
    if len(normals) < 2:
        raise UserError(f"training needs at least 2 normal images, there are {len(normals)}; add some")
    return normals, anomalies


def _chosen(train: TrainSet) -> tuple[Tensor, Tensor]:
    return train.semi_targets >= 0, train.semi_targets < 0


def cycled(rows: Tensor, count: int, stream: Generator) -> Tensor:
    """`count` of the rows in random order, (count,); none comes again before all were there."""
    passes = math.ceil(count / len(rows))
    order = [torch.randperm(len(rows), generator=stream) for _ in range(passes)]
    return rows[torch.cat(order)[:count]]


def gradient_step(
    loss: Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    where: str,
    advice: str = "lower --lr",
    max_norm: float | None = None,
) -> float:
    """One step of all optimizers, with gradients of at most `max_norm`; returns the loss.

    Raises TrainingError if it is not finite.
    """
    value = loss.item()
    if not math.isfinite(value):
        raise TrainingError(f"the loss became {value} in {where}; {advice}")
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if max_norm is not None:
        groups = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group], max_norm)
    for optimizer in optimizers:
        optimizer.step()
    return value


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """`function` of (N, ...) images, `size` at a time."""
    return torch.cat([function(part) for part in images.split(size)])


def feature_scale(std: float, features: Callable[[Tensor], Tensor], normals: Tensor, size: int) -> float:
    """Factor that gives `features` of training normals the deviation `std`; 1 if that is 0.

    Absolute noise and learning rates are made for features of one backbone; others' are many times larger.
    """
    return std / float(in_batches(features, normals, size).std()) if std else 1.0


def score_images(scorer: nn.Module, images: Tensor, device: torch.device, size: int) -> Tensor:
    """(N, 3, S, S) uint8 -> (N,) scores on the CPU, `size` images at a time."""
    scorer.eval()
    return in_batches(lambda part: scorer(part.to(device)).cpu(), images, size)


def smooth(maps: Tensor, sigma: float = 4.0) -> Tensor:
    """Gaussian filter of each map, as scipy's gaussian_filter. (N, H, W) -> the same."""
    rows, columns = (smoothing(side, sigma).to(maps) for side in maps.shape[1:])
    return rows @ maps @ columns.T


def smoothing(side: int, sigma: float) -> Tensor:
    """The filter of one axis as a matrix, (side, side): it is linear, borders included."""
    return torch.tensor(gaussian_filter1d(np.eye(side), sigma, axis=0))
