"""What the stand-ins learn from: captions by kind, and small captioned images.

Of the garden they see flowers of all attributes, not only its species: a large LLM knows flowers, too.
"""

import hashlib
import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from kka.datasets import garden, sources
from kka.datasets.garden_drawing import ATTRIBUTES, Flower, draw
from kka.datasets.images import cache_folder, content_digest, decode
from kka.datasets.layout import ANOMALY_FOLDER, NAME_LIST, DataSetSpec, Images, read_class_folder
from kka.draw import read_captions
from kka.errors import UserError
from kka.files import write_bytes

PER_KIND = 12  # captions written of each of the garden's 2,400 flowers
PARTIAL_SHARE = 0.1  # of the captions that leave an attribute open, kept in the garden
POOL_PART = 1000  # drawn images in one file of the cache

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionKinds:
    """Captions grouped by what they describe."""

    kinds: tuple[tuple[str, ...], ...]
    normal: tuple[int, ...]
    """positions of the normal ones"""

    @property
    def captions(self) -> list[str]:
        """All of them."""
        return [caption for kind in self.kinds for caption in kind]


@dataclass(frozen=True)
class CaptionedImages:
    """Images with captions."""

    images: Tensor
    """(N, 3, S, S) uint8 RGB"""
    captions: tuple[tuple[str, ...], ...]
    """of each image, at least one"""


def read_kinds(
    spec: DataSetSpec, data_path: str | None = None, file: str | None = None, seed: int = 0
) -> CaptionKinds:
    """Captions of a file (one kind), of the garden (one kind for each flower) or of each class folder.

    Raises UserError if there are fewer than two different ones.
    """
    normal: tuple[int, ...] = ()
    if file is not None:
        texts = [str(record["caption"]).strip() for record in read_captions(Path(file))]
        kinds = [tuple(dict.fromkeys(texts))]
    elif spec.name == garden.SPEC.name:
        _refuse_path(data_path)
        kinds, normal = _garden_kinds(seed)
    else:
        classes = _read_classes(spec, data_path)
        kinds = [_distinct(images) for images in classes.values()]
        normal = tuple(k for k, number in enumerate(classes) if number in spec.normal_classes)
    if len({caption for kind in kinds for caption in kind}) < 2:
        where = file or f"the training images of {spec.title}"
        raise UserError(
            f"there is one caption only in {where}; a language model needs two different ones to learn from"
        )
    return CaptionKinds(tuple(kinds), normal or tuple(range(len(kinds))))


def read_images(
    spec: DataSetSpec, data_path: str | None, side: int, n_drawn: int, seed: int
) -> CaptionedImages:
    """Captioned training images of all class folders, or `n_drawn` drawn flowers for the garden.

    Args:
        spec: the data set.
        data_path: its folder; None: data/<name>.
        side: of the images, px.
        n_drawn: images of the garden.
        seed: of the drawn ones.
    """
    if spec.name == garden.SPEC.name:
        _refuse_path(data_path)
        return draw_pool(n_drawn, seed, side)
    classes = _read_classes(spec, data_path)
    everything = sum(classes.values(), Images())
    images = everything.take([i for i, captions in enumerate(everything.captions) if captions])
    decoded = decode(images.paths, content_digest(images.paths), 0, side, name="captioned images")
    return CaptionedImages(decoded.resized, images.captions)


def draw_pool(n: int, seed: int, side: int) -> CaptionedImages:
    """`n` drawn flowers of random attributes, seen as a detector does (resized); the first caption names all.

    Kept in the cache folder part by part, so that an interrupted call loses at most one part.
    """
    parts, captions = [], []
    with tqdm(total=n, desc="drawing flowers", unit="image", disable=None, leave=False) as bar:
        for first in range(0, n, POOL_PART):
            numbers = range(first, min(first + POOL_PART, n))
            parts.append(_cached_part(numbers, seed, side))
            captions += [_pool_captions(number, seed) for number in numbers]
            bar.update(len(numbers))
    return CaptionedImages(torch.cat(parts), tuple(captions))


def _refuse_path(data_path: str | None) -> None:
    """Raises UserError for a folder that would not be read."""
    if data_path is not None:
        raise UserError(f"--data_path {data_path} has no effect: the garden's flowers are drawn; omit it")


def _garden_kinds(seed: int) -> tuple[list[tuple[str, ...]], tuple[int, ...]]:
    flowers = [Flower(*values) for values in itertools.product(*ATTRIBUTES.values())]
    normal = garden.SPECIES[garden.NORMAL]
    kinds = [_kind(flower, np.random.default_rng([seed, k])) for k, flower in enumerate(flowers)]
    return kinds, (flowers.index(normal),)


def _kind(flower: Flower, rng: np.random.Generator) -> tuple[str, ...]:
    """Different captions of a flower, most of which name all its attributes."""
    chosen: dict[str, None] = {}
    while len(chosen) < PER_KIND:
        caption = garden.captions(flower, rng, 2)[1]
        whole = garden.parse_caption(caption) == asdict(flower)
        if whole or rng.random() < PARTIAL_SHARE:
            chosen[caption] = None
    return tuple(chosen)


def _read_classes(spec: DataSetSpec, data_path: str | None) -> dict[int, Images]:
    """Training images of each class folder that has captions; raises UserError if there are none."""
    root = sources.data_root(spec, data_path)
    found = [p.parent.name for p in root.glob(f"*/{NAME_LIST['train']}")]
    numbers = sorted(int(name) for name in found if name.isdigit() and int(name) != ANOMALY_FOLDER)
    classes = {number: read_class_folder(root / str(number), "train", 1, spec) for number in numbers}
    captioned = {number: images for number, images in classes.items() if any(images.captions)}
    if not captioned:
        raise UserError(f"{root} has no captioned training images in the format of {spec.title}")
    return captioned


def _distinct(images: Images) -> tuple[str, ...]:
    texts = (caption.strip() for captions in images.captions for caption in captions)
    return tuple(dict.fromkeys(text for text in texts if text))


def _cached_part(numbers: Sequence[int], seed: int, side: int) -> Tensor:
    """(len(numbers), 3, side, side) uint8."""
    key = repr((garden.VERSION, Image.__version__, seed, side, numbers[0], numbers[-1]))
    path = cache_folder() / f"pool_{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    caching = os.environ.get("KKA_CACHE") != "off"
    if caching and path.exists():
        try:
            return safetensors.torch.load(path.read_bytes())["images"]
        except (OSError, safetensors.SafetensorError, KeyError):
            log.warning("the cache %s is damaged and made anew", path)
    images = torch.stack([_draw_one(number, seed, side) for number in numbers])
    if caching:
        try:
            write_bytes(path, safetensors.torch.save({"images": images}))
        except OSError as error:
            log.warning("drawn images were not cached (%s); set KKA_CACHE to a writable folder", error)
    return images


def _pool_flower(number: int, seed: int) -> tuple[Flower, np.random.Generator]:
    rng = np.random.default_rng([seed, number])
    return Flower(**{name: values[rng.integers(len(values))] for name, values in ATTRIBUTES.items()}), rng


def _draw_one(number: int, seed: int, side: int) -> Tensor:
    picture = draw(*_pool_flower(number, seed)).resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _pool_captions(number: int, seed: int) -> tuple[str, ...]:
    flower, _ = _pool_flower(number, seed)
    rng = np.random.default_rng([seed, number, 1])
    return tuple(garden.captions(flower, rng, garden.SPEC.captions_per_image))
