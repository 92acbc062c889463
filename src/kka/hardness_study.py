"""Does hardness help? The claim of the paper, taken apart on anomalies that are drawn perfectly.

From a base set of n anomalies, k of a pool of fresh ones are added, or replace k of the base set, chosen in
different ways. Real training images of the other classes stand for perfect drawings. Test images are looked
at only to test. All choices of a seed share base set, pool, number, evaluator and the random numbers of the
training, so that their differences come in pairs.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from kka.data import Data, build_train_set, load_data, refuse_test_images
from kka.datasets import garden
from kka.datasets.images import content_digest
from kka.datasets.layout import ANOMALY_FOLDER, DataSetSpec, Images, read_class_folder
from kka.datasets.task import Choice, Task, read_anomalies, read_task
from kka.detectors import build_detector, detector_name
from kka.detectors.contract import Detector, DetectorSettings
from kka.errors import TrainingError, UserError
from kka.files import read_json, user_path, write_json
from kka.hardness import RULES, Pool, leaving
from kka.metrics import auroc
from kka.networks.backbones import content_of_weights
from kka.options import ExperimentSettings
from kka.results import check_scores
from kka.runs import LOG, RESULTS, ROOT, claim, fingerprint, locked, log_to, write_config
from kka.seeds import derive_seed
from kka.settings import option
from kka.split import easy_anomalies, hard_anomalies, hardness_threshold
from kka.update import MODES, PER_ROUND

CROSSFIT = "hard-crossfit"  # the only rule that needs trainings of its own
SELECTIONS = (*RULES, CROSSFIT)
TRAININGS = "trainings.json"
N_DRAWN = 1000  # the garden's pool and base set
TOTALS = ("n_base", "selections", "modes", "n_detectors")  # more of these is no other study

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HardnessSettings:
    """One normal class and one seed: which anomalies help?"""

    dataset_name: str = option("flower", "flower, cifar100 (mycifar), ucm_caption, folder or garden")
    data_path: str | None = option(None, "folder of the data set; None: data/<name>, made if it can be")
    anomaly_path: str | None = option(
        None,
        "folder whose images are base set and pool; None: training images of the other classes, for the "
        "garden drawings of flowers that are no species of it",
    )
    xp_path: str | None = option(None, "run folder; None: log/<data set>/hardness_<class>_seed<seed>_<hash>")
    overwrite: bool = option(False, "begin anew: remove the run that the folder holds, finished or not")
    normal_class: tuple[int | str, ...] = option((), "folders taken as normal; none: the data set's own")
    normal_superclass: str | None = option(None, "superclass of CIFAR-100 taken as normal, e.g. furniture")
    n_base: tuple[int, ...] = option((10, 50, 100, 200, 400), "sizes of the base set; smaller ones are parts")
    n_pool: int = option(500, "fresh anomalies to choose from")
    n_chosen: int = option(PER_ROUND, "of these that come into the set; fewer where fewer are hard")
    max_replaced: float = option(0.3, "largest part of the base set that rep replaces (paper: 59 of 200)")
    selections: tuple[str, ...] = option(
        tuple(name for name in SELECTIONS if name != "easy"),
        f"how they are chosen: {', '.join(SELECTIONS)}",
    )
    modes: tuple[str, ...] = option(MODES, "add them, or replace (rep) easy ones of the base set by them")
    n_clusters: int = option(10, "k-means clusters of hard-clusters")
    n_detectors: int = option(1, "detectors trained on each set")
    threshold_quantile: float = option(1.0, "of the normal scores, for Eq. (6); 1 is their maximum")
    seed: int = option(0, "of base set, pool, choice and training")
    device: str = option("cpu", "cpu, cuda or cuda:N")
    num_threads: int = option(0, "threads of PyTorch; 0: its default")

    @property
    def sets(self) -> list[str]:
        """Names of the trained sets: "base", then "add random", ..., "rep random", ..."""
        return ["base", *(f"{mode} {rule}" for mode in self.modes for rule in self.selections)]


PLACE = (
    "data_path", "xp_path", "overwrite", "anomaly_path", "device", "num_threads", *TOTALS,
)  # fmt: skip


def check_hardness(s: HardnessSettings) -> None:
    """Raises UserError naming the flag of the first value that makes no sense."""
    for name, known in (("selections", SELECTIONS), ("modes", MODES)):
        wrong = [value for value in getattr(s, name) if value not in known]
        if wrong or not getattr(s, name):
            raise UserError(f"--{name} takes some of {', '.join(known)}, not {wrong[0] if wrong else 'none'}")
    if not s.n_base or min(s.n_base) < 1:
        raise UserError("--n_base takes sizes of at least 1")
    for name in ("n_pool", "n_chosen", "n_clusters", "n_detectors"):
        if getattr(s, name) < 1:
            raise UserError(f"--{name} must be at least 1, it is {getattr(s, name)}")
    for name in ("max_replaced", "threshold_quantile"):
        if not 0 < getattr(s, name) <= 1:
            raise UserError(f"--{name} must lie in (0, 1], it is {getattr(s, name)}")


def read_candidates(spec: DataSetSpec, root: Path, normals: Images) -> Images:
    """Training images of all classes that are not normal; raises UserError where a set has none."""
    others = [i for i in spec.user_dict.get(1, []) if str(i) not in normals.classes and i != ANOMALY_FOLDER]
    if not others:
        raise UserError(f"{spec.title} has no training images of other classes; give --anomaly_path DIR")
    images = Images()
    for i in others:
        images += read_class_folder(root / str(i), "train", 1, spec)
    return images


@dataclass(frozen=True)
class Study:
    """One normal class and one seed in their run folder."""

    settings: HardnessSettings
    detector: DetectorSettings
    spec: DataSetSpec
    root: Path
    normal_classes: tuple[int, ...]
    device: torch.device

    @cached_property
    def task(self) -> Task:
        """Normals, and the real images of the test."""
        category = self.settings.normal_class  # of mvtec, whose classes are folders of their own
        choice = Choice(normal_classes=self.normal_classes, category=category, n_anomalies=0)
        return read_task(self.spec, self.root, choice)

    @property
    def _drawn(self) -> bool:
        """Whether the garden draws base set and pool for this study."""
        return self.spec.name == garden.SPEC.name and not self.settings.anomaly_path

    @cached_property
    def candidates(self) -> Images:
        """Base set and pool come from these, which are no test images."""
        s = self.settings
        if self._drawn:
            garden.draw_anomalies(self.folder / "drawn", s.seed, N_DRAWN)
            return read_anomalies(self.folder / "drawn" / str(ANOMALY_FOLDER), self.spec)
        if s.anomaly_path:
            given = read_anomalies(user_path(s.anomaly_path), self.spec, "give another --anomaly_path")
            refuse_test_images(given, self.task.test)
            return given
        return read_candidates(self.spec, self.root, self.task.normals)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the numbers, as JSON values."""
        drawn = f"drawn by garden {garden.VERSION}"
        parts = (self.task.normals, self.task.test)
        data = [*(content_digest(part.paths) for part in parts), self.task.test.targets]
        data.append(drawn if self._drawn else content_digest(self.candidates.paths))
        chosen = {key: value for key, value in asdict(self.settings).items() if key not in PLACE}
        own = {**asdict(self.detector), **content_of_weights(self.detector)}
        return {"detector": detector_name(self.detector), **chosen, **own, "data": fingerprint(data)}

    @cached_property
    def folder(self) -> Path:
        """The run folder."""
        s = self.settings
        if s.xp_path:
            return user_path(s.xp_path)
        normal = "_".join(map(str, self.normal_classes or self.spec.normal_classes)) or "good"
        digest = fingerprint([self._place_free, detector_name(self.detector), asdict(self.detector)])[:6]
        return ROOT / "log" / self.spec.name / f"hardness_{normal}_seed{s.seed}_{digest}"

    @property
    def _place_free(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self.settings).items() if key not in PLACE}

    @cached_property
    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of `candidates`: the largest base set, which begins with the smaller ones, and the pool."""
        s, n = self.settings, len(self.candidates)
        largest = max(s.n_base)
        if largest + s.n_pool > n:
            raise UserError(
                f"--n_base {largest} and --n_pool {s.n_pool} need {largest + s.n_pool} anomalies, "
                f"there are {n}"
            )
        order = np.random.default_rng(derive_seed(s.seed, "order")).permutation(n)
        return order[:largest], order[n - s.n_pool :]

    @cached_property
    def data(self) -> Data:
        """Tensors; the generated ones are the largest base set and, behind it, the pool."""
        base, pool = self._order
        generated = self.candidates.take([*base, *pool])
        index = tuple(range(len(generated)))
        task = Task(self.task.normals, generated, index, self.task.test)
        digests = tuple(content_digest(part.paths) for part in (task.normals, generated, task.test))
        size, real = build_detector(self.detector).image_size, not any(generated.generated)
        return load_data(task, digests, size, False, self.settings.num_threads, False, match=not real)

    def execute(self) -> dict[str, Any]:
        """All trainings that are not finished yet; writes and returns results.json."""
        s = self.settings
        with locked(self.folder):
            claim(self.folder, self.identity, s.overwrite)
            settings = {**asdict(s), "detector": detector_name(self.detector), **asdict(self.detector)}
            write_config(self.folder, self.identity, settings)
            with log_to(self.folder / LOG):
                return self._train_all()

    def _train_all(self) -> dict[str, Any]:
        s, began = self.settings, time.monotonic()
        steps = [(n, name) for n in s.n_base for name in ("judge", *s.sets)]
        results: dict[str, Any] = {"seed": s.seed, "sets": {}}
        for n, name in tqdm(steps, desc=str(self.folder.name), unit="set", disable=None):
            judged = self._judge(n)
            if name == "judge":
                results["sets"][str(n)] = {"hard": float(np.mean(judged["hard"])), "aucs": {}, "n_new": {}}
                continue
            trained = [self._train_on(n, name, judged, i) for i in range(s.n_detectors)]
            results["sets"][str(n)]["aucs"][name] = [each["auc"] for each in trained]
            results["sets"][str(n)]["n_new"][name] = trained[0]["n_new"]
        results["trainings"] = len(self._finished)
        results["seconds"] = sum(each["seconds"] for each in self._finished.values())
        write_json(self.folder / RESULTS, results, indent=1)
        log.info("%d trainings, %.0f s now", results["trainings"], time.monotonic() - began)
        return results

    @cached_property
    def _finished(self) -> dict[str, Any]:
        path = self.folder / TRAININGS
        return read_json(path) if path.exists() else {}

    def _once(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a training gave: from trainings.json, or made now and kept there."""
        if key not in self._finished:
            began = time.monotonic()
            made = make()
            self._finished[key] = {**made, "seconds": time.monotonic() - began}
            write_json(self.folder / TRAININGS, self._finished)
        return self._finished[key]

    def _judge(self, n: int) -> dict[str, Any]:
        """What the evaluator of the base set says: who is hard, who leaves first, who is chosen."""
        judged = self._once(f"{n} judge", lambda: self._ask_judge(n))
        if CROSSFIT not in self.settings.selections:
            return judged
        halves = [self._once(f"{n} crossfit {k}", partial(self._crossfit, n, k)) for k in (0, 1)]
        hard = np.concatenate([half["hard"] for half in halves]).astype(int)
        chosen = self._rng(n, CROSSFIT).permutation(hard)[: self.settings.n_chosen]
        return {**judged, "rows": {**judged["rows"], CROSSFIT: chosen.tolist()}}

    def _ask_judge(self, n: int) -> dict[str, Any]:
        s, judge = self.settings, self._fit(np.arange(n), "judge", n)
        images, pooled = self.data.generated.resized, slice(max(s.n_base), None)
        scores = judge.score(images).double().numpy()
        threshold = self._threshold(judge)
        pool = Pool(scores[pooled], threshold, judge.embed(images[pooled]).numpy())
        easy = np.zeros(n, bool)
        easy[easy_anomalies(scores[:n], hard_anomalies(scores[:n], threshold))] = True
        rows = {
            name: rule(pool, s.n_chosen, s.n_clusters, self._rng(n, name)).tolist()
            for name, rule in RULES.items()
        }
        leave = leaving(easy, self._rng(n, "leave"))
        return {"threshold": threshold, "hard": pool.hard.tolist(), "rows": rows, "leave": leave.tolist()}

    def _crossfit(self, n: int, half: int) -> dict[str, Any]:
        """Who of one half of the pool is hard for an evaluator that knows the base set and the other half."""
        s = self.settings
        halves = np.array_split(self._rng(0, "halves").permutation(s.n_pool), 2)
        first = max(s.n_base)
        judge = self._fit(np.r_[np.arange(n), first + halves[1 - half]], "crossfit", n, half)
        scores = judge.score(self.data.generated.resized[first + halves[half]]).double().numpy()
        return {"hard": halves[half][hard_anomalies(scores, self._threshold(judge))].tolist()}

    def _train_on(self, n: int, name: str, judged: dict[str, Any], i: int) -> dict[str, Any]:
        """Test AUC of the i-th detector on one set; it shares no random number with the evaluator."""
        mode, _, rule = name.partition(" ")
        count = min(self.settings.n_chosen, sum(judged["hard"]))
        if mode == "rep":
            count = min(count, round(self.settings.max_replaced * n))
        new = np.array(judged["rows"][rule][:count] if rule else [], dtype=int)
        stay = np.array(judged["leave"][len(new) :] if mode == "rep" else range(n), dtype=int)
        rows = np.r_[np.sort(stay), max(self.settings.n_base) + np.sort(new)]
        if name != "base" and not len(new):  # nothing was chosen: it is the base set
            return {**self._train_on(n, "base", judged, i), "n_new": 0}
        return self._once(f"{n} {name} {i}", lambda: {"auc": self._test(rows, i), "n_new": len(new)})

    def _test(self, rows: np.ndarray, i: int) -> float:
        targets = self.data.task.test.targets
        scores = self._fit(rows, "detector", i).score(self.data.test.resized)
        check_scores(detector_name(self.detector), scores)
        auc = auroc(targets, scores.numpy())
        if auc is None:
            raise TrainingError("the test set has one class only, so there is no AUC")
        return auc

    def _fit(self, rows: np.ndarray, *purpose: object) -> Detector:
        """A detector of the normals and these rows of the generated images."""
        chosen, g = torch.from_numpy(rows), self.data.generated
        train = build_train_set(self.data, ExperimentSettings(), self.settings.seed)[0]
        normals = train.take(torch.nonzero(train.targets == 0).squeeze(1))
        seed = derive_seed(self.settings.seed, "hardness", *purpose)
        detector = build_detector(self.detector, seed, self.device)
        detector.fit(normals.append_anomalies(g.images[chosen], g.native_sizes[chosen], g.resized[chosen]))
        return detector

    def _threshold(self, judge: Detector) -> float:
        normals = judge.score(self.data.normals.resized).numpy()
        return hardness_threshold(normals, self.settings.threshold_quantile)

    def _rng(self, n: int, purpose: str) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self.settings.seed, purpose, n))
