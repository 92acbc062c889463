"""Every figure of a report: its file, its title, how it is drawn, and what it shows in words."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kka.errors import UserError
from kka.figures import charts, images
from kka.files import read_listed, write_json
from kka.metrics import format_interval
from kka.report import data
from kka.report.sources import FinishedRun, Group, LoopRecord
from kka.report.tables import Table

MAX_PANELS = 4
LISTING = "figures.json"  # which files of the folder are figures: only they are ever replaced or removed
KINDS = ("png", "pdf")


@dataclass(frozen=True)
class Material:
    """What was given to the report."""

    loops: tuple[LoopRecord, ...] = ()
    groups: tuple[Group, ...] = ()
    tables: tuple[Table, ...] = ()
    data_path: str | None = None

    @property
    def all_groups(self) -> list[Group]:
        """All groups of runs with names that tell them apart."""
        several = len(self.loops) + len(self.groups) > 1
        named = [
            replace(group, name=f"{loop.name}, {group.name}") if several else group
            for loop in self.loops
            for group in loop.groups
        ]
        return [*named, *self.groups]

    @property
    def selected(self) -> list[Group]:
        """At most MAX_PANELS: of each loop those without anomalies, of round 0 and of the last round."""
        groups, chosen = iter(self.all_groups), []
        for loop in self.loops:
            own = [next(groups) for _ in loop.groups]
            chosen += [own[0], *own[1:2], *own[2:][-1:]]
        return [*chosen, *groups][:MAX_PANELS]

    @property
    def pair(self) -> tuple[Group | None, Group | None]:
        """A group without generated anomalies, and the last selected one with them."""
        without = [group for group in self.selected if not group.n_generated]
        with_anomalies = [group for group in self.selected if group.n_generated]
        return next(iter(without), None), next(reversed(with_anomalies), None)


@dataclass(frozen=True)
class Figure:
    """A figure that was drawn, as <stem>.png and <stem>.pdf."""

    stem: str
    title: str
    description: str
    """what it shows, for the caption"""
    summary: str
    """its main numbers in words, for those who do not see it"""
    shape: str = ""
    """on the page: wide, or tall"""


@dataclass(frozen=True)
class LeftOut:
    """A figure that could not be drawn."""

    title: str
    reason: str


Drawn = tuple[str, str]
"""Description and summary."""


def draw_all(material: Material, out: Path) -> tuple[list[Figure], list[LeftOut]]:
    """Draw what the material has data for; files of an earlier report that are not drawn now are removed.

    Raises UserError before anything is drawn if a file that is no figure of ours has the name of one.
    """
    figures, left_out = [], []
    chosen = RUN_FIGURES
    if material.tables:
        chosen = SIZE_FIGURES if data.table_sizes(material.tables[0]) else TABLE_FIGURES
    listed = _claim(out, chosen)
    for stem, (title, shape, draw) in chosen.items():
        try:
            description, summary = draw(material, out / stem)
        except (data.NoDataError, UserError) as error:
            left_out.append(LeftOut(title, str(error)))
            for name in _files(stem):
                (out / name).unlink(missing_ok=True)
            listed -= _files(stem)
        else:
            figures.append(Figure(stem, title, description, summary, shape))
    write_json(out / LISTING, sorted(listed))
    return figures, left_out


def _files(stem: str) -> set[str]:
    return {f"{stem}.{kind}" for kind in KINDS}


def _claim(out: Path, stems: Iterable[str]) -> set[str]:
    """List the names of all figures as ours, and return that list."""
    names = set().union(*map(_files, stems))
    if (out / LISTING).exists() or not (out / "index.html").exists():
        listed = read_listed(out / LISTING)
    else:
        listed = names  # a report made before there was a list
    foreign = sorted(name for name in names - listed if (out / name).exists())
    if foreign:
        raise UserError(f"{out / foreign[0]} is no figure of a report; choose another folder with --out")
    write_json(out / LISTING, sorted(listed | names))
    return listed | names


def _anomalies(material: Material, path: Path) -> Drawn:
    rows = data.anomaly_rows(material.loops, material.groups, material.data_path)
    images.draw_anomalies(path, rows)
    captions = "; ".join(f"{title}: {shown[0].caption}" for title, shown in rows).replace("\n", ", ")
    return (
        "The hard ones closest to the normals come first, then the easy ones farthest from them.",
        f"{len(rows)} rows of images. The first captions are: {captions}",
    )


def _sizes(material: Material, path: Path) -> Drawn:
    if material.tables:
        series = data.table_sizes(material.tables[0])
    else:
        series = data.size_series(material.loops, material.groups)
    charts.draw_sizes(path, series)
    points = [
        f"{name}, {point.n} images {point.label}: {format_interval(point.aucs, unit=' %')}"
        for name, each in series.items()
        for point in each
    ]
    over = (
        "runs; a point without an interval is one run"
        if material.tables
        else ("seeds; a point without an interval is one seed")
    )
    return f"Mean and 95 % t-interval over {over}.", "; ".join(points)


def _latent(material: Material, path: Path) -> Drawn:
    panels = data.latent_panels(*material.pair, material.data_path)
    charts.draw_latent(path, panels)
    counts = ", ".join(f"{len(points)} of {kind}" for kind, points in panels[0][1].items())
    description = (
        "t-SNE of the same images in the features of two detectors, first seed. Distances between groups "
        "of points mean little."
    )
    return f"{description} {_crossfit_note(material.selected)}".strip(), f"Two panels of points: {counts}."


def _convergence(material: Material, path: Path) -> Drawn:
    series = data.curve_series(material.selected)
    charts.draw_convergence(path, series)
    last = [f"{name}: {_last_point(curves)}" for name, curves in series.items()]
    tested = any(curve.aucs for curves in series.values() for curve in curves)
    note = "" if tested else " No run was made with --test_every, so there is no AUC by epoch."
    return f"Mean over seeds; thin lines are single seeds.{note}", "; ".join(last)


def _last_point(curves: Sequence[charts.Curve]) -> str:
    curve = curves[0]
    loss = f"last loss {list(curve.losses.values())[-1]:.4g}" if curve.losses else "no loss recorded"
    return loss + (f", last AUC {100 * list(curve.aucs.values())[-1]:.1f} %" if curve.aucs else "")


def _scores(material: Material, path: Path) -> Drawn:
    panels = data.score_panels(material.selected)
    charts.draw_scores(path, panels)
    medians = [
        f"{panel.title}: median score of "
        + ", ".join(f"{kind} {np.median(v):.4g}" for kind, v in panel.kinds.items() if len(v))
        + f", threshold {panel.threshold:.4g}"
        for panel in panels
    ]
    note = "First seed of each. What lies beyond the axis is in the outermost bars. "
    return note + _crossfit_note(material.selected), "; ".join(medians)


def _crossfit_note(groups: Sequence[Group]) -> str:
    def is_crossfit(run: FinishedRun) -> bool:
        return run.settings.get("split") == "crossfit" and bool(run.results["n_generated"])

    if not any(is_crossfit(group.runs[0]) for group in groups):
        return ""
    return (
        "Generated anomalies were judged by cross-fit: each by a detector that was not trained on it, whose "
        "scores and threshold differ a little from those of the detector shown."
    )


def _shares(material: Material, path: Path) -> Drawn:
    series = data.share_series(material.loops)
    charts.draw_shares(path, series)
    shares = [
        f"{name}, round {share.round}: {share.n_hard} of {share.n} hard"
        for name, each in series.items()
        for share in each
    ]
    description = (
        "Images that no detector has seen, judged by the evaluator of the round before, with Wilson's 95 % "
        "interval over the images. The evaluator changes from round to round: compare the two LLMs "
        "within a round, not rounds with each other."
    )
    return description, "; ".join(shares)


def _classes(material: Material, path: Path) -> Drawn:
    series = data.class_series(material.selected, material.data_path)
    charts.draw_classes(path, series)
    shown = charts.choose_classes(series)
    total = min(len(each) for each in series.values())
    cut = f" {len(shown)} of {total} classes: the lowest and the highest." if len(shown) < total else ""
    *_, (name, last) = series.items()
    ends = [f"{each} {format_interval(last[each], unit=' %')}" for each in (shown[0], shown[-1])]
    description = (
        f"Classes in the order of {name}; means over seeds, and lines from the lowest to the highest.{cut}"
    )
    return description, f"{name}: lowest {ends[0]}, highest {ends[1]}."


def _margins(material: Material, path: Path) -> Drawn:
    rounds = data.margin_series(material.loops)
    charts.draw_margins(path, rounds)
    ends = [
        f"{title}, {name} pairs: from {points[0][1]:+z.3f} to {points[-1][1]:+z.3f}"
        for title, kinds in rounds.items()
        for name, points in kinds.items()
    ]
    description = (
        "β times how much more the tuned LLM than its reference prefers the hard caption of a pair to the "
        "easy one, Eq. (7); validation pairs were not trained on."
    )
    return description, "; ".join(ends)


def _table(material: Material, path: Path) -> Drawn:
    table = material.tables[0]
    columns = {
        title: [(name, cells[k].aucs, cells[k].paper_mean) for name, cells in table.rows]
        for k, title in enumerate(table.columns)
        if any(cells[k].aucs for _, cells in table.rows)
    }
    if not columns:
        raise data.NoDataError("no cell of the table has a run")
    charts.draw_table(path, columns)
    return (
        "Mean and 95 % t-interval over runs; a point without an interval is one run.",
        "The numbers are those of the table above.",
    )


Draw = Callable[[Material, Path], Drawn]
RUN_FIGURES: dict[str, tuple[str, str, Draw]] = {
    "anomalies": ("Generated anomalies by round (Fig. 3)", "wide", _anomalies),
    "scores": ("Scores and threshold", "wide", _scores),
    "convergence": ("Convergence (Fig. 6)", "wide", _convergence),
    "latent": ("Latent space (Fig. 5)", "wide", _latent),
    "classes": ("AUC of each anomalous class", "tall", _classes),
    "sizes": ("AUC against the number of anomalies (Fig. 4)", "", _sizes),
    "hard_shares": ("Share of hard anomalies by round", "", _shares),
    "margins": ("Reward margins of DPO", "", _margins),
}
SIZE_FIGURES = {"sizes": RUN_FIGURES["sizes"]}
TABLE_FIGURES: dict[str, tuple[str, str, Draw]] = {"table": ("The table as points", "wide", _table)}
