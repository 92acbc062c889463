"""The picture at the end of a loop: normal images, anomalies of each round, and how the scores separate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kka.anomalies import Item, live, read_items
from kka.errors import UserError
from kka.files import write_atomically

COLUMNS = 10
INK, MUTED = "#1f2430", "#5b6472"
NORMAL, ANOMALY = "#0072b2", "#d55e00"  # told apart also by colour-blind readers

Rows = Sequence[tuple[str, Sequence[Path]]]


def draw_loop(path: Path, rows: Rows, runs: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Rows of images above score histograms, as PNG.

    Args:
        path: file to write.
        rows: a title and files for each row, of which COLUMNS are shown.
        runs: a title and results.json for each histogram.

    Raises UserError naming the extra if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib; install it with pip install -e '.[plot]'") from None
    heights = [0.95 * len(rows), 3.0]
    figure = Figure(figsize=(9.5, sum(heights)), layout="constrained", facecolor="white")
    halves: Any = figure.subfigures(2, 1, height_ratios=heights)
    _draw_rows(halves[0], rows)
    for axis, (title, results) in zip(np.atleast_1d(halves[1].subplots(1, len(runs))), runs, strict=True):
        _draw_scores(axis, results, title)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=90))


def split_rows(folder: Path, title: str) -> Rows:
    """The hard anomalies of a folder, closest first, and the easy ones, farthest first."""
    items = sorted(live(read_items(folder)), key=lambda item: item.score or 0.0)
    sides = {
        "hard": [item for item in items if item.status == "hard"],
        "easy": [item for item in reversed(items) if item.status == "easy"],
    }
    return [(f"{title}\n{len(side)} {name}", _files(folder, side)) for name, side in sides.items()]


def _files(folder: Path, items: Sequence[Item]) -> list[Path]:
    return [folder / item.file for item in items[:COLUMNS]]


def _draw_rows(figure: Any, rows: Rows) -> None:
    axes = figure.subplots(len(rows), COLUMNS, squeeze=False)
    for line, (title, paths) in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, path in zip(line, paths, strict=False):
            with Image.open(path) as image:
                axis.imshow(np.asarray(image.convert("RGB")))
        line[0].text(
            -0.15, 0.5, title, transform=line[0].transAxes, ha="right", va="center", color=INK, fontsize=10
        )


def _draw_scores(axis: Any, results: dict[str, Any], title: str) -> None:
    rows = np.array(results["test_scores"])
    scores = np.log10(np.maximum(rows[:, 2], 1e-12))
    low, high = np.quantile(scores, [0.001, 0.999])
    bins = np.linspace(float(low), float(high), 40)
    for label, name, colour in ((1, "anomalies", ANOMALY), (0, "normals", NORMAL)):
        chosen = scores[rows[:, 1] == label]
        axis.hist(chosen, bins, density=True, histtype="stepfilled", alpha=0.55, color=colour, label=name)
    axis.axvline(
        np.log10(results["threshold"]), color=INK, linestyle="--", linewidth=1, label="threshold, Eq. (6)"
    )
    axis.set_title(f"{title}: test AUC {100 * results['test_auc']:.1f} %", color=INK, fontsize=11)
    axis.set_xlabel("log10 of the squared distance to the centre", color=MUTED)
    axis.set_yticks([])
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
