"""What the files of the normals are like, so that generated images can be made like them.

A generated image has the size and the compression of its generator. A detector that sees more pixels than a
normal image has would tell it by its sharpness, or by missing JPEG blocks, and not by what it shows.
"""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from PIL import Image, JpegImagePlugin


@dataclass(frozen=True)
class Native:
    """Size and compression of image files."""

    short_side: int
    """in pixels"""
    jpeg_tables: tuple[tuple[int, ...], ...] = ()
    """quantisation tables of 64 numbers each; none: the files are not JPEG"""
    jpeg_sampling: int = -1
    """Pillow's number for the subsampling of the colours; -1: not known"""

    def apply(self, picture: Image.Image, own: "Native") -> Image.Image:
        """An RGB picture of a file that is like `own` in this size and with the traces of this compression.

        Proportions are kept. A picture that is like this already is returned as it is.
        """
        if own == self:
            return picture
        scale = self.short_side / min(picture.size)
        width, height = (max(1, round(scale * side)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        if not self.jpeg_tables:
            return picture
        file = io.BytesIO()
        picture.save(file, "jpeg", qtables=self.jpeg_tables, subsampling=self.jpeg_sampling)
        return Image.open(file).convert("RGB")


def native_of(picture: Image.Image) -> Native:
    """Size and compression of an opened file, before anything is done to it."""
    if not isinstance(picture, JpegImagePlugin.JpegImageFile):
        return Native(min(picture.size))
    tables = tuple(tuple(table) for table in picture.quantization.values())
    return Native(min(picture.size), tables, JpegImagePlugin.get_sampling(picture))


def common_native(natives: Sequence[Native]) -> Native:
    """The median size and the most common compression; a size of 1 if there are no files."""
    if not natives:
        return Native(1)
    compressions = Counter((native.jpeg_tables, native.jpeg_sampling) for native in natives)
    return Native(median_low(native.short_side for native in natives), *compressions.most_common(1)[0][0])
