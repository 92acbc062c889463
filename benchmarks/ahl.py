"""DevNet, DRA and AHL on a data set in MVTec's format, with few known anomalies; and what an episode costs.

    python benchmarks/ahl.py --data_path mvtec --backbone_weights squeezenet1_0.pth
    python benchmarks/ahl.py --episodes                # seconds of an epoch by the number of clusters

The table's runs are finished once and read again; an interrupted one continues.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cells import read_cell, run_cell
from deep_sad import processor, table

from kka import paper
from kka.detectors.ahl import AHL, AHLSettings, Collaboration
from kka.detectors.ahl_tasks import FeatureBank, bank_labels, make_tasks
from kka.detectors.deviation import Groups, find_groups
from kka.errors import UserError, run_script
from kka.files import write_bytes, write_json
from kka.metrics import format_interval
from kka.runs import ROOT, git_commit
from kka.settings import build_parser, make_settings, option
from kka.train_set import TrainSet


@dataclass(frozen=True)
class TableSettings:
    """Options of the table."""

    data_path: str | None = option(None, "folder with the class folder, in MVTec's format")
    normal_class: str = option("screw", "the class folder")
    backbone_weights: str | None = option(None, "weights of SqueezeNet; None: torchvision's, downloaded once")
    seeds: int = option(3, "runs of each cell; each knows other anomalies")
    known: tuple[int, ...] = option((10, 1), "numbers of known anomalies")
    backbones: tuple[str, ...] = option(("squeezenet1_0", "resnet18"), "pre-trained, and random")
    num_threads: int = option(0, "threads of PyTorch; 0: its default")
    episodes: bool = option(False, "measure epochs instead")
    folder: str = option(str(ROOT / "log" / "ahl"), "folder of the runs")
    out: str = option(str(Path(__file__).parent / "results" / "ahl"), "table without suffix")


ROWS: dict[str, list[str]] = {
    "DevNet": ["--detector", "devnet"],
    "DRA": ["--detector", "dra"],
    "AHL(DevNet)": ["--detector", "ahl", "--base_model", "devnet", "--base_epochs", "50"],
    "AHL(DRA)": ["--detector", "ahl", "--base_model", "dra"],
}


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    s = make_settings(TableSettings, vars(build_parser("AHL.", TableSettings).parse_args()))
    if s.num_threads:
        torch.set_num_threads(s.num_threads)
    if s.episodes:
        measure_episodes(s)
        return
    if s.data_path is None:
        raise UserError("--data_path DIR is needed: the folder above the class folder")
    for backbone in s.backbones:
        for n_known in s.known:
            for row in ROWS:
                run_cell(place(row, backbone, n_known, s), flags_of(row, backbone, n_known, s), s.seeds)
                report = {"processor": processor(), "git_commit": git_commit(), "cells": collect(s)}
                write_json(Path(f"{s.out}.json"), report, indent=1)
                write_bytes(Path(f"{s.out}.md"), to_markdown(report, s).encode())
    print(to_markdown(report, s))


def place(row: str, backbone: str, n_known: int, s: TableSettings) -> Path:
    """Folder of a cell's runs."""
    return Path(s.folder) / backbone / f"known_{n_known}" / row


def flags_of(row: str, backbone: str, n_known: int, s: TableSettings) -> list[str]:
    """The flags of src/main.py."""
    words = ["--dataset_name", "mvtec", "--data_path", str(s.data_path), "--normal_class", s.normal_class]
    words += [*ROWS[row], "--preset", "cpu", "--n_anomaly", str(n_known), "--n_anomalies", "0"]
    words += ["--device", "cpu", "--num_threads", str(s.num_threads), "--backbone", backbone]
    if backbone != "squeezenet1_0":
        return [*words, "--backbone_init", "random"]
    return [*words, *(["--backbone_weights", s.backbone_weights] if s.backbone_weights else [])]


def collect(s: TableSettings) -> dict[str, dict[str, Any]]:
    """What is finished: {row: {"backbone, n": AUCs, seconds, ...}}."""
    cells: dict[str, dict[str, Any]] = {row: {} for row in ROWS}
    for row in ROWS:
        for backbone in s.backbones:
            for n_known in s.known:
                cell = read_cell(place(row, backbone, n_known, s), s.seeds)
                if cell is not None:
                    cells[row][f"{backbone}, {n_known}"] = cell
    return cells


def to_markdown(report: dict[str, Any], s: TableSettings) -> str:
    """AUCs with 95 % t-intervals beside the paper's mean, and a table of speed and memory."""
    columns = [(backbone, n) for backbone in s.backbones for n in s.known]
    rows, speeds = [], []
    for row, cells in report["cells"].items():
        found = [cells.get(f"{backbone}, {n}") for backbone, n in columns]
        aucs = [format_interval(cell["aucs"]).partition(" (")[0] if cell else "not run" for cell in found]
        figures = [paper.AHL[row].get(n, "") for n in s.known]
        rows.append([row, *aucs, *figures])
        keys = ("train_seconds", "peak_mib")
        speeds.append([row, *(f"{cell[key]:.0f}" if cell else "" for cell in found for key in keys)])
    names = [f"{'random ' * (backbone != 'squeezenet1_0')}{backbone}, {n} known" for backbone, n in columns]
    paper_names = [f"paper, mean of MVTec AD, {n} known" for n in s.known]
    return (
        f"{s.normal_class}, {report['processor']}, commit {report['git_commit']}\n"
        + table("AUC, %|" + "|".join(names + paper_names), rows)
        + table("|" + "|".join(f"{name}: training, s|MiB" for name in names), speeds)
        + "\nTraining: of AHL, without its base model. The paper trains a pre-trained ResNet-18 at 448 px;\n"
        "here features of a frozen network at 224 px are kept (`--preset cpu`).\n"
    )


def measure_episodes(s: TableSettings) -> None:
    """Seconds of an epoch of AHL at its CPU preset by clusters; they grow with the tasks, C (C - 1)."""
    rows = []
    for base_model in ("dra", "devnet"):
        preset = {**AHLSettings.PRESETS["cpu"], "base_model": base_model, "backbone_init": "random"}
        detector = AHL(AHLSettings(**preset))
        train = random_images(60, 10, detector.image_size)
        groups = find_groups(train, False)
        bank = detector._fill_bank(train, groups, None)
        for n_clusters in (2, 3, 4, 5):
            rows.append([base_model, str(n_clusters), *seconds_of(detector, groups, bank, n_clusters)])
    header = "base model|clusters|tasks|an epoch, s|a task, s"
    text = f"{processor()}, {torch.get_num_threads()} threads\n{table(header, rows)}"
    write_bytes(Path(f"{s.out}_episodes.md"), text.encode())
    print(text)


def random_images(n_normal: int, n_known: int, side: int) -> TrainSet:
    """Noise: what an epoch costs does not depend on the images."""
    stream = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n_normal + n_known, 3, side, side), generator=stream, dtype=torch.uint8)
    targets = (torch.arange(n_normal + n_known) >= n_normal).long()
    return TrainSet(images, torch.full((len(images), 2), side), images, targets, -targets)


def seconds_of(detector: AHL, groups: Groups, bank: FeatureBank, n_clusters: int) -> list[str]:
    """Tasks, seconds of an epoch (the best of two after one to warm up), and of a task."""
    clusters = [k % n_clusters for k in range(len(groups.normals))]
    n_kinds = len(detector.settings.pseudo)
    tasks = make_tasks(clusters, groups, n_kinds, True, True, seed=0)
    learning = Collaboration(detector.settings, detector.base, tasks, bank_labels(groups, n_kinds), 0)
    taken = []
    for epoch in range(3):
        began = time.perf_counter()
        learning.run_epoch(bank, epoch)
        taken.append(time.perf_counter() - began)
    best = min(taken[1:])
    return [str(len(tasks)), f"{best:.2f}", f"{best / len(tasks):.2f}"]


if __name__ == "__main__":
    run_script(main)
