"""Tables of src/reproduce.py, read from their JSON."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kka.errors import UserError
from kka.files import is_number, read_json

SHAPE = '{"title", "notes": [...], "columns": [...], "rows": [{"name", "cells": [...]}]}'


@dataclass(frozen=True)
class Cell:
    """One figure of a table."""

    text: str
    """as it is printed"""
    aucs: tuple[float, ...] = ()
    """of the runs behind it, in [0, 1], or differences of such, in [-1, 1]; none: it is not measured"""
    paper: str = ""
    """the paper's figure, in percent"""
    runs: tuple[str, ...] = ()
    """folders of its runs, where the table names them"""
    cost: Mapping[str, float] = field(default_factory=dict)
    """what its runs took, by the name of the figure; empty: not measured"""
    anomalies: float | None = None
    """mean number of generated anomalies that its runs were trained with, in a table of Fig. 4"""

    @property
    def paper_mean(self) -> float | None:
        """The first number of the paper's figure."""
        found = re.match(r"\d+(\.\d+)?", self.paper)
        return float(found[0]) if found else None


@dataclass(frozen=True)
class Table:
    """Rows and columns of cells."""

    name: str
    path: Path
    title: str
    notes: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def read_table(path: Path) -> Table:
    """A table; raises UserError naming the place of the first thing that is not as it should be."""
    value = read_json(path)
    where = str(path)
    _check_keys(value, ("title", "notes", "columns", "rows"), where)
    title, columns = _text(value["title"], f"{where}: title"), _texts(value["columns"], f"{where}: columns")
    rows = []
    for number, row in enumerate(_list(value["rows"], f"{where}: rows")):
        place = f"{where}: row {number}"
        _check_keys(row, ("name", "cells"), place)
        cells = _list(row["cells"], f"{place}: cells")
        if len(cells) != len(columns):
            raise UserError(
                f"{place} has {len(cells)} cells for {len(columns)} columns; write the table anew"
            )
        parsed = [
            _cell(cell, f"{place}, column {title!r}") for cell, title in zip(cells, columns, strict=True)
        ]
        rows.append((_text(row["name"], f"{place}: name"), tuple(parsed)))
    if not rows or not columns:
        raise UserError(f"{where} has no rows or no columns; write the table anew")
    return Table(path.stem, path, title, _texts(value["notes"], f"{where}: notes"), columns, tuple(rows))


def _cell(value: Any, where: str) -> Cell:
    _check_keys(value, ("text", "aucs", "paper", "runs"), where, optional=("cost", "anomalies"))
    aucs = _list(value["aucs"], f"{where}: aucs")
    for auc in aucs:
        if not is_number(auc) or not -1 <= auc <= 1:
            raise UserError(f"{where}: aucs must be from 0 to 1, differences from -1 to 1; one is {auc!r}")
    runs = value["runs"]
    if type(runs) is int:  # their number
        runs = []
    paper = _text(value["paper"] or "", f"{where}: paper")
    cost = value.get("cost", {})
    if not isinstance(cost, dict) or not all(is_number(number) for number in cost.values()):
        raise UserError(f"{where}: cost must be an object of numbers, it is {_brief(cost)}")
    anomalies = value.get("anomalies")
    if anomalies is not None and not is_number(anomalies):
        raise UserError(f"{where}: anomalies must be a number, it is {_brief(anomalies)}")
    folders = _texts(runs, f"{where}: runs")
    return Cell(_text(value["text"], where), tuple(aucs), paper, folders, cost, anomalies)


def _check_keys(value: Any, keys: tuple[str, ...], where: str, optional: tuple[str, ...] = ()) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object, it is {_brief(value)}; a table is {SHAPE}")
    wrong = sorted(set(keys) ^ (value.keys() - set(optional)))
    if wrong:
        what = "lacks" if wrong[0] in keys else "has the unknown key"
        raise UserError(f"{where} {what} {wrong[0]!r}; a table is {SHAPE}")


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{where} must be a list, it is {_brief(value)}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} must be a string, it is {_brief(value)}")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    return tuple(_text(item, where) for item in _list(value, where))


def _brief(value: Any) -> str:
    return repr(value)[:60]
