"""Studies of which anomalies help, compared: means over seeds and normal classes, differences in pairs."""

from collections.abc import Sequence
from typing import Any

from kka.differences import describe_runs, mixed_settings
from kka.errors import UserError
from kka.finished import Finished, read_finished
from kka.metrics import mean_interval
from kka.plans import GROWING
from kka.sweep import Job
from kka.tables import LEFT_OUT, MIXED, Cell, cell_text

EMPTY: dict[str, Any] = {"aucs": {}}  # a size that a study does not have
COLUMNS = ("hard, %", "new", "AUC, %", "minus add/rep random", "minus add/rep hard", "minus base set")


def compare(title: str, cells: Sequence[Cell]) -> dict[str, Any]:
    """The table as JSON values. A cell of `cells` is one data set and detector, its jobs classes and seeds.

    In the columns of differences each study is compared with itself: the same base set and pool, the same
    number of new anomalies, the same random numbers of the training.
    """
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    everyone: dict[str, list[Finished]] = {}
    for cell in cells:
        name = f"{cell.column}, {cell.row}"
        studies = _read(cell, problems)
        everyone[name] = [study for _, study in studies]
        if different := mixed_settings(everyone[name], ignored=GROWING):
            problems.append(f"{MIXED}{name}: its runs differ in {different}.")
            continue
        trained = _trained(everyone[name])
        for n, key in trained:
            found = [study.results["sets"][n] for _, study in studies if _has(study, n, key)]
            rows.append(_row(f"{name}, {n}: {key}", key, found, len(cell.jobs)))
        problems += _missing(studies, trained, name)
    notes = [
        *problems,
        "Differences are points of AUC between trainings of the same base set, pool and seed; intervals are "
        "over seeds and normal classes.",
        "New: fewer than --n_chosen where fewer are hard, and in rep at most --max_replaced of the base.",
        *describe_runs(everyone),
    ]
    return {"title": title, "notes": list(dict.fromkeys(notes)), "columns": list(COLUMNS), "rows": rows}


def _read(cell: Cell, problems: list[str]) -> list[tuple[Job, Finished]]:
    studies = []
    for job in dict.fromkeys(cell.jobs):
        try:
            study = read_finished(job.folder)
            if study.script != "hardness.py":
                raise UserError(f"{job.folder} is no study of hardness")
            studies.append((job, study))
        except UserError as error:
            problems.append(f"{LEFT_OUT}{error}.")
    return studies


def _trained(studies: Sequence[Finished]) -> list[tuple[str, str]]:
    """Size and name of every set of any study, by size."""
    sizes = {n: None for study in studies for n in study.results["sets"]}
    return [
        (n, key)
        for n in sorted(sizes, key=int)
        for key in {key: None for study in studies for key in study.results["sets"].get(n, EMPTY)["aucs"]}
    ]


def _has(study: Finished, n: str, key: str) -> bool:
    return key in study.results["sets"].get(n, EMPTY)["aucs"]


def _missing(
    studies: Sequence[tuple[Job, Finished]], trained: Sequence[tuple[str, str]], name: str
) -> list[str]:
    """Notes on studies that lack a set; what they were not asked for now is no problem, they may grow."""
    notes, growing = [], set()
    for job, study in studies:
        lacking = {(n, key) for n, key in trained if not _has(study, n, key)}
        asked = {(n, key) for n, key in lacking if ("sets", n, "aucs", key) in job.parts}
        growing |= lacking - asked
        if asked:
            notes.append(f"{LEFT_OUT}{job.folder} has no {name}, {_titles(trained, asked)}.")
    if growing:
        notes.append(f"Not in all studies: {name}, {_titles(trained, growing)}.")
    return notes


def _titles(trained: Sequence[tuple[str, str]], chosen: set[tuple[str, str]]) -> str:
    return "; ".join(f"{n}: {key}" for n, key in trained if (n, key) in chosen)


def _row(title: str, key: str, found: Sequence[dict[str, Any]], asked: int) -> dict[str, Any]:
    """One set of one size over all studies that have it, of so many."""
    aucs = [_mean(each["aucs"][key]) for each in found]
    mode = key.partition(" ")[0]
    cells = [
        _mean_cell([100 * each["hard"] for each in found]),
        _mean_cell([each["n_new"][key] for each in found]),
        _cell(aucs, asked),
        *(_difference(key, other, found) for other in (f"{mode} random", f"{mode} hard", "base")),
    ]
    return {"name": title, "cells": cells}


def _difference(key: str, other: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    pairs = [(each["aucs"][key], each["aucs"][other]) for each in found if other in each["aucs"]]
    if key in (other, "base") or not pairs:
        return {"text": "", "aucs": [], "paper": "", "runs": 0}
    return _cell([_mean(a) - _mean(b) for a, b in pairs], len(found), sign="+")


def _cell(values: Sequence[float], asked: int, sign: str = "") -> dict[str, Any]:
    text = cell_text(values, asked)
    if sign:  # of a difference, whose number of runs is that of the AUC unless it says another
        mean = 100 * mean_interval(values)[0]
        text = text.replace(f"{mean:.2f}", f"{mean:+z.2f}", 1)
        text = text.partition(" (")[0] if len(values) == asked else text
    return {"text": text, "aucs": list(values), "paper": "", "runs": len(values)}


def _mean_cell(values: Sequence[float]) -> dict[str, Any]:
    """Of what is no AUC: only the mean."""
    return {"text": f"{_mean(values):.0f}", "aucs": [], "paper": "", "runs": len(values)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
