"""Finished runs to tables: mean ± 95 % t-interval, and a note for whatever is missing, broken or mixed."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kka.differences import describe_runs, mixed_settings
from kka.errors import UserError
from kka.files import read_json, write_bytes, write_json
from kka.finished import COST, Finished, n_anomalies, read_finished, value_of
from kka.metrics import deviation, format_interval, mean_interval
from kka.sweep import Job

LEFT_OUT, MIXED = "Left out: ", "Not averaged: "  # how a note on runs that are in no mean begins


@dataclass(frozen=True)
class Cell:
    """One figure of a table: the runs behind it, and what of their results it is."""

    row: str
    column: str
    jobs: tuple[Job, ...]
    part: str = "test_auc"
    """of a run: test_auc; of a loop: none, or the number of a round"""
    paper: str = ""
    """its figure, for comparison"""
    counted: bool = False
    """whether the number of generated anomalies is written too, which Fig. 4 is drawn over"""
    deviates: bool = False
    """whether the standard deviation stands beside the interval"""


def tabulate(title: str, cells: Sequence[Cell]) -> dict[str, Any]:
    """The table as JSON values: title, notes, columns, rows of cells.

    Runs that are missing or broken are named in the notes and are no part of any mean; neither is a cell
    whose runs differ in more than seed and normal class.
    """
    runs, problems = _read_all(cells)
    columns, names = (list(dict.fromkeys(getattr(cell, key) for cell in cells)) for key in ("column", "row"))
    rows: list[dict[str, Any]] = []
    for name in names:
        own = {cell.column: cell for cell in cells if cell.row == name}
        filled = [_fill(own[column], runs, problems) if column in own else _empty() for column in columns]
        rows.append({"name": name, "cells": filled})
    by_row = {name: _runs_of([cell for cell in cells if cell.row == name], runs) for name in names}
    notes = [*problems, *describe_runs(by_row)]
    return {"title": title, "notes": list(dict.fromkeys(notes)), "columns": columns, "rows": rows}


def problems_of(table: dict[str, Any]) -> list[str]:
    """Its notes on runs that are in no mean, as ends of sentences."""
    marks = (LEFT_OUT, MIXED)
    return [note.removeprefix(LEFT_OUT).rstrip(".") for note in table["notes"] if note.startswith(marks)]


def _read_all(cells: Sequence[Cell]) -> tuple[dict[Path, Finished], list[str]]:
    runs, problems = {}, []
    for folder in dict.fromkeys(job.folder for cell in cells for job in cell.jobs):
        try:
            runs[folder] = read_finished(folder)
        except UserError as error:
            problems.append(f"{LEFT_OUT}{error}.")
    return runs, problems


def _runs_of(cells: Sequence[Cell], runs: dict[Path, Finished]) -> list[Finished]:
    """The finished ones of all columns, each once."""
    folders = dict.fromkeys(job.folder for cell in cells for job in cell.jobs)
    return [runs[folder] for folder in folders if folder in runs]


def _empty() -> dict[str, Any]:
    return {"text": "", "aucs": [], "paper": "", "runs": 0}


def _fill(cell: Cell, runs: dict[Path, Finished], problems: list[str]) -> dict[str, Any]:
    aucs, used = [], []
    for job in cell.jobs:
        if job.folder in runs:
            try:
                aucs.append(value_of(runs[job.folder], cell.part))
                used.append(runs[job.folder])
            except UserError as error:
                problems.append(f"{LEFT_OUT}{job.folder} {error}.")
    if different := mixed_settings(used):
        problems.append(f"{MIXED}{cell.row}, {cell.column}: its runs differ in {different}.")
        return {**_empty(), "text": "mixed settings", "paper": cell.paper}
    text = cell_text(aucs, len(cell.jobs))
    spread = deviation(aucs) if cell.deviates and aucs else None
    text += "" if spread is None else f", std {100 * spread:.2f}"
    cost = cost_of([run.results for run in used]) if cell.part == "test_auc" else {}
    return {
        "text": text,
        "aucs": aucs,
        "paper": cell.paper,
        "runs": len(aucs),
        **({"cost": cost} if cost else {}),
        **_count(cell, used),
    }


def _count(cell: Cell, runs: Sequence[Finished]) -> dict[str, float]:
    """Mean number of generated anomalies, where a table asks for it and each run knows it."""
    counts = [n_anomalies(run, cell.part) for run in runs if cell.counted]
    known = [n for n in counts if n is not None]
    return {"anomalies": sum(known) / len(known)} if known and len(known) == len(counts) else {}


def cost_of(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean seconds of a run, mean images per second of the test, and the most memory of any run, MiB.

    Of runs of a version that measured no whole run the seconds are those of the training alone.
    """
    whole = all("seconds" in each for each in results)
    title, key = ("run, s", "seconds") if whole else ("training, s", "train_time")
    if not results or not all({key, *COST} <= each.keys() for each in results):
        return {}
    seconds, times, tested, peaks = ([each[name] for each in results] for name in (key, *COST))
    speeds = [n / time for n, time in zip(tested, times, strict=True)]
    return {
        title: sum(seconds) / len(results),
        "images/s": sum(speeds) / len(results),
        "MiB": max(peaks),
    }


def cell_text(values: Sequence[float], asked: int, scale: float = 100) -> str:
    """ "mean ± half width (n = 5)", with "of" where fewer runs than asked for gave a figure."""
    if not values:
        return "not run"
    text = format_interval(values, scale)
    return text if len(values) == asked else text.replace(")", f" of {asked})")


def refuse_foreign(out: Path) -> None:
    """Raises UserError if a file that `write_table` would replace is no part of a table of ours."""
    files = [
        path for path in (Path(f"{out}.{kind}") for kind in ("json", "md", "csv", "tex")) if path.exists()
    ]
    table = read_json(files[0]) if files and files[0].suffix == ".json" else None
    if files and not (isinstance(table, dict) and {"title", "columns", "rows", "notes"} <= table.keys()):
        raise UserError(f"--out {out}: {files[0]} is no table of this program; choose another name")


def write_table(table: dict[str, Any], out: Path) -> None:
    """Write <out>.json, .md, .csv and .tex; raises UserError if one of them is somebody else's."""
    refuse_foreign(out)
    write_json(Path(f"{out}.json"), table, indent=1)
    for suffix, convert in {"md": to_markdown, "csv": to_csv, "tex": to_latex}.items():
        write_bytes(Path(f"{out}.{suffix}"), convert(table).encode())


def to_markdown(table: dict[str, Any]) -> str:
    """A table with the paper's figure beside each cell that has one, and the notes below."""
    header, lines = _grid(table)
    rows = [header, ["---"] * len(header), *lines]
    notes = "\n".join(f"- {note}" for note in table["notes"])
    parts = [f"**{table['title']}**", _lines(rows), *_costs(table), notes]
    return "\n\n".join(parts) + "\n"


def _lines(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(word.replace('|', '/') for word in row)} |" for row in rows)


def _costs(table: dict[str, Any]) -> list[str]:
    """A table of what the runs cost, where it was measured."""
    costs = [[cell.get("cost", {}) for cell in row["cells"]] for row in table["rows"]]
    names = list(dict.fromkeys(name for row in costs for cost in row for name in cost))
    if not names:
        return []
    header = ["", *(f"{column}: {name}" for column in table["columns"] for name in names)]
    rows = [
        [row["name"], *(f"{cost[name]:.0f}" if name in cost else "" for cost in own for name in names)]
        for row, own in zip(table["rows"], costs, strict=True)
    ]
    return [_lines([header, ["---"] * len(header), *rows])]


def _grid(table: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; a column of the paper's figures only where there are any."""
    shown = [any(row["cells"][k]["paper"] for row in table["rows"]) for k in range(len(table["columns"]))]
    header, lines = [""], [[row["name"]] for row in table["rows"]]
    for k, column in enumerate(table["columns"]):
        header += [column, *["paper"] * shown[k]]
        for line, row in zip(lines, table["rows"], strict=True):
            cell = row["cells"][k]
            line += [cell["text"], *[cell["paper"]] * shown[k]]
    return header, lines


def to_csv(table: dict[str, Any]) -> str:
    """One line per cell: row, column, mean, half width, deviation, runs, paper's figure, single values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "column", "mean", "interval95", "std", "runs", "paper", "values"])
    for row in table["rows"]:
        for column, cell in zip(table["columns"], row["cells"], strict=True):
            aucs = cell["aucs"]
            figures = (*mean_interval(aucs), deviation(aucs)) if aucs else (None,) * 3
            shown = ["" if figure is None else figure for figure in figures]
            values = " ".join(map(str, aucs))
            writer.writerow([row["name"], column, *shown, cell["runs"], cell["paper"], values])
    return text.getvalue()


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": "$<$", ">": "$>$",
}  # fmt: skip


def to_latex(table: dict[str, Any]) -> str:
    """A tabular for booktabs, with the notes as comments."""
    header, lines = _grid(table)
    rows = [
        " & ".join("".join(LATEX.get(c, c) for c in word) for word in row) + r" \\"
        for row in (header, *lines)
    ]
    notes = "\n".join(f"% {note}" for note in (table["title"], *table["notes"]))
    body = "\n".join([rows[0], r"\midrule", *rows[1:]])
    columns = "l" + "c" * (len(header) - 1)
    return f"{notes}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"
