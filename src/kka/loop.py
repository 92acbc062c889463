"""The steps of Algorithm 1 on files: every step is what one of the scripts does, and none is done twice.

A killed loop that is started again skips what is finished and continues inside the step that was not.
"""

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kka.anomalies import MODES, PER_ROUND, live, read_items, record_split, update
from kka.datasets.images import content_digest, decode
from kka.datasets.layout import NAME_LIST, DataSetSpec, Images
from kka.datasets.task import Choice, read_anomalies, read_task
from kka.describe import choose_examples, describe, normal_test
from kka.detectors.deep_sad import DeepSADSettings
from kka.draw import draw_captions, read_captions
from kka.drawers import DrawerSettings, build_drawer
from kka.errors import UserError
from kka.files import read_json, write_json
from kka.language_models import LanguageModelSettings, load_language_model
from kka.options import ExperimentSettings
from kka.pairs import NothingToPreferError, PairSettings, build_pairs
from kka.preference_trainer import TuneSettings
from kka.prompts import generation_prompt
from kka.represent import select_representatives
from kka.results import Scored
from kka.run import Run, load_detector
from kka.seeds import derive_seed
from kka.settings import option
from kka.split import easy_anomalies, hard_anomalies
from kka.tune import tune

TUNED = Path("tuning") / "results.json"  # in the folder of a finished adapter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopSettings:
    """Algorithm 1."""

    dataset_name: str = option("flower", "flower, cifar100 (mycifar), ucm_caption, folder or garden")
    data_path: str | None = option(None, "folder of the data set; None: data/<name>, made if it can be")
    xp_path: str | None = option(None, "folder of the loop; None: log/<data set>/<name>")
    name: str | None = option(None, "its name in log/<data set>; None: made from the settings")
    overwrite: bool = option(False, "replace a loop of other settings in the same folder")
    normal_class: tuple[int, ...] = option((), "folders taken as normal; none: the data set's own")
    mode: str = option("rep", "rep: hard anomalies replace easy ones; add: they are added", MODES)
    rounds: int | None = option(None, "updates; None: 3 for CIFAR-100, else 2 (paper)")
    n_initial: int | None = option(None, "anomalies of round 0; None: 1,000 for CIFAR-100, else 200 (paper)")
    n_fresh: int = option(200, "captions that the tuned LLM writes in each later round")
    per_round: int = option(PER_ROUND, "hard ones of these, at most, that come into the set")
    examples: str = option(
        "representatives", "captions shown to the LLM: of Eq. (2), or random", ("representatives", "random")
    )
    n_clusters: int | None = option(None, "K of Eq. (2); None: number of normal folders")
    split: str = option("crossfit", "who judges the set in Eq. (6), see main.py", ("own", "crossfit"))
    draw_batch: int = option(8, "images drawn at once")
    seed: int = option(0, "of every random draw")
    device: str = option("cuda", "of the detector; without a GPU the CPU is taken")


@dataclass(frozen=True)
class Loop:
    """One run of Algorithm 1 in a folder with none/ and round_<k>/."""

    folder: Path
    root: Path
    spec: DataSetSpec
    settings: LoopSettings
    detector: DeepSADSettings
    llm: LanguageModelSettings
    drawer: DrawerSettings
    tuning: TuneSettings
    pairs: PairSettings
    device: torch.device

    @property
    def n_rounds(self) -> int:
        """Number of updates of the anomaly set."""
        default = 3 if self.spec.name == "cifar100" else 2
        return self.settings.rounds if self.settings.rounds is not None else default

    def place(self, k: int, name: str) -> Path:
        """A file or folder of round k."""
        return self.folder / f"round_{k}" / name

    @cached_property
    def normals(self) -> Images:
        """Normal training images."""
        choice = Choice(normal_classes=self.settings.normal_class, n_anomalies=0)
        return read_task(self.spec, self.root, choice).normals

    def represent(self) -> list[str]:
        """Eq. (1)-(2) on features of a detector without anomalies, whose AUC is the table's first row."""
        self._train("none", None)
        n = self.settings.n_clusters or len(set(self.normals.classes))
        if self.settings.examples == "random":
            return choose_examples(self.normals.captions, n, self.settings.seed)
        detector = load_detector(self.folder / "none", self.device)
        paths = self.normals.paths
        images = decode(paths, content_digest(paths), 0, detector.image_size, name="normal images").resized
        chosen = select_representatives(detector.embed(images).numpy(), n, self.settings.seed)
        return choose_examples([self.normals.captions[i] for i in chosen], n, self.settings.seed)

    def describe(self, k: int, examples: list[str]) -> None:
        """Eq. (3): captions.jsonl of round k, by the LLM as tuned for it."""
        report = self.place(k, "described.json")
        if report.exists():
            return
        adapter = self._adapter(k)
        n = self._n_captions(k)
        classes = self.settings.normal_class or self.spec.normal_classes
        with self._timed(k, "describe"):
            model = load_language_model(
                replace(self.llm, adapter=str(adapter) if adapter else self.llm.adapter)
            )
            described = describe(
                model,
                generation_prompt(self.spec, examples),
                examples,
                n,
                derive_seed(self.settings.seed, "captions") % 2**31,
                self.place(k, "captions.jsonl"),
                round=k,
                is_normal=normal_test(self.spec, self.normals, classes),
            )
            del model
            _free_memory()
        if not described.captions:
            raise UserError(f"round {k}: the LLM gave no usable caption (rejected: {described.reasons()})")
        if len(described.captions) < n:
            log.warning("round %d: only %d of %d captions", k, len(described.captions), n)
        write_json(report, {"captions": len(described.captions), "rejected": dict(described.rejected)})

    def _n_captions(self, k: int) -> int:
        if k:
            return self.settings.n_fresh
        return self.settings.n_initial or (1000 if self.spec.name == "cifar100" else 200)

    def draw(self, k: int) -> None:
        """Eq. (4): fresh/ of round k, or the set itself in round 0."""
        out = self.place(k, "fresh" if k else "0")
        if (out / NAME_LIST["train"]).exists():
            return
        with self._timed(k, "draw"):
            drawer = build_drawer(self.drawer, self.spec, used=self._used_sources(k))
            records = read_captions(self.place(k, "captions.jsonl"))
            draw_captions(drawer, records, out, self.spec, self.settings.seed, self.settings.draw_batch)
            del drawer
            _free_memory()

    def _used_sources(self, k: int) -> list[str]:
        """Images of the bank that were taken up to round k, each of which is given once."""
        folders = [self.place(j, "fresh" if j else "0") for j in range(k + 1)]
        return [item.source for folder in folders for item in read_items(folder) if item.source]

    def build(self, k: int) -> None:
        """Eq. (8): the anomaly set 0/ of round k; in round 0 all that was drawn."""
        if k == 0 or (self.place(k, "0") / NAME_LIST["train"]).exists():
            return
        fresh = self.place(k, "fresh")
        # Fresh images are judged by the evaluator of the round before, which has not seen them.
        judge_folder(self.place(k - 1, "detector"), fresh, self.spec, self.device)
        rng = np.random.default_rng(derive_seed(self.settings.seed, "update", k))
        s = self.settings
        update(self.place(k - 1, "0"), fresh, self.place(k, "0"), self.spec, s.mode, k, rng, s.per_round)

    def detect(self, k: int) -> dict[str, Any]:
        """Eq. (5)-(6): the detector of round k, its test, the split of the set. Returns the table's row."""
        with self._timed(k, "detect"):
            results = self._train(f"round_{k}/detector", self.place(k, "0"))
        record_split(self.place(k, "0"), read_split(self.place(k, "detector")))
        fresh = live(read_items(self.place(k, "fresh" if k else "0")))
        tuned = self.place(k, "adapter") / TUNED
        return {
            "round": k,
            "captions": read_json(self.place(k, "described.json"))["captions"],
            "hard": sum(item.status == "hard" for item in fresh) / len(fresh),
            "size": results["n_generated"],
            "margin": read_json(tuned).get("margin_after") if tuned.exists() else None,
            "test_auc": results["test_auc"],
            "seconds": read_json(self.place(k, "times.json")),
        }

    def _train(self, name: str, anomalies: Path | None) -> dict[str, Any]:
        s = self.settings
        settings = ExperimentSettings(
            dataset_name=self.spec.name,
            data_path=str(self.root),
            xp_path=str(self.folder / name),
            normal_class=s.normal_class,
            anomaly_path=str(anomalies) if anomalies else None,
            n_anomalies=-1 if anomalies else 0,
            split=s.split,
            seed=s.seed,
            device=str(self.device),
        )
        choice = Choice(
            normal_classes=s.normal_class, anomaly_path=anomalies, n_anomalies=settings.n_anomalies
        )
        task = read_task(self.spec, self.root, choice)
        return Run(settings, self.detector, self.spec, task, self.device, None).execute()

    def tune(self, k: int) -> None:
        """Eq. (7): the adapter of round k from the hard and easy anomalies of the round before.

        Where all are hard or all are easy there is nothing to prefer, and the LLM stays as it is.
        """
        before, out = k - 1, self.place(k, "adapter")
        if (out / TUNED).exists():
            return
        run, anomalies = self.place(before, "detector"), self.place(before, "0")
        try:
            pairs = build_pairs(run, anomalies, self.pairs, self.settings.seed, spec=self.spec)
        except NothingToPreferError as error:
            log.warning("round %d: not tuned: %s", k, error)
            return
        with self._timed(k, "tune"):
            tune(self._llm_name, pairs, out, self.tuning, self._adapter(before))
            _free_memory()

    def _adapter(self, k: int) -> Path | None:
        """The newest adapter up to round k."""
        made = [j for j in range(1, k + 1) if (self.place(j, "adapter") / TUNED).exists()]
        return self.place(made[-1], "adapter") if made else None

    @property
    def _llm_name(self) -> str:
        if self.llm.backend != "transformers" or self.llm.model is None:
            raise UserError("tuning needs --llm_backend transformers and --llm_model; or give --rounds 0")
        return self.llm.model

    @contextmanager
    def _timed(self, k: int, stage: str) -> Iterator[None]:
        """Add the seconds of a step to times.json, over all starts of the loop that ended it."""
        began = time.monotonic()
        log.info("round %d: %s", k, stage)
        yield
        path = self.place(k, "times.json")
        times = read_json(path) if path.exists() else {}
        times[stage] = times.get(stage, 0.0) + time.monotonic() - began
        write_json(path, times)


def judge_folder(run: Path, folder: Path, spec: DataSetSpec, device: torch.device) -> None:
    """Score a folder's images by a trained detector and record in its manifest which are hard, Eq. (6)."""
    detector, card = load_detector(run, device), read_json(run / "model.json")
    images = read_anomalies(folder, spec)
    size = detector.image_size
    resized = decode(images.paths, content_digest(images.paths), 0, size, name="fresh anomalies").resized
    scores = detector.score(resized).double().numpy()
    hard = hard_anomalies(scores, card["threshold"])
    index = tuple(range(len(images)))
    easy = easy_anomalies(scores, hard)
    record_split(folder, Scored(index, images.captions, scores, hard, easy, card["threshold"]))


def read_split(run: Path) -> Scored:
    """The split of a finished run, from its d_samples.json and e_samples.json."""
    hard, easy = (read_json(run / f"{name}_samples.json") for name in ("d", "e"))
    rows = [(*row, True) for row in hard] + [(*row, False) for row in easy]
    rows.sort(key=lambda row: row[0][0])
    is_hard = np.array([row[2] for row in rows], dtype=bool)
    return Scored(
        tuple(row[0][0] for row in rows),
        tuple(tuple(row[1]) for row in rows),
        np.array([row[0][2] for row in rows]),
        is_hard,
        np.flatnonzero(~is_hard),
        read_json(run / "model.json")["threshold"],
    )


def describe_settings(loop: Loop) -> dict[str, Any]:
    """All settings of a loop as JSON values, for its config.json."""
    prefixed: dict[str, Any] = {}
    parts: dict[str, Any] = {"llm": loop.llm, "drawer": loop.drawer, "tune": loop.tuning, "pairs": loop.pairs}
    for name, part in parts.items():
        prefixed |= {f"{name}_{key}": value for key, value in asdict(part).items()}
    return {**asdict(loop.settings), **asdict(loop.detector), **prefixed}


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
