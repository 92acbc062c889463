"""Runs per hour of --vmap_seeds against one by one, for the garden or class 57 of Oxford-102.

    python benchmarks/vmap_seeds.py                          # the garden, 200 stand-ins, the CPU
    python benchmarks/vmap_seeds.py --oxford DIR --device cuda

Single and joint epochs take turns, so that a change of the clock or a job beside hits all alike; a whole run
is their median times the epochs of both phases. CPU seconds are hardly touched by other jobs. Start-up,
decoding and the test are left out: they are the same for both. On a GPU, where an epoch takes less time than
the networks take to get there, --at_once 20 times as many epochs in one go.
"""

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kka.data import build_train_set, digest_task, load_data
from kka.datasets import get_spec
from kka.datasets.garden import make_garden
from kka.datasets.task import Choice, read_task
from kka.detectors.deep_sad import DeepSAD, DeepSADSettings
from kka.detectors.deep_sad_together import Training
from kka.errors import run_script
from kka.files import write_bytes, write_json
from kka.journal import Journal
from kka.options import ExperimentSettings
from kka.run import fit
from kka.runs import git_commit, machine
from kka.settings import build_parser, make_settings, option
from kka.train_set import TrainSet

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class BenchmarkSettings:
    """Options of the benchmark."""

    oxford: str | None = option(None, "Oxford-102 in class folders; None: the garden")
    seeds: tuple[int, ...] = option((1, 4, 8, 16), "seeds at once")
    epochs: int = option(200, "epochs of each of the two phases of a whole run")
    timed: int = option(3, "times that an epoch of each phase is timed")
    at_once: int = option(1, "epochs of each phase in one timing, which is divided by them")
    device: str = option("cpu", "cpu or cuda")
    threads: int = option(2, "threads of PyTorch")
    out: str = option(str(RESULTS / "vmap_seeds"), "results without suffix: .json and .md are written")


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    s = make_settings(
        BenchmarkSettings, vars(build_parser("--vmap_seeds, timed.", BenchmarkSettings).parse_args())
    )
    torch.set_num_threads(s.threads)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as scratch:
        train = load_train_set(s, Path(scratch))
    counts = [1, *(n for n in s.seeds if n > 1)]
    seconds: dict[int, list[tuple[float, float]]] = {n: [] for n in counts}
    load = []
    for turn in range(s.timed + 1):
        for n in tqdm(counts, desc=f"turn {turn} of {s.timed}", disable=None, leave=False):
            load.append(os.getloadavg()[0])
            seconds[n].append(epoch_seconds(n, train, s))
    rows = [summarize(n, times[1:], seconds[1][1:], s.epochs) for n, times in seconds.items()]
    report = {
        "machine": machine(), "git_commit": git_commit(), "device": s.device, "threads": s.threads,
        "n_train": len(train), "at_once": s.at_once, "data": "Oxford-102, class 57" if s.oxford else "garden",
        "load_average": [min(load), statistics.median(load), max(load)], "rows": rows,
    }  # fmt: skip
    write_json(Path(f"{s.out}.json"), report, indent=2)
    write_bytes(Path(f"{s.out}.md"), to_markdown(report).encode())
    print(to_markdown(report))


def load_train_set(s: BenchmarkSettings, scratch: Path) -> TrainSet:
    """Normals and 200 anomalies."""
    choice, name, root = Choice(n_anomalies=200), "garden", scratch / "garden"
    if s.oxford:
        choice, name, root = replace(choice, normal_classes=(57,)), "flower", Path(s.oxford)
    else:
        make_garden(root)
    task = read_task(get_spec(name), root, choice)
    data = load_data(task, digest_task(task), 32, skip_bad=False, threads=0, bgr=False)
    return build_train_set(data, ExperimentSettings(), 0)[0]


def epoch_seconds(n: int, train: TrainSet, s: BenchmarkSettings) -> tuple[float, float]:
    """One epoch of pre-training and one of training, of n seeds: seconds, and those of the CPU."""
    settings = DeepSADSettings(n_epochs=s.at_once, ae_n_epochs=s.at_once)
    trainings = [Training(DeepSAD(settings, seed, s.device), train, Journal()) for seed in range(n)]
    began, cpu_began = time.perf_counter(), time.process_time()
    fit(trainings)
    if torch.device(s.device).type == "cuda":
        torch.cuda.synchronize(s.device)
    return (time.perf_counter() - began) / s.at_once, (time.process_time() - cpu_began) / s.at_once


def summarize(
    n: int, times: Sequence[tuple[float, float]], single: Sequence[tuple[float, float]], epochs: int
) -> dict[str, Any]:
    """Runs per hour and CPU seconds per run of n seeds; the ratios are those of neighbours in time."""
    wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [
        [n * a / b for a, b in zip(one, joint, strict=True)] for one, joint in zip(single, times, strict=True)
    ]
    ratio, cpu_ratio = (statistics.median(column) for column in zip(*ratios, strict=True))
    return {
        "seeds": n,
        "seconds": list(times),
        "runs_per_hour": 3600 * n / (epochs * wall),
        "ratio": ratio,
        "cpu_seconds_per_run": epochs * cpu / n,
        "cpu_ratio": cpu_ratio,
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The table, with what it was measured on."""
    low, middle, high = report["load_average"]
    where = f"{report['device']}, {report['threads']} threads, {report['machine']['cores']} cores"
    head = (
        f"Runs per hour of Deep SAD, {report['data']}, {report['n_train']} training images, paper's settings "
        f"with pre-training; {where}, GPU {report['machine']['gpu']}, commit {report['git_commit']}.\n"
        f"{report['at_once']} epochs of each phase timed, medians, extrapolated to whole runs. Load average\n"
        f"of the machine while this ran: {low:.1f} to {high:.1f}, median {middle:.1f}, of which this "
        f"benchmark is {report['threads']}, other jobs the rest.\n\n"
    )
    lines = ["| seeds at once | runs per hour | gain | CPU seconds per run | gain |", "|---|---|---|---|---|"]
    for row in report["rows"]:
        lines.append(
            f"| {row['seeds']} | {row['runs_per_hour']:.0f} | {row['ratio']:.2f} "
            f"| {row['cpu_seconds_per_run']:.0f} | {row['cpu_ratio']:.2f} |"
        )
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
