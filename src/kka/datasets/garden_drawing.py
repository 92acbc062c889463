"""Drawn flowers of 64 x 64 px: five attributes that decide the species, and everything else at random.

The attributes decide petal colour, count, shape, size and centre colour. Hue, number and width of the petals,
tilt, rotation, position, background, light and noise vary from picture to picture.
"""

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIDE = 64  # px, side of a picture
SCALE = 4  # supersampling of everything that has an edge

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]

# hue in degrees, saturation and value in [0, 1]
COLOURS: dict[str, tuple[float, float, float]] = {
    "white": (45, 0.04, 0.97),
    "yellow": (54, 0.85, 0.97),
    "orange": (30, 0.92, 0.97),
    "peach": (22, 0.40, 0.98),
    "red": (1, 0.88, 0.80),
    "pink": (338, 0.42, 0.97),
    "magenta": (318, 0.80, 0.82),
    "purple": (282, 0.65, 0.58),
    "lavender": (260, 0.33, 0.90),
    "blue": (224, 0.76, 0.84),
}
CENTRES: dict[str, tuple[float, float, float]] = {
    "yellow": (49, 0.88, 0.95),
    "white": (60, 0.10, 0.94),
    "green": (92, 0.62, 0.62),
    "brown": (24, 0.70, 0.42),
    "black": (285, 0.35, 0.14),
}
COUNTS: dict[str, tuple[int, ...]] = {
    "sparse": (4,),
    "several": (6, 7),
    "many": (9, 10, 11),
    "dense": (15, 16, 17),
}
SIZES: dict[str, tuple[float, float]] = {
    "small": (12, 15),
    "medium": (18, 22),
    "large": (25, 30),
}  # radius, px
_WIDTHS = {
    "thin": 0.085,
    "pointed": 0.20,
    "round": 0.30,
    "heart-shaped": 0.33,
}  # half width / length of a petal
SHAPES = tuple(_WIDTHS)

# backdrop: ranges of hue in degrees, saturation and value
_BACKDROPS = (
    ((75, 150), (0.35, 0.8), (0.15, 0.65)),  # foliage
    ((75, 150), (0.35, 0.8), (0.15, 0.65)),
    ((60, 110), (0.3, 0.6), (0.5, 0.8)),  # lawn in the sun
    ((15, 45), (0.25, 0.6), (0.15, 0.5)),  # soil
    ((35, 55), (0.2, 0.5), (0.5, 0.8)),  # straw
    ((195, 225), (0.1, 0.5), (0.55, 0.95)),  # sky
    ((0, 360), (0.0, 0.12), (0.1, 0.75)),  # stone
)


@dataclass(frozen=True)
class Flower:
    """What a species is: one word for each attribute."""

    colour: str
    """of the petals, a key of COLOURS"""
    count: str
    """of the petals, a key of COUNTS"""
    shape: str
    """of the petals, one of SHAPES"""
    size: str
    """of the whole flower, a key of SIZES"""
    centre: str
    """colour of the centre, a key of CENTRES"""


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "count": tuple(COUNTS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "centre": tuple(CENTRES),
}


def draw(flower: Flower, rng: np.random.Generator) -> Image.Image:
    """One picture of a flower, RGB, 64 x 64 px; `rng` decides everything that is not an attribute."""
    picture = _background(rng)
    radius = rng.uniform(*SIZES[flower.size])
    slack = max(3.0, 0.5 * (SIDE / 2 - radius))
    middle = SIDE / 2 + rng.uniform(-slack, slack, 2)
    bloom = _bloom(flower, radius * SCALE, middle * SCALE, rng)
    _cast_shadow(picture, bloom, rng)
    picture.paste(bloom, mask=bloom.getchannel("A"))
    return _expose(picture, rng)


def _rgb(hsv: tuple[float, float, float]) -> Colour:
    hue, saturation, value = hsv
    channels = colorsys.hsv_to_rgb(hue / 360 % 1, min(1.0, max(0.0, saturation)), min(1.0, max(0.0, value)))
    return (round(255 * channels[0]), round(255 * channels[1]), round(255 * channels[2]))


def _vary(hsv: tuple[float, float, float], rng: np.random.Generator) -> tuple[float, float, float]:
    """Individuals of one species differ a little in colour."""
    hue, saturation, value = hsv
    return hue + rng.normal(0, 4), saturation * rng.uniform(0.85, 1.12), value * rng.uniform(0.9, 1.03)


def _shade(hsv: tuple[float, float, float], light: float) -> Colour:
    return _rgb((hsv[0], hsv[1] / light**0.5, hsv[2] * light))


def _background(rng: np.random.Generator) -> Image.Image:
    """Out-of-focus clutter: blobs of one kind of backdrop, some flowers far away, some leaves."""
    hues, saturations, values = _BACKDROPS[rng.integers(len(_BACKDROPS))]

    def tone() -> Colour:
        return _rgb((rng.uniform(*hues), rng.uniform(*saturations), rng.uniform(*values)))

    picture = Image.new("RGB", (SIDE, SIDE), tone())
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(8, 20)):
        _blob(pen, tone(), rng.uniform(4, 18, 2), rng)
    for _ in range(rng.integers(0, 4)):
        names = list(COLOURS)
        _blob(pen, _rgb(COLOURS[names[rng.integers(len(names))]]), np.full(2, rng.uniform(2, 6)), rng)
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(1.0, 4.0)))
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(0, 5)):
        _leaf(pen, rng)
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.2)))


def _blob(pen: ImageDraw.ImageDraw, colour: Colour, radii: np.ndarray, rng: np.random.Generator) -> None:
    x, y = rng.uniform(0, SIDE, 2)
    pen.ellipse((x - radii[0], y - radii[1], x + radii[0], y + radii[1]), fill=colour)


def _leaf(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """A leaf or a blade of grass."""
    outline = _outline("pointed") * (rng.uniform(15, 45), rng.uniform(5, 14) / 0.2)
    angle, foot = rng.uniform(0, 2 * math.pi), rng.uniform(0, SIDE, 2)
    green = _rgb((rng.uniform(80, 140), rng.uniform(0.35, 0.75), rng.uniform(0.2, 0.6)))
    pen.polygon(_points(outline @ _rotation(angle).T + foot), fill=green)


def _bloom(flower: Flower, radius: float, middle: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Stem, petals and centre on a transparent ground, RGBA, 64 x 64 px; lengths in supersampled pixels."""
    petal_hsv, centre_hsv = _vary(COLOURS[flower.colour], rng), _vary(CENTRES[flower.centre], rng)
    ground = (*_rgb(petal_hsv), 0)
    bloom = Image.new("RGBA", (SIDE * SCALE, SIDE * SCALE), ground)
    pen = ImageDraw.Draw(bloom)
    _draw_stem(pen, radius, middle, rng)
    view = _view(rng)
    for outline, light in _petals(flower, radius, rng):
        _draw_petal(pen, outline @ view.T + middle, middle, petal_hsv, light)
    _draw_centre(pen, max(0.2 * radius, 2.6 * SCALE) * rng.uniform(0.9, 1.15), view, middle, centre_hsv, rng)
    return bloom.resize((SIDE, SIDE), Image.Resampling.BOX)


def _view(rng: np.random.Generator) -> np.ndarray:
    """(2, 2) matrix: a flower turned away from the viewer by up to 40 degrees is foreshortened."""
    turn = _rotation(rng.uniform(0, 2 * math.pi))
    return turn @ np.diag([1.0, math.cos(math.radians(rng.uniform(0, 40)))]) @ turn.T


def _petals(flower: Flower, radius: float, rng: np.random.Generator) -> list[tuple[np.ndarray, float]]:
    """Outlines (K, 2) around the origin with their brightness, from the lowest petal to the topmost."""
    count = int(rng.choice(COUNTS[flower.count]))
    start, slender = rng.uniform(0, 2 * math.pi), rng.uniform(0.88, 1.12)
    petals = []
    for ring, number, length in _rings(count, radius):
        for k in rng.permutation(number):
            angle = start + 2 * math.pi * (k + 0.5 * ring) / number + rng.normal(0, 0.25 / number)
            stretch = length * np.array([rng.uniform(0.9, 1.05), slender * rng.uniform(0.93, 1.07)])
            petals.append(((_outline(flower.shape) * stretch) @ _rotation(angle).T, rng.uniform(0.86, 1.06)))
    return petals


def _rings(count: int, radius: float) -> list[tuple[int, int, float]]:
    """(ring, petals in it, their length); a dense flower has a second, shorter ring on top."""
    if count < min(COUNTS["dense"]):
        return [(0, count, radius)]
    outer = math.ceil(0.6 * count)
    return [(0, outer, radius), (1, count - outer, 0.68 * radius)]


def _outline(shape: str) -> np.ndarray:
    """(K, 2) outline of a petal of length 1 that lies along the x axis with its foot in the origin."""
    return _OUTLINES[shape]


def _make_outline(shape: str) -> np.ndarray:
    t = np.linspace(0, 1, 15)
    profile = {
        "thin": np.sin(math.pi * t**0.8) ** 0.5,
        "pointed": 2.6 * t**0.5 * (1 - t),
        "round": (1 - (2 * t**1.4 - 1) ** 2) ** 0.5,
        "heart-shaped": (1 - (2 * t**2 - 1) ** 2) ** 0.5,
    }[shape]
    tip = 0.24 * np.clip(t - 0.8, 0, None) / 0.2 if shape == "heart-shaped" else 0 * t
    width = _WIDTHS[shape] * np.clip(profile, 0, None)
    if shape == "heart-shaped":
        width = np.where(t > 0.8, width[t <= 0.8][-1] * (1 - (t - 0.8) / 0.2) ** 0.5, width)
    side = np.stack([t - tip, width], axis=1)
    return np.concatenate([side, side[::-1] * (1, -1)])


_OUTLINES = {shape: _make_outline(shape) for shape in SHAPES}


def _rotation(angle: float) -> np.ndarray:
    sine, cosine = math.sin(angle), math.cos(angle)
    return np.array([[cosine, -sine], [sine, cosine]])


def _points(array: np.ndarray) -> Points:
    return [(float(x), float(y)) for x, y in array]


def _draw_petal(
    pen: ImageDraw.ImageDraw,
    outline: np.ndarray,
    middle: np.ndarray,
    hsv: tuple[float, float, float],
    light: float,
) -> None:
    """A petal with a darker rim, so that neighbours can be told apart, and a deeper tone towards its foot."""
    pen.polygon(_points(outline), fill=_shade(hsv, light), outline=_shade(hsv, 0.62 * light), width=2)
    foot = middle + 0.55 * (outline - middle) * 1.0
    pen.polygon(_points(foot), fill=_shade(hsv, 0.84 * light))


def _draw_centre(
    pen: ImageDraw.ImageDraw,
    radius: float,
    view: np.ndarray,
    middle: np.ndarray,
    hsv: tuple[float, float, float],
    rng: np.random.Generator,
) -> None:
    angles = np.linspace(0, 2 * math.pi, 20, endpoint=False)
    circle = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1) @ view.T + middle
    pen.polygon(_points(circle), fill=_shade(hsv, 1.0), outline=_shade(hsv, 0.6), width=3)
    spots = rng.normal(0, 0.4 * radius, (7, 2)) @ view.T + middle
    for x, y in np.clip(spots, middle - 0.7 * radius, middle + 0.7 * radius):
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=_shade(hsv, 0.75))


def _draw_stem(pen: ImageDraw.ImageDraw, radius: float, middle: np.ndarray, rng: np.random.Generator) -> None:
    foot = np.array([middle[0] + rng.normal(0, 0.6 * radius), SIDE * SCALE])
    bend = (middle + foot) / 2 + (rng.normal(0, 4 * SCALE), 0)
    green = _rgb((rng.uniform(80, 120), rng.uniform(0.4, 0.7), rng.uniform(0.3, 0.6)))
    t = np.linspace(0, 1, 8)[:, None]
    curve = (1 - t) ** 2 * middle + 2 * t * (1 - t) * bend + t**2 * foot
    pen.line(_points(curve), fill=green, width=int(rng.integers(5, 9)), joint="curve")


def _cast_shadow(picture: Image.Image, bloom: Image.Image, rng: np.random.Generator) -> None:
    """Darken the background beside the flower."""
    dx, dy = (int(v) for v in rng.integers(-3, 4, 2))
    shadow = ImageChops.offset(bloom.getchannel("A"), dx, dy).filter(ImageFilter.GaussianBlur(2))
    strength = rng.uniform(0.2, 0.6)
    picture.paste((0, 0, 0), mask=shadow.point(lambda alpha: int(alpha * strength)))


def _expose(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Light from one side, exposure, white balance and sensor noise."""
    pixels = np.asarray(picture, dtype=np.float32) / 255
    ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.3)
    slope = 1 + strength * (math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None])
    balance = rng.uniform(0.92, 1.08, 3).astype(np.float32) * np.float32(rng.uniform(0.75, 1.15))
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(0.005, 0.03))
    pixels = pixels ** np.float32(rng.uniform(0.85, 1.2)) * slope[..., None] * balance + noise
    return Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8))
