"""Runs on a Ray cluster: plain tasks with retries, so that a lost node costs only its unfinished runs.

Every node needs this checkout, the data and the folder of the runs at the same paths.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kka.errors import UserError
from kka.sweep import Job, blocked, failure, is_finished, log_end, start, stop

LOCKED = "is in use by"  # what a run says whose folder the process of a lost node still holds
PATIENCE = 120.0  # seconds until that one must be gone


def run_on_ray(
    jobs: Sequence[Job], gpus: float, cpus: int, retries: int, address: str | None
) -> Iterator[tuple[Job, str]]:
    """Run all jobs on the cluster at `address` (None: one on this machine); yields each as it ends.

    Raises UserError naming the extra if Ray is not installed, or if the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--backend ray needs Ray; install it with pip install -e '.[ray]'") from None
    try:
        ray.init(address=address, log_to_driver=False)  # workers get the sys.path of this process
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster at RAY_ADDRESS {address} ({error})") from None
    try:
        task = ray.remote(num_gpus=gpus, num_cpus=cpus, max_retries=retries)(make)
        waiting = {}
        promised: dict[Path, ray.ObjectRef] = {}
        for job in jobs:  # a task that gets the promise of another one starts behind it
            before = promised.get(job.after.folder) if job.after else None
            reference = promised[job.folder] = task.remote(job, cpus, Path.cwd(), before)
            waiting[reference] = job
        while waiting:
            for reference in ray.wait(list(waiting), num_returns=1)[0]:
                job = waiting.pop(reference)
                try:
                    yield job, ray.get(reference)
                except ray.exceptions.RayError as error:
                    yield job, f"{job.folder}: lost by Ray ({type(error).__name__})"
    finally:
        ray.shutdown()


def make(job: Job, threads: int, folder: Path, before: str | None = None) -> str:
    """One run, made unless it is finished; returns why it failed, or nothing."""
    until = time.monotonic() + PATIENCE
    while True:
        if is_finished(job):
            return ""
        if reason := blocked(job):
            return reason
        since = log_end(job)
        process = start(job, threads, folder)
        try:
            reason = failure(job, process.wait(), since)
        finally:
            stop([process])
        if LOCKED not in reason or time.monotonic() > until:
            return reason
        time.sleep(2)
