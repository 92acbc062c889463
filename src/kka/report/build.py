"""A report: the figures as files, and everything on one page."""

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kka.datasets import get_spec
from kka.errors import UserError
from kka.figures.style import styled
from kka.files import user_path, write_bytes
from kka.loop_folder import to_cells
from kka.metrics import format_interval, mean_interval
from kka.report.catalogue import Material, draw_all
from kka.report.gallery import Picture, collect, make_thumbnails
from kka.report.html import Html, element, join
from kka.report.page import GENERATOR, Grid, Page, render
from kka.report.sources import Group, LoopRecord, is_loop, read_group, read_loop
from kka.report.tables import Cell, Table, read_table
from kka.runs import CONFIG, RESULTS
from kka.settings import option

PAGE, FOLDER, SUMMARY = "index.html", "report", "summary.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReportSettings:
    """Where the report goes."""

    out: str | None = option(
        None, "folder of the report; None: <RUN>/report, for a table <name>_report beside it"
    )
    data_path: str | None = option(None, "folder of the data set, if it was moved since the runs")


def make_reports(paths: Sequence[Path], settings: ReportSettings) -> list[Path]:
    """One page for all runs and loops together, and one for each table; returns the pages.

    Raises UserError for a run that is missing, broken or not finished, before anything is written.
    """
    with styled():
        pass  # without matplotlib it ends here
    tables, loops, groups = _read(paths)
    material = Material(tuple(loops), tuple(groups), (), settings.data_path)
    given = user_path(settings.out) if settings.out else None
    places: list[tuple[Material, Path]] = []
    if loops or groups:
        folders = [loop.folder for loop in loops] + [group.folder for group in groups]
        first = next(path for path in paths if path in folders)
        places.append((material, given or first / FOLDER))
    for table in tables:
        beside = table.path.with_name(f"{table.name}_{FOLDER}")
        inside = given / table.name if given and len(tables) + len(places) > 1 else given
        places.append((Material(tables=(table,)), inside or beside))
    for _, out in places:
        refuse_foreign(out)
    return [_make_report(each, out) for each, out in places]


def _read(paths: Sequence[Path]) -> tuple[list[Table], list[LoopRecord], list[Group]]:
    tables: list[Table] = []
    loops: list[LoopRecord] = []
    groups: list[Group] = []
    for path in paths:
        inside = sorted(path.glob("*.json")) if path.is_dir() else []
        if path.suffix == ".json" and not path.is_dir():
            tables.append(read_table(path))
        elif is_loop(path):
            loops.append(read_loop(path))
        elif inside and not {each.name for each in inside} & {CONFIG, RESULTS, SUMMARY}:
            tables += [read_table(each) for each in inside]
        else:
            groups.append(read_group(path))
    names = short_names([loop.folder for loop in loops] + [group.folder for group in groups])
    loops = [replace(loop, name=names[loop.folder]) for loop in loops]
    return tables, loops, [replace(group, name=names[group.folder]) for group in groups]


def short_names(folders: Sequence[Path]) -> dict[Path, str]:
    """The ends of the paths, as long as needed to tell them apart; raises UserError for one given twice."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        twice = next(str(folder) for k, folder in enumerate(folders) if parts[k] in parts[:k])
        raise UserError(f"{twice} is given twice")
    length = 1
    while len({each[-length:] for each in parts}) < len(parts):
        length += 1
    return {folder: "/".join(each[-length:]) for folder, each in zip(folders, parts, strict=True)}


def refuse_foreign(out: Path) -> None:
    """Raises UserError if the folder has a page that is no report, so that nobody's file is lost."""
    page = out / PAGE
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another folder with --out")
    if (
        page.exists()
        and f'content="{GENERATOR}"' not in page.read_text(encoding="utf-8", errors="replace")[:2000]
    ):
        raise UserError(f"{page} is no report of this program; choose another folder with --out")


def _make_report(material: Material, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    figures, left_out = draw_all(material, out)
    pictures, problems = collect(material.loops, material.groups, material.data_path)
    thumbnails = make_thumbnails([picture.path for picture in pictures])
    gone = [p.path for p, uri in zip(pictures, thumbnails.uris, strict=True) if uri is None]
    problems += [f"{path} is gone or cannot be read" for path in gone]
    problems += [problem for group in material.all_groups for problem in group.problems]
    for problem in problems:
        log.warning("%s", problem)
    table = material.tables[0] if material.tables else None
    settings, commands = _settings(material)
    page = Page(
        title=table.title if table else ", ".join(name for name, _ in _sources(material)),
        kicker="KKA, a table" if table else "KKA, a report of finished runs",
        facts=_table_facts(table) if table else _facts(material, pictures),
        problems=problems,
        grids=_table_grids(table) if table else _grids(material),
        notes=table.notes if table else (),
        figures=figures,
        left_out=left_out,
        settings=settings,
        commands=commands,
        footer=_footer(material),
    )
    text = render(page, out, pictures, thumbnails)
    write_bytes(out / PAGE, text.encode())
    log.info("%s: %d figures, %d images, %.1f MB", out / PAGE, len(figures), len(pictures), len(text) / 1e6)
    return out / PAGE


def _facts(material: Material, pictures: Sequence[Picture]) -> dict[str, str]:
    """The few things that a reader wants to know first."""
    groups = material.all_groups
    run = groups[0].runs[0]
    titles = {get_spec(group.runs[0].settings["dataset_name"]).title for group in groups}
    detectors = {group.runs[0].detector for group in groups}
    facts = {"Data set": ", ".join(sorted(titles)), "Detector": ", ".join(sorted(detectors))}
    for group in (each for each in material.pair if each):
        facts[f"Test AUC, {group.name}"] = _auc(group)
    if pictures:
        hard = sum(picture.status == "hard" for picture in pictures)
        facts["Generated anomalies"] = f"{len(pictures):,}\n{hard:,} of them hard"
    normals = int((run.test[:, 1] == 0).sum())
    facts["Test images"] = f"{len(run.test):,}\n{normals:,} of them normal"
    return facts


def _auc(group: Group) -> str:
    if not group.aucs:
        return "n/a\nthe test set has one class only"
    mean, half = mean_interval(group.aucs)
    if half is None:
        return f"{100 * mean:.1f} %\none seed"
    return f"{100 * mean:.1f} ± {100 * half:.1f} %\nmean and 95 % t-interval, n = {len(group.aucs)}"


def _grids(material: Material) -> list[Grid]:
    grids = []
    for loop in material.loops:
        head, *rows = to_cells(loop.results["none"], loop.rounds)
        title = (
            f"{loop.name}: mean and 95 % t-interval over evaluators; hard ones of the set in round 0, later "
            "of the fresh images"
        )
        grids.append(Grid(title, ["round", *head[1:]], rows))
    if material.groups:
        head = ["run", "detector", "test AUC", "seeds", "generated", "hard", "easy", "training, s"]
        rows = [_run_row(group) for group in material.groups]
        grids.append(Grid("Test AUC of the last epoch; mean and 95 % t-interval over seeds", head, rows))
    return grids


def _run_row(group: Group) -> list[str]:
    def mean(key: str) -> str:
        return f"{sum(run.results[key] for run in group.runs) / len(group.runs):.4g}"

    aucs = f"{format_interval(group.aucs).partition(' (')[0]} %" if group.aucs else "n/a"
    seeds = f"{len(group.runs)}" + (f" of {len(group.runs) + len(group.problems)}" if group.problems else "")
    counts = [mean(key) for key in ("n_generated", "n_hard", "n_easy", "train_time")]
    return [group.name, group.runs[0].detector, aucs, seeds, *counts]


def _settings(material: Material) -> tuple[list[tuple[str, Mapping[str, Any]]], list[str]]:
    """Blocks of settings, and the commands that made the runs."""
    behind = {key: value for table in material.tables for key, value in _runs_of(table).items()}
    blocks: list[tuple[str, Mapping[str, Any]]] = [("Runs behind the table", behind)] if behind else []
    commands = []
    named = [(loop.name, loop.config) for loop in material.loops]
    named += [(group.name, group.runs[0].config) for group in material.groups]
    for name, config in named:
        blocks.append((f"Settings of {name}", config["settings"]))
        origin = {key: config.get(key) for key in ("versions", "machine", "git_commit")}
        parts = {
            f"{key}: {k}": v
            for key, part in origin.items()
            if isinstance(part, dict)
            for k, v in part.items()
        }
        blocks.append((f"Versions and machine of {name}", {**parts, "commit": origin["git_commit"]}))
        words = config.get("command")
        if isinstance(words, list):
            commands.append(shlex.join(["python", *map(str, words)]))
    return blocks, commands


def _table_facts(table: Table) -> dict[str, str]:
    cells = [cell for _, row in table.rows for cell in row]
    return {
        "Cells measured": f"{sum(bool(cell.aucs) for cell in cells)} of {len(cells)}",
        "Runs": f"{sum(len(cell.aucs) for cell in cells):,}",
    }


def _table_grids(table: Table) -> list[Grid]:
    title = "Measured here; below it, where the paper has one, its figure. AUC in percent."
    rows = [[name, *(_table_cell(cell) for cell in cells)] for name, cells in table.rows]
    grids = [Grid(title, ["", *table.columns], rows)]
    names = dict.fromkeys(name for _, cells in table.rows for cell in cells for name in cell.cost)
    if names:
        head = ["", *(f"{column}: {name}" for column in table.columns for name in names)]
        costs = [
            [row, *(f"{c.cost[name]:.0f}" if name in c.cost else "" for c in cells for name in names)]
            for row, cells in table.rows
        ]
        grids.append(Grid("What the runs cost: means, and the most memory of any.", head, costs))
    return grids


def _table_cell(cell: Cell) -> Html:
    paper = element("small", f"paper: {cell.paper}") if cell.paper else Html()
    return join(cell.text, paper)


def _runs_of(table: Table) -> dict[str, Any]:
    return {
        f"{name}, {column}": list(cell.runs)
        for name, cells in table.rows
        for column, cell in zip(table.columns, cells, strict=True)
        if cell.runs
    }


def _sources(material: Material) -> list[tuple[str, Path]]:
    """Name and place of what was given."""
    return [
        *((loop.name, loop.folder) for loop in material.loops),
        *((group.name, group.folder) for group in material.groups),
        *((table.name, table.path) for table in material.tables),
    ]


def _footer(material: Material) -> str:
    places = ", ".join(str(place) for _, place in _sources(material))
    return f"Made by src/report.py from {places}. Captions were written by an LLM."
