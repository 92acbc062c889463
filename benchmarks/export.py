"""Images per second of one core: Deep SAD as PyTorch runs it, exported by torch.export, and in ONNX Runtime.

    python benchmarks/export.py                      # needs the extra onnx
    python benchmarks/export.py --net_name resnet18 --net_size 224

All three take uint8 images of the network's own size and give scores; weights are random, which costs the
same. They take turns, so that a change of the clock hits all alike; the median of the rounds counts.
"""

import logging
import os
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deep_sad import processor, table
from tqdm import tqdm

from kka.detectors.deep_sad import DeepSAD, DeepSADSettings
from kka.errors import run_script
from kka.export import FORMATS, Scoring, import_onnxruntime, trace
from kka.files import write_bytes, write_json
from kka.runs import git_commit, machine
from kka.settings import build_parser, make_settings, option
from kka.trained import Trained

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 32)


@dataclass(frozen=True)
class BenchmarkSettings:
    """Options of the benchmark."""

    net_name: str = option("cifar10_LeNet", "Deep SAD's network")
    net_size: int = option(224, "side of the images for a network of torchvision")
    rounds: int = option(30, "times that each is measured")
    out: str = option(str(RESULTS / "export"), "results without suffix: .json and .md are written")


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser = build_parser("Exported Deep SAD, timed.", BenchmarkSettings)
    s = make_settings(BenchmarkSettings, vars(parser.parse_args()))
    import_onnxruntime()
    torch.set_num_threads(1)
    load = [os.getloadavg()[0]]
    where = {**machine(), "processor": processor(), "git_commit": git_commit()}
    ways = make_ways(s)
    rows = [time_batch(ways, n, s) for n in BATCHES]
    report = {
        **where,
        "load": [*load, os.getloadavg()[0]],
        "net_name": s.net_name,
        "images_per_s": rows,
    }
    write_json(Path(f"{s.out}.json"), report, indent=1)
    write_bytes(Path(f"{s.out}.md"), to_markdown(report).encode())
    print(to_markdown(report))


def make_ways(s: BenchmarkSettings) -> dict[str, Scoring]:
    """The detector itself, and both exports of it."""
    detector = DeepSAD(DeepSADSettings(s.net_name, s.net_size))
    trained = Trained(Path(), "deep_sad", detector, 1.0, bgr=False, native=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about itself
        program = trace(trained, 1.0)
        to_pt2, from_pt2 = FORMATS[".pt2"]
        exported = from_pt2(to_pt2(program))
        data = FORMATS[".onnx"][0](program)
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return {
        "PyTorch": lambda images: (detector.score(images), images),
        "torch.export": exported,
        "ONNX Runtime": lambda images: session.run(None, {"images": images.numpy()}),
    }


@torch.no_grad()
def time_batch(ways: dict[str, Scoring], n: int, s: BenchmarkSettings) -> dict[str, Any]:
    """Images per CPU second of each way at batches of n: from the median of the rounds."""
    side = DeepSAD(DeepSADSettings(s.net_name, s.net_size)).image_size
    images = torch.randint(256, (n, 3, side, side), dtype=torch.uint8)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(s.rounds), desc=f"batches of {n}", disable=None, leave=False):
        for name, score in ways.items():
            score(images)  # warm
            began = time.process_time()  # other jobs on the machine do not count
            score(images)
            seconds[name].append(time.process_time() - began)
    return {"batch": n, **{name: n / statistics.median(values) for name, values in seconds.items()}}


def to_markdown(report: dict[str, Any]) -> str:
    """A table, and where it was measured."""
    first, last = report["load"]
    names = [name for name in report["images_per_s"][0] if name != "batch"]
    rows = [[str(row["batch"]), *(f"{row[name]:.0f}" for name in names)] for row in report["images_per_s"]]
    return (
        f"Deep SAD, {report['net_name']}; {report['processor']}, {report['cores']} cores, "
        f"one thread, commit {report['git_commit']}. CPU time of the process; the load of the machine was "
        f"{first:.1f} to {last:.1f}: above 1 other jobs ran beside it, which also costs cache\n"
        + table(f"images per CPU second, batches of|{'|'.join(names)}", rows)
    )


if __name__ == "__main__":
    run_script(main)
