"""ReContrast (Guo et al., NeurIPS 2023): each encoder's code must rebuild the features of the other encoder.

One encoder is trained, its frozen twin is not; a bottleneck and a decoder with two heads rebuild features of
three levels. Where the rebuilt features disagree, the image is anomalous. With generated anomalies ("+KKA")
their features must not be rebuilt. Differences from the official code are in docs/implementation_details.md.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kka.detectors.contract import Evaluate
from kka.detectors.parts import cycled, gradient_step, in_batches, score_images, smooth, split_labels
from kka.errors import UserError
from kka.journal import Journal, Stateful
from kka.networks.backbones import Backbone, BackboneSettings
from kka.networks.reconstruction import Bottleneck, Decoder, kaiming
from kka.seeds import generator, seeded
from kka.settings import option
from kka.train_set import TrainSet

STRIDES = (4, 8, 16)  # layer1 to layer3 of a ResNet
SCORE_BATCH = 16
WEIGHT_DECAY = 1e-5
FIRST_ALPHA, LAST_ALPHA, RAMP = -3.0, 1.0, 0.1  # hard mining sets in over the first tenth of the iterations
TOP_SHARE = 0.01  # of the pixels, for --image_score top

Pairs = list[tuple[Tensor, Tensor]]
"""Target and rebuilt features (N, C_l, h_l, w_l): three levels of each encoder"""


@dataclass(frozen=True)
class ReContrastSettings(BackboneSettings):
    """ReContrast's options; defaults are those of the official scripts for whole images."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": {
            "backbone": "squeezenet1_0", "image_size": 224, "n_iterations": 200, "batch_size": 8,
            "width": 0.25, "bottleneck_blocks": 1, "decoder_blocks": (1, 1, 1),
        },
    }  # fmt: skip

    image_size: int = option(256, "side of the images")
    n_iterations: int = option(2000, "training steps")
    batch_size: int = option(16, "normal images per training step, and as many generated ones")
    lr: float = option(2e-3, "learning rate of bottleneck and decoder")
    encoder_lr: float = option(1e-5, "learning rate of the trained encoder")
    encoder_bn: str = option("eval", "BatchNorm of the trained encoder in training", ("eval", "train"))
    width: float = option(1.0, "channels inside bottleneck and decoder, relative to the backbone's")
    bottleneck_blocks: int = option(3, "residual blocks of the bottleneck")
    decoder_blocks: tuple[int, ...] = option((3, 4, 6), "residual blocks of the decoder, deepest level first")
    image_score: str = option("max", "image score from the anomaly map", ("max", "mean", "top"))
    kka_loss: str = option(
        "margin",
        "what generated anomalies add: max(0, margin - distance), max(0, cosine) by place, or -distance",
        ("margin", "similarity", "signed"),
    )
    kka_weight: float = option(1.0, "weight of that term")
    kka_margin: float = option(1.0, "distance beyond which a generated anomaly is far enough")
    kka_batch: str = option(
        "separate",
        "generated anomalies pass in evaluation mode, or in the normals' batch",
        ("separate", "mixed"),
    )
    precision: str = option(
        "float32", "of the training steps; scores are always float32", ("float32", "bfloat16")
    )
    test_every: int = option(0, "epochs between two test AUCs for curves, never used for selection; 0: none")


def check_settings(settings: ReContrastSettings) -> None:
    """Raises UserError naming the flag of the first value out of range."""
    s = settings
    for name in ("image_size", "lr", "encoder_lr", "width", "bottleneck_blocks"):
        if not getattr(s, name) > 0:
            raise UserError(f"--{name} must be above 0, it is {getattr(s, name)}")
    for name in ("n_iterations", "kka_weight", "kka_margin", "test_every"):
        if getattr(s, name) < 0:
            raise UserError(f"--{name} must not be negative, it is {getattr(s, name)}")
    if s.batch_size < 2:
        raise UserError(f"--batch_size must be at least 2 (batch normalisation), it is {s.batch_size}")
    if len(s.decoder_blocks) != 3 or min(s.decoder_blocks) < 1:
        raise UserError(f"--decoder_blocks must be 3 numbers above 0, they are {s.decoder_blocks}")
    if s.layers and len(s.layers) != 3:
        raise UserError(f"--layers must name 3 layers for recontrast, it names {len(s.layers)}")


def point_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine over channels at each place. (N, C, h, w) twice -> (N, h, w)."""
    return 1 - F.cosine_similarity(a, b, dim=1)


def global_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine of whole images. (N, C, h, w) twice -> (N,)."""
    return 1 - F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)


def mine_hard(output: Tensor, target: Tensor, alpha: float) -> Tensor:
    """The output, without gradient where it is close to the target: below mean + alpha std of the batch."""
    distance = point_distance(output, target).detach()
    far = distance >= distance.mean() + alpha * distance.std()
    return torch.where(far[:, None], output, output.detach())


def recontrast_loss(pairs: Pairs, alpha: float) -> Tensor:
    """Half the sum of the mean global distances of six pairs, gradients only at hard places; in [0, 6]."""
    distances = [
        global_distance(target.detach(), mine_hard(output, target, alpha)) for target, output in pairs
    ]
    return torch.stack(distances).mean(1).sum() / 2


def repulsion(pairs: Pairs, kind: str, margin: float) -> Tensor:
    """What generated anomalies add to the loss: the mean over the six pairs, small where they are far."""
    if kind == "similarity":
        similarities = [1 - point_distance(target.detach(), output) for target, output in pairs]
        return torch.stack([similarity.clamp(min=0).mean() for similarity in similarities]).mean()
    distances = torch.stack([global_distance(target.detach(), output) for target, output in pairs])
    return -distances.mean() if kind == "signed" else (margin - distances).clamp(min=0).mean()


def mining_alpha(iteration: int, n_iterations: int) -> float:
    """Strength of hard mining: from -3 (nothing is masked) to 1."""
    share = iteration / (RAMP * n_iterations)
    return min(FIRST_ALPHA + (LAST_ALPHA - FIRST_ALPHA) * share, LAST_ALPHA)


def sum_maps(pairs: Pairs, size: tuple[int, int]) -> Tensor:
    """Sum of the enlarged point distances of all pairs. -> (N, H, W)."""
    distances = [point_distance(target, output)[:, None] for target, output in pairs]
    large = [F.interpolate(d, size, mode="bilinear", align_corners=True) for d in distances]
    return torch.cat(large, 1).sum(1)


def image_scores(maps: Tensor, kind: str) -> Tensor:
    """Maximum, mean, or mean of the highest hundredth. (N, H, W) -> (N,)."""
    pixels = maps.flatten(1)
    if kind == "top":
        return pixels.topk(max(1, int(TOP_SHARE * pixels.shape[1])), dim=1).values.mean(1)
    return pixels.mean(1) if kind == "mean" else pixels.amax(1)


class ContrastiveReconstruction(nn.Module):
    """Two encoders, bottleneck and decoder."""

    def __init__(self, settings: ReContrastSettings, seed: int) -> None:
        super().__init__()
        s, self.encoder_bn = settings, settings.encoder_bn
        self.encoder = Backbone(s, s.image_size, STRIDES, seed, trainable=True)
        self.encoder.check_maps()
        self.frozen = copy.deepcopy(self.encoder).requires_grad_(False)
        channels = [shape[0] for shape in self.encoder.shapes]
        self.sizes = [(shape[1], shape[2]) for shape in self.encoder.shapes]
        with seeded(seed, "init"):
            self.bottleneck = Bottleneck(channels, s.width, s.bottleneck_blocks)
            self.decoder = Decoder(self.bottleneck.n_out, channels, s.width, s.decoder_blocks)
            kaiming(self.bottleneck)
            kaiming(self.decoder)

    def forward(self, images: Tensor) -> Pairs:
        """(N, 3, S, S) uint8 -> six pairs.

        First the frozen encoder's features, rebuilt from the trained one's code, then the reverse.
        """
        trained, frozen = self.encoder(images), self.frozen(images)
        code = self.bottleneck([torch.cat(pair) for pair in zip(trained, frozen, strict=True)])
        first, second = self.decoder(code, self.sizes)
        n = images.shape[0]  # len() would be a constant in an exported graph
        rebuilt = [level[:n] for level in first] + [level[n:] for level in second]
        return [(t.float(), o.float()) for t, o in zip(frozen + trained, rebuilt, strict=True)]

    def train(self, mode: bool = True) -> "ContrastiveReconstruction":
        """The frozen encoder is always in evaluation mode, the trained one by the fixed rule --encoder_bn."""
        super().train(mode)
        self.encoder.train(mode and self.encoder_bn == "train")
        self.frozen.eval()
        return self


class MapScorer(nn.Module):
    """Smooth anomaly maps and what an image scores by them. (N, 3, S, S) uint8 -> (N,)."""

    def __init__(self, model: ContrastiveReconstruction, size: int, kind: str) -> None:
        super().__init__()
        self.model, self.size, self.kind = model, (size, size), kind

    def maps(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, S, S)."""
        return smooth(sum_maps(self.model(images), self.size))

    def forward(self, images: Tensor) -> Tensor:
        return image_scores(self.maps(images), self.kind)


class ReContrast:
    """ReContrast on images; the same class with and without generated anomalies."""

    def __init__(
        self, settings: ReContrastSettings, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        check_settings(settings)
        self.settings, self.seed, self.device = settings, seed, torch.device(device)
        model = ContrastiveReconstruction(settings, seed).to(self.device)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.warm_start = False  # weights were loaded: those of the encoders, too

    @property
    def image_size(self) -> int:
        """Side of the images that the network takes."""
        return self.settings.image_size

    def fit(self, train: TrainSet, journal: Journal | None = None, evaluate: Evaluate | None = None) -> None:
        """Train encoder, bottleneck and decoder; resumes from the journal's checkpoint.

        Raises UserError for too few images or unfit weights, TrainingError if a loss is not finite.
        """
        journal, s, model = journal or Journal(), self.settings, self.model
        normals, anomalies = split_labels(train)
        if not self.warm_start:
            model.encoder.load_pretrained()
            model.frozen.load_state_dict(model.encoder.state_dict())
        optimizers = make_optimizers(model, s)
        parts: dict[str, Stateful] = {
            name: getattr(model, name) for name in ("encoder", "bottleneck", "decoder")
        }
        parts |= {f"optimizer_{i}": optimizer for i, optimizer in enumerate(optimizers)}
        steps = steps_per_epoch(len(normals), s.batch_size)
        for epoch in journal.epochs("train", math.ceil(s.n_iterations / steps), parts):
            model.train()
            losses = []
            for iteration, rows, negatives in self._batches(normals, anomalies, epoch, steps):
                generated = train.resized[negatives] if len(negatives) else None
                loss = self.loss(train.resized[rows], generated, mining_alpha(iteration, s.n_iterations))
                where, advice = f"iteration {iteration} of training", "lower --lr or --encoder_lr"
                losses.append(gradient_step(loss, optimizers, where, advice))
            curve = {}
            if evaluate is not None and s.test_every and (epoch + 1) % s.test_every == 0:
                curve = {"test_auc": evaluate(self.score)}
            journal.record("train", epoch, loss=sum(losses) / len(losses), **curve)

    def loss(self, normals: Tensor, generated: Tensor | None, alpha: float) -> Tensor:
        """(B, 3, S, S) uint8 normals and generated anomalies -> loss of the batch."""
        s = self.settings
        if generated is None:
            return recontrast_loss(self._forward(normals), alpha)
        if s.kka_batch == "mixed":
            pairs, n = self._forward(torch.cat([normals, generated])), len(normals)
            near, far = [(t[:n], o[:n]) for t, o in pairs], [(t[n:], o[n:]) for t, o in pairs]
        else:
            near = self._forward(normals)
            self.model.eval()  # the statistics of BatchNorm are those of the normals
            far = self._forward(generated)
            self.model.train()
        return recontrast_loss(near, alpha) + s.kka_weight * repulsion(far, s.kka_loss, s.kka_margin)

    def score(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N,) image scores from the anomaly maps, on the CPU."""
        return score_images(self.scorer(), images, self.device, SCORE_BATCH)

    def scorer(self) -> MapScorer:
        """(N, 3, S, S) uint8 -> (N,), as one module."""
        return MapScorer(self.model, self.image_size, self.settings.image_score)

    def maps(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, S, S) smooth anomaly maps, on the CPU."""
        scorer = self.scorer().eval()
        return in_batches(lambda part: scorer.maps(part.to(self.device)).cpu(), images, SCORE_BATCH)

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, C) mean of the trained encoder's deepest features, on the CPU."""
        self.model.eval()
        return in_batches(
            lambda part: self.model.encoder(part.to(self.device))[-1].mean((2, 3)).cpu(), images, SCORE_BATCH
        )

    def state_dict(self) -> dict[str, Any]:
        """Weights of encoders, bottleneck and decoder."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start from these weights."""
        self.model.load_state_dict(state, strict=True)
        self.warm_start = True

    def _forward(self, images: Tensor) -> Pairs:
        bfloat16 = self.settings.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            return self.model(images.to(self.device))

    def _batches(
        self, normals: Tensor, anomalies: Tensor, epoch: int, steps: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (iteration, rows of normals, rows of as many anomalies) of one epoch."""
        stream, size = generator(self.seed, "train", epoch), self.settings.batch_size
        order = cycled(normals, len(normals), stream).split(size)
        others = [anomalies] * steps
        if len(anomalies):
            others = list(cycled(anomalies, len(normals), stream).split(size))
        for i in range(min(steps, self.settings.n_iterations - epoch * steps)):
            yield epoch * steps + i, order[i], others[i]


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Batches of n images; a last single image is left out (BatchNorm)."""
    return n // batch_size + (n % batch_size > 1)


def make_optimizers(
    model: ContrastiveReconstruction, settings: ReContrastSettings
) -> list[torch.optim.Optimizer]:
    """Of bottleneck and decoder, and of the trained encoder."""
    new: Sequence[nn.Parameter] = [*model.bottleneck.parameters(), *model.decoder.parameters()]
    return [
        torch.optim.AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY, fused=True)
        for parameters, lr in ((new, settings.lr), (model.encoder.parameters(), settings.encoder_lr))
    ]
