"""What a detector is trained on: tensors and captions, no files."""

from dataclasses import dataclass, field, fields

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
    known: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    """(N,) whether it is a real anomaly; all False if it is not given"""
    captions: tuple[tuple[str, ...], ...] = ()
    """N times the captions of an image, () for one without; nothing at all if no image has any"""

    def __post_init__(self) -> None:
        if not len(self.known):
            object.__setattr__(self, "known", torch.zeros(len(self.targets), dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: Tensor) -> "TrainSet":
        """The images at `indices` (N',), in that order."""
        captions = tuple(self.captions[i] for i in indices.tolist()) if self.captions else ()
        taken = {name: value[indices] for name, value in self._tensors().items()}
        return TrainSet(**taken, captions=captions)

    def append_anomalies(
        self, images: Tensor, native_sizes: Tensor, resized: Tensor, known: bool = False
    ) -> "TrainSet":
        """The same with labelled anomalies, generated or known ones without captions, behind it."""
        ones = torch.ones(len(images), dtype=torch.long)
        more = TrainSet(images, native_sizes, resized, ones, -ones, ones.bool() & known)._tensors()
        joined = {name: torch.cat([value, more[name]]) for name, value in self._tensors().items()}
        return TrainSet(**joined, captions=self.captions + ((),) * len(images) * bool(self.captions))

    def to(self, device: torch.device) -> "TrainSet":
        """The same on a device; the native sizes stay on the CPU, where crops are drawn."""
        moved = {name: value.to(device) for name, value in self._tensors().items()}
        return TrainSet(**{**moved, "native_sizes": self.native_sizes}, captions=self.captions)

    def _tensors(self) -> dict[str, Tensor]:
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "captions"}
