"""Rows of images: a loop's picture and Fig. 3 of the paper."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kka.datasets.images import read_image
from kka.errors import UserError
from kka.figures.style import EASY, HARD, INK, MUTED, PAGE, new_figure, styled, write_figure

TITLE, UNDER = 0.72, 0.46  # inches left of a row for its title, and below it for captions
GAP = 0.13  # between two images, as a share of their side
CAPTION_WIDTH, CAPTION_LINES = 20, 4  # of letters under an image
MARK = {"hard": HARD, "easy": EASY}


@dataclass(frozen=True)
class Shown:
    """An image of a row."""

    path: Path
    caption: str = ""
    status: str = ""
    """hard and easy get a frame and a word"""


Row = tuple[str, Sequence[Shown]]


def draw_anomalies(path: Path, rows: Sequence[Row]) -> None:
    """Fig. 3: a row per round, each image with its caption and whether it is hard; writes PNG and PDF."""
    columns = max(len(images) for _, images in rows)
    side = (PAGE - TITLE) / (columns + GAP * (columns - 1))
    height = len(rows) * (side + UNDER)
    place = {
        "left": TITLE / PAGE, "right": 0.995, "top": 0.99, "bottom": UNDER / height, "wspace": GAP,
        "hspace": UNDER / side,
    }  # fmt: skip
    with styled():
        figure = new_figure(PAGE, height, layout="none")
        draw_rows(figure, rows, columns, place=place)
        write_figure(figure, path)


def draw_rows(
    figure: Any,
    rows: Sequence[Row],
    columns: int,
    fontsize: float = 7.5,
    place: Mapping[str, float] | None = None,
) -> None:
    """Fill a figure or subfigure with rows of images, each with its title on the left.

    `place` says where the images are, as matplotlib's GridSpec does; None leaves it to the figure's layout.
    """
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw=place)
    for line, (title, images) in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, shown in zip(line, images, strict=False):
            _draw_image(axis, shown)
        line[0].text(
            -0.15, 0.5, title, transform=line[0].transAxes, ha="right", va="center", color=INK,
            fontsize=fontsize,
        )  # fmt: skip


def _draw_image(axis: Any, shown: Shown) -> None:
    try:
        axis.imshow(np.asarray(read_image(shown.path)), interpolation="antialiased")
    except UserError:
        axis.imshow(np.full((1, 1, 3), 235, dtype=np.uint8))
        axis.text(0.5, 0.5, "no file", transform=axis.transAxes, ha="center", va="center", color=MUTED)
    if shown.status in MARK:
        colour = MARK[shown.status]
        _draw_frame(axis, colour)
        box = {"boxstyle": "square,pad=0.2", "facecolor": colour, "edgecolor": "none"}
        axis.text(
            0.02, 0.98, shown.status, transform=axis.transAxes, ha="left", va="top", fontsize=5.5,
            color="white", weight="bold", bbox=box,
        )  # fmt: skip
    if shown.caption:
        lines = textwrap.wrap(shown.caption, CAPTION_WIDTH, max_lines=CAPTION_LINES, placeholder=" …")
        axis.text(
            0.5, -0.06, "\n".join(lines), transform=axis.transAxes, ha="center", va="top", fontsize=4.8,
            color=MUTED,
        )  # fmt: skip


def _draw_frame(axis: Any, colour: str) -> None:
    from matplotlib.patches import Rectangle

    style: dict[str, Any] = {"fill": False, "edgecolor": colour, "linewidth": 2.2, "clip_on": False}
    axis.add_patch(Rectangle((0, 0), 1, 1, transform=axis.transAxes, **style))
