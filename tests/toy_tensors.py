"""Training sets made by hand, for detectors with a backbone."""

import torch

from kka.train_set import TrainSet


def toy_images(n, bright, side=48, seed=0):
    """(n, 3, side, side) uint8: dark noise, or bright noise in coarse blocks."""
    stream = torch.Generator().manual_seed(2 * seed + bright)
    if not bright:
        return torch.randint(0, 90, (n, 3, side, side), generator=stream, dtype=torch.uint8)
    coarse = torch.randint(130, 250, (n, 3, side // 8, side // 8), generator=stream, dtype=torch.uint8)
    return coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)


def toy_train_set(n_normal=7, n_anomalies=5, side=48):
    """Dark normals, and bright labelled anomalies behind them."""
    images = torch.cat([toy_images(n_normal, False, side), toy_images(n_anomalies, True, side)])
    targets = (torch.arange(len(images)) >= n_normal).long()
    return TrainSet(images, torch.full((len(images), 2), side), images.clone(), targets, -targets)
