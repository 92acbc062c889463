"""What every detector offers, whatever is behind it."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from kka.journal import Journal
from kka.train_set import TrainSet

Evaluate = Callable[[Callable[[Tensor], Tensor]], float | None]
"""Takes a function from images to scores, returns the test AUC"""


class DetectorSettings(Protocol):
    """A frozen dataclass made with `kka.settings.option`; it may name PRESETS, values for small data."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class Detector(Protocol):
    """`Detector(settings, seed, device)`; raises UserError for settings that make no sense."""

    @property
    def image_size(self) -> int:
        """Side of the images that it takes."""

    def fit(self, train: TrainSet, journal: Journal | None = None, evaluate: Evaluate | None = None) -> None:
        """Train with or without generated anomalies; resumes from the journal's checkpoint."""

    def score(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8, S = image_size -> (N,) on the CPU, higher = more anomalous."""

    def scorer(self) -> nn.Module:
        """What `score` does to a batch, as one module: (N, 3, S, S) uint8 -> (N,); it can be exported."""

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, D) features of whole images for Eq. (1)-(2), on the CPU."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors that `score` needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Score with, or train on from, an earlier state; raises RuntimeError if it does not fit."""
