"""How long runs will take, from runs of the same kind that were made before."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kka.command_line import DEFAULT_DETECTOR, preset_values
from kka.datasets import get_spec
from kka.detectors import DETECTORS
from kka.errors import UserError
from kka.experiment import fill_epochs
from kka.files import is_number
from kka.finished import Finished, read_finished
from kka.plans import SCRIPTS, parser_of
from kka.runs import CONFIG, RESULTS
from kka.settings import make_settings
from kka.sweep import Job

Kind = tuple[str, ...]
"""script, detector, data set, for main.py whether there are generated anomalies, and SIZES"""

# Settings that decide most of the time; a preset is known by those that it gives.
SIZES = (
    "base_model", "base_epochs", "backbone", "net_name", "arch", "fine_tune", "image_size", "net_size",
    "pretrain", "n_epochs", "ae_n_epochs", "n_iterations", "inner_steps", "query_batches", "views",
    "rounds", "n_initial", "n_fresh", "n_evaluators", "n_base", "selections", "modes", "n_detectors",
)  # fmt: skip


def kind_of_job(job: Job) -> Kind:
    """What a job has in common with others that take as long.

    Raises UserError for a flag that has no such value.
    """
    words = dict(zip(job.words, job.words[1:], strict=False))
    detector = words.get("--detector", DEFAULT_DETECTOR)
    values = vars(parser_of(job.script, detector).parse_known_args(job.words)[0])
    values = {**preset_values(detector, values.get("preset")), **values}
    spec = get_spec(values["dataset_name"])
    own = fill_epochs(make_settings(DETECTORS[detector][0], values), spec)
    settings = {**asdict(make_settings(SCRIPTS[job.script], values)), **asdict(own), "detector": detector}
    return _kind(job.script, settings, settings.get("n_anomalies") != 0)


def kind_of_run(run: Finished) -> Kind:
    """The same of a finished run."""
    return _kind(run.script, run.settings, bool(run.results.get("n_generated")))


def _kind(script: str, settings: Mapping[str, Any], some: bool) -> Kind:
    sizes = []
    for name in SIZES:
        value = settings.get(name)
        sizes.append(f"{name} {list(value) if isinstance(value, tuple) else value}")
    generated = str(some) if script == "main.py" else ""
    return script, settings["detector"], get_spec(settings["dataset_name"]).name, generated, *sizes


def seconds_of(results: dict[str, Any]) -> float:
    """What a finished run took; of an older version only its training and its test."""
    if "rounds" in results:
        rounds = sum(sum(row["seconds"].values()) for row in results["rounds"])
        return rounds + results.get("seconds_beside", 0.0)
    return results["seconds"] if "seconds" in results else results["train_time"] + results["test_time"]


def median_seconds(folder: Path) -> dict[Kind, float]:
    """Median seconds of all finished runs below a folder, by kind."""
    times: dict[Kind, list[float]] = {}
    for path in folder.glob(f"**/{RESULTS}"):
        if (path.parent / CONFIG).exists():
            try:
                run = read_finished(path.parent)
                seconds = seconds_of(run.results)  # first, or a kind without any time would stay
            except (UserError, AttributeError, KeyError, TypeError):
                continue  # no run, or a damaged one: the table names it
            if is_number(seconds):
                times.setdefault(kind_of_run(run), []).append(seconds)
    return {kind: statistics.median(values) for kind, values in times.items()}


def total(jobs: Sequence[Job], known: dict[Kind, float], n_jobs: int) -> str:
    """A sentence on all jobs together."""
    times = [known.get(kind_of_job(job)) for job in jobs]
    seconds = sum(time for time in times if time is not None) / n_jobs
    unknown = sum(time is None for time in times)
    if jobs and unknown == len(jobs):
        return f"{len(jobs)} runs to make, {n_jobs} at once: no estimate yet, as none like them is finished"
    text = f"{len(jobs)} runs to make: about {duration(seconds)}, {n_jobs} at once"
    return text + (f", and {unknown} without an estimate yet" if unknown else "")


def duration(seconds: float) -> str:
    """90 -> "1.5 min"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
