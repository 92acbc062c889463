"""Speed of Deep SAD: a step against a bare step, whole runs against the plain way of the official code.

    python benchmarks/deep_sad.py --oxford DIR --ucm DIR --cifar DIR   # what is not given is left out
    python benchmarks/deep_sad.py                                      # the garden only

The plain way (plain.py) decodes every image at every epoch, uses a DataLoader, torchvision's transforms and
the official form of the networks, and scores the test set after every training epoch. Some evenly spaced
epochs of it are timed and their mean multiplied. One thing runs at a time.
"""

import logging
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from memory import peak_memory
from plain import PlainWay, enlarge
from tqdm import tqdm

from kka.augment import augment, normalize
from kka.data import Data, build_train_set, digest_task, load_data
from kka.datasets import get_spec
from kka.datasets.garden import make_garden
from kka.datasets.task import Choice, read_task
from kka.detectors.deep_sad import DeepSAD, DeepSADSettings, deep_sad_loss, make_optimizer
from kka.detectors.parts import gradient_step
from kka.errors import run_script
from kka.files import write_bytes, write_json
from kka.journal import Journal
from kka.options import ExperimentSettings
from kka.runs import git_commit, machine
from kka.seeds import generator
from kka.settings import build_parser, make_settings, option
from kka.train_set import TrainSet

RESULTS = Path(__file__).parent / "results"
FULL_SIZE = 500  # px, shorter side of the enlarged JPEGs


@dataclass(frozen=True)
class BenchmarkSettings:
    """Options of the benchmark."""

    oxford: str | None = option(None, "Oxford-102 in class folders")
    ucm: str | None = option(None, "UCM-Caption in class folders")
    cifar: str | None = option(None, "CIFAR-100 in class folders")
    normal_class: int = option(57, "normal class of Oxford-102")
    n_anomalies: int = option(200, "generated anomalies of the Oxford-102 and garden runs")
    epochs: int = option(200, "epochs of each of the two phases of a whole run")
    plain_epochs: int = option(5, "evenly spaced epochs of each phase that are timed the plain way")
    steps: int = option(60, "steps timed for (a)")
    out: str = option(str(RESULTS / "deep_sad"), "results without suffix: .json and .md are written")


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    settings = make_settings(
        BenchmarkSettings, vars(build_parser("Deep SAD, timed.", BenchmarkSettings).parse_args())
    )
    os.environ["KKA_CACHE"] = "off"  # decoding is part of what is timed
    torch.set_flush_denormal(True)
    report: dict[str, Any] = {"machine": {**machine(), "processor": processor()}, "git_commit": git_commit()}
    with tempfile.TemporaryDirectory() as scratch:
        report["runs"] = [time_run(*run, settings) for run in planned_runs(settings, Path(scratch))]
        report["steps"] = time_steps(settings, Path(scratch))
        report["memory"] = measure_memory(settings, Path(scratch))
    write_json(Path(f"{settings.out}.json"), report, indent=2)
    write_bytes(Path(f"{settings.out}.md"), to_markdown(report).encode())
    print(to_markdown(report))


def processor() -> str:
    """Name of the processor, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def garden_folder(scratch: Path) -> Path:
    make_garden(scratch / "garden")
    return scratch / "garden"


def planned_runs(s: BenchmarkSettings, scratch: Path) -> list[tuple[str, str, Path, Choice]]:
    """(title, data set, folder, choice) of each whole run."""
    some, none = Choice(n_anomalies=s.n_anomalies), Choice(n_anomalies=0)
    if s.oxford is None:
        root = garden_folder(scratch)
        return [("garden", "garden", root, some), ("garden, no anomalies", "garden", root, none)]
    normal = (s.normal_class,)
    some, none = replace(some, normal_classes=normal), replace(none, normal_classes=normal)
    original = Path(s.oxford)
    large = enlarge(original, scratch / "large", FULL_SIZE)
    title = f"Oxford-102 class {s.normal_class}"
    return [
        (f"{title}, {s.n_anomalies} anomalies", "flower", original, some),
        (f"{title}, no anomalies", "flower", original, none),
        (f"{title}, {s.n_anomalies} anomalies, {FULL_SIZE} px JPEGs", "flower", large, some),
        (f"{title}, no anomalies, {FULL_SIZE} px JPEGs", "flower", large, none),
    ]


def time_run(title: str, name: str, root: Path, choice: Choice, s: BenchmarkSettings) -> dict[str, Any]:
    """(b) one run split into decode, pre-train, train, test, and (c) the same the plain way, in seconds."""
    tqdm.write(f"(b) {title}")
    began = time.perf_counter()
    data = load(name, root, choice)
    train = build_train_set(data, ExperimentSettings(), 0)[0]
    decoded = time.perf_counter()
    detector, journal = DeepSAD(DeepSADSettings(n_epochs=s.epochs, ae_n_epochs=s.epochs)), Journal()
    detector.fit(train, journal)
    trained = time.perf_counter()
    detector.score(data.test.resized)
    ours = {
        "decode": decoded - began,
        "pretrain": journal.seconds("pretrain"),
        "train": journal.seconds("train"),
        "test": time.perf_counter() - trained,
    }
    tqdm.write(f"(c) {title}, the plain way")
    # Whether denormals are flushed belongs to a thread, and threads stay: the plain way gets new ones.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        plain = fresh.submit(time_plain, name, root, choice, s).result()
    counts = {"n_train": len(train), "n_test": len(data.task.test)}
    ratio = sum(plain.values()) / sum(ours.values())
    return {"title": title, **counts, "ours": ours, "plain": plain, "ratio": ratio}


def time_plain(name: str, root: Path, choice: Choice, s: BenchmarkSettings) -> dict[str, float]:
    """(c) of one run, in seconds."""
    data = load(name, root, choice)
    return PlainWay(data.task, build_train_set(data, ExperimentSettings(), 0)[0]).time(
        s.plain_epochs, s.epochs
    )


def load(name: str, root: Path, choice: Choice) -> Data:
    task = read_task(get_spec(name), root, choice)
    return load_data(task, digest_task(task), 32, skip_bad=False, threads=0, bgr=False)


def time_steps(s: BenchmarkSettings, scratch: Path) -> list[dict[str, Any]]:
    """(a) and (d): one training step with everything, against a bare one on resident tensors."""
    sets = [("Oxford-102", "flower", s.oxford), ("CIFAR-100", "cifar100", s.cifar)]
    chosen = [(title, name, Path(root)) for title, name, root in sets if root is not None]
    if not chosen:
        chosen = [("garden", "garden", garden_folder(scratch))]
    return [time_step(title, name, root, s.steps) for title, name, root in chosen]


def time_step(title: str, name: str, root: Path, steps: int) -> dict[str, Any]:
    """Median milliseconds; the variants take turns, so that a change of the clock hits all alike."""
    tqdm.write(f"(a) {title}")
    train = build_train_set(load(name, root, Choice()), ExperimentSettings(), 0)[0]
    variants = {
        "bare": bare_step(train, torch.channels_last),
        "bare, contiguous": bare_step(train, torch.contiguous_format),
        "ours": our_step(train, torch.float32),
        "ours, bfloat16 autocast": our_step(train, torch.bfloat16),
        "autoencoder, ours": autoencoder_step(train),
    }
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in tqdm(range(steps), desc="steps", disable=None, leave=False):
        for variant, step in variants.items():
            began = time.perf_counter()
            step()
            times[variant].append(1000 * (time.perf_counter() - began))
    medians = {variant: statistics.median(values[5:]) for variant, values in times.items()}
    per_epoch = -(-len(train) // 32)
    return {
        "title": title,
        "milliseconds": medians,
        "ratio": medians["ours"] / medians["bare"],
        "steps": per_epoch,
    }


def bare_step(train: TrainSet, layout: torch.memory_format) -> Callable[[], object]:
    """Forward, backward and Adam on a resident batch."""
    model = DeepSAD(DeepSADSettings()).model.to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = make_optimizer("adam", model, 1e-4, 0.5e-6)
    images, semi = (
        normalize(train.resized[:32].float() / 255).contiguous(memory_format=layout),
        train.semi_targets[:32],
    )
    return lambda: gradient_step(deep_sad_loss(model(images), semi).mean(), [optimizer], "benchmark")


def our_step(train: TrainSet, dtype: torch.dtype) -> Callable[[], object]:
    """The same as the detector trains: a new batch, cut out, jittered, normalised."""
    model = DeepSAD(DeepSADSettings()).model
    optimizer, stream = make_optimizer("adam", model, 1e-4, 0.5e-6), generator(0, "benchmark")

    def step() -> None:
        batch = torch.randint(len(train), (32,), generator=stream)
        images = normalize(augment(train.images[batch], train.native_sizes[batch], 32, stream))
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            distances = model(images)
        gradient_step(
            deep_sad_loss(distances.float(), train.semi_targets[batch]).mean(), [optimizer], "benchmark"
        )

    return step


def autoencoder_step(train: TrainSet) -> Callable[[], object]:
    """One step of the pre-training as the detector does it."""
    model = DeepSAD(DeepSADSettings()).autoencoder
    optimizer, stream = make_optimizer("adam", model, 1e-4, 0.5e-3), generator(0, "benchmark")

    def step() -> None:
        batch = torch.randint(len(train), (32,), generator=stream)
        images = augment(train.images[batch], train.native_sizes[batch], 32, stream)
        inputs = normalize(images).contiguous(memory_format=torch.channels_last)
        gradient_step(torch.nn.functional.mse_loss(model(inputs), images), [optimizer], "benchmark")

    return step


def measure_memory(s: BenchmarkSettings, scratch: Path) -> dict[str, float]:
    """Peak resident memory of main.py on each data set, GiB."""
    sets = [("flower", s.oxford), ("ucm_caption", s.ucm), ("cifar100", s.cifar)]
    chosen = [(name, Path(root)) for name, root in sets if root is not None]
    chosen = chosen or [("garden", garden_folder(scratch))]
    return {name: peak_memory(name, root, scratch / f"memory_{name}") for name, root in chosen}


def to_markdown(report: dict[str, Any]) -> str:
    """Tables for the README."""
    where, commit = report["machine"], report["git_commit"]
    steps, runs = [], []
    for row in report["steps"]:
        bare, contiguous, ours, bf16, autoencoder = (f"{x:.1f}" for x in row["milliseconds"].values())
        steps.append([row["title"], bare, contiguous, ours, f"{row['ratio']:.2f}", bf16, autoencoder])
    for row in report["runs"]:
        ours, plain = sum(row["ours"].values()), sum(row["plain"].values())
        images, parts = f"{row['n_train']} + {row['n_test']}", [f"{x:.1f}" for x in row["ours"].values()]
        runs.append([row["title"], images, *parts, f"{ours:.0f}", f"{plain:.0f}", f"{row['ratio']:.1f}"])
    memory = [[name, f"{value:.2f}"] for name, value in report["memory"].items()]
    return "\n".join([
        f"{where['processor']}, {where['threads']} threads, commit {commit}",
        table("one step of 32 images, ms|bare|bare, contiguous|ours|ours / bare|bfloat16|autoencoder", steps),
        table("whole run, s|images|decode|pre-train|train|test|all|plain way|ratio", runs),
        table("peak memory of main.py|GiB", memory),
    ])  # fmt: skip


def table(header: str, rows: list[list[str]]) -> str:
    """A markdown table; the header's cells are divided by |."""
    lines = [header.split("|"), ["---"] * (header.count("|") + 1), *rows]
    return "\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


if __name__ == "__main__":
    run_script(main)
