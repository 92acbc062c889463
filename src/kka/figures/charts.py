"""Charts: AUC by size of the set (Fig. 4), latent spaces (Fig. 5), convergence (Fig. 6), scores, rounds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from kka.figures.style import (
    ANOMALY,
    COLUMN,
    EASY,
    HARD,
    INK,
    MARKERS,
    MUTED,
    NORMAL,
    PAGE,
    SERIES,
    look,
    new_figure,
    percent_axis,
    styled,
    write_figure,
)
from kka.metrics import mean_interval

KINDS = {  # what an image is: colour, marker, whether its histogram is filled
    "normal": (NORMAL, "o", True),
    "real anomaly": (ANOMALY, "^", True),
    "easy generated": (EASY, "+", False),
    "hard generated": (HARD, "x", False),
}
MAX_CLASSES = 40  # in one chart
LOG_RATIO = 8.0  # of the 99.9 % quantile to the 0.1 % quantile, from which an axis of scores is logarithmic


@dataclass(frozen=True)
class Scores:
    """Scores of one run."""

    title: str
    kinds: Mapping[str, np.ndarray]
    """of KINDS: (N,) scores"""
    threshold: float
    """of Eq. (6)"""
    unit: str = ""
    """what a score is"""


@dataclass(frozen=True)
class Size:
    """One set of generated anomalies."""

    n: int
    aucs: Sequence[float]
    """in [0, 1], one per seed"""
    label: str = ""
    """written beside the point"""


@dataclass(frozen=True)
class Curve:
    """One training."""

    losses: Mapping[int, float]
    """by epoch, from 1 on"""
    aucs: Mapping[int, float]
    """in [0, 1], at those epochs at which it was tested"""


@dataclass(frozen=True)
class Share:
    """Hard ones among the fresh images of a round."""

    round: int
    n_hard: int
    n: int


def score_unit(detector: str) -> str:
    """What the score of a detector is, where it has a unit."""
    return {"deep_sad": "squared distance to the centre"}.get(detector, "")


def draw_scores(path: Path, panels: Sequence[Scores]) -> None:
    """Histograms of the scores of normals, real and generated anomalies, with the threshold."""
    with styled():
        figure = new_figure(PAGE, 0.35 + 1.75 * len(panels))
        for axis, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            fill_scores(axis, panel)
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        write_figure(figure, path)


def fill_scores(axis: Any, panel: Scores) -> None:
    """Draw one panel of `draw_scores` on an axis."""
    kinds = {name: np.asarray(values) for name, values in panel.kinds.items() if len(values)}
    everything = np.concatenate(list(kinds.values()))
    low, high = np.quantile(everything, [0.001, 0.999])
    logarithmic = everything.min() > 0 and high / low > LOG_RATIO
    bins = np.geomspace(low, high, 41) if logarithmic else np.linspace(low, high, 41)
    for name, values in kinds.items():
        colour, _, filled = KINDS[name]
        shape: dict[str, Any] = {"histtype": "stepfilled", "alpha": 0.5}
        if not filled:
            shape = {"histtype": "step", "linewidth": 1.5, "linestyle": "--" if colour == HARD else "-"}
        # Shares of all of a kind, so that 100 normals and 10,000 anomalies can be compared.
        weights = np.full(len(values), 100 / len(values))
        inside = np.clip(values, low, high)
        axis.hist(inside, bins, weights=weights, color=colour, label=f"{name} ({len(values)})", **shape)
    axis.axvline(panel.threshold, color=INK, linestyle=":", linewidth=1.4, label="threshold, Eq. (6)")
    if logarithmic:
        _make_logarithmic(axis, "x")
    axis.set_title(panel.title)
    axis.set_xlabel(f"anomaly score{f' ({panel.unit})' if panel.unit else ''}")
    axis.set_ylabel("images of a kind (%)")
    axis.grid(axis="x", visible=False)


def _make_logarithmic(axis: Any, name: str) -> None:
    """Plain numbers at 1, 2 and 5: the powers of ten alone are often a single tick."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axis.set(**{f"{name}scale": "log"})
    ticks = getattr(axis, f"{name}axis")
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ticks.set_major_formatter(FormatStrFormatter("%g"))
    ticks.set_minor_formatter(NullFormatter())


def draw_sizes(path: Path, series: Mapping[str, Sequence[Size]]) -> None:
    """Fig. 4: test AUC against the number of generated anomalies, mean and 95 % t-interval over seeds."""
    with styled():
        figure = new_figure(COLUMN + 0.6, 2.7)
        axis = figure.subplots()
        for k, (name, points) in enumerate(series.items()):
            points = sorted(points, key=lambda point: (point.n, point.label))
            means, halves = _intervals([point.aucs for point in points])
            style = look(k) | {"capsize": 2.5, "elinewidth": 0.9, "label": name}
            axis.errorbar([point.n for point in points], means, halves, **style)
            tops: dict[int, float] = {}
            for point, mean, half in zip(points, means, halves, strict=True):
                tops[point.n] = max(mean + half, tops.get(point.n, 0.0))
            sides = ["right", *["center"] * (len(tops) - 2), "left"]  # neighbours are closer than words
            for (n, top), side in zip(tops.items(), sides, strict=False):
                text = ", ".join(point.label for point in points if point.n == n and point.label)
                _annotate(axis, text, (n, top), SERIES[k % len(SERIES)], side)
        axis.set_xlabel("number of generated anomalies in training")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.margins(x=0.14, y=0.1)
        percent_axis(axis)
        axis.legend(loc="best")
        write_figure(figure, path)


def _annotate(axis: Any, text: str, point: tuple[float, float], colour: str, side: str) -> None:
    where = {"xytext": (0, 3), "ha": side, "va": "bottom"}
    axis.annotate(text, point, textcoords="offset points", fontsize=6.5, color=colour, **where)


def _intervals(values: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Means and half widths in percent; 0 for a single value, which has no interval."""
    pairs = [mean_interval(each) for each in values]
    return [100 * mean for mean, _ in pairs], [100 * (half or 0.0) for _, half in pairs]


def draw_latent(path: Path, panels: Sequence[tuple[str, Mapping[str, np.ndarray]]]) -> None:
    """Fig. 5: t-SNE of features, (N, 2) for each of KINDS, in panels side by side."""
    with styled():
        figure = new_figure(PAGE, 0.5 + PAGE / len(panels) if len(panels) > 1 else PAGE / 2)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, kinds) in zip(axes, panels, strict=True):
            for name, points in kinds.items():
                colour, marker, filled = KINDS[name]
                style: dict[str, Any] = {"linewidth": 0 if filled else 0.8, "alpha": 0.6 if filled else 0.9}
                axis.scatter(*points.T, s=13, c=colour, marker=marker, label=name, **style)
            axis.set(
                title=title, xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", xticks=[], yticks=[]
            )
            axis.set_box_aspect(1)
        handles, labels = axes[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, markerscale=1.5)
        write_figure(figure, path)


def draw_convergence(path: Path, series: Mapping[str, Sequence[Curve]]) -> None:
    """Fig. 6: training loss, and test AUC where it was recorded, by epoch; thin lines are single seeds."""
    curves = [curve for each in series.values() for curve in each]
    kinds = [("losses", "training loss")] + [("aucs", "test AUC (%)")] * any(c.aucs for c in curves)
    with styled():
        figure = new_figure(COLUMN * len(kinds), 2.6)
        axes = figure.subplots(1, len(kinds), squeeze=False)[0]
        for axis, (kind, label) in zip(axes, kinds, strict=True):
            scale = 100 if kind == "aucs" else 1
            for k, (name, each) in enumerate(series.items()):
                _draw_curves(axis, k, name, [getattr(curve, kind) for curve in each], scale)
            axis.set(xlabel="epoch", ylabel=label)
        if all(loss > 0 for curve in curves for loss in curve.losses.values()):
            _make_logarithmic(axes[0], "y")
        if len(kinds) > 1:
            percent_axis(axes[1])
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        write_figure(figure, path)


def _draw_curves(axis: Any, k: int, name: str, curves: Sequence[Mapping[int, float]], scale: float) -> None:
    """The mean over seeds at the epochs that all have, and each seed."""
    curves = [curve for curve in curves if curve]
    common = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    style = look(k) | {"markevery": max(1, len(common) // 8)}
    means = [scale * float(np.mean([curve[epoch] for curve in curves])) for epoch in common]
    axis.plot(common, means, label=name, **style)
    for curve in curves if len(curves) > 1 else []:
        values = [scale * value for value in curve.values()]
        axis.plot(list(curve), values, color=style["color"], linewidth=0.5, alpha=0.45)


def draw_shares(path: Path, series: Mapping[str, Sequence[Share]]) -> None:
    """Hard ones among fresh images by round, with Wilson's 95 % interval over the images."""
    from scipy.stats import binomtest

    rounds = sorted({share.round for each in series.values() for share in each})
    with styled():
        figure = new_figure(COLUMN + 0.6, 2.6)
        axis = figure.subplots()
        for k, (name, shares) in enumerate(series.items()):
            ranges = [binomtest(s.n_hard, s.n).proportion_ci(method="wilson") for s in shares]
            values = [s.n_hard / s.n for s in shares]
            below = [100 * (v - r.low) for v, r in zip(values, ranges, strict=True)]
            above = [100 * (r.high - v) for v, r in zip(values, ranges, strict=True)]
            at = [share.round + 0.06 * (k - (len(series) - 1) / 2) for share in shares]
            style = look(k) | {"capsize": 2.5, "elinewidth": 0.9, "label": name}
            axis.errorbar(at, [100 * v for v in values], [below, above], **style)
        axis.set_xticks(rounds)
        axis.set(xlabel="round", ylabel="hard among fresh images (%)", ylim=(-3, 103))
        axis.legend()
        write_figure(figure, path)


def choose_classes(series: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """The classes that all series have, lowest mean of the last series first; MAX_CLASSES at most.

    Of more, the lowest three quarters and the highest quarter of that number.
    """
    *_, last = series.values()
    shared = [name for name in last if all(name in each for each in series.values())]
    ordered = sorted(shared, key=lambda name: (float(np.mean(last[name])), name))
    if len(ordered) <= MAX_CLASSES:
        return ordered
    n_high = MAX_CLASSES // 4
    return ordered[: MAX_CLASSES - n_high] + ordered[-n_high:]


def draw_classes(path: Path, series: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """AUC of each anomalous class against all test normals, {series: {class: AUCs in [0, 1] of seeds}}.

    Lines span the seeds: a t-interval over two or three of them is wider than the axis.
    """
    names = choose_classes(series)
    places = np.arange(len(names))
    with styled():
        figure = new_figure(COLUMN + 1.2, max(1.4, 0.9 + 0.17 * len(names)))  # no lower than its label
        axis = figure.subplots()
        for k, (title, aucs) in enumerate(series.items()):
            values = [100 * np.array(aucs[name]) for name in names]
            at = places + 0.18 * (k - (len(series) - 1) / 2)
            colour, marker = SERIES[k % len(SERIES)], MARKERS[k % len(MARKERS)]
            axis.hlines(at, [v.min() for v in values], [v.max() for v in values], colour, linewidth=0.9)
            means = [v.mean() for v in values]
            axis.plot(means, at, marker, color=colour, markersize=3.5, label=title, zorder=3)
        axis.axvline(50, color=MUTED, linestyle=":", linewidth=1, label="chance")
        axis.set_yticks(places, names)
        axis.set(xlabel="test AUC against all normals (%)", ylabel="class of the anomalies")
        axis.set_ylim(len(names) - 0.4, -0.6)  # the worst at the top
        figure.legend(loc="outside upper center", ncols=4)
        write_figure(figure, path)


def draw_margins(path: Path, rounds: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> None:
    """DPO reward margins by step, {round: {"training" or "validation": [(step, margin)]}}."""
    with styled():
        figure = new_figure(COLUMN + 0.6, 2.6)
        axis = figure.subplots()
        for k, (title, kinds) in enumerate(rounds.items()):
            for name, points in kinds.items():
                style = look(k) if name == "validation" else {"color": SERIES[k % len(SERIES)]}
                thin = {} if name == "validation" else {"linewidth": 0.8, "alpha": 0.6}
                axis.plot(*zip(*points, strict=True), label=f"{title}, {name} pairs", **style | thin)
        axis.axhline(0, color=MUTED, linewidth=0.8)
        axis.set(xlabel="optimiser step", ylabel="reward margin, hard minus easy (nats)")
        axis.legend()
        write_figure(figure, path)


def draw_table(
    path: Path, columns: Mapping[str, Sequence[tuple[str, Sequence[float], float | None]]]
) -> None:
    """A table's AUCs, or their differences ("minus ..."), as points.

    {column: [(row, values of the runs in [-1, 1], the paper's mean in percent)]}.
    """
    n_rows = max(len(rows) for rows in columns.values())
    with styled():
        figure = new_figure(PAGE, 0.9 + 0.24 * n_rows)
        axes = figure.subplots(1, len(columns), sharey=False, squeeze=False)[0]
        for axis, (title, rows) in zip(axes, columns.items(), strict=True):
            _draw_column(axis, rows, first=axis is axes[0])
            difference = title.startswith("minus ")
            if difference:
                axis.axvline(0, color=MUTED, linewidth=0.8)
            axis.set(
                title=fill(title, max(8, 64 // len(columns)), break_long_words=False),
                xlabel="points" if difference else "percent",
            )
        handles = {label: h for a in axes for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
        write_figure(figure, path)


def _draw_column(axis: Any, rows: Sequence[tuple[str, Sequence[float], float | None]], first: bool) -> None:
    for place, (_, aucs, paper) in enumerate(rows):
        if aucs:
            (mean,), (half,) = _intervals([aucs])
            axis.errorbar([mean], [place], xerr=[half], color=NORMAL, fmt="o", capsize=2, label="here")
        if paper is not None:
            axis.plot([paper], [place], "D", color=ANOMALY, fillstyle="none", label="paper")
    axis.set_yticks(range(len(rows)), [name for name, _, _ in rows] if first else [""] * len(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.margins(x=0.15)
