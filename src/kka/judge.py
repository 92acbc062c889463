"""Fresh images before a trained evaluator, and what comes of them: Eq. (6), then Eq. (8)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kka.anomalies import MANIFEST, live, read_items, record_split
from kka.datasets import get_spec
from kka.datasets.layout import DataSetSpec
from kka.datasets.task import read_anomalies
from kka.errors import UserError
from kka.evaluator import judging_run
from kka.experiment import find_device
from kka.files import read_json, user_path
from kka.results import EASY, HARD, MODEL_CARD, Scored, read_rows, write_split
from kka.run import load_detector
from kka.runs import CONFIG, RESULTS
from kka.seeds import derive_seed
from kka.settings import option
from kka.split import easy_anomalies, hard_anomalies
from kka.trained import open_run, views
from kka.update import MODES, PER_ROUND, Updated, update


@dataclass(frozen=True)
class UpdateSettings:
    """The next anomaly set (Eq. 8)."""

    dataset_name: str | None = option(None, "data set whose anomalies they are; None: that of --run")
    run: str | None = option(None, "run folder of the evaluator, trained on the current set")
    anomaly_path: str | None = option(None, "the current set, which that run split into hard and easy")
    fresh: str | None = option(None, "new images, of captions by the tuned LLM")
    out: str | None = option(None, "folder of the next set")
    split: str = option(
        "run",
        "who judged the current set: the run, or fresh: it keeps what its manifest says of each image",
        ("run", "fresh"),
    )
    mode: str = option("rep", "rep: hard anomalies replace easy ones; add: they are added", MODES)
    per_round: int = option(PER_ROUND, "hard ones of the new images, at most, that come into the set")
    round: int = option(1, "round of Algorithm 1, for the record")
    seed: int = option(0, "of the choice of those that leave and enter")
    device: str = option("cpu", "cpu, cuda or cuda:N")


def update_anomalies(settings: UpdateSettings) -> tuple[Updated, float]:
    """Judge the fresh images by the run's detector and write the next set; raises UserError for bad input.

    Returns what changed, and the share of hard ones among the fresh images.
    """
    s = settings
    for name in ("run", "anomaly_path", "fresh", "out"):
        if not getattr(s, name):
            raise UserError(f"--{name} DIR is needed; see --help")
    run, current, fresh, out = (
        user_path(place) for place in (s.run, s.anomaly_path, s.fresh, s.out) if place
    )
    if fresh.resolve() == current.resolve():
        raise UserError(f"--fresh {fresh} is the current set; give the folder of the new images")
    run = judging_run(run)
    if not (run / RESULTS).exists():
        raise UserError(f"--run {run} is no finished run; train it with src/main.py")
    spec, device = _spec_of(run, s.dataset_name), find_device(s.device, strict=False)
    for name, folder in (("anomaly_path", current), ("fresh", fresh)):
        if not live(read_items(folder)):
            raise UserError(
                f"--{name} {folder} has no images in a {MANIFEST}; give a folder of create/create_image.py"
            )
    open_run(run, device, "--run")  # a damaged one is refused before the current set is changed
    if s.split == "run":
        record_split(current, read_split(run))
    share = judge_folder(run, fresh, spec, device)
    rng = np.random.default_rng(derive_seed(s.seed, "update", s.round))
    return update(current, fresh, out, spec, s.mode, s.round, rng, s.per_round), share


def run_settings(run: Path) -> dict[str, Any]:
    """What a run of src/main.py was asked for; raises UserError if its config.json does not say it."""
    config = read_json(run / CONFIG)
    settings = config.get("settings") if isinstance(config, dict) else None
    if not isinstance(settings, dict) or not {"dataset_name", "hard_inclusive"} <= settings.keys():
        raise UserError(f"{run / CONFIG} is not from a run of src/main.py; give another one with --run")
    return settings


def _spec_of(run: Path, name: str | None) -> DataSetSpec:
    """The run's data set; raises UserError if another one was named."""
    spec = get_spec(run_settings(run)["dataset_name"])
    if name is not None and get_spec(name) != spec:
        raise UserError(f"--dataset_name {name}: the run {run} is of {spec.title}; leave the flag out")
    return spec


def judge_folder(run: Path, folder: Path, spec: DataSetSpec, device: torch.device) -> float:
    """Score a folder's images by a trained detector and record in its manifest which are hard, Eq. (6).

    The detector must not have seen them. Returns the share of hard ones.
    """
    detector, card = load_detector(run, device), read_json(run / MODEL_CARD)
    images = read_anomalies(folder, spec)
    scores = detector.score(views(run, detector, images, "fresh anomalies")).double().numpy()
    hard = hard_anomalies(scores, card["threshold"], run_settings(run)["hard_inclusive"])
    index = tuple(range(len(images)))
    easy = easy_anomalies(scores, hard)
    record_split(folder, Scored(index, images.captions, scores, hard, easy, card["threshold"]))
    return float(hard.mean())


def hard_share(folder: Path) -> float:
    """Share of hard anomalies in a folder, by the last judgement in its manifest."""
    items = live(read_items(folder))
    return sum(item.status == "hard" for item in items) / len(items)


def write_recorded_split(folder: Path, out: Path) -> None:
    """Write what the manifest of a set says of its images as a run writes its split, for the pairs of DPO."""
    items = live(read_items(folder))
    hard = np.array([item.status == "hard" for item in items])
    scores = np.array([item.score for item in items], dtype=float)
    captions = tuple((item.caption,) for item in items)
    out.mkdir(exist_ok=True)
    easy = easy_anomalies(scores, hard)
    write_split(out, Scored(tuple(range(len(items))), captions, scores, hard, easy, float("nan")))


def read_split(run: Path) -> Scored:
    """The split of a finished run, from its d_samples.json and e_samples.json.

    With --easy_top_k an image may be in both; it is hard then.
    """
    by_index = {row[0]: (row, False) for row in read_rows(run / EASY)}
    by_index |= {row[0]: (row, True) for row in read_rows(run / HARD)}
    index = sorted(by_index)
    is_hard = np.array([by_index[i][1] for i in index], dtype=bool)
    rows = [by_index[i][0] for i in index]
    return Scored(
        tuple(index),
        tuple(tuple(texts) for _, _, texts in rows),
        np.array([score for _, score, _ in rows]),
        is_hard,
        np.flatnonzero(~is_hard),
        read_json(run / MODEL_CARD)["threshold"],
    )
