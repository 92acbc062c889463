"""Files to tensors: every image is decoded once, in threads, and the result is cached on disk by content.

RandomResizedCrop(32, scale 0.2-1) cuts out at least sqrt(0.2 * 3/4) = 0.39 of a side, so an image of 128 px
gives crops of 50 px or more: a working size of 128 px is never enlarged and loses nothing for 32 px. For a
detector that takes larger images the working size grows, so that the smallest crop still has its size.
"""

import hashlib
import logging
import math
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from kka.datasets.native import Native, common_native, native_of
from kka.errors import UserError
from kka.files import write_bytes

CACHE_VERSION = 3  # of the decoding below; another version does not read older caches
MAX_WORKING_SIDE = 128  # for a detector of up to 49 px
SMALLEST_CROP = math.sqrt(0.2 * 3 / 4)  # of a side
MAX_PIXELS = 64_000_000  # a larger picture is taken for a decompression bomb
MAX_CACHED = 256 * 2**20  # bytes; enlarged copies of many files are made anew as fast as they are read

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # read_image has a stricter limit
warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)

log = logging.getLogger(__name__)


class UnreadableImageError(UserError):
    """An image file that cannot be used; some callers can leave it out."""


@dataclass(frozen=True)
class Decoded:
    """A list of images as tensors."""

    images: Tensor
    """(N, 3, S, S) uint8 RGB, squeezed to a square; (N, 3, 0, 0) if no working copy was asked for"""
    native_sizes: Tensor
    """(N, 2) int64, height and width of the files"""
    resized: Tensor
    """(N, 3, H, W) uint8 RGB, the test transform's Resize((H, W))"""
    good: Tensor
    """(number of paths,) bool, False for files that were skipped as unreadable; N is their number of Trues"""


def read_native(paths: Sequence[Path], skip_bad: bool = False) -> tuple[Native, int]:
    """What image files are like, without decoding them, and the largest side of any, at least 1."""
    natives, sides = [], [1]
    for path in paths:
        try:
            with _open(path) as picture:
                natives.append(native_of(picture))
                sides.append(max(picture.size))
        except UserError:
            if not skip_bad:
                raise
    return common_native(natives), max(sides)


def working_side(largest: int, size: int) -> int:
    """Side of the square working copies of files of that largest side, for a detector of `size` px."""
    return min(largest, max(MAX_WORKING_SIDE, math.ceil(size / SMALLEST_CROP)))


def decode(
    paths: Sequence[Path],
    digest: str,
    side: int,
    size: int,
    skip_bad: bool = False,
    threads: int = 0,
    name: str = "images",
    native: Native | None = None,
    generated: Sequence[bool] | None = None,
) -> Decoded:
    """Read images, from the cache if the same files were decoded before.

    Args:
        paths: image files in any mode Pillow reads; EXIF orientation is applied.
        digest: their `content_digest`, under which the result is cached.
        side: side of the working copies; 0 for none.
        size: side of the resized ones.
        skip_bad: leave unreadable files out instead of raising UnreadableImageError.
        threads: 0 means one per core.
        name: what the progress bar calls them.
        native: what generated images are first made like; None: they stay as they are.
        generated: which of the images that concerns; None: all.
    """
    if not paths:
        empty = torch.empty(0, 3, size, size, dtype=torch.uint8)
        images, sizes = torch.empty(0, 3, side, side, dtype=torch.uint8), torch.empty(0, 2, dtype=torch.long)
        return Decoded(images, sizes, empty, torch.empty(0, dtype=torch.bool))
    like = [native if generated is None or generated[i] else None for i in range(len(paths))]
    cached = _cache_file(digest, side, size, skip_bad, like)
    if cached is not None and cached.exists():
        try:
            return Decoded(**safetensors.torch.load(cached.read_bytes()))
        except (OSError, safetensors.SafetensorError, TypeError):
            log.warning("the cache %s is damaged and made anew", cached)
    decoded = _decode_all(paths, side, size, skip_bad, threads, name, like)
    if cached is not None and decoded.images.nbytes + decoded.resized.nbytes <= MAX_CACHED:
        _store(cached, decoded)
    return decoded


def read_image(path: Path) -> Image.Image:
    """An image file as RGB; raises UnreadableImageError naming it if it cannot be read."""
    with _open(path) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            size = f"{picture.width} x {picture.height}"
            raise UnreadableImageError(f"{path} has {size} pixels, more than {MAX_PIXELS}; shrink it")
        if picture.mode in ("I", "F"):  # Pillow would cut them off at 255, and 0 to 1 would be all black
            raise UnreadableImageError(
                f"{path} has 32 bits per channel, and nothing says which value is white; "
                "save it with 8 bits per channel"
            )
        try:
            is_deep = picture.mode.startswith("I;16")
            if is_deep and np.asarray(picture).max() > 255:
                raise UnreadableImageError(
                    f"{path} has 16 bits per channel and values above 255, which would all become white; "
                    "save it with 8 bits per channel"
                )
            return ImageOps.exif_transpose(picture).convert("RGB")
        except UnreadableImageError:
            raise
        except Exception as error:  # Pillow raises many kinds for a damaged file
            raise UnreadableImageError(f"{path} is damaged ({error}); restore it") from None


def cache_folder() -> Path:
    """Where decoded images are kept: $KKA_CACHE ("off" for nowhere), else kka in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("KKA_CACHE") or Path(base) / "kka")


def _open(path: Path) -> Image.Image:
    if _is_special(path):
        raise UnreadableImageError(f"{path} is no regular file; remove it")
    try:
        return Image.open(path)
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise UnreadableImageError(f"{path} is no readable image ({error}); restore it") from None


def _is_special(path: Path) -> bool:
    """Whether it is a pipe or a device, which could be waited for without end."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _decode_all(
    paths: Sequence[Path],
    side: int,
    size: int,
    skip_bad: bool,
    threads: int,
    name: str,
    like: Sequence[Native | None],
) -> Decoded:
    n = len(paths)
    images = torch.empty(n, 3, side, side, dtype=torch.uint8)
    resized = torch.empty(n, 3, size, size, dtype=torch.uint8)
    native_sizes, good = torch.zeros(n, 2, dtype=torch.long), torch.ones(n, dtype=torch.bool)

    def decode_one(i: int) -> None:
        try:
            picture = read_like(paths[i], like[i])
        except UserError:
            if not skip_bad:
                raise
            good[i] = False
            return
        native_sizes[i] = torch.tensor([picture.height, picture.width])
        resized[i] = test_view(picture, size)
        if side:
            images[i] = _pixels(picture.resize((side, side), Image.Resampling.LANCZOS))

    _in_threads(decode_one, n, threads, f"decoding {name}")
    if good.all():  # the usual case, without a copy
        return Decoded(images, native_sizes, resized, good)
    return Decoded(images[good], native_sizes[good], resized[good], good)


def read_like(path: Path, native: Native | None) -> Image.Image:
    """An image file as RGB, made like `native` if there is one."""
    picture = read_image(path)
    if native is None:
        return picture
    with _open(path) as file:
        return native.apply(picture, native_of(file))


def test_view(picture: Image.Image, size: int) -> Tensor:
    """The test transform's Resize((size, size)) of an RGB picture, (3, size, size) uint8."""
    return _pixels(picture.resize((size, size), Image.Resampling.BILINEAR))


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _in_threads(work: Callable[[int], None], n: int, threads: int, title: str) -> None:
    # Pillow releases the interpreter lock while it decodes and resizes.
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        try:
            for _ in tqdm(
                pool.map(work, range(n)), total=n, desc=title, unit="image", disable=None, leave=False
            ):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def content_digest(paths: Sequence[Path]) -> str:
    """SHA-256 over the contents of files, in their order."""
    digest = hashlib.sha256()
    try:
        for path in paths:
            if _is_special(path):
                raise UserError(f"{path} is no regular file; remove it")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _cache_file(
    digest: str, side: int, size: int, skip_bad: bool, like: Sequence[Native | None]
) -> Path | None:
    """Named by the content of the files, so that a changed file is never served from the cache."""
    if os.environ.get("KKA_CACHE") == "off":
        return None
    changed = (like,) if any(like) else ()
    key = repr((CACHE_VERSION, Image.__version__, digest, side, size, skip_bad, *changed))
    return cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.safetensors"


def _store(path: Path, decoded: Decoded) -> None:
    try:
        write_bytes(path, safetensors.torch.save(vars(decoded)))
    except OSError as error:
        log.warning("decoded images were not cached (%s); set KKA_CACHE to a writable folder", error)
