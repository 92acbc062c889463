"""DRA (Ding et al., 2022): four heads learn normality, seen, pseudo and residual abnormality.

Pseudo anomalies are made of normal images; the residual is taken to the mean of a few normal images.
Differences from the official code are in docs/implementation_details.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from kka.detectors.deviation import DRAHeads, Features, Groups, draw_prior
from kka.detectors.devnet import DevNet, DevNetSettings, check_settings
from kka.detectors.pseudo_anomalies import KINDS, PseudoAnomalies, randint
from kka.errors import UserError
from kka.seeds import generator
from kka.settings import option
from kka.train_set import TrainSet

PSEUDO_SHARE = 0.5  # of the normals of a batch that become pseudo anomalies


@dataclass(frozen=True)
class DRASettings(DevNetSettings):
    """DRA's options; defaults are the official code's, preset cpu trains the heads on kept features."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": {**DevNetSettings.PRESETS["cpu"], "residual_stride": 3},
    }

    n_epochs: int = option(30, "training epochs")
    batch_size: int = option(48, "images per step, a third of them seen anomalies")
    pseudo: tuple[str, ...] = option(("cutpaste",), f"kinds of pseudo anomalies: {', '.join(KINDS)}")
    texture_dir: str | None = option(
        None, "folder of texture images for pseudo anomalies of kind dream; None: procedural textures"
    )
    generated_as: str = option(
        "seen", "what generated anomalies count as: seen ones, or a further kind of pseudo ones",
        ("seen", "pseudo"),
    )  # fmt: skip
    n_references: int = option(5, "normal images to whose mean the residual is taken")
    residual_stride: int = option(
        1, "of the convolution on the residual, padded if it is 1 (AHL's code: 3, unpadded)"
    )


def check_dra_settings(settings: DRASettings) -> None:
    """Raises UserError naming the flag of the first value out of range."""
    s = settings
    check_settings(s)
    if s.batch_size < 3:
        raise UserError(f"--batch_size must be at least 3, a third of them anomalies, it is {s.batch_size}")
    for name in ("n_references", "residual_stride"):
        if getattr(s, name) < 1:
            raise UserError(f"--{name} must be at least 1, it is {getattr(s, name)}")
    wrong = [kind for kind in s.pseudo if kind not in KINDS]
    if wrong or not s.pseudo:
        raise UserError(f"--pseudo {' '.join(wrong)}: name one or more of {', '.join(KINDS)}")


class DRA(DevNet):
    """DRA; known anomalies are the seen ones, generated ones too unless they count as pseudo anomalies."""

    anomaly_share = 3

    def __init__(self, settings: Any, seed: int = 0, device: str | torch.device = "cpu") -> None:
        super().__init__(settings, seed, device)
        self.generated_are_pseudo = settings.generated_as == "pseudo"
        self.made = PseudoAnomalies(settings.texture_dir, settings.image_size)
        smallest = min(self.model.references[-1].shape[1:])
        if settings.residual_stride > 1 and smallest < 3:
            raise UserError(
                f"--image_size {settings.image_size} gives maps of {smallest} px at the smallest of "
                f"--n_scales {settings.n_scales}, the residual head needs 3; enlarge it or set "
                "--residual_stride 1"
            )

    def set_references(self, train: TrainSet, groups: Groups) -> None:
        """Mean features of some normals, the same ones whenever it is called."""
        order = torch.randperm(len(groups.normals), generator=generator(self.seed, "references"))
        chosen = groups.normals[order[: self.settings.n_references]]
        self.model.set_references(train.resized[chosen].to(self.device))

    def _check(self, settings: Any) -> None:
        check_dra_settings(settings)

    def _new_heads(self, channels: int) -> DRAHeads:
        s = self.settings
        return DRAHeads(channels, s.topk, s.residual_stride)

    def _batches(self, groups: Groups, stream: Generator) -> Iterator[Tensor]:
        """Two thirds normals, half of which become pseudo anomalies, and a third seen anomalies."""
        first_pseudo = len(groups.labels) - len(groups.normals)
        place = torch.zeros(len(groups.labels), dtype=torch.long)
        place[groups.normals] = first_pseudo + torch.arange(len(groups.normals))
        n_kinds = len(self.settings.pseudo) + bool(len(groups.generated))
        for rows in super()._batches(groups, stream):
            swapped = (groups.labels[rows] == 0) & (torch.rand(len(rows), generator=stream) < PSEUDO_SHARE)
            pseudo = place[rows]
            if len(groups.generated):
                drawn = torch.randint(len(groups.generated), (len(rows),), generator=stream)
                generated = torch.randint(n_kinds, (len(rows),), generator=stream) == 0
                pseudo = torch.where(generated, groups.generated[drawn], pseudo)
            yield torch.where(swapped, pseudo, rows)

    def _loss(
        self, train: TrainSet, groups: Groups, kept: Features | None, rows: Tensor, stream: Generator
    ) -> Tensor:
        n = self.settings.n_references
        chosen = groups.normals[torch.randint(len(groups.normals), (n,), generator=stream)]
        features = self._features(train, groups, kept, torch.cat([chosen, rows]), stream)
        references = [maps[:n].mean(0) for maps in features]
        with self._autocast():
            scores = self.model.heads([maps[n:] for maps in features], references)
        draws = draw_prior(stream, DRAHeads.n_draws).to(self.device)
        return self.model.heads.loss(scores.float(), groups.labels[rows].to(self.device), draws)

    def _images(self, train: TrainSet, groups: Groups, rows: Tensor, stream: Generator) -> Tensor:
        """(N, 3, S, S) in [0, 1] on the device; rows behind the training set become pseudo anomalies."""
        made = rows >= len(train)
        sources = torch.where(made, groups.normals[(rows - len(train)).clamp(min=0)], rows)
        pseudo = self.settings.pseudo
        kinds = [pseudo[randint(stream, len(pseudo))] if new else None for new in made.tolist()]
        return self.made.of(train, sources, kinds, stream).to(self.device)

    def _rows_kept(self, train: TrainSet, groups: Groups) -> Tensor:
        return torch.arange(len(groups.labels))
