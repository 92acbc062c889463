"""Finished runs to tables: mean ± 95 % t-interval, and a note for whatever is missing, broken or mixed."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kka.differences import describe_runs, mixed_settings
from kka.errors import UserError
from kka.files import read_json, write_bytes, write_json
from kka.metrics import format_interval, mean_interval
from kka.runs import CONFIG, RESULTS
from kka.sweep import Job

COST = ("train_time", "test_time", "n_test", "peak_mib")  # of results.json


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


@dataclass(frozen=True)
class Finished:
    """What a table needs of a run."""

    settings: dict[str, Any]
    config: dict[str, Any]
    results: dict[str, Any]


def read_finished(folder: Path) -> Finished:
    """A finished run or loop; raises UserError if it is missing, damaged or not finished."""
    if not (folder / RESULTS).exists():
        raise UserError(f"{folder} is {'not finished' if (folder / CONFIG).exists() else 'missing'}")
    config, results = read_json(folder / CONFIG), read_results(folder / RESULTS)
    if not isinstance(config, dict) or not isinstance(config.get("settings"), dict):
        raise UserError(f"{folder / CONFIG} is not from a run of this program")
    return Finished(config["settings"], config, results)


def read_results(path: Path) -> dict[str, Any]:
    """results.json without the scores of single images, which are nearly all of it and slow to parse."""
    try:
        text = path.read_text(encoding="utf-8")
        begin = text.find('"test_scores": [')
        end = text.find("]]", begin)
        if begin >= 0 and end >= 0:
            text = f'{text[:begin]}"test_scores": null{text[end + 2 :]}'
        value = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not from a run of this program")
    return value


def value_of(run: Finished, part: str) -> float:
    """The AUC of a run, or of one round of a loop, whose detectors are averaged; in [0, 1].

    Raises UserError if there is none, or it is no such number.
    """
    try:
        if part == "test_auc":
            values = [run.results["test_auc"]]
        else:
            values = run.results["none"] if part == "none" else run.results["rounds"][int(part)]["test_aucs"]
    except (KeyError, IndexError, TypeError):
        raise UserError(f"has no result of {part}") from None
    for value in values:
        if value is None:
            raise UserError("has no AUC, as its test set has one class only")
        if not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1:
            raise UserError(f"has an AUC of {value}")
    return sum(values) / len(values)


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
    notes = [
        *problems,
        *describe_runs({c.row: [runs[j.folder] for j in c.jobs if j.folder in runs] for c in cells}),
    ]
    return {"title": title, "notes": list(dict.fromkeys(notes)), "columns": columns, "rows": rows}


def _read_all(cells: Sequence[Cell]) -> tuple[dict[Path, Finished], list[str]]:
    runs, problems = {}, []
    for folder in dict.fromkeys(job.folder for cell in cells for job in cell.jobs):
        try:
            runs[folder] = read_finished(folder)
        except UserError as error:
            problems.append(f"Left out: {error}.")
    return runs, problems


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
                problems.append(f"Left out: {job.folder} {error}.")
    if different := mixed_settings(used):
        problems.append(f"Not averaged: {cell.row}, {cell.column}: its runs differ in {different}.")
        return {**_empty(), "text": "mixed settings", "paper": cell.paper}
    text = cell_text(aucs, len(cell.jobs))
    cost = cost_of([run.results for run in used]) if cell.part == "test_auc" else {}
    return {
        "text": text,
        "aucs": aucs,
        "paper": cell.paper,
        "runs": len(aucs),
        **({"cost": cost} if cost else {}),
    }


def cost_of(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean seconds of training, mean images per second of the test, and the most memory of any run, MiB."""
    if not results or not all(set(COST) <= each.keys() for each in results):
        return {}  # runs of a version that did not measure them
    seconds, times, tested, peaks = ([each[key] for each in results] for key in COST)
    speeds = [n / time for n, time in zip(tested, times, strict=True)]
    return {
        "training, s": sum(seconds) / len(results),
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
    names = ("training, s", "images/s", "MiB")
    header = ["", *(f"{column}: {name}" for column in table["columns"] for name in names)]
    rows = [
        [
            row["name"],
            *(
                f"{cell['cost'][name]:.0f}" if cell.get("cost") else ""
                for cell in row["cells"]
                for name in names
            ),
        ]
        for row in table["rows"]
    ]
    return [_lines([header, ["---"] * len(header), *rows])] if any(any(row[1:]) for row in rows) else []


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
    """One line per cell: row, column, mean, half width, runs, the paper's figure, single values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "column", "mean", "interval95", "runs", "paper", "values"])
    for row in table["rows"]:
        for column, cell in zip(table["columns"], row["cells"], strict=True):
            mean, half = mean_interval(cell["aucs"]) if cell["aucs"] else ("", None)
            values = " ".join(map(str, cell["aucs"]))
            shown = "" if half is None else half
            writer.writerow([row["name"], column, mean, shown, cell["runs"], cell["paper"], values])
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
