"""Fresh images before a trained evaluator, and what comes of them: Eq. (6), then Eq. (8)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kka.anomalies import MANIFEST, MODES, PER_ROUND, Updated, live, read_items, record_split, update
from kka.datasets import get_spec
from kka.datasets.layout import DataSetSpec
from kka.datasets.task import read_anomalies
from kka.errors import UserError
from kka.experiment import find_device
from kka.files import read_json
from kka.results import EASY, HARD, MODEL_CARD, Scored, read_rows
from kka.run import load_detector
from kka.runs import RESULTS
from kka.seeds import derive_seed
from kka.settings import option
from kka.split import easy_anomalies, hard_anomalies
from kka.trained import open_run, views


@dataclass(frozen=True)
class UpdateSettings:
    """The next anomaly set (Eq. 8)."""

    dataset_name: str = option("flower", "data set whose anomalies they are")
    run: str | None = option(None, "run folder of the evaluator, trained on the current set")
    anomaly_path: str | None = option(None, "the current set, which that run split into hard and easy")
    fresh: str | None = option(None, "new images, of captions by the tuned LLM")
    out: str | None = option(None, "folder of the next set")
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
        Path(place).expanduser() for place in (s.run, s.anomaly_path, s.fresh, s.out) if place
    )
    if not (run / RESULTS).exists():
        raise UserError(f"--run {run} is no finished run; train it with src/main.py")
    spec, device = get_spec(s.dataset_name), find_device(s.device, strict=False)
    for name, folder in (("anomaly_path", current), ("fresh", fresh)):
        if not live(read_items(folder)):
            raise UserError(
                f"--{name} {folder} has no images in a {MANIFEST}; give a folder of create/create_image.py"
            )
    open_run(run, device, "--run")  # a damaged one is refused before the current set is changed
    record_split(current, read_split(run))
    share = judge_folder(run, fresh, spec, device)
    rng = np.random.default_rng(derive_seed(s.seed, "update", s.round))
    return update(current, fresh, out, spec, s.mode, s.round, rng, s.per_round), share


def judge_folder(run: Path, folder: Path, spec: DataSetSpec, device: torch.device) -> float:
    """Score a folder's images by a trained detector and record in its manifest which are hard, Eq. (6).

    The detector must not have seen them. Returns the share of hard ones.
    """
    detector, card = load_detector(run, device), read_json(run / MODEL_CARD)
    images = read_anomalies(folder, spec)
    scores = detector.score(views(run, detector, images, "fresh anomalies")).double().numpy()
    hard = hard_anomalies(scores, card["threshold"])
    index = tuple(range(len(images)))
    easy = easy_anomalies(scores, hard)
    record_split(folder, Scored(index, images.captions, scores, hard, easy, card["threshold"]))
    return float(hard.mean())


def hard_share(folder: Path) -> float:
    """Share of hard anomalies in a folder, by the last judgement in its manifest."""
    items = live(read_items(folder))
    return sum(item.status == "hard" for item in items) / len(items)


def read_split(run: Path) -> Scored:
    """The split of a finished run, from its d_samples.json and e_samples.json."""
    hard, easy = read_rows(run / HARD), read_rows(run / EASY)
    rows = [(*row, True) for row in hard] + [(*row, False) for row in easy]
    rows.sort(key=lambda row: row[0])
    is_hard = np.array([row[3] for row in rows], dtype=bool)
    return Scored(
        tuple(row[0] for row in rows),
        tuple(tuple(row[2]) for row in rows),
        np.array([row[1] for row in rows]),
        is_hard,
        np.flatnonzero(~is_hard),
        read_json(run / MODEL_CARD)["threshold"],
    )
