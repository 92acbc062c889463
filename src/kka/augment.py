"""The train and test transforms of the official code, on whole batches.

The same distribution as torchvision's RandomResizedCrop(scale 0.2-1), RandomHorizontalFlip,
RandomApply(ColorJitter(0.4, 0.4, 0.4, 0.1), 0.8), RandomGrayscale(0.2), drawn independently for every image
of the batch. Cropping and antialiased resizing are two small matrix products per image.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow and torchvision

SCALE = (0.2, 1.0)
RATIO = (3 / 4, 4 / 3)
JITTER = 0.4  # brightness, contrast and saturation factors are uniform in 1 +- JITTER
HUE = 0.1
BRIGHTNESS, CONTRAST, SATURATION, HUE_SHIFT = range(4)


def augment(images: Tensor, native_sizes: Tensor, size: int, generator: Generator) -> Tensor:
    """The train transform, without normalisation.

    Args:
        images: (N, 3, S, S) uint8, squeezed to a square.
        native_sizes: (N, 2) height and width of the original files; crops are drawn in their proportions.
        size: side of the result.
        generator: CPU generator, so that the same seed gives the same crops on every device.

    Returns (N, 3, size, size) float32 in [0, 1].
    """
    return transform(images, draw(native_sizes, generator), size)


class Draws(NamedTuple):
    """Everything that is random in the train transform of N images."""

    boxes: Tensor
    """(N, 4) top, left, height, width as fractions"""
    flips: Tensor
    """(N,) bool"""
    jittered: Tensor
    """(N, 1) bool, whether the colours change"""
    factors: Tensor
    """(N, 3) of brightness, contrast, saturation"""
    shifts: Tensor
    """(N,) of the hue, as a fraction of the circle"""
    order: Tensor
    """(N, 4) the four steps of the colours in their order"""
    gray: Tensor
    """(N,) bool"""


def draw(native_sizes: Tensor, generator: Generator) -> Draws:
    """(N, 2) height, width -> what `transform` does to N images."""
    n = len(native_sizes)
    boxes = random_crops(native_sizes, generator)
    flips = torch.rand(n, generator=generator) < 0.5
    jitter = draw_jitter(n, generator)
    return Draws(boxes, flips, *jitter, torch.rand(n, generator=generator) < 0.2)


def join(draws: Sequence[Draws]) -> Draws:
    """Those of several batches, one behind the other."""
    return Draws(*map(torch.cat, zip(*draws, strict=True)))


def transform(images: Tensor, draws: Draws, size: int) -> Tensor:
    """Crop, flip, change colours as drawn: (N, 3, S, S) uint8 -> (N, 3, size, size) float32 in [0, 1]."""
    crops = resize_crops(images, draws.boxes, draws.flips, size)
    colored = color_jitter(crops, draws.jittered, draws.factors, draws.shifts, draws.order)
    return torch.where(draws.gray.to(images.device)[:, None, None, None], luma(colored), colored)


def random_crops(native_sizes: Tensor, generator: Generator, attempts: int = 10) -> Tensor:
    """Boxes of RandomResizedCrop. (N, 2) height, width -> (N, 4) top, left, height, width as fractions.

    Area uniform in SCALE, aspect ratio log-uniform in RATIO; the first of ten attempts that fits inside the
    image counts, otherwise the largest central crop of an allowed ratio.
    """
    height, width = native_sizes.double().unsqueeze(-1).unbind(1)
    u = torch.rand(4, len(native_sizes), attempts, generator=generator, dtype=torch.float64)
    area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * u[0])
    ratio = torch.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * u[1])
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    top, left = (u[2] * (height - h + 1)).floor(), (u[3] * (width - w + 1)).floor()
    fits = (w > 0) & (h > 0) & (w <= width) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    boxes = torch.stack([top, left, h, w], -1).gather(1, first[..., None].expand(-1, -1, 4)).squeeze(1)
    boxes = torch.where(fits.any(1, keepdim=True), boxes, central_crops(native_sizes))
    return boxes / native_sizes.double().repeat(1, 2)


def central_crops(native_sizes: Tensor) -> Tensor:
    """RandomResizedCrop's way out: the largest central box of an allowed ratio. (N, 2) -> (N, 4) pixels."""
    height, width = native_sizes.double().unbind(1)
    h = torch.minimum(height, (width / RATIO[0]).round())
    w = torch.minimum(width, (height * RATIO[1]).round())
    return torch.stack([((height - h) / 2).floor(), ((width - w) / 2).floor(), h, w], 1)


def resize_crops(images: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """Cut a box out of every image and resize it with antialiased bilinear interpolation (as Pillow).

    (N, 3, S, S) uint8, (N, 4) fractions, (N,) bool -> (N, 3, size, size) float32 in [0, 1].
    """
    side = images.shape[-1]
    top, left, height, width = (boxes * side).float().to(images.device).unbind(1)
    rows = interpolation_matrix(top, height, side, size)
    columns = interpolation_matrix(left, width, side, size)
    columns = torch.where(flips.to(images.device)[:, None, None], columns.flip(1), columns)
    pixels = images.float().flatten(0, 1).view(len(images), 3, side, side)
    narrow = pixels.flatten(1, 2) @ columns.transpose(1, 2)  # (N, 3 S, size)
    return (rows[:, None] @ narrow.view(len(images), 3, side, size)).div_(255).clamp_(0, 1)


def interpolation_matrix(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """Weights that map [start, start + length) of `side` pixels to `size`: (N,), (N,) -> (N, size, side).

    A triangle as wide as an output pixel (at least one source pixel), cut off at the box and normalised.
    """
    scale = (length / size)[:, None, None]
    centres = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    sources = torch.arange(side, device=start.device) + 0.5
    weights = (1 - (sources - centres).abs() / scale.clamp(min=1)).clamp_(min=0)
    edge = start[:, None, None]
    inside = (sources > edge) & (sources < edge + length[:, None, None])
    weights = weights * inside
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)


def draw_jitter(n: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RandomApply(ColorJitter(0.4, 0.4, 0.4, 0.1), p=0.8): whether, factors, shifts, order, as in `Draws`."""
    applied = torch.rand(n, 1, generator=generator) < 0.8
    factors = 1 + JITTER * (2 * torch.rand(n, 3, generator=generator) - 1)
    factors = torch.where(applied, factors, 1.0)
    shifts = torch.where(applied[:, 0], HUE * (2 * torch.rand(n, generator=generator) - 1), 0.0)
    return applied, factors, shifts, torch.rand(n, 4, generator=generator).argsort(1)


def color_jitter(images: Tensor, applied: Tensor, factors: Tensor, shifts: Tensor, order: Tensor) -> Tensor:
    """ColorJitter with the values of `draw_jitter`. (N, 3, H, W) float in [0, 1] -> the same."""
    device = images.device
    factors, shifts = factors.to(device), shifts.to(device)
    for step in range(4):
        kind = order[:, step]
        images = blend_step(images, kind.to(device), factors)
        rows = torch.nonzero((kind == HUE_SHIFT) & applied[:, 0]).squeeze(1).to(device)
        images = images.index_copy(0, rows, shift_hue(images[rows], shifts[rows]))
    return images


def blend_step(images: Tensor, kind: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast or saturation, as `kind` (N,) says for each image; hue images pass unchanged.

    All three blend the image with a base: black, its mean gray, or its own gray.
    """
    factor = torch.gather(torch.cat([factors, torch.ones_like(factors[:, :1])], 1), 1, kind[:, None])
    gray = luma(images)
    column = kind[:, None, None, None]
    base = torch.where(column == CONTRAST, gray.mean((1, 2, 3), keepdim=True), gray * (column == SATURATION))
    return torch.lerp(base, images, factor[..., None, None]).clamp_(0, 1)


def luma(images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W) brightness."""
    red, green, blue = images.split(1, 1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` (N,) of the colour circle. (N, 3, H, W) in [0, 1] -> the same."""
    high, low = images.amax(1), images.amin(1)
    chroma = high - low
    red, green, blue = images.unbind(1)
    safe = chroma.clamp(min=1e-12)
    sector = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )  # hue in sixths of the circle, any multiple of 6 added
    sector = sector + 6 * shift[:, None, None]
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device)[:, None, None]
    k = (offsets + sector[:, None]).remainder(6)
    return high[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def normalize(images: Tensor) -> Tensor:
    """ImageNet normalisation. (N, 3, H, W) in [0, 1], or (N, 1, H, W) with the mean of the three."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    if images.shape[1] == 1:
        mean, std = mean.mean(), std.mean()
    return (images - mean.view(-1, 1, 1).to(images)) / std.view(-1, 1, 1).to(images)


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1] (ToTensor)."""
    return images.float() / 255
