"""Table II of the paper on local data: every detector alone and with anomalies, and frozen features beside.

    python benchmarks/table2.py --oxford DIR --ucm DIR --cifar DIR --backbone_weights squeezenet1_0.pth

Each data set must have a folder 0, whose images stand for the generated ones. Every cell is one call of
src/main.py with several seeds: finished ones are not run again, interrupted ones continue, and the table is
written after each of them. After a change of a default give another --folder.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import read_cell, run_cell
from deep_sad import processor, table

from kka import paper
from kka.errors import UserError, run_script
from kka.files import write_bytes, write_json
from kka.metrics import format_interval
from kka.runs import ROOT
from kka.settings import build_parser, make_settings, option


@dataclass(frozen=True)
class TableSettings:
    """Options of the table."""

    oxford: str | None = option(None, "folder of Oxford-102; None: this column is left out")
    ucm: str | None = option(None, "folder of UCM-Caption")
    cifar: str | None = option(None, "folder of CIFAR-100")
    backbone_weights: str | None = option(None, "weights of SqueezeNet; None: torchvision's, downloaded once")
    rows: tuple[str, ...] = option((), "names of the rows to make, quoted; none: all")
    seeds: int = option(3, "runs of each cell")
    precision: str = option("float32", "of training steps", ("float32", "bfloat16"))
    num_threads: int = option(0, "threads of PyTorch; 0: its default")
    folder: str = option(str(ROOT / "log" / "table2"), "folder of the runs")
    out: str = option(str(Path(__file__).parent / "results" / "table2"), "table without suffix")


# Data set: (title, flags). CIFAR-100 is many times larger, so passes and steps are fewer there.
SETS: dict[str, tuple[str, list[str]]] = {
    "oxford": ("Oxford-102, 26", ["--dataset_name", "flower", "--normal_class", "26"]),
    "ucm": ("UCM-Caption, 20 + 21", ["--dataset_name", "ucm_caption"]),
    "cifar": ("CIFAR-100, furniture", ["--dataset_name", "cifar100", "--normal_superclass", "furniture"]),
}
SHORT = {  # the same number of training steps as on UCM-Caption or fewer
    "deep_sad": ["--n_epochs", "25", "--lr_milestone", "18"],
    "ssd": ["--n_epochs", "25"],
    "cmda": ["--n_epochs", "25"],
    "simplenet": ["--n_epochs", "5", "--image_size", "96"],
    "recontrast": ["--image_size", "96"],
    "frozen": [],
}


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    detector: str
    flags: tuple[str, ...]
    anomalies: bool


CPU = ("--preset", "cpu")
DIFFERENCES = """
Not the paper's: real images of other classes (folder 0) stand for the generated anomalies, so rows with
anomalies are upper bounds; SqueezeNet for WRN-50-2 and a LeNet for SSD's and CMDA's ResNet (`--preset cpu`);
one choice of normal classes; on CIFAR-100 25 epochs (SimpleNet 5), and SimpleNet and ReContrast at 96 px.
Paper's figures with anomalies: modes add / rep. Peaks are of all seeds of a cell in one process; flags of
each cell: table2.json.
"""
ROWS: dict[str, Row] = {
    "SSD": Row("ssd", CPU, False),
    "CMDA": Row("cmda", CPU, False),
    "SimpleNet": Row("simplenet", CPU, False),
    "ReContrast, no pre-training": Row("recontrast", (*CPU, "--backbone_init", "random"), False),
    "ReContrast": Row("recontrast", CPU, False),
    "Deep SAD": Row("deep_sad", (), False),
    "SAD+KKA": Row("deep_sad", (), True),
    "SimpleNet+KKA": Row("simplenet", CPU, True),
    "ReContrast+KKA": Row("recontrast", CPU, True),
    "SSD_k": Row("ssd", CPU, True),
    "CMDA+KKA": Row("cmda", CPU, True),
    "frozen, kNN": Row("frozen", CPU, False),
    "frozen, kNN + anomalies": Row("frozen", CPU, True),
    "frozen, logistic + anomalies": Row("frozen", (*CPU, "--head", "logistic"), True),
}
DATA_SET = {"cifar": "cifar100", "oxford": "flower", "ucm": "ucm_caption"}


def paper_figure(row: str, name: str) -> str:
    """AUC in the paper, of a row with anomalies by mode: add / rep."""
    rows = (row, f"{row}(add)", f"{row}(rep)")
    return " / ".join(filter(None, (paper.table2(each, DATA_SET[name]) for each in rows)))


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    s = make_settings(TableSettings, vars(build_parser("Table II.", TableSettings).parse_args()))
    unknown = [name for name in s.rows if name not in ROWS]
    if unknown:
        raise UserError(f"--rows {unknown[0]!r} is none of {', '.join(ROWS)}")
    sets = [name for name in SETS if getattr(s, name)]
    if not sets:
        raise UserError("give at least one of --oxford, --ucm and --cifar")
    for row in s.rows or ROWS:
        for name in sets:
            run(row, name, s)
            report = {"processor": processor(), "cells": collect(sets, s)}
            write_json(Path(f"{s.out}.json"), report, indent=1)
            write_bytes(Path(f"{s.out}.md"), to_markdown(report, sets).encode())
    print(to_markdown(report, sets))


def place(row: str, name: str, s: TableSettings) -> Path:
    """Folder of a cell's runs."""
    return Path(s.folder) / name / row.replace(" ", "_").replace(",", "")


def flags_of(row: str, name: str, s: TableSettings) -> list[str]:
    """The flags of src/main.py that a cell differs by."""
    own, flags = ROWS[row], ["--detector", ROWS[row].detector, *SETS[name][1], *ROWS[row].flags]
    flags += SHORT[own.detector] if name == "cifar" else []
    if own.detector == "deep_sad":
        flags += ["--pretrain", "False"]
    if own.detector != "frozen" and s.precision != "float32":
        flags += ["--precision", s.precision]
    return [*flags, "--n_anomalies", "-1" if own.anomalies else "0"]


def run(row: str, name: str, s: TableSettings) -> None:
    """One cell, all its seeds."""
    words = [*flags_of(row, name, s), "--data_path", getattr(s, name)]
    words += ["--num_threads", str(s.num_threads), "--device", "cpu"]
    if s.backbone_weights and ROWS[row].detector in ("simplenet", "recontrast", "frozen"):
        words += [] if "random" in ROWS[row].flags else ["--backbone_weights", s.backbone_weights]
    run_cell(place(row, name, s), words, s.seeds)


def collect(sets: Sequence[str], s: TableSettings) -> dict[str, dict[str, Any]]:
    """What is finished: {row: {data set: AUCs, seconds, images per second, MiB, flags}}."""
    cells: dict[str, dict[str, Any]] = {row: {} for row in ROWS}
    for row in ROWS:
        for name in sets:
            cell = read_cell(place(row, name, s), s.seeds)
            if cell is not None:
                cells[row][name] = {**cell, "flags": flags_of(row, name, s)}
    return cells


def to_markdown(report: dict[str, Any], sets: Sequence[str]) -> str:
    """AUCs with 95 % t-intervals beside the paper's, and a table of speed and memory."""
    rows, speeds = [], []
    for row, cells in report["cells"].items():
        line, speed = [row], [row]
        for name in sets:
            cell = cells.get(name)
            auc = format_interval(cell["aucs"]).partition(" (")[0] if cell else "not run"
            line += [auc, paper_figure(row, name)]
            keys = ("train_seconds", "test_images_per_second", "peak_mib")
            speed += [f"{cell[key]:.0f}" if cell and cell[key] is not None else "" for key in keys]
        rows.append(line)
        speeds.append(speed)
    titles = [SETS[name][0] for name in sets]
    made = [cell for cells in report["cells"].values() for cell in cells.values()]
    commits = sorted({commit for cell in made for commit in cell["commits"]})
    return (
        f"{report['processor']}, runs made by commits {', '.join(commits)}\n"
        + table("AUC, %|" + "|".join(f"{title}|paper" for title in titles), rows)
        + table("|" + "|".join(f"{title}: training, s|images/s|MiB" for title in titles), speeds)
        + DIFFERENCES
    )


if __name__ == "__main__":
    run_script(main)
