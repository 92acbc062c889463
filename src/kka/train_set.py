"""What a detector is trained on: tensors and captions, no files."""

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
    captions: tuple[tuple[str, ...], ...] = ()
    """N times the captions of an image, () for one without; nothing at all if no image has any"""

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: Tensor) -> "TrainSet":
        """The images at `indices` (N',), in that order."""
        captions = tuple(self.captions[i] for i in indices.tolist()) if self.captions else ()
        taken = {name: value[indices] for name, value in self._tensors().items()}
        return TrainSet(**taken, captions=captions)

    def append_anomalies(self, images: Tensor, native_sizes: Tensor, resized: Tensor) -> "TrainSet":
        """The same with labelled anomalies, which have no captions, behind it."""
        ones = torch.ones(len(images), dtype=torch.long)
        more = TrainSet(images, native_sizes, resized, ones, -ones)._tensors()
        joined = {name: torch.cat([value, more[name]]) for name, value in self._tensors().items()}
        return TrainSet(**joined, captions=self.captions + ((),) * len(images) * bool(self.captions))

    def to(self, device: torch.device) -> "TrainSet":
        """The same on a device; the native sizes stay on the CPU, where crops are drawn."""
        moved = {name: value.to(device) for name, value in self._tensors().items()}
        return TrainSet(**{**moved, "native_sizes": self.native_sizes}, captions=self.captions)

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "captions"}
