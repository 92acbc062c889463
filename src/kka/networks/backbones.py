"""Torchvision networks as feature extractors: weights by file, download or at random; layers by name."""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from kka.augment import normalize, to_unit
from kka.datasets.images import MAX_PIXELS
from kka.errors import UserError
from kka.files import sha256, user_path
from kka.seeds import seeded
from kka.settings import option

# The last layer at each stride, by the beginning of the network's name; the longest beginning counts.
RESNET = {4: "layer1", 8: "layer2", 16: "layer3", 32: "layer4"}
STAGES: dict[str, dict[int, str]] = {
    "resnet": RESNET,
    "resnext": RESNET,
    "wide_resnet": RESNET,
    "squeezenet1_0": {4: "features.5", 8: "features.10", 16: "features.12"},
    "squeezenet1_1": {4: "features.4", 8: "features.7", 16: "features.12"},
    "mobilenet_v2": {4: "features.3", 8: "features.6", 16: "features.13", 32: "features.18"},
    "mobilenet_v3_large": {4: "features.3", 8: "features.6", 16: "features.12", 32: "features.16"},
    "efficientnet_b": {4: "features.2", 8: "features.3", 16: "features.5", 32: "features.8"},
    "convnext": {4: "features.1", 8: "features.3", 16: "features.5", 32: "features.7"},
    "densenet": {stride: f"features.denseblock{i}" for i, stride in enumerate((4, 8, 16, 32), 1)},
    "regnet": {stride: f"trunk_output.block{i}" for i, stride in enumerate((4, 8, 16, 32), 1)},
}
# These two expect their own normalisation and convert to it only if told.
ARGUMENTS: dict[str, dict[str, Any]] = {
    name: {"transform_input": True, "init_weights": False} for name in ("googlenet", "inception_v3")
}


@dataclass(frozen=True)
class BackboneSettings:
    """Which network gives the features; part of the settings of every detector that has a backbone."""

    backbone: str = option("wide_resnet50_2", "network of torchvision that gives the features")
    backbone_weights: str | None = option(
        None, "file of its ImageNet weights; None: torchvision's, downloaded once"
    )
    backbone_init: str = option("imagenet", "how the backbone starts", ("imagenet", "random"))
    layers: tuple[str, ...] = option((), "its feature layers; none: the usual ones of the network")


class Backbone(nn.Module):
    """Feature maps of a torchvision network at some layers; deeper parts of the network are dropped.

    Args:
        settings: which network; its weights are random until `load_pretrained`.
        size: side of the images, in pixels.
        strides: where the usual layers are taken, if the settings name none; -1 is the deepest.
        seed: of the random weights.
        trainable: False fixes the weights and keeps evaluation mode, whatever `train` says.

    Raises UserError for an unknown network or layer, or images that are too small for it.
    """

    def __init__(
        self,
        settings: BackboneSettings,
        size: int,
        strides: Sequence[int] = (-1,),
        seed: int = 0,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.settings, self.size, self.trainable = settings, size, trainable
        check_backbone(settings)
        name = settings.backbone
        self.layers = settings.layers or usual_layers(name, strides)
        with seeded(seed, "backbone"):
            network = get_model(name, weights=None, **ARGUMENTS.get(name, {}))
        check_layers(name, network, self.layers)
        nodes = {layer: layer for layer in self.layers}
        net = create_feature_extractor(network, nodes, suppress_diff_warning=True)
        self.net = net.to(memory_format=torch.channels_last)
        self.requires_grad_(trainable).eval()
        self.shapes = [tuple(features.shape[1:]) for features in self._try_out()]

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, S, S), uint8 or float in [0, 1], not normalised -> the output of each layer."""
        if images.shape[1:] != (3, self.size, self.size):
            raise UserError(
                f"images of shape {tuple(images.shape)} were given to a backbone for "
                f"(N, 3, {self.size}, {self.size}); resize them or set --image_size"
            )
        unit = to_unit(images) if images.dtype == torch.uint8 else images
        features = self.net(normalize(unit).contiguous(memory_format=torch.channels_last))
        return [features[layer] for layer in self.layers]

    def train(self, mode: bool = True) -> "Backbone":
        """Training mode only for a trainable backbone."""
        return super().train(mode and self.trainable)

    def load_pretrained(self) -> None:
        """Take ImageNet weights from the file or from torchvision; random initialisation is kept.

        Raises UserError if they cannot be had or do not fit.
        """
        s = self.settings
        if s.backbone_init == "random":
            return
        if s.backbone_weights is None:
            self._take(download_weights(s.backbone), "torchvision's weights")
        else:
            self._take(
                read_weights(user_path(s.backbone_weights)),
                f"--backbone_weights {s.backbone_weights}",
            )

    def check_maps(self) -> None:
        """Raises UserError for a layer whose output is no (C, H, W) map."""
        for layer, shape in zip(self.layers, self.shapes, strict=True):
            if len(shape) != 3 or shape[1] != shape[2]:
                raise UserError(
                    f"layer {layer} of {self.settings.backbone} gives {shape} per image, not a square map "
                    "of features; choose others with --layers"
                )

    def _take(self, weights: dict[str, Tensor], origin: str) -> None:
        own = self.net.state_dict()
        # Old files lack the counter of BatchNorm; the classifier that was cut off may have any shape.
        for key in own:
            if key.endswith("num_batches_tracked"):
                continue
            if key not in weights or weights[key].shape != own[key].shape:
                found = f"has shape {tuple(weights[key].shape)}" if key in weights else "is missing"
                raise UserError(
                    f"{origin} does not fit {self.settings.backbone}: {key} {found}, "
                    f"expected {tuple(own[key].shape)}"
                )
        self.net.load_state_dict({key: weights.get(key, value) for key, value in own.items()})

    @torch.no_grad()
    def _try_out(self) -> list[Tensor]:
        """The outputs for one black image."""
        name, size = self.settings.backbone, self.size
        if size**2 > MAX_PIXELS:
            largest = math.isqrt(MAX_PIXELS)
            raise UserError(f"{name} cannot take images of {size} px; --image_size {largest} is the largest")
        try:
            return self(torch.zeros(1, 3, size, size))
        except (RuntimeError, AssertionError, ValueError) as error:
            least = max(pretrained_weights(name).meta["min_size"])
            if size >= least:
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"{name} cannot take images of {size} px ({reason}); choose another --image_size"
                ) from None
            raise UserError(
                f"{name} cannot take images of {size} px; --image_size {least} is the smallest it is made for"
            ) from None


class PooledBackbone(nn.Module):
    """A torchvision network as an encoder: pooled features of its deepest layer, then a map without bias.

    (N, 3, size, size) normalised -> (N, rep_dim).
    """

    channels = 3

    def __init__(
        self, settings: BackboneSettings, size: int, rep_dim: int, trainable: bool, seed: int
    ) -> None:
        super().__init__()
        self.size, self.rep_dim = size, rep_dim
        self.backbone = Backbone(settings, size, seed=seed, trainable=trainable)
        self.head = nn.Linear(self.backbone.shapes[0][0], rep_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.backbone.net(x)[self.backbone.layers[0]]
        return self.head(maps.flatten(2).mean(2))


def check_backbone(settings: BackboneSettings, flag: str = "backbone", others: tuple[str, ...] = ()) -> None:
    """Raises UserError for an unknown network or settings that contradict each other.

    `others` are names that the flag takes beside torchvision's.
    """
    known = list_models(module=torchvision.models)
    if settings.backbone not in known:
        close = difflib.get_close_matches(settings.backbone, [*others, *known], n=3)
        hint = (
            f"did you mean {' or '.join(close)}" if close else f"torchvision has {', '.join(known[:4])} ..."
        )
        raise UserError(f"--{flag} {settings.backbone!r} is no network of torchvision; {hint}")
    if settings.backbone_init == "random" and settings.backbone_weights is not None:
        raise UserError("--backbone_init random and --backbone_weights exclude each other; give one of them")


def usual_layers(name: str, strides: Sequence[int]) -> tuple[str, ...]:
    """The last layer of a network at each stride, -1 for its deepest; raises UserError if none is known."""
    stages = next((STAGES[start] for start in sorted(STAGES, key=len)[::-1] if name.startswith(start)), None)
    if stages is None:
        raise UserError(f"{name} has no usual feature layers here; name them with --layers")
    return tuple(stages[max(stages) if stride == -1 else stride] for stride in strides)


def check_layers(name: str, network: nn.Module, layers: Iterable[str]) -> None:
    """Raises UserError for a layer that the network does not have, naming close ones."""
    nodes = get_graph_node_names(network, suppress_diff_warning=True)[1]
    parts = [node.split(".") for node in nodes]
    known = dict.fromkeys(".".join(part[: depth + 1]) for part in parts for depth in range(len(part)))
    for layer in layers:
        if layer not in known:
            close = difflib.get_close_matches(layer, known, n=3) or list(known)[-3:]
            raise UserError(f"--layers: {name} has no layer {layer!r}; there are {', '.join(close)} ...")


def pretrained_weights(name: str) -> Any:
    """Torchvision's first ImageNet weights of a network, which the methods' authors used."""
    weights = get_model_weights(name)
    return getattr(weights, "IMAGENET1K_V1", weights.DEFAULT)


def download_weights(name: str) -> dict[str, Tensor]:
    """Torchvision's ImageNet weights, from its cache or the network; raises UserError if there is none."""
    try:
        return get_model(name, weights=pretrained_weights(name), progress=False).state_dict()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the ImageNet weights of {name} cannot be downloaded ({error}); give --backbone_weights with a "
            "file of them, or --backbone_init random"
        ) from None


def content_of_weights(settings: Any) -> dict[str, str]:
    """{"backbone_weights": digest} of a detector's file of weights, or nothing without one.

    Raises UserError if the file does not exist.
    """
    given = getattr(settings, "backbone_weights", None)
    return {"backbone_weights": sha256(_check_file(user_path(given)))[:12]} if given else {}


def _check_file(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"--backbone_weights {path} does not exist; give a .pth or .safetensors file")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights from a .pth or .safetensors file; never unpickles foreign objects."""
    _check_file(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(path.read_bytes())
        weights = torch.load(path, map_location="cpu", weights_only=True)
        return {str(key): value for key, value in weights.items() if isinstance(value, Tensor)}
    except Exception as error:  # the two libraries raise many kinds for a damaged file
        raise UserError(
            f"--backbone_weights {path} holds no weights ({type(error).__name__}); download it again"
        ) from None
