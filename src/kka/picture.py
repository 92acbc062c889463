"""Pictures of a run: what was normal, what was generated, and how the scores separate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kka.datasets.task import Task
from kka.errors import UserError
from kka.files import read_json, write_atomically

COLUMNS = 10
INK, MUTED = "#1f2430", "#5b6472"
NORMAL, ANOMALY = "#0072b2", "#d55e00"  # told apart also by colour-blind readers


def draw_demo(path: Path, task: Task, without: dict[str, Any], with_: dict[str, Any], run: Path) -> None:
    """Image rows and score histograms of two runs, one without and one with generated anomalies, as PNG.

    Args:
        path: file to write.
        task: the images of the second run.
        without: results of the first run.
        with_: results of the second run.
        run: folder of the second run, for its hard and easy lists.

    Raises UserError naming the extra if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib; install it with pip install -e '.[plot]'") from None
    figure = Figure(figsize=(9, 7.6), layout="constrained", facecolor="white")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.25, 1])
    _draw_rows(halves[0], _rows(task, with_, run))
    axes = halves[1].subplots(1, 2)
    _draw_scores(axes[0], without, "no anomalies")
    _draw_scores(axes[1], with_, f"{with_['n_generated']} generated anomalies")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _rows(task: Task, results: dict[str, Any], run: Path) -> list[tuple[str, Sequence[Path]]]:
    """Titles and files of the image rows."""
    hard, easy = ([row[0] for row in read_json(run / f"{name}_samples.json")] for name in ("d", "e"))
    place = dict(zip(task.generated_index, task.generated.paths, strict=True))
    anomalies = [row for row in results["test_scores"] if row[1] == 1]
    lowest = sorted(anomalies, key=lambda row: row[2])
    return [
        ("normal (training)", task.normals.paths[:COLUMNS]),
        ("generated,\nhard: closest", _files(place, sorted(hard, key=lambda row: row[2]))),
        ("generated,\neasy: farthest", _files(place, sorted(easy, key=lambda row: -row[2]))),
        ("test anomalies\nmissed most", [task.test.paths[row[0]] for row in lowest[:COLUMNS]]),
    ]


def _files(place: dict[int, Path], rows: list[list[Any]]) -> list[Path]:
    return [place[row[0]] for row in rows[:COLUMNS]]


def _draw_rows(figure: Any, rows: list[tuple[str, Sequence[Path]]]) -> None:
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
