"""Studies of which anomalies help, compared: means over seeds and normal classes, differences in pairs."""

from collections.abc import Sequence
from typing import Any

from kka.differences import describe_runs, mixed_settings
from kka.errors import UserError
from kka.finished import Finished, read_finished
from kka.metrics import mean_interval
from kka.tables import LEFT_OUT, MIXED, Cell, cell_text

COLUMNS = ("hard, %", "new", "AUC, %", "minus add/rep random", "minus base set")


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
        studies = everyone[name] = _read(cell, problems)
        if different := mixed_settings(studies):
            problems.append(f"{MIXED}{name}: its runs differ in {different}.")
            continue
        sizes = sorted({int(n) for study in studies for n in study.results["sets"]})
        for n in sizes:
            found = [study.results["sets"][str(n)] for study in studies if str(n) in study.results["sets"]]
            rows += [_row(f"{name}, {n}: {key}", key, found) for key in found[0]["aucs"]]
    notes = [
        *problems,
        "Differences are points of AUC between trainings of the same base set, pool and seed; intervals are "
        "over seeds and normal classes.",
        "New: fewer than --n_chosen where fewer are hard, and in rep at most --max_replaced of the base.",
        *describe_runs(everyone),
    ]
    return {"title": title, "notes": list(dict.fromkeys(notes)), "columns": list(COLUMNS), "rows": rows}


def _read(cell: Cell, problems: list[str]) -> list[Finished]:
    studies = []
    for job in cell.jobs:
        try:
            study = read_finished(job.folder)
            if not isinstance(study.results.get("sets"), dict):
                raise UserError(f"{job.folder} is no study of hardness")
            studies.append(study)
        except UserError as error:
            problems.append(f"{LEFT_OUT}{error}.")
    return studies


def _row(title: str, key: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One set of one size over all studies that have it."""
    found = [each for each in found if key in each["aucs"]]
    aucs = [_mean(each["aucs"][key]) for each in found]
    mode = key.partition(" ")[0]
    cells = [
        _mean_cell([100 * each["hard"] for each in found]),
        _mean_cell([each["n_new"][key] for each in found]),
        _cell(aucs),
        *(_difference(key, other, found) for other in (f"{mode} random", "base")),
    ]
    return {"name": title, "cells": cells}


def _difference(key: str, other: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    pairs = [(each["aucs"][key], each["aucs"][other]) for each in found if other in each["aucs"]]
    if key in (other, "base") or not pairs:
        return {"text": "", "aucs": [], "paper": "", "runs": 0}
    return _cell([_mean(a) - _mean(b) for a, b in pairs], sign="+")


def _cell(values: Sequence[float], sign: str = "") -> dict[str, Any]:
    text = cell_text(values, len(values))
    if sign:  # of a difference, whose number of runs is that of the AUC
        mean = 100 * mean_interval(values)[0]
        text = text.replace(f"{mean:.2f}", f"{mean:+.2f}", 1).partition(" (")[0]
    return {"text": text, "aucs": list(values), "paper": "", "runs": len(values)}


def _mean_cell(values: Sequence[float]) -> dict[str, Any]:
    """Of what is no AUC: only the mean."""
    return {"text": f"{_mean(values):.0f}", "aucs": [], "paper": "", "runs": len(values)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
