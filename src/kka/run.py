"""One seed of an experiment in its run folder: train, test, split the generated anomalies, write files."""

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kka.data import Data, add_known, build_train_set, digest_task, load_data
from kka.datasets.layout import DataSetSpec
from kka.datasets.native import Native
from kka.datasets.task import Task
from kka.detectors import DETECTORS, build_detector, detector_name
from kka.detectors.contract import Detector, DetectorSettings
from kka.detectors.deep_sad_together import Training, fit_together
from kka.detectors.frozen import FrozenSettings
from kka.detectors.pseudo_anomalies import content_of_textures
from kka.errors import UserError
from kka.files import read_json, user_path, write_json
from kka.journal import Journal
from kka.metrics import auroc
from kka.networks.backbones import content_of_weights
from kka.options import EVALUATOR, PLACE, ExperimentSettings
from kka.results import (
    MODEL_CARD,
    Scored,
    check_scores,
    digest_weights,
    load_weights,
    report,
    save_model,
    test_metrics,
    write_split,
)
from kka.runs import LOG, RESULTS, ROOT, claim, fingerprint, locked, log_to, peak_memory, write_config
from kka.seeds import derive_seed, generator
from kka.settings import make_settings
from kka.split import easy_anomalies, hard_anomalies, hardness_threshold
from kka.tracking import Tracker
from kka.train_set import TrainSet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One seed of an experiment."""

    settings: ExperimentSettings
    detector_settings: DetectorSettings
    spec: DataSetSpec
    task: Task
    device: torch.device
    weights: dict[str, Tensor] | None
    evaluator: FrozenSettings | None = None
    """of --evaluator frozen, whose run is another one"""

    @property
    def name(self) -> str:
        """The detector's."""
        return detector_name(self.detector_settings)

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """Content of its normals, generated and test images."""
        return digest_task(self.task)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the numbers, as JSON values."""
        task = self.task
        chosen = {key: value for key, value in asdict(self.settings).items() if key not in PLACE}
        if not self.evaluator:
            del chosen[EVALUATOR]  # as before there were any: runs go on
        data = [self.digests, task.normals.targets, task.test.targets, task.generated_index]
        return {
            "detector": self.name,
            **chosen,
            **asdict(self.detector_settings),
            **content_of_weights(self.detector_settings),
            **content_of_textures(self.detector_settings),
            "data": fingerprint(data),
            "load_model": digest_weights(self.weights) if self.weights else None,
        }

    @cached_property
    def folder(self) -> Path:
        """The run folder; several seeds of one experiment share a parent."""
        s = self.settings
        if s.xp_path is not None:
            folder = user_path(s.xp_path)
        else:
            folder = ROOT / "log" / self.spec.name / (s.name or self._default_name())
        return folder / f"seed_{s.seed}" if s.runs > 1 else folder

    def _default_name(self) -> str:
        several = self.settings.runs > 1
        normal = "_".join(dict.fromkeys(self.task.normals.classes))
        same = {k: v for k, v in self.identity.items() if not (several and k in ("seed", "data"))}
        seeds = f"runs{self.settings.runs}" if several else f"seed{self.settings.seed}"
        mode = "_iterate" if self.settings.iterate else ""
        n_anomalies = len(self.task.generated)
        return f"{self.name}_{normal}_anomalies{n_anomalies}{mode}_{seeds}_{fingerprint(same)[:6]}"

    def execute(self) -> dict[str, Any]:
        """Train, test and write the run folder; a finished run is read, an interrupted one continued."""
        return execute([self])[0]

    def begin(self) -> bool:
        """Make the (locked) folder its own; False if the run has finished there."""
        if claim(self.folder, self.identity, self.settings.overwrite):
            log.info("%s is finished; src/main.py --overwrite repeats it", self.folder)
            return False
        own = {"detector": self.name, **asdict(self.detector_settings)}
        if self.evaluator:
            own |= {f"{EVALUATOR}_{key}": value for key, value in asdict(self.evaluator).items()}
        alone = {"runs": 1, "vmap_seeds": 1, "each_class": False}
        settings = {**asdict(self.settings), **alone, **own}
        write_config(self.folder, self.identity, settings)
        return True

    def train_and_test(self, began: float) -> Iterator[Training]:
        """Yield what has to be trained, each time going on when it is, and at last write every file.

        `began` is when this start of the run did, by time.monotonic().
        """
        s, detector = self.settings, self._new_detector()
        size, threads = detector.image_size, s.n_jobs_dataloader
        reading = (s.skip_bad_images, threads, s.bgr, s.match_generated)
        data = load_data(self.task, self.digests, size, *reading)
        train, heldout = build_train_set(data, s, s.seed)
        self._announce(data, train)
        targets, journal = data.task.test.targets, self._journal(self.folder, began)
        yield Training(
            detector, train, journal, lambda score: auroc(targets, score(data.test.resized).numpy())
        )
        tested = time.monotonic()
        test_scores = detector.score(data.test.resized)
        times = {"train_time": journal.seconds("train"), "test_time": time.monotonic() - tested}
        cost = {**times, "n_test": len(targets), "peak_mib": peak_memory()}
        normals = threshold_images(s.threshold_from, data, train, heldout)
        check_scores(self.name, test_scores, detector.score(normals))
        split = yield from self._split(detector, data, train, normals, journal)
        results = {"seconds": journal.elapsed, **cost, **test_metrics(targets, test_scores), **split.counts()}
        results |= {"n_skipped": data.n_skipped, "seed": s.seed}
        self._write(detector, journal, split, results, data.native)

    def _split(
        self, detector: Detector, data: Data, train: TrainSet, normals: Tensor, journal: Journal
    ) -> Generator[Training, None, Scored]:
        """Eq. (6) over the generated images, by the detector itself or by cross-fit."""
        s = self.settings

        def threshold_of(judge: Detector) -> float:
            return hardness_threshold(judge.score(normals).numpy(), s.threshold_quantile, s.hard_margin)

        n = len(data.task.generated)
        scores, thresholds = np.zeros(n), np.full(n, threshold_of(detector))
        if n and (s.split == "own" or self.evaluator):  # an evaluator's split is in its own run
            scores = detector.score(data.generated.resized).double().numpy()
        elif n:
            for fold, (rows, training) in enumerate(self._crossfit(data, train)):
                yield training
                journal.earlier += training.journal.earlier
                judge = training.detector
                log.info("cross-fit %d judges %d generated anomalies", fold, len(rows))
                scores[rows] = judge.score(data.generated.resized[rows])
                thresholds[rows] = threshold_of(judge)
        hard = hard_anomalies(scores, thresholds, s.hard_inclusive)
        easy = easy_anomalies(scores, hard, s.easy_top_k)
        task = data.task
        return Scored(
            task.generated_index, task.generated.captions, scores, hard, easy, threshold_of(detector)
        )

    def _crossfit(self, data: Data, train: TrainSet) -> Iterator[tuple[np.ndarray, Training]]:
        """Two detectors to train, each trained without the half of the generated anomalies that it judges.

        Every training anomaly counts here as labelled, whatever the ratios say.
        """
        order = torch.randperm(len(data.task.generated), generator=generator(self.settings.seed, "crossfit"))
        normals = torch.nonzero(train.targets == 0).squeeze(1)
        for fold, rows in enumerate(order.chunk(2)):
            others = torch.from_numpy(np.setdiff1d(order.numpy(), rows.numpy()))
            g = data.generated
            part = train.take(normals).append_anomalies(
                g.images[others], g.native_sizes[others], g.resized[others]
            )
            part, judge = add_known(part, data), self._new_detector(fold + 1)
            folder = self.folder / f"crossfit_{fold}"
            folder.mkdir(exist_ok=True)
            yield rows.numpy(), Training(judge, part, self._journal(folder))

    def _new_detector(self, fold: int = 0) -> Detector:
        seed = derive_seed(self.settings.seed, "fold", fold)
        detector = build_detector(self.detector_settings, seed, self.device)
        if self.weights is not None:
            detector.load_state_dict(self.weights)
        return detector

    def _journal(self, folder: Path, began: float | None = None) -> Journal:
        s = self.settings
        tracker = Tracker(folder, s.report_to, self.identity)
        return Journal(folder, s.checkpoint_every, fingerprint(self.identity), tracker, began)

    def _announce(self, data: Data, train: TrainSet) -> None:
        semi, task = train.semi_targets, data.task
        log.info("run folder %s, seed %d, %s", self.folder, self.settings.seed, self.device)
        log.info(
            "%s: %d training images (%d normals, %d generated and %d known anomalies; %d labelled anomalies, "
            "%d labelled normals, %d unlabelled), %d test images (%d normal)",
            self.spec.title, len(train), int((train.targets == 0).sum()),
            int((train.targets == 1).sum()) - len(task.known), len(task.known),
            int((semi == -1).sum()), int((semi == 1).sum()), int((semi == 0).sum()),
            len(task.test), task.test.targets.count(0),
        )  # fmt: skip

    def _write(
        self,
        detector: Detector,
        journal: Journal,
        split: Scored,
        results: dict[str, Any],
        native: Native | None,
    ) -> None:
        """Write every file of the run folder; results.json last, because it marks the run as finished."""
        write_split(self.folder, split)
        state = detector.state_dict()
        card = {
            "detector": self.name,
            "settings": asdict(self.detector_settings),
            "image_size": detector.image_size,
            "threshold": split.threshold,
            **({"center": state["center"].tolist()} if "center" in state else {}),
            "native": asdict(native) if native else None,
            "channels": "BGR" if self.settings.bgr else "RGB",
        }
        save_model(self.folder, state, card)
        losses, aucs = journal.series("train", "loss"), journal.series("train", "test_auc")
        write_json(self.folder / "epoch_results.json", {"train_losses": losses, "test_aucs": aucs})
        if journal.seconds("pretrain"):
            seconds, losses = journal.seconds("pretrain"), journal.series("pretrain", "loss")
            pretraining = {"train_time": seconds, "train_losses": losses, **journal.facts.get("ae", {})}
            write_json(self.folder / "ae_results.json", pretraining)
        write_json(self.folder / RESULTS, results)
        for pattern in ("checkpoint*.pt", ".*.tmp"):  # nothing is left to resume, nor by a killed process
            for left in self.folder.rglob(pattern):
                left.unlink()
        report(results)


def execute(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Train, test and write the folders of runs, several of them together; the results.

    Finished runs are read, interrupted ones continued.
    """
    began = time.monotonic()
    with ExitStack() as locks:
        for run in runs:
            locks.enter_context(locked(run.folder))
        unfinished = [run for run in runs if run.begin()]
        torch.set_flush_denormal(True)  # denormal numbers slow a CPU many times
        steps = [run.train_and_test(began) for run in unfinished]
        while trainings := _next_trainings(unfinished, steps):
            with ExitStack() as logs:
                for run in unfinished:
                    logs.enter_context(log_to(run.folder / LOG))
                fit(trainings)
        return [read_json(run.folder / RESULTS) for run in runs]


def _next_trainings(runs: Sequence[Run], steps: Sequence[Iterator[Training]]) -> list[Training]:
    """Take each run to its next training; none if they are written."""
    trainings = []
    for run, step in zip(runs, steps, strict=True):
        with log_to(run.folder / LOG):
            trainings += [*islice(step, 1)]
    return trainings


def fit(trainings: Sequence[Training]) -> None:
    """Train each detector; together those whose sets have equally many images in equal working size."""
    alike: dict[torch.Size, list[Training]] = {}
    for each in trainings:
        alike.setdefault(each.train.images.shape, []).append(each)
    for group in alike.values():
        if len(group) > 1:
            fit_together(group)
        else:
            (one,) = group
            one.detector.fit(one.train, one.journal, one.evaluate)
    for each in trainings:
        each.journal.close()


def load_detector(run: Path, device: torch.device) -> Detector:
    """The trained detector of a finished run."""
    card = read_json(run / MODEL_CARD)
    settings = make_settings(DETECTORS[card["detector"]][0], card["settings"])
    detector = build_detector(settings, device=device)
    detector.load_state_dict(load_weights(run, flag=""))
    return detector


def load_native(run: Path) -> Native | None:
    """What a finished run made its generated images like; None if they stayed as they were."""
    native = read_json(run / MODEL_CARD)["native"]
    if native is None:
        return None
    tables = tuple(tuple(table) for table in native["jpeg_tables"])
    return Native(native["short_side"], tables, native["jpeg_sampling"])


def threshold_images(source: str, data: Data, train: TrainSet, heldout: Tensor) -> Tensor:
    """The normal images whose scores make the threshold of Eq. (6), (N, 3, H, W) uint8.

    Of the training set all that count as normal: anomalies among them by --ratio_pollution are not known.
    """
    if source == "heldout":
        return data.normals.resized[heldout]
    if source == "train":
        return train.resized[train.semi_targets >= 0]
    normal = torch.tensor(data.task.test.targets) == 0
    if not normal.any():
        raise UserError("--threshold_from test needs normal test images, the test set has none")
    return data.test.resized[normal]
