"""Pseudo anomalies made of normal images: CutPaste, CutMix, and textures behind noise (DRAEM).

DRA and AHL learn from them beside real anomalies; every draw comes from the stream that is given.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as transforms

from kka.augment import to_unit
from kka.datasets.images import content_digest, decode
from kka.datasets.layout import list_images
from kka.errors import UserError
from kka.files import user_path
from kka.train_set import TrainSet

PATCH_AREA = (0.02, 0.15)  # share of the image
PATCH_RATIO = (0.3, 1 / 0.3)
PATCH_JITTER = 0.1  # of brightness, contrast, saturation and hue
OCTAVES = 6  # cells of the noise across an image: 2^0 ... 2^5
VISIBLE = (0.2, 1.0)  # weight of the texture inside the mask
N_OPERATIONS = 3  # on a texture

KINDS = ("cutpaste", "cutmix", "dream")


def uniform(stream: Generator, low: float, high: float) -> float:
    """One number between low and high."""
    return low + (high - low) * torch.rand((), generator=stream).item()


def randint(stream: Generator, n: int) -> int:
    """One of 0 ... n - 1."""
    return int(torch.randint(n, (), generator=stream))


def pseudo_anomaly(
    kind: str, image: Tensor, other: Tensor, textures: Tensor | None, stream: Generator
) -> Tensor:
    """One made of a normal image.

    Args:
        kind: one of KINDS.
        image: (3, S, S) in [0, 1].
        other: (3, S, S) in [0, 1], a normal image from which CutMix takes its patch.
        textures: (K, 3, S, S) in [0, 1]; None: procedural ones.
        stream: on the CPU.

    Returns (3, S, S) in [0, 1].
    """
    if kind == "dream":
        return blend_texture(image, textures, stream)
    return paste_patch(image, {"cutpaste": image, "cutmix": other}[kind], stream)


def paste_patch(image: Tensor, source: Tensor, stream: Generator) -> Tensor:
    """A jittered patch of the source at another place of the image. (3, S, S), (3, S, S) -> (3, S, S)."""
    side = image.shape[-1]
    area = side**2 * uniform(stream, *PATCH_AREA)
    ratio = math.exp(uniform(stream, *map(math.log, PATCH_RATIO)))
    height, width = (min(side, max(1, round(math.sqrt(area * r)))) for r in (ratio, 1 / ratio))
    top, left, row, column = (randint(stream, side - length + 1) for length in (height, width, height, width))
    result = image.clone()
    patch = source[:, top : top + height, left : left + width]
    result[:, row : row + height, column : column + width] = jitter(patch, stream)
    return result


def jitter(image: Tensor, stream: Generator) -> Tensor:
    """Small changes of brightness, contrast, saturation and hue. (3, H, W) in [0, 1] -> the same."""
    near_one = (1 - PATCH_JITTER, 1 + PATCH_JITTER)
    image = transforms.adjust_brightness(image, uniform(stream, *near_one))
    image = transforms.adjust_contrast(image, uniform(stream, *near_one))
    image = transforms.adjust_saturation(image, uniform(stream, *near_one))
    return transforms.adjust_hue(image, uniform(stream, -PATCH_JITTER, PATCH_JITTER))


def blend_texture(image: Tensor, textures: Tensor | None, stream: Generator) -> Tensor:
    """A texture shows through the image where noise is high. (3, S, S) -> (3, S, S)."""
    side = image.shape[-1]
    if textures is None:
        texture = procedural_texture(side, stream)
    else:
        texture = change_texture(textures[randint(stream, len(textures))], stream)
    mask = noise_mask(side, stream).to(image.device)
    weight = mask * uniform(stream, *VISIBLE)
    return torch.lerp(image, texture.to(image), weight)


def noise_mask(side: int, stream: Generator) -> Tensor:
    """(S, S) of 0 and 1: Perlin noise, turned by up to 90 degrees, above 0.5; never empty."""
    while True:
        rows, columns = (2 ** randint(stream, OCTAVES) for _ in range(2))
        noise = perlin(side, rows, columns, stream)[None]
        mask = (transforms.rotate(noise, uniform(stream, -90, 90))[0] > 0.5).float()
        if mask.any():
            return mask


def perlin(side: int, rows: int, columns: int, stream: Generator) -> Tensor:
    """(S, S) Perlin noise with that many cells, scaled to deviate by about 1 at most (Perlin, 1985)."""
    angles = 2 * math.pi * torch.rand(rows + 1, columns + 1, generator=stream)
    y = (torch.arange(side) + 0.5)[:, None] / side * rows
    x = (torch.arange(side) + 0.5)[None] / side * columns
    row, column = y.long().expand(side, side), x.long().expand(side, side)

    def slope(down: int, right: int) -> Tensor:
        angle = angles[row + down, column + right]
        return angle.cos() * (x - column - right) + angle.sin() * (y - row - down)

    def fade(t: Tensor) -> Tensor:
        return t**3 * (t * (6 * t - 15) + 10)

    right, down = fade(x - column), fade(y - row)
    above = torch.lerp(slope(0, 0), slope(0, 1), right)
    below = torch.lerp(slope(1, 0), slope(1, 1), right)
    return math.sqrt(2) * torch.lerp(above, below, down)


def procedural_texture(side: int, stream: Generator) -> Tensor:
    """Stripes of two or three colours, bent by noise, fine or coarse. -> (3, S, S) in [0, 1]."""
    cells, bend = 2 ** (1 + randint(stream, OCTAVES - 1)), uniform(stream, 0, 3)
    angle, pitch = uniform(stream, 0, math.pi), uniform(stream, 1, 40)
    y, x = torch.meshgrid(*2 * [torch.arange(side) / side], indexing="ij")
    phase = pitch * (x * math.cos(angle) + y * math.sin(angle)) + bend * perlin(side, cells, cells, stream)
    colors = torch.rand(3, 3, 1, 1, generator=stream)
    wave = 0.5 + 0.5 * torch.sin(2 * math.pi * phase)
    grain = 0.5 + 0.5 * perlin(side, 32, 32, stream)
    return torch.lerp(torch.lerp(colors[0], colors[1], wave), colors[2], 0.5 * grain).clamp(0, 1)


def change_texture(texture: Tensor, stream: Generator) -> Tensor:
    """Three of ten changes of colour or position, in random order. (3, S, S) in [0, 1] -> the same."""
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda x: transforms.adjust_gamma(x, uniform(stream, 0.5, 2)),
        lambda x: (x * uniform(stream, 0.8, 1.2) + uniform(stream, -30, 30) / 255).clamp(0, 1),
        lambda x: transforms.adjust_sharpness(x, uniform(stream, 1, 2)),
        lambda x: transforms.adjust_saturation(
            transforms.adjust_hue(x, uniform(stream, -0.2, 0.2)), uniform(stream, 0.8, 1.2)
        ),
        lambda x: transforms.solarize(x, uniform(stream, 0.125, 0.5)),
        lambda x: transforms.posterize(x.mul(255).byte(), 4 + randint(stream, 3)).float() / 255,
        transforms.invert,
        transforms.autocontrast,
        lambda x: transforms.equalize(x.mul(255).byte()).float() / 255,
        lambda x: transforms.rotate(x, uniform(stream, -45, 45)),
    ]
    for k in torch.randperm(len(changes), generator=stream)[:N_OPERATIONS].tolist():
        texture = changes[k](texture)
    return texture


def texture_files(folder: str) -> list[Path]:
    """The images of a folder and its subfolders; raises UserError if there are none."""
    place = user_path(folder)
    if not place.is_dir():
        raise UserError(f"--texture_dir {folder} is no folder; leave it out for procedural textures")
    inside = sorted(path for path in place.rglob("*") if path.is_dir())
    paths = [path for part in (place, *inside) for path in list_images(part)]
    if not paths:
        raise UserError(f"--texture_dir {folder} holds no images; leave it out for procedural textures")
    return paths


def read_textures(folder: str, side: int) -> Tensor:
    """(K, 3, S, S) in [0, 1]; raises UserError if there are none."""
    paths = texture_files(folder)
    return to_unit(decode(paths, content_digest(paths), 0, side, name="textures").resized)


class PseudoAnomalies:
    """Pseudo anomalies of training images; textures are read when the first one is needed."""

    def __init__(self, texture_dir: str | None, side: int) -> None:
        self.texture_dir, self.side = texture_dir, side
        self.textures: Tensor | None = None

    def of(self, train: TrainSet, rows: Tensor, kinds: Sequence[str | None], stream: Generator) -> Tensor:
        """The images in these rows, each as a pseudo anomaly of its kind or, with None, as it is.

        (N,) rows, N kinds -> (N, 3, S, S) in [0, 1].
        """
        if "dream" in kinds and self.texture_dir is not None and self.textures is None:
            self.textures = read_textures(self.texture_dir, self.side)
        normals = torch.nonzero(train.semi_targets >= 0).squeeze(1)
        images = to_unit(train.resized[rows])
        for k, kind in enumerate(kinds):
            if kind is not None:
                other = to_unit(train.resized[normals[randint(stream, len(normals))]])
                images[k] = pseudo_anomaly(kind, images[k], other, self.textures, stream)
        return images


def content_of_textures(settings: Any) -> dict[str, str]:
    """{"texture_dir": digest} of a detector's folder of textures, or nothing without one."""
    given = getattr(settings, "texture_dir", None)
    return {"texture_dir": content_digest(texture_files(given))} if given else {}
