"""What a detector is trained on: tensors, no files."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainSet:
    """Training images with their labels; the first axis of every field is the image."""

    images: Tensor
    """(N, 3, S, S) uint8, squeezed to a square at the working size"""
    native_sizes: Tensor
    """(N, 2) height and width of the files"""
    resized: Tensor
    """(N, 3, H, W) uint8, as the test transform sees them"""
    targets: Tensor
    """(N,) 0 normal, 1 anomaly; for evaluation only"""
    semi_targets: Tensor
    """(N,) -1 labelled anomaly, 0 unlabelled (presumed normal), +1 labelled normal"""

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: Tensor) -> "TrainSet":
        """The images at `indices` (N',), in that order."""
        return TrainSet(*(getattr(self, field.name)[indices] for field in fields(self)))

    def append_anomalies(self, images: Tensor, native_sizes: Tensor, resized: Tensor) -> "TrainSet":
        """The same with labelled anomalies behind it."""
        ones = torch.ones(len(images), dtype=torch.long)
        more = TrainSet(images, native_sizes, resized, ones, -ones)
        return TrainSet(*(torch.cat([getattr(self, f.name), getattr(more, f.name)]) for f in fields(self)))

    def to(self, device: torch.device) -> "TrainSet":
        """The same on a device; the native sizes stay on the CPU, where crops are drawn."""
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        return TrainSet(**{**moved, "native_sizes": self.native_sizes})
