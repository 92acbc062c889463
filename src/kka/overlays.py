"""Anomaly maps as arrays and as pictures over their images, all on one scale."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from kka.datasets.images import read_image
from kka.errors import UserError
from kka.files import check_writable, read_listed, write_atomically, write_json
from kka.trained import Trained

LISTING = "maps.json"  # which files of the folder are maps: only they are ever replaced or removed
MAX_STEM = 200  # bytes of an image's name in that of its map; a file system takes 255 with all else
LARGEST = 1024  # longer side of a picture
STRENGTH = 0.7  # of the colour where a map is highest
# From dark over red to light yellow: brightness rises, so that it can be read without colours.
STOPS = (0.0, 0.5, 1.0)
COLOURS = ((20, 11, 52), (196, 60, 78), (252, 253, 191))


def map_function(trained: Trained) -> Callable[[Tensor], Tensor]:
    """(N, 3, S, S) uint8 -> (N, S, S) maps; raises UserError for a detector that has none."""
    detector: Any = trained.detector
    if not hasattr(detector, "maps"):
        raise UserError(
            f"--maps: {trained.name} scores whole images and has no anomaly maps; "
            "train simplenet or recontrast for them"
        )
    return detector.maps


def array_path(folder: Path, number: int, image: Path) -> Path:
    """Where the map of the image of that number lies; its picture is beside it."""
    stem = os.fsencode(image.stem)[:MAX_STEM].decode("utf-8", "ignore")
    return folder / f"{number:05d}_{stem}.npy"


def check_folder(folder: Path, images: Sequence[Path], overwrite: bool) -> None:
    """Raises UserError for a folder in which maps would replace, or lie among, files that are no maps."""
    check_writable(folder, "--maps", folder=True)
    files = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
    if files and not overwrite:
        raise UserError(f"--maps {folder} holds files; choose another folder or give --overwrite")
    inside = next((path for path in images if path.resolve().parent == folder.resolve()), None)
    if inside:
        raise UserError(f"--maps {folder} holds {inside.name}, one of IMAGES; choose another folder")
    known = {LISTING, *read_listed(folder / LISTING)}
    foreign = sorted(path.name for path in files if path.name not in known)
    if foreign:
        raise UserError(
            f"--maps {folder} holds {foreign[0]}, which is no map of predict.py; choose another folder"
        )


def write_arrays(folder: Path, first: int, images: Sequence[Path], maps: Tensor) -> None:
    """Write (N, S, S) maps as they are, float32; the first image has the number `first`."""
    listed = read_listed(folder / LISTING)  # first, so that an interrupted call leaves no file unlisted
    write_json(folder / LISTING, sorted(listed | _names(folder, first, images)))
    for number, (image, values) in enumerate(zip(images, maps.float().numpy(), strict=True), first):
        write_atomically(array_path(folder, number, image), partial(_save, values))


def _save(values: np.ndarray, file: BinaryIO) -> None:
    np.save(file, values)


def write_pictures(folder: Path, images: Sequence[Path], threshold: float) -> tuple[float, float]:
    """Draw every map over its image, from the lowest value of all maps to the highest (or the threshold).

    Returns the two ends of the scale.
    """
    files = [array_path(folder, number, image) for number, image in enumerate(images)]
    ends = [(values.min(), values.max()) for values in map(np.load, files)]
    low, high = float(min(end[0] for end in ends)), max(threshold, *(float(end[1]) for end in ends))
    for file, image in zip(tqdm(files, desc="drawing maps", disable=None, leave=False), images, strict=True):
        picture = overlay(read_image(image), np.load(file), low, high)
        write_atomically(file.with_suffix(".png"), partial(picture.save, format="png"))
    return low, high


def remove_older(folder: Path, images: Sequence[Path]) -> None:
    """Remove the maps of an earlier call that have no image in this one."""
    kept = _names(folder, 0, images)
    for name in read_listed(folder / LISTING) - kept:
        (folder / name).unlink(missing_ok=True)
    write_json(folder / LISTING, sorted(kept))


def _names(folder: Path, first: int, images: Sequence[Path]) -> set[str]:
    """Names of the two files of each image's map."""
    arrays = [array_path(folder, number, image) for number, image in enumerate(images, first)]
    return {path.with_suffix(suffix).name for path in arrays for suffix in (".npy", ".png")}


def overlay(picture: Image.Image, values: np.ndarray, low: float, high: float) -> Image.Image:
    """An RGB picture under the colours of its map; where the map is lowest it shows as it is.

    (S, S) values from `low` to `high` are stretched over the picture.
    """
    picture = picture.copy()
    picture.thumbnail((LARGEST, LARGEST))
    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1).astype(np.float32)
    heat = np.asarray(Image.fromarray(share).resize(picture.size, Image.Resampling.BILINEAR))
    colour = np.stack([np.interp(heat, STOPS, channel) for channel in zip(*COLOURS, strict=True)], -1)
    alpha = STRENGTH * heat[..., None]
    mixed = (1 - alpha) * np.asarray(picture) + alpha * colour
    return Image.fromarray(mixed.round().astype(np.uint8))
