"""Experiments: every seed of one setting, with mean and interval."""

import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kka.datasets import get_spec, mvtec
from kka.datasets.images import UnreadableImageError
from kka.datasets.layout import ANOMALY_FOLDER, DataSetSpec
from kka.datasets.sources import data_root
from kka.datasets.task import Choice, Task, parse_user_dict, read_task
from kka.detectors import build_detector, detector_name
from kka.detectors.contract import DetectorSettings
from kka.detectors.deep_sad_together import check_together
from kka.detectors.frozen import FrozenSettings
from kka.errors import TrainingError, UserError
from kka.evaluator import evaluator_run
from kka.files import user_path, write_json
from kka.metrics import deviation, format_interval, mean_interval
from kka.options import PLACE, ExperimentSettings, check_options
from kka.results import load_weights
from kka.run import Run, execute
from kka.runs import CONFIG, ROOT, fingerprint

NETWORK_FLAGS = ("net_name", "arch", "backbone")  # of the detectors, for messages

log = logging.getLogger(__name__)


def run_experiment(
    settings: ExperimentSettings, detector: DetectorSettings, evaluator: FrozenSettings | None = None
) -> list[dict[str, Any]]:
    """Run one experiment for every seed and, with --each_class, class; several runs get a summary.json.

    With an evaluator, which splits the anomalies in the detector's place, each run has one within its folder.
    Raises UserError for bad input, TrainingError for a run without a meaningful result.
    """
    spec = get_spec(settings.dataset_name)
    check_options(settings)
    if settings.vmap_seeds > 1:
        check_together(detector)
        if settings.runs == 1 and not settings.each_class:
            settings = replace(settings, runs=settings.vmap_seeds)
    detector = fill_epochs(detector, spec)
    weights = load_weights(Path(settings.load_model)) if settings.load_model else None
    check_detector(detector, weights, settings.load_model)
    device = find_device(settings.device, settings.strict_device)
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    root = data_root(spec, settings.data_path)
    first = secrets.randbelow(2**31) if settings.seed == -1 else settings.seed
    settings = replace(settings, seed=first)
    cases = one_per_class(settings, detector, spec, root) if settings.each_class else [settings]
    runs = [
        Run(each, detector, spec, choose_task(each, spec, root), device, weights, evaluator)
        for case in cases
        for each in [replace(case, seed=first + k) for k in range(case.runs)]
    ]
    refuse_single_run(runs)
    try:
        results = execute_all(runs, settings.vmap_seeds)
        if evaluator:
            for judge in [evaluator_run(run, evaluator) for run in runs]:
                judge.execute()
                log.info("hard and easy anomalies by frozen features are in %s", judge.folder)
    except UnreadableImageError as error:
        raise UserError(f"{error} or give --skip_bad_images") from None
    summarize_all(runs, results, [str(case.normal_class[0]) for case in cases if settings.each_class])
    return results


def execute_all(runs: Sequence[Run], together: int) -> list[dict[str, Any]]:
    """The results of all runs, of which so many are trained together.

    One that fails does not keep those behind it from being made, but raises its TrainingError at the end: a
    mean over the others would be one over chosen seeds, so there is none.
    """
    results, failures = [], []
    for k in range(0, len(runs), together):
        group = runs[k : k + together]
        try:
            results += execute(group)
        except TrainingError as error:
            if len(runs) == 1:
                raise
            failures.append(f"{' '.join(str(run.folder) for run in group)}: {error}")
            log.error("failed: %s", failures[-1])
    if failures:
        others = f"{len(results)} of {len(runs)} runs are finished, and there is no summary"
        raise TrainingError(f"{failures[0]}; {others}")
    return results


def one_per_class(
    settings: ExperimentSettings, detector: DetectorSettings, spec: DataSetSpec, root: Path
) -> list[ExperimentSettings]:
    """The experiments of --each_class: one class normal in each, in a folder of its own within a common one.

    --user_dict says then what is tested, and whether folder 0 is trained on. Raises UserError for a data set
    without classes.
    """
    if spec.name == "folder":
        raise UserError("--each_class needs a data set with classes; --dataset_name folder has only `good`")
    given = parse_user_dict(settings.user_dict) if settings.user_dict is not None else None
    if spec.name == mvtec.SPEC.name:
        classes: Sequence[int | str] = settings.normal_class or mvtec.class_names(root)
    else:
        tested = [i for i in (given or spec.user_dict)[1] if i != ANOMALY_FOLDER]
        classes = find_normal_classes(settings, spec) or tested
    parent = class_parent(settings, detector, spec, classes)
    cases = []
    for i in classes:
        own = {0: [i, *[ANOMALY_FOLDER] * (ANOMALY_FOLDER in given[0])], 1: given[1]} if given else None
        case = replace(
            settings, normal_class=(i,), normal_superclass=None, xp_path=str(parent / f"class_{i}")
        )
        cases.append(replace(case, user_dict=json.dumps(own)) if own else case)
    return cases


def class_parent(
    settings: ExperimentSettings, detector: DetectorSettings, spec: DataSetSpec, classes: Sequence[int | str]
) -> Path:
    """The folder of the folders of each class."""
    if settings.xp_path:
        return user_path(settings.xp_path)
    decides = {k: v for k, v in asdict(settings).items() if k not in PLACE | {"normal_class", "seed"}}
    digest = fingerprint([decides, detector_name(detector), asdict(detector), list(map(str, classes))])[:6]
    seeds = f"runs{settings.runs}" if settings.runs > 1 else f"seed{settings.seed}"
    name = settings.name or f"{detector_name(detector)}_each_class_{seeds}_{digest}"
    return ROOT / "log" / spec.name / name


def refuse_single_run(runs: Sequence[Run]) -> None:
    """Raises UserError if a folder that is to hold several runs is one itself."""
    for run in runs:
        by_class, by_seed = run.settings.each_class, run.settings.runs > 1
        for parent in run.folder.parents[: by_class + by_seed]:
            if (parent / CONFIG).exists():
                flag = "--each_class" if by_class else "--runs"
                raise UserError(f"{parent} holds a single run; choose another --xp_path or --name for {flag}")


def fill_epochs(detector: Any, spec: DataSetSpec) -> Any:
    """The settings of a detector with the paper's epochs of this data set where it has n_epochs of None."""
    asked = getattr(detector, "n_epochs", 0)
    return detector if asked is not None else replace(detector, n_epochs=spec.n_epochs)


def check_detector(detector: DetectorSettings, weights: dict[str, Tensor] | None, path: str | None) -> None:
    """Raises UserError if the settings make no sense, or the weights are those of another network."""
    trial = build_detector(detector)
    try:
        if weights is not None:
            trial.load_state_dict(weights)
    except RuntimeError:
        flags = [f" --{key} {getattr(detector, key)}" for key in NETWORK_FLAGS if hasattr(detector, key)]
        network = f"--detector {detector_name(detector)}{''.join(flags)}"
        raise UserError(f"--load_model {path} holds another network than {network}") from None


def choose_task(settings: ExperimentSettings, spec: DataSetSpec, root: Path) -> Task:
    """The images that the options take from the data set at `root`.

    Without folder 0, and if the user did not ask for it, a run without anomalies is made, with a warning.
    """
    choice = Choice(
        user_dict=parse_user_dict(settings.user_dict) if settings.user_dict is not None else None,
        iterate=settings.iterate,
        normal_classes=find_normal_classes(settings, spec),
        category=settings.normal_class,
        n_known=settings.n_anomaly,
        known_kind=settings.know_class,
        anomaly_path=user_path(settings.anomaly_path) if settings.anomaly_path else None,
        n_anomalies=settings.n_anomalies,
        seed=settings.seed,
    )
    is_mvtec = spec.name == mvtec.SPEC.name
    folder = (mvtec.class_folder(root, settings.normal_class) if is_mvtec else root) / str(ANOMALY_FOLDER)
    asked = settings.user_dict or settings.iterate or settings.anomaly_path or settings.n_anomalies > 0
    if not asked and settings.n_anomalies < 0 and not folder.is_dir():
        log.warning("there are no generated anomalies at %s; training without any", folder)
        choice = replace(choice, n_anomalies=0)
    return read_task(spec, root, choice)


def find_normal_classes(settings: ExperimentSettings, spec: DataSetSpec) -> tuple[int, ...]:
    """--normal_class or the classes of --normal_superclass; empty for the data set's own."""
    given, name = settings.normal_class, settings.normal_superclass
    if spec.name == mvtec.SPEC.name:
        return ()  # its class is a folder of its own
    words = [value for value in given if isinstance(value, str)]
    if words:
        raise UserError(f"--normal_class {words[0]!r}: the classes of {spec.title} are numbers")
    numbers = tuple(value for value in given if isinstance(value, int))
    if name is None:
        if given and spec.name == "folder":
            raise UserError(
                "--normal_class is for numbered class folders; --dataset_name folder has only `good`"
            )
        if len(set(given)) < len(given):
            raise UserError(f"--normal_class names a class twice: {' '.join(map(str, given))}")
        return () if given == (0,) else numbers  # 0 is the official default and means the data set's own
    if given:
        raise UserError("give either --normal_class or --normal_superclass")
    matches = [key for key in spec.superclasses if name == key] or [
        key for key in spec.superclasses if name in key
    ]
    if len(matches) != 1:
        known = ", ".join(spec.superclasses) or f"none, {spec.title} has no superclasses"
        raise UserError(f"--normal_superclass {name!r} means {matches or 'nothing'}; known are {known}")
    return spec.superclasses[matches[0]]


def find_device(name: str, strict: bool) -> torch.device:
    """The device, or the CPU with a message; raises UserError for nonsense or if `strict`.

    On a GPU float32 then means float32, not the shorter TF32 of cuDNN's default, and convolutions are
    computed in the same order each time.
    """
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is no device; use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name!r} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cpu" or (device.index or 0) < torch.cuda.device_count():
        return device
    if strict:
        raise UserError(f"--device {name} is not there; leave out --strict_device to run on the CPU")
    log.warning("%s is not there; running on the CPU", name)
    return torch.device("cpu")


def summarize_all(runs: Sequence[Run], results: list[dict[str, Any]], classes: Sequence[str]) -> None:
    """The summaries of the seeds of each experiment, and of --each_class that of all classes."""
    several, per_class = runs[0].settings.runs, len(results) // max(1, len(classes))
    if several > 1:
        for k in range(0, len(runs), several):
            summarize(runs[k].folder.parent, results[k : k + several])
    if classes:
        parent = runs[0].folder.parents[several > 1]
        summarize(parent, results, [name for name in classes for _ in range(per_class)])


def summarize(folder: Path, results: list[dict[str, Any]], classes: Sequence[str] = ()) -> None:
    """Write summary.json with every run's AUC, mean, 95 % t-interval and standard deviation, and log it."""
    summary: dict[str, Any] = {"seeds": [result["seed"] for result in results]}
    if classes:
        summary["normal_classes"] = list(classes)
    for key in ("test_auc", "test_aupr"):
        values = [result[key] for result in results]
        summary[key] = values
        if None not in values:
            summary[f"{key}_mean"], summary[f"{key}_interval95"] = mean_interval(values)
            summary[f"{key}_std"] = deviation(values)
    write_json(folder / "summary.json", summary, indent=2)
    if "test_auc_mean" in summary:
        of = (
            f"{len(set(classes))} normal classes, {len(results)} runs" if classes else f"{len(results)} seeds"
        )
        log.info("test AUC over %s: %s", of, format_interval(summary["test_auc"], unit=" %"))
    log.info("summary: %s", folder / "summary.json")
