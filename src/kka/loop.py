"""The steps of Algorithm 1 on files: every step is what one of the scripts does, and none is done twice.

A killed loop that is started again skips what is finished and continues inside the step that was not. Each
step says the command that does the same by hand.
"""

import gc
import logging
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kka.anomalies import live, read_items, record_split
from kka.datasets.layout import NAME_LIST, DataSetSpec, Images
from kka.datasets.task import Choice, read_task
from kka.describe import CaptionSettings, ask_for_captions, choose_examples, find_examples
from kka.detectors import detector_name
from kka.detectors.contract import DetectorSettings
from kka.detectors.frozen import FrozenSettings
from kka.draw import ImageSettings, describe_failures, draw_captions, read_captions
from kka.drawers import DrawerSettings, build_drawer
from kka.errors import UserError
from kka.files import read_json, user_path, write_json
from kka.judge import (
    UpdateSettings,
    hard_share,
    judge_folder,
    read_split,
    update_anomalies,
    write_recorded_split,
)
from kka.language_models import DEFAULT_MODEL, LanguageModelSettings
from kka.loop_settings import FRESH, RANDOM, LoopSettings, flags_of
from kka.options import ExperimentSettings
from kka.pairs import NothingToPreferError, PairSettings, build_pairs
from kka.preference_trainer import TuneSettings
from kka.run import Run
from kka.runs import RESULTS
from kka.seeds import derive_seed
from kka.settings import to_flags
from kka.tune import tune

CAPTIONS, DESCRIBED, TIMES = "captions.jsonl", "described.json", "times.json"
TUNED = Path("tuning") / "results.json"  # in the folder of a finished adapter

log = logging.getLogger(__name__)


class NoCaptionsError(UserError):
    """The LLM has no caption that is not known."""


@dataclass(frozen=True)
class Loop:
    """One run of Algorithm 1 in a folder with none/, untuned/ and round_<k>/."""

    folder: Path
    root: Path
    spec: DataSetSpec
    settings: LoopSettings
    detector: DetectorSettings
    llm: LanguageModelSettings
    drawer: DrawerSettings
    tuning: TuneSettings
    pairs: PairSettings
    device: torch.device
    evaluator: FrozenSettings | None = None
    """of the confusion evaluator; None: the first detector of each set judges"""

    @property
    def n_rounds(self) -> int:
        """Number of updates of the anomaly set."""
        return self.settings.rounds if self.settings.rounds is not None else self.spec.n_updates

    def place(self, k: int, name: str) -> Path:
        """A file or folder of round k."""
        return self.folder / f"round_{k}" / name

    @property
    def _untuned(self) -> Path:
        """Images by the untuned LLM."""
        return self.folder / "untuned" / "fresh"

    def judge(self, folder: Path) -> Path:
        """The run that judges in Eq. (6), in the folder of a round or of the loop without anomalies."""
        return folder.with_name(f"{folder.name}_evaluator") if self.evaluator else folder

    @cached_property
    def normals(self) -> Images:
        """Normal training images."""
        choice = Choice(normal_classes=self.settings.normal_class, n_anomalies=0)
        return read_task(self.spec, self.root, choice).normals

    def represent(self) -> list[str]:
        """Eq. (1)-(2) on features of a detector without anomalies, whose AUC is the table's first row."""
        with self._timed(self.folder, "detect"):
            aucs = self._train(self.folder / "none", None)
        write_json(self.folder / "none.json", aucs)
        s = self.settings
        n = s.n_clusters or len(set(self.normals.classes))
        if s.own_examples:
            return s.own_examples
        if s.examples == (RANDOM,):
            return choose_examples(self.normals.captions, n, s.seed)
        chosen = CaptionSettings(run=str(self.judge(self.folder / "none")), n_examples=n, seed=s.seed)
        return find_examples(chosen, self.normals)

    def describe(self, k: int, examples: list[str]) -> None:
        """Eq. (3): captions.jsonl of round k, by the LLM as tuned for it."""
        n = self.settings.n_fresh if k else self.n_initial
        self._describe(self.place(k, ""), k, n, examples, range(k), self._adapter(k))

    def compare(self, examples: list[str]) -> None:
        """Captions and images by the untuned LLM that no detector is trained on, to judge in every round.

        An LLM that has no more captions leaves the comparison out, and the loop goes on.
        """
        out = self.folder / "untuned"
        try:
            self._describe(out, 0, self.settings.n_untuned, examples, range(1), None)
        except NoCaptionsError as error:
            log.warning("%s; the rounds are not compared with the untuned LLM", error)
            write_json(out / DESCRIBED, {"captions": 0})
        if read_json(out / DESCRIBED)["captions"]:
            self._draw(out, self._untuned, [self.place(0, "0")])

    def _describe(
        self, folder: Path, k: int, n: int, examples: list[str], earlier: Sequence[int], adapter: Path | None
    ) -> None:
        """Ask for captions that the earlier rounds do not have, unless captions may come again."""
        report, s = folder / DESCRIBED, self.settings
        if report.exists():
            return
        known = [str(self.place(j, CAPTIONS)) for j in earlier] if self._repeats == 1 else []
        asked = CaptionSettings(
            dataset_name=self.spec.name, data_path=str(self.root), normal_class=s.normal_class, n=n,
            out=str(folder / CAPTIONS), examples=tuple(examples), known=tuple(known), round=k,
            repeats=self._repeats,
            seed=derive_seed(s.seed, "captions", folder.name) % 2**31,
        )  # fmt: skip
        llm = replace(self.llm, adapter=str(adapter) if adapter else self.llm.adapter)
        with self._timed(folder, "describe", "create/use_glm4.py", asked, llm), flags_of("llm"):
            described = ask_for_captions(asked, llm)
            _free_memory()
        if not described.captions:
            raise NoCaptionsError(
                f"{folder}: the LLM gave no usable caption (rejected: {described.reasons()}); start "
                "anew with another LLM, other --examples, fewer --rounds, more --llm_temperature or --repeats"
            )
        if len(described.captions) < n:
            found = len(described.captions)
            log.warning("%s: only %d of %d captions (rejected: %s)", folder, found, n, described.reasons())
        write_json(report, {"captions": len(described.captions), "rejected": dict(described.rejected)})

    @property
    def _repeats(self) -> int:
        return self.settings.repeats or self.spec.caption_repeats

    @property
    def n_initial(self) -> int:
        """Captions of round 0."""
        return self.settings.n_initial or self.spec.n_initial

    @property
    def own_drawer(self) -> DrawerSettings:
        """The drawer's settings; a bank gives no image of what is normal in this loop."""
        excluded = self.drawer.bank_exclude or self.settings.normal_class
        return replace(self.drawer, bank_exclude=excluded) if self.drawer.backend == "bank" else self.drawer

    def draw(self, k: int) -> None:
        """Eq. (4): fresh/ of round k, or the set itself in round 0."""
        earlier = [self._untuned] if k and self._untuned.exists() else []
        earlier += [self.place(j, "fresh" if j else "0") for j in range(k)]
        self._draw(self.place(k, ""), self.place(k, "fresh" if k else "0"), earlier)

    def _draw(self, folder: Path, out: Path, earlier: list[Path]) -> None:
        """Draw a folder's captions; the bank gives no image of the earlier folders again."""
        if (out / NAME_LIST["train"]).exists():
            return
        seed = self.settings.seed
        if self._repeats > 1:  # one caption at one place of two folders would else be one image
            seed = derive_seed(seed, "images", folder.name) % 2**31
        drawn = ImageSettings(
            captions=str(folder / CAPTIONS), dataset_name=self.spec.name, out=str(out),
            used=tuple(map(str, earlier)) if self.drawer.backend == "bank" else (),
            batch_size=self.settings.draw_batch, seed=seed,
        )  # fmt: skip
        own = self.own_drawer
        with self._timed(folder, "draw", "create/create_image.py", drawn, own), flags_of("drawer"):
            used = [item.source for place in (out, *earlier) for item in read_items(place) if item.source]
            drawer = build_drawer(own, self.spec, used)
            records = read_captions(folder / CAPTIONS)
            done = draw_captions(drawer, records, out, self.spec, drawn.seed, drawn.batch_size)
            if done.missing:
                why = describe_failures(done.reasons)
                log.warning("%s: %d captions gave no image (%s)", out, done.missing, why)
            del drawer
            _free_memory()

    def build(self, k: int) -> None:
        """Eq. (8): the anomaly set 0/ of round k; in round 0 all that was drawn.

        Fresh images, and those of the untuned LLM, are judged by the evaluator of the round before, which
        has seen neither.
        """
        report, s = self.place(k, "judged.json"), self.settings
        if k == 0 or report.exists():
            return
        run = self.judge(self.place(k - 1, "detector"))
        updating = UpdateSettings(
            dataset_name=self.spec.name, run=str(run), anomaly_path=str(self.place(k - 1, "0")),
            fresh=str(self.place(k, "fresh")), out=str(self.place(k, "0")), mode=s.mode,
            split=FRESH if s.split == FRESH else "run",
            per_round=s.per_round, round=k, seed=s.seed, device=str(self.device),
        )  # fmt: skip
        with self._timed(self.place(k, ""), "build", "create/update_anomalies.py", updating):
            share = update_anomalies(updating)[1]
            untuned = None
            if self._untuned.exists():
                untuned = judge_folder(run, self._untuned, self.spec, self.device)
        write_json(report, {"hard": share, "hard_untuned": untuned})

    def detect(self, k: int) -> dict[str, Any]:
        """Eq. (5)-(6): detectors of round k, their test, the split of the set. Returns a row of the table."""
        anomalies, run = self.place(k, "0"), self.place(k, "detector")
        with self._timed(self.place(k, ""), "detect"):
            aucs = self._train(run, anomalies)
        self._split(k)
        tuned, judged = self.place(k, "adapter") / TUNED, self.place(k, "judged.json")
        return {
            "round": k,
            "captions": read_json(self.place(k, DESCRIBED))["captions"],
            "hard": hard_share(anomalies),
            "hard_untuned": None,
            **(read_json(judged) if k else {}),
            "size": len(live(read_items(anomalies))),
            "margin": read_json(tuned).get("margin_after") if tuned.exists() else None,
            "test_aucs": aucs,
            "seconds": read_json(self.place(k, TIMES)),
        }

    def _split(self, k: int) -> None:
        """Eq. (6) for the set of round k; a fresh split was made when its images came in."""
        anomalies = self.place(k, "0")
        if self.settings.split != FRESH:
            record_split(anomalies, read_split(self.judge(self.place(k, "detector"))))
        elif k == 0:
            judge_folder(self.judge(self.folder / "none"), anomalies, self.spec, self.device)

    def _train(self, run: Path, anomalies: Path | None) -> list[float | None]:
        """Train a set's judge, which splits it, and the detectors of the table; test AUC of each of these."""
        s = self.settings
        judging = "own" if s.split == FRESH else s.split
        if self.evaluator:
            self._run(self.judge(run), self.evaluator, anomalies, s.seed, judging)
        aucs = []
        for i in range(s.n_evaluators):
            folder = run if i == 0 else run.with_name(f"{run.name}_seed_{s.seed + i}")
            split = judging if folder == self.judge(run) else "own"
            aucs.append(self._run(folder, self.detector, anomalies, s.seed + i, split))
        return aucs

    def _run(
        self, folder: Path, detector: DetectorSettings, anomalies: Path | None, seed: int, split: str
    ) -> float | None:
        """One run of src/main.py; returns its test AUC."""
        s, n_anomalies = self.settings, -1 if anomalies else 0
        settings = ExperimentSettings(
            dataset_name=self.spec.name, data_path=str(self.root), normal_class=s.normal_class,
            xp_path=str(folder), anomaly_path=str(anomalies) if anomalies else None,
            n_anomalies=n_anomalies, split=split, threshold_quantile=s.threshold_quantile, seed=seed,
            device=str(self.device), report_to=s.report_to,
        )  # fmt: skip
        self._say("src/main.py", settings, detector, detector=detector_name(detector))
        choice = Choice(normal_classes=s.normal_class, anomaly_path=anomalies, n_anomalies=n_anomalies)
        task = read_task(self.spec, self.root, choice)
        return Run(settings, detector, self.spec, task, self.device, None).execute()["test_auc"]

    def tune(self, k: int) -> None:
        """Eq. (7): the adapter of round k from the hard and easy anomalies of the round before.

        Where all are hard or all are easy there is nothing to prefer, and the LLM stays as it is.
        """
        out, anomalies = self.place(k, "adapter"), self.place(k - 1, "0")
        if (out / TUNED).exists():
            return
        run = self.judge(self.place(k - 1, "detector"))
        if self.settings.split == FRESH:
            run = self.place(k - 1, "split")
            write_recorded_split(anomalies, run)
        try:
            pairs = build_pairs(run, anomalies, self.pairs, self.tuning.seed, spec=self.spec)
        except NothingToPreferError as error:
            log.warning("round %d: not tuned: %s", k, error)
            return
        before = self._adapter(k - 1)
        places = {"run": run, "anomaly_path": anomalies, "out": out, "adapter": before}
        given = {"model": self.llm_name, "dataset_name": self.spec.name}
        given |= {name: str(place) for name, place in places.items() if place}
        said = ("dpo/dpo_train.py", self.pairs, self.tuning)
        with self._timed(self.place(k, ""), "tune", *said, **given), flags_of("tune"):
            tune(self.llm_name, pairs, out, self.tuning, before)
            _free_memory()

    def _adapter(self, k: int) -> Path | None:
        """The newest adapter up to round k; before the first tuning the one that was given."""
        made = [j for j in range(1, k + 1) if (self.place(j, "adapter") / TUNED).exists()]
        given = user_path(self.llm.adapter) if self.llm.adapter else None
        return self.place(made[-1], "adapter") if made else given

    @property
    def llm_name(self) -> str:
        """Folder or hub id of the LLM that is tuned."""
        return self.llm.model or DEFAULT_MODEL[self.llm.backend]

    @contextmanager
    def _timed(
        self, folder: Path, stage: str, script: str = "", *settings: Any, **flags: Any
    ) -> Iterator[None]:
        """Say what is done; add its seconds to times.json, over all starts of the loop that ended it."""
        began = time.monotonic()
        log.info("\n%s: %s", folder.name, stage)
        if script:
            self._say(script, *settings, **flags)
        yield
        if (self.folder / RESULTS).exists():  # of a finished loop nothing was made
            return
        path = folder / TIMES
        times = read_json(path) if path.exists() else {}
        times[stage] = times.get(stage, 0.0) + time.monotonic() - began
        write_json(path, times)

    def _say(self, script: str, *settings: Any, **flags: Any) -> None:
        """The command that does by hand what comes now."""
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        words += [word for each in settings for word in to_flags(each)]
        log.info("by hand: %s", shlex.join(["python", script, *words]))


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
