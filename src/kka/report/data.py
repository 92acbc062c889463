"""From finished runs to what the figures show. A run without the data of a figure raises NoDataError."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.manifold import TSNE

from kka.anomalies import Item, read_lines
from kka.datasets import get_spec
from kka.datasets.layout import Images
from kka.datasets.task import Task
from kka.detectors import DETECTORS
from kka.differences import shown
from kka.experiment import choose_task
from kka.figures.charts import Curve, Scores, Share, Size, score_unit
from kka.figures.images import Row, Shown
from kka.files import user_path
from kka.metrics import auroc
from kka.options import ExperimentSettings
from kka.picture import split_items
from kka.report.sources import TUNING, UNTUNED, FinishedRun, Group, LoopRecord
from kka.report.tables import Table
from kka.run import load_detector
from kka.runs import ROOT, fingerprint
from kka.settings import make_settings
from kka.trained import views

COLUMNS = 8  # images in a row of Fig. 3
MAX_POINTS = 400  # of a kind in a latent space
PERPLEXITY = 30.0
INITIAL = "initial anomalies only"
UPDATED = "updated by KKA"


class NoDataError(Exception):
    """A figure cannot be drawn from these runs; the message says why, as the end of a sentence."""


def anomaly_rows(loops: Sequence[LoopRecord], groups: Sequence[Group], data_path: str | None) -> list[Row]:
    """Fig. 3: a row per round of each loop; of a single run a row of hard and one of easy anomalies."""
    rows: list[Row] = []
    for loop in loops:
        mark = f"{loop.name}\n" if len(loops) > 1 else ""
        for k, folder in loop.fresh().items():
            if k != UNTUNED:
                hard, easy = split_items(loop.items(folder))
                title = f"{mark}round {k}\n{len(hard)} hard\n{len(easy)} easy"
                rows.append((title, _half_and_half(folder, hard, easy)))
    for group in groups if not loops else []:
        shown = [each for each, _ in split_images(group.runs[0], data_path)]
        mark = f"{group.name}\n" if len(groups) > 1 else ""
        for status in ("hard", "easy"):
            side = [each for each in shown if each.status == status]
            rows.append((f"{mark}{len(side)} {status}", side[:COLUMNS]))
    rows = [row for row in rows if row[1]]
    if not rows:
        raise NoDataError("there are no generated anomalies")
    return rows


def _half_and_half(folder: Path, hard: Sequence[Item], easy: Sequence[Item]) -> list[Shown]:
    """COLUMNS images, half of them hard if there are enough of both."""
    n_hard = min(len(hard), max(COLUMNS // 2, COLUMNS - len(easy)))
    chosen = [*hard[:n_hard], *easy[: COLUMNS - n_hard]]
    return [Shown(folder / item.file, item.caption, item.status) for item in chosen]


def split_images(run: FinishedRun, data_path: str | None) -> list[tuple[Shown, float]]:
    """The generated anomalies of a run and their scores: hard ones, closest first, then the others."""
    images, split = generated_images(run, data_path), run.split
    easy = set(split.easy.tolist())
    order = np.argsort(split.scores, kind="stable").tolist()
    positions = [i for i in order if split.hard[i]] + [i for i in order[::-1] if not split.hard[i]]
    statuses = ["hard" if split.hard[i] else "easy" if i in easy else "between" for i in positions]
    captions = [(*split.captions[i], "")[0] for i in positions]
    return [
        (Shown(images.paths[i], caption, status), float(split.scores[i]))
        for i, caption, status in zip(positions, captions, statuses, strict=True)
    ]


def generated_images(run: FinishedRun, data_path: str | None) -> Images:
    """The generated anomalies that a run split, in the order of its split."""
    if not run.split.index:
        raise NoDataError(f"{run.folder.name} has no generated anomalies")
    anomalies = str(run.anomalies) if run.anomalies else None
    task = _choose({**run.settings, "anomaly_path": anomalies}, data_path)
    where = {index: k for k, index in enumerate(task.generated_index)}
    rows = [where.get(index, -1) for index in run.split.index]
    images = task.generated.take(rows) if -1 not in rows else Images()
    if images.captions != run.split.captions:
        raise NoDataError(f"the anomaly folder of {run.folder} holds other images now")
    return images


def read_task_of(run: FinishedRun, data_path: str | None) -> Task:
    """The real images of a run; raises NoDataError if the test images have other targets now."""
    if run.settings.get("iterate"):
        raise NoDataError(f"the test anomalies of {run.folder.name} are the generated ones")
    task = _choose({**run.settings, "anomaly_path": None, "n_anomalies": 0}, data_path)
    if list(task.test.targets) != run.test[:, 1].astype(int).tolist():
        raise NoDataError(f"the test set of {run.folder} is not what it was")
    return task


def _choose(values: Mapping[str, Any], data_path: str | None) -> Task:
    settings = make_settings(ExperimentSettings, values)
    spec, given = get_spec(settings.dataset_name), data_path or settings.data_path
    return choose_task(settings, spec, user_path(given) if given else ROOT / "data" / spec.name)


def score_panels(groups: Sequence[Group]) -> list[Scores]:
    """Scores of the first seed of each group."""
    panels = []
    for group in groups:
        run = group.runs[0]
        scores, targets, split = run.test[:, 2], run.test[:, 1], run.split
        kinds = {
            "normal": scores[targets == 0],
            "real anomaly": scores[targets == 1],
            "easy generated": split.scores[split.easy],
            "hard generated": split.scores[split.hard],
        }
        if run.settings.get("iterate"):
            del kinds["real anomaly"]  # the anomalies of its test set are the generated ones
        auc = "n/a" if run.auc is None else f"{100 * run.auc:.1f} %"
        threshold = run.results["threshold"]
        panels.append(Scores(f"{group.name}, test AUC {auc}", kinds, threshold, score_unit(run.detector)))
    return panels


def size_series(loops: Sequence[LoopRecord], groups: Sequence[Group]) -> dict[str, list[Size]]:
    """Fig. 4: sets that were never updated, and those that the loop has updated, as two series.

    Loops that differ in the seed only make one point together for each round. Detectors, their settings and
    normal classes are not joined to one line.
    """
    seeds: dict[str, list[LoopRecord]] = defaultdict(list)
    for loop in loops:
        same_for_seeds = {k: v for k, v in loop.config["identity"].items() if k != "seed"}
        seeds[fingerprint([same_for_seeds, len(loop.rounds)])].append(loop)
    rounds = [each for same in seeds.values() for each in zip(*(loop.groups for loop in same), strict=True)]
    shown = [*rounds, *((group,) for group in groups)]
    marks = _line_names([own[0].runs[0] for own in shown])
    series: dict[str, list[Size]] = {
        mark + kind: [] for mark in dict.fromkeys(marks) for kind in (INITIAL, UPDATED)
    }
    for mark, own in zip(marks, shown, strict=True):
        last = max(group.runs[0].newest_round if group.n_generated else 0 for group in own)
        # Of several loops each counts once, with the mean of its evaluators.
        each = [float(np.mean(group.aucs)) for group in own if group.aucs]
        if each:
            n, aucs = np.mean([group.n_generated for group in own]), each if len(own) > 1 else own[0].aucs
            point = Size(round(float(n)), aucs, f"KKA({last})" if last else "")
            series[mark + (UPDATED if last else INITIAL)].append(point)
    if len({point.n for points in series.values() for point in points}) < 2:
        raise NoDataError("it needs runs with different numbers of generated anomalies")
    return {name: points for name, points in series.items() if points}


def _line_names(runs: Sequence[FinishedRun]) -> list[str]:
    """What sets the line of each run apart, as far as they differ: detector, its settings, normal class."""
    keys = {"detector": "", "dataset_name": "", "normal_class": "normal ", "normal_superclass": ""}
    found = [{key: run.settings.get(key) for key in keys} | {"detector": run.detector} for run in runs]
    for values, run in zip(found, runs, strict=True):
        values |= {key: run.settings.get(key) for key in asdict(DETECTORS[run.detector][0]())}

    def differs(key: str) -> bool:
        return len({str(values[key]) for values in found if key in values}) > 1

    varied = dict.fromkeys(key for values in found for key in values if differs(key))
    return [
        "".join(f"{keys.get(key, f'{key} ')}{shown(values[key])}, " for key in varied if key in values)
        for values in found
    ]


def table_sizes(table: Table) -> dict[str, list[Size]]:
    """Fig. 4 from its table: a series of the initial sets, and one of the rounds of each mode of a loop."""
    series: dict[str, list[Size]] = defaultdict(list)
    for k, title in enumerate(table.columns):
        for name, cells in table.rows:
            n = cells[k].anomalies
            if cells[k].aucs and n is not None:
                label, _, mode = name.partition(", ")
                own = INITIAL if label == "initial" else f"KKA, {mode}"
                mark = f"{title}, " if len(table.columns) > 1 else ""
                point = Size(round(n), cells[k].aucs, "" if label == "initial" else label)
                series[mark + own].append(point)
    return dict(series)


def curve_series(groups: Sequence[Group]) -> dict[str, list[Curve]]:
    """Fig. 6: losses and test AUCs by epoch."""
    series = {
        group.name: [Curve(run.epochs("loss"), run.epochs("test_auc")) for run in group.runs]
        for group in groups
    }
    series = {name: curves for name, curves in series.items() if any(curve.losses for curve in curves)}
    if not series or max(len(curve.losses) for curves in series.values() for curve in curves) < 2:
        raise NoDataError("no run has recorded more than one epoch")
    return series


def class_series(groups: Sequence[Group], data_path: str | None) -> dict[str, dict[str, list[float]]]:
    """AUC of each anomalous class of the test set against all its normals."""
    series = {}
    for group in groups:
        aucs: dict[str, list[float]] = defaultdict(list)
        for run in group.runs:
            for name, auc in class_aucs(run, read_task_of(run, data_path).test.classes).items():
                aucs[name].append(auc)
        series[group.name] = dict(aucs)
    shared = set.intersection(*(set(aucs) for aucs in series.values())) if series else set()
    if len(shared) < 2:
        raise NoDataError("there are fewer than two anomalous classes that all the runs have tested")
    return series


def class_aucs(run: FinishedRun, classes: Sequence[str]) -> dict[str, float]:
    """{class: AUC in [0, 1]} from the classes of the test images in their order."""
    names, targets, scores = np.array(classes), run.test[:, 1], run.test[:, 2]
    aucs = {}
    for name in dict.fromkeys(classes):
        chosen = (targets == 0) | ((names == name) & (targets == 1))
        auc = auroc(targets[chosen], scores[chosen])
        if auc is not None:
            aucs[f"class {name}" if name.isdigit() else name] = auc
    return aucs


def share_series(loops: Sequence[LoopRecord]) -> dict[str, list[Share]]:
    """Hard ones among fresh images of the tuned and of the untuned LLM, as `build` judged them."""
    series: dict[str, list[Share]] = defaultdict(list)
    for loop in loops:
        mark = f"{loop.name}, " if len(loops) > 1 else ""
        untuned = loop.fresh().get(UNTUNED)
        n_untuned = len(loop.items(untuned)) if untuned else 0
        for row in loop.rounds[1:]:
            n = len(loop.items(loop.fresh()[str(row["round"])]))
            series[f"{mark}tuned LLM"].append(Share(row["round"], round(row["hard"] * n), n))
            if n_untuned and row["hard_untuned"] is not None:
                share = Share(row["round"], round(row["hard_untuned"] * n_untuned), n_untuned)
                series[f"{mark}untuned LLM"].append(share)
    if not series:
        raise NoDataError(
            "only a loop of src/iterate.py with at least one round after round 0 has fresh images"
        )
    return dict(series)


def margin_series(loops: Sequence[LoopRecord]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Reward margins of DPO by step, of each round in which the LLM was tuned."""
    rounds = {}
    for loop in loops:
        for k in range(1, len(loop.rounds)):
            path = loop.place(k, TUNING) / "metrics.jsonl"
            rows = [row for _, row in read_lines(path)] if path.exists() else []
            kinds = {
                name: [(row["step"], row[key]) for row in rows if key in row]
                for name, key in (("training", "rewards/margins"), ("validation", "eval_rewards/margins"))
            }
            if any(kinds.values()):
                title = f"{loop.name}, round {k}" if len(loops) > 1 else f"round {k}"
                rounds[title] = {name: points for name, points in kinds.items() if points}
    if not rounds:
        raise NoDataError("no LLM was tuned in these runs")
    return rounds


def latent_panels(
    without: Group | None, with_anomalies: Group | None, data_path: str | None
) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Fig. 5: t-SNE of the same images in the features of two runs, each its first seed."""
    if without is None or with_anomalies is None:
        raise NoDataError("it needs a run without generated anomalies beside one with them")
    images, kinds = _latent_images(with_anomalies.runs[0], data_path)
    if (
        read_task_of(without.runs[0], data_path).test.paths
        != read_task_of(with_anomalies.runs[0], data_path).test.paths
    ):
        raise NoDataError("the runs without and with generated anomalies were tested on different images")
    panels = []
    for group in (without, with_anomalies):
        points = embed_2d(features_of(group.runs[0].folder, images))
        panels.append((group.name, {k: points[kinds == k] for k in dict.fromkeys(kinds.tolist())}))
    return panels


def _latent_images(run: FinishedRun, data_path: str | None) -> tuple[Images, np.ndarray]:
    """At most MAX_POINTS images of each kind, and what each is."""
    task, generated, split = read_task_of(run, data_path), generated_images(run, data_path), run.split
    everything = task.test + generated
    hard = np.where(split.hard, "hard generated", "easy generated")
    test = np.where(np.array(task.test.targets) == 1, "real anomaly", "normal")
    kinds, rng = np.concatenate([test, hard]), np.random.default_rng(0)
    chosen = []
    for kind in ("real anomaly", "normal", "easy generated", "hard generated"):  # the last lie on top
        rows = np.flatnonzero(kinds == kind)
        chosen.append(np.sort(rng.permutation(rows)[:MAX_POINTS]))
    order = np.concatenate(chosen)
    return everything.take(order.tolist()), kinds[order]


def features_of(run: Path, images: Images) -> np.ndarray:
    """(N, D) features of images by the detector of a run."""
    detector = load_detector(run, torch.device("cpu"))
    return detector.embed(views(run, detector, images, "images")).numpy()


def embed_2d(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """t-SNE, (N, D) -> (N, 2), with a perplexity of 30, or (N - 1) / 3 where that is lower."""
    if len(features) < 4:
        raise NoDataError(f"t-SNE needs at least four images, there are {len(features)}")
    if not np.isfinite(features).all() or np.ptp(features, axis=0).max() == 0:
        raise NoDataError("the features are not finite, or the same for all images")
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)
