"""SimpleNet (Liu et al., CVPR 2023): a discriminator between patch features and the same features with noise.

Patches of a frozen backbone are adapted by one linear layer; a small network learns to score them above those
to which Gaussian noise was added. With generated anomalies ("+KKA") their patches take the place of the noisy
ones, or join them. Differences from the official code are in docs/implementation_details.md.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from kka.augment import augment
from kka.detectors.contract import Evaluate
from kka.detectors.parts import (
    SCALE_IMAGES,
    cycled,
    feature_scale,
    gradient_step,
    in_batches,
    score_images,
    smooth,
    split_labels,
)
from kka.errors import UserError
from kka.journal import Journal, Stateful
from kka.networks.backbones import Backbone, BackboneSettings
from kka.seeds import derive_seed, generator, seeded
from kka.settings import option
from kka.train_set import TrainSet

STRIDES = (8, 16)  # layer2 and layer3 of a ResNet
FEATURE_BATCH = 8  # images whose patches are unfolded at a time
DSC_WEIGHT_DECAY = 1e-5
MIX_FACTOR = 1.1  # ratio of the noise levels of mix_noise

Features = Callable[[Tensor, Generator], Tensor]
"""From rows of the training set (and a stream, for crops) to their patches (N, L, D)"""


@dataclass(frozen=True)
class SimpleNetSettings(BackboneSettings):
    """SimpleNet's options; names and defaults are those of the official run.sh."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": {
            "backbone": "squeezenet1_0", "image_size": 224, "pretrain_embed_dimension": 512,
            "target_embed_dimension": 512, "dsc_hidden": 512, "feature_std": 0.05, "n_epochs": 80,
        },
    }  # fmt: skip

    image_size: int = option(288, "side of the images")
    patchsize: int = option(3, "side of the neighbourhood that makes a patch, in features")
    pretrain_embed_dimension: int = option(1536, "numbers per patch and layer, after averaging")
    target_embed_dimension: int = option(1536, "numbers per patch, over all layers")
    feature_std: float = option(
        0.0, "scale the features to this standard deviation, for other backbones; 0: leave them as they are"
    )
    dsc_hidden: int = option(1024, "hidden units of the discriminator")
    dsc_margin: float = option(0.5, "scores beyond this margin are good enough")
    dsc_lr: float = option(2e-4, "learning rate of the discriminator")
    proj_lr: float = option(1e-4, "learning rate of the adaptor")
    noise_std: float = option(0.015, "standard deviation of the noise on adapted features")
    mix_noise: int = option(1, "number of noise levels, each 1.1 times the one before")
    n_epochs: int = option(160, "passes over the normals (official: 40 meta epochs of 4)")
    batch_size: int = option(8, "normal images per training step, and as many generated ones")
    augment: bool = option(False, "random crops and colours; features are then computed anew in each pass")
    cache_gib: float = option(2.0, "largest cache of features; a larger set is computed anew in each pass")
    kka_negatives: str = option(
        "replace", "patches of generated images instead of noise, or besides it", ("replace", "mixed")
    )
    kka_weight: float = option(0.5, "share of the generated images in the loss of the negatives, if mixed")
    kka_level: str = option(
        "patches", "all patches of a generated image are anomalous, or its worst ones", ("patches", "images")
    )
    kka_top: float = option(0.1, "share of the worst patches, with --kka_level images")
    precision: str = option(
        "float32", "of the training steps; scores are always float32", ("float32", "bfloat16")
    )
    test_every: int = option(0, "epochs between two test AUCs for curves, never used for selection; 0: none")


def check_settings(settings: SimpleNetSettings) -> None:
    """Raises UserError naming the flag of the first value out of range."""
    s = settings
    for name in ("dsc_lr", "proj_lr", "noise_std", "dsc_hidden", "mix_noise", "batch_size", "image_size",
                 "pretrain_embed_dimension", "target_embed_dimension"):  # fmt: skip
        if not getattr(s, name) > 0:
            raise UserError(f"--{name} must be above 0, it is {getattr(s, name)}")
    for name in ("dsc_margin", "n_epochs", "cache_gib", "feature_std", "test_every"):
        if getattr(s, name) < 0:
            raise UserError(f"--{name} must not be negative, it is {getattr(s, name)}")
    if s.patchsize < 1 or s.patchsize % 2 == 0:
        raise UserError(f"--patchsize must be odd, it is {s.patchsize}")
    if not 0 <= s.kka_weight <= 1:
        raise UserError(f"--kka_weight must lie in [0, 1], it is {s.kka_weight}")
    if not 0 < s.kka_top <= 1:
        raise UserError(f"--kka_top must lie in (0, 1], it is {s.kka_top}")


def patchify(maps: Tensor, patchsize: int) -> Tensor:
    """Each feature with its neighbourhood (zeros beyond the border). (N, C, h, w) -> (N, C p p, h, w)."""
    unfolded = F.unfold(maps, patchsize, padding=patchsize // 2)
    return unfolded.unflatten(2, maps.shape[-2:])


def average_channels(maps: Tensor, n: int) -> Tensor:
    """Mean of neighbouring channels (adaptive average pooling). (N, C, h, w) -> (N, n, h, w)."""
    if maps.shape[1] % n == 0:  # the same and several times faster
        return maps.unflatten(1, (n, -1)).mean(2)
    return F.adaptive_avg_pool2d(maps.flatten(2), (n, maps[0, 0].numel())).unflatten(2, maps.shape[-2:])


def embed_patches(layers: list[Tensor], patchsize: int, layer_dim: int, dim: int) -> Tensor:
    """Patch features of all layers, on the grid of the first.

    Averaging and bilinear enlargement are both linear, the one over channels and the other over places, so
    averaging first is equal to the official order and needs a fraction of its memory.

    [(N, C_l, h_l, w_l), ...] -> (N, dim, h, w).
    """
    grid = layers[0].shape[-2:]
    patches = [average_channels(patchify(maps, patchsize), layer_dim) for maps in layers]
    same = [patches[0]] + [
        F.interpolate(part, grid, mode="bilinear", align_corners=False) for part in patches[1:]
    ]
    return average_channels(torch.cat(same, 1), dim)


def hinge(scores: Tensor, margin: float) -> Tensor:
    """The truncated L1 loss of negatives; of true patches with -scores. (N,) -> mean."""
    return (margin + scores).clamp(min=0).mean()


def worst_patches(scores: Tensor, share: float) -> Tensor:
    """The lowest scores of each image, those of its most anomalous patches. (N, L) -> (N, share of L)."""
    return scores.topk(max(1, round(share * scores.shape[1])), dim=1, largest=False).values


class PatchDiscriminator(nn.Module):
    """Backbone, adaptor and discriminator."""

    feature_scale: Tensor

    def __init__(self, settings: SimpleNetSettings, seed: int) -> None:
        super().__init__()
        self.settings = s = settings
        self.backbone = Backbone(s, s.image_size, STRIDES, seed)
        self.backbone.check_maps()
        self.register_buffer("feature_scale", torch.ones(()))
        with seeded(seed, "init"):
            self.adaptor = nn.Linear(s.target_embed_dimension, s.target_embed_dimension)
            self.discriminator = make_discriminator(s.target_embed_dimension, s.dsc_hidden)
            nn.init.xavier_normal_(self.adaptor.weight)

    def patches(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, L, D) patch features, not adapted."""
        s, layers = self.settings, self.backbone(images)
        patches = embed_patches(layers, s.patchsize, s.pretrain_embed_dimension, s.target_embed_dimension)
        return self.feature_scale * patches.flatten(2).transpose(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, h, w), -D(q) of each patch."""
        adapted = self.adaptor(self.patches(images))
        return -self.discriminator(adapted.flatten(0, 1)).view(-1, *self.grid)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the patches of an image."""
        return self.backbone.shapes[0][1], self.backbone.shapes[0][2]


def make_discriminator(dim: int, hidden: int) -> nn.Sequential:
    """(N, dim) patches -> (N, 1), high for normal ones."""
    first, last = nn.Linear(dim, hidden), nn.Linear(hidden, 1, bias=False)
    for layer in (first, last):
        nn.init.xavier_normal_(layer.weight)
    return nn.Sequential(first, nn.BatchNorm1d(hidden), nn.LeakyReLU(0.2), last)


class WorstPatch(nn.Module):
    """The score of the most anomalous patch. (N, 3, S, S) uint8 -> (N,)."""

    def __init__(self, model: PatchDiscriminator) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).flatten(1).amax(1)


class SimpleNet:
    """SimpleNet on images; the same class with and without generated anomalies."""

    def __init__(
        self, settings: SimpleNetSettings, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        check_settings(settings)
        self.settings, self.seed, self.device = settings, seed, torch.device(device)
        self.model = PatchDiscriminator(settings, seed).to(self.device)
        self.warm_start = False  # weights were loaded: the backbone's, too

    @property
    def image_size(self) -> int:
        """Side of the images that the network takes."""
        return self.settings.image_size

    def fit(self, train: TrainSet, journal: Journal | None = None, evaluate: Evaluate | None = None) -> None:
        """Train adaptor and discriminator; resumes from the journal's checkpoint.

        Raises UserError for too few images or unfit weights, TrainingError if a loss is not finite.
        """
        journal, s, model = journal or Journal(), self.settings, self.model
        normals, anomalies = split_labels(train)
        if not self.warm_start:
            model.backbone.load_pretrained()
            some = train.resized[normals[:SCALE_IMAGES]]
            scale = feature_scale(s.feature_std, self._patches, some, FEATURE_BATCH)
            model.feature_scale.fill_(scale)
        optimizers = make_optimizers(model, s)
        parts: dict[str, Stateful] = {"adaptor": model.adaptor, "discriminator": model.discriminator}
        parts |= {f"optimizer_{i}": optimizer for i, optimizer in enumerate(optimizers)}
        features: Features | None = None
        for epoch in journal.epochs("train", s.n_epochs, parts):
            features = features or self._features(train)
            model.train()
            total = 0.0
            stream = torch.Generator(self.device).manual_seed(derive_seed(self.seed, "noise", epoch))
            for rows, true, generated in self._batches(features, normals, anomalies, epoch):
                noise = None
                if generated is None or s.kka_negatives == "mixed":
                    noise = draw_noise(true.flatten(0, 1), s.noise_std, s.mix_noise, stream)
                loss = self.loss(true, noise, generated)
                where, advice = f"epoch {epoch} of training", "lower --dsc_lr or --proj_lr"
                total += len(rows) * gradient_step(loss, optimizers, where, advice)
            curve = {}
            if evaluate is not None and s.test_every and (epoch + 1) % s.test_every == 0:
                curve = {"test_auc": evaluate(self.score)}
            journal.record("train", epoch, loss=total / len(normals), **curve)

    def score(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N,) score of the most anomalous patch, on the CPU."""
        return score_images(self.scorer(), images, self.device, FEATURE_BATCH)

    def scorer(self) -> nn.Module:
        """(N, 3, S, S) uint8 -> (N,), as one module."""
        return WorstPatch(self.model)

    def maps(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, S, S) anomaly maps, on the CPU."""
        size = (self.image_size, self.image_size)
        return in_batches(lambda part: enlarge(self.patch_scores(part), size), images, FEATURE_BATCH)

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, D) mean of the patch features, on the CPU."""
        return in_batches(lambda part: self._patches(part).mean(1).cpu(), images, FEATURE_BATCH)

    @torch.no_grad()
    def patch_scores(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, h, w), -D(q) of each patch."""
        return self.model.eval()(images.to(self.device))

    def state_dict(self) -> dict[str, Any]:
        """Weights of backbone, adaptor and discriminator."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start from these weights."""
        self.model.load_state_dict(state, strict=True)
        self.warm_start = True

    def loss(self, true: Tensor, noise: Tensor | None, generated: Tensor | None = None) -> Tensor:
        """(B, L, D) patches of normals; negatives: (B L, D) noise, (B', L, D) generated, or both -> loss.

        True and false patches pass the discriminator together: its BatchNorm must not tell them apart.
        """
        s, model = self.settings, self.model
        with torch.autocast(self.device.type, torch.bfloat16, enabled=s.precision == "bfloat16"):
            groups = [model.adaptor(true.flatten(0, 1))]
            if noise is not None:
                groups.append(groups[0] + noise)
            if generated is not None:
                groups.append(model.adaptor(generated.flatten(0, 1)))
            scores = model.discriminator(torch.cat(groups)).float().squeeze(1)
        positives, *negatives = scores.split([len(group) for group in groups])
        if generated is not None and s.kka_level == "images":
            negatives[-1] = worst_patches(negatives[-1].view(len(generated), -1), s.kka_top)
        losses = [hinge(part, s.dsc_margin) for part in negatives]
        # The shares of noise and generated images add up to 1, so the negatives weigh as much as ever.
        return hinge(-positives, s.dsc_margin) + torch.lerp(losses[0], losses[-1], s.kka_weight)

    def _batches(
        self, features: Features, normals: Tensor, anomalies: Tensor, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield (rows of normals, their patches, patches of as many generated anomalies) of one epoch."""
        stream = generator(self.seed, "train", epoch)
        order, size = cycled(normals, len(normals), stream), self.settings.batch_size
        negatives = cycled(anomalies, len(normals), stream) if len(anomalies) else anomalies
        for i, rows in enumerate(order.split(size)):
            true = features(rows, stream)
            generated = features(negatives[i * size :][:size], stream) if len(anomalies) else None
            yield rows, true, generated

    def _features(self, train: TrainSet) -> Features:
        """A function from rows to (N, L, D) patches: from a cache, or computed anew."""
        s = self.settings
        if s.augment:
            return lambda rows, stream: self._patches(
                augment(train.images[rows].to(self.device), train.native_sizes[rows], s.image_size, stream)
            )
        height, width = self.model.grid
        shape = (len(train), height * width, s.target_embed_dimension)
        if math.prod(shape) * 4 > s.cache_gib * 2**30:
            return lambda rows, stream: self._patches(train.resized[rows])
        cache = torch.empty(shape, device=self.device)
        for rows in torch.arange(len(train)).split(FEATURE_BATCH):
            cache[rows.to(self.device)] = self._patches(train.resized[rows])
        return lambda rows, stream: cache[rows.to(self.device)]

    @torch.no_grad()
    def _patches(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, L, D) patch features."""
        return self.model.patches(images.to(self.device))


def enlarge(patch_scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, h, w) -> (N, H, W) smooth maps, on the CPU."""
    large = F.interpolate(patch_scores[:, None], size, mode="bilinear", align_corners=False)
    return smooth(large[:, 0]).cpu()


def draw_noise(patches: Tensor, std: float, levels: int, stream: Generator) -> Tensor:
    """Gaussian noise for (N, D) patches, of a level drawn for each patch."""
    level = torch.randint(levels, (len(patches), 1), generator=stream, device=patches.device)
    return std * MIX_FACTOR**level * torch.randn(patches.shape, generator=stream, device=patches.device)


def make_optimizers(model: PatchDiscriminator, settings: SimpleNetSettings) -> list[torch.optim.Optimizer]:
    """Of the adaptor (AdamW) and of the discriminator (Adam)."""
    return [
        torch.optim.AdamW(model.adaptor.parameters(), lr=settings.proj_lr, fused=True),
        torch.optim.Adam(
            model.discriminator.parameters(), lr=settings.dsc_lr, weight_decay=DSC_WEIGHT_DECAY, fused=True
        ),
    ]
