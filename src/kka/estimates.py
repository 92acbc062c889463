"""How long runs will take, from runs of the same kind that were made before."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kka.errors import UserError
from kka.finished import Finished, read_finished
from kka.runs import CONFIG, RESULTS
from kka.sweep import Job

Kind = tuple[str, ...]
"""script, detector, data set, and for main.py whether there are generated anomalies"""


def kind_of_job(job: Job) -> Kind:
    """What a job has in common with others that take as long."""
    words = dict(zip(job.words, job.words[1:], strict=False))
    some = str(words.get("--n_anomalies") != "0") if job.script == "main.py" else ""
    return job.script, words.get("--detector", "deep_sad"), words["--dataset_name"], some


def kind_of_run(run: Finished) -> Kind:
    """The same of a finished run."""
    s = run.settings
    some = str(bool(run.results.get("n_generated"))) if run.script == "main.py" else ""
    return run.script, str(s.get("detector")), str(s.get("dataset_name")), some


def seconds_of(results: dict[str, Any]) -> float:
    """What a finished run took."""
    if "rounds" in results:
        return sum(sum(row["seconds"].values()) for row in results["rounds"])
    return results["seconds"] if "sets" in results else results["train_time"] + results["test_time"]


def median_seconds(folder: Path) -> dict[Kind, float]:
    """Median seconds of all finished runs below a folder, by kind."""
    times: dict[Kind, list[float]] = {}
    for path in folder.glob(f"**/{RESULTS}"):
        if (path.parent / CONFIG).exists():
            try:
                run = read_finished(path.parent)
                seconds = float(seconds_of(run.results))  # first, or a kind without any time would stay
                times.setdefault(kind_of_run(run), []).append(seconds)
            except (UserError, KeyError, TypeError):
                continue  # no run, or a damaged one: the table names it
    return {kind: statistics.median(values) for kind, values in times.items()}


def total(jobs: Sequence[Job], known: dict[Kind, float], n_jobs: int) -> str:
    """A sentence on all jobs together."""
    times = [known.get(kind_of_job(job)) for job in jobs]
    seconds = sum(time for time in times if time is not None) / n_jobs
    unknown = sum(time is None for time in times)
    text = f"{len(jobs)} runs to make: about {duration(seconds)}, {n_jobs} at once"
    return text + (f", and {unknown} without an estimate yet" if unknown else "")


def duration(seconds: float) -> str:
    """90 -> "1.5 min"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
