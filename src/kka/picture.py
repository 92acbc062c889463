"""The picture at the end of a loop: normal images, anomalies of each round, and how the scores separate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kka.anomalies import Item, live, read_items
from kka.figures.charts import Scores, fill_scores
from kka.figures.images import Row, Shown, draw_rows
from kka.figures.style import new_figure, styled
from kka.files import write_atomically

COLUMNS = 10


def draw_loop(
    path: Path, rows: Sequence[Row], runs: Sequence[tuple[str, dict[str, Any]]], unit: str = ""
) -> None:
    """Rows of images above score histograms, as PNG.

    Args:
        path: file to write.
        rows: a title and images for each row, of which COLUMNS are shown.
        runs: a title and results.json for each histogram.
        unit: what a score is.

    Raises UserError naming the extra if matplotlib is not installed.
    """
    heights = [0.95 * len(rows), 3.0]
    with styled():
        figure = new_figure(9.5, sum(heights))
        halves: Any = figure.subfigures(2, 1, height_ratios=heights)
        draw_rows(halves[0], rows, COLUMNS, fontsize=10)
        for axis, (title, results) in zip(np.atleast_1d(halves[1].subplots(1, len(runs))), runs, strict=True):
            fill_scores(axis, _test_scores(title, results, unit))
            axis.legend()
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=90))


def split_rows(folder: Path, title: str, columns: int = COLUMNS) -> Sequence[Row]:
    """The hard anomalies of a folder, closest first, and the easy ones, farthest first."""
    hard, easy = split_items(read_items(folder))
    return [
        (f"{title}\n{len(side)} {name}", [Shown(folder / item.file) for item in side[:columns]])
        for name, side in (("hard", hard), ("easy", easy))
    ]


def split_items(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """The hard items that are in the set, closest first, and the easy ones, farthest first."""
    ordered = sorted(live(items), key=lambda item: item.score or 0.0)
    hard = [item for item in ordered if item.status == "hard"]
    return hard, [item for item in reversed(ordered) if item.status == "easy"]


def _test_scores(title: str, results: dict[str, Any], unit: str) -> Scores:
    rows = np.array(results["test_scores"])
    kinds = {name: rows[rows[:, 1] == label, 2] for label, name in ((1, "real anomaly"), (0, "normal"))}
    auc = results["test_auc"]  # None: the test set has one class
    said = "no test AUC" if auc is None else f"test AUC {100 * auc:.1f} %"
    return Scores(f"{title}: {said}", kinds, results["threshold"], unit)
