"""Many independent runs: each is a call of a script with a run folder of its own, made once.

Finished runs are never made again. The scheduler is a loop that keeps N processes busy; on a cluster Ray does
the same (ray_backend.py).
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kka.errors import UserError
from kka.runs import RESULTS, ROOT, read_results

POLL = 0.05  # seconds
GRACE = 10.0  # seconds that a process is given to end


@dataclass(frozen=True)
class Job:
    """One call of a script in src/."""

    folder: Path
    """its run folder, given to the script as --xp_path"""
    script: str
    words: tuple[str, ...]
    """its other flags"""
    after: "Job | None" = None
    """the job that must be finished first"""
    share: str = ""
    """mode of a loop that takes from the loop `after` what does not depend on the mode"""
    parts: tuple[tuple[str, ...], ...] = ()
    """what results.json must have for the run to be finished, each as keys from the outside in"""

    @property
    def command(self) -> list[str]:
        """The words behind python."""
        return [str(ROOT / "src" / self.script), *self.words, "--xp_path", str(self.folder)]

    @property
    def log(self) -> Path:
        """What the script prints."""
        return self.folder.with_name(f"{self.folder.name}.log")


def is_finished(job: Job) -> bool:
    """Whether the run folder has its results, and they can be read."""
    try:
        results = read_results(job.folder / RESULTS)
    except UserError:  # there are none, or a disk has damaged them
        return False
    return all(_has(results, keys) for keys in job.parts)


def set_aside(folder: Path) -> None:
    """Rename results that cannot be read: the script would take them for the end of its run."""
    path = folder / RESULTS
    if path.exists():
        try:
            read_results(path)
        except UserError:
            path.replace(path.with_name(f"damaged_{RESULTS}"))


def _has(value: object, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return True


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def python_path() -> str:
    """PYTHONPATH with this checkout first."""
    return os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))


def start(job: Job, threads: int, folder: Path) -> subprocess.Popen[bytes]:
    """Start the script with so many threads in the working folder; it ends when this process does."""
    if job.share and job.after:
        from kka.loop_folder import share_common  # torch, which nothing else here needs

        share_common(job.after.folder, job.folder, job.share)
    set_aside(job.folder)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads)), "PYTHONPATH": python_path()}
    with open(job.log, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "kka.tether", *job.command],
            stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=folder, env=environment,
        )  # fmt: skip


def log_end(job: Job) -> int:
    """Where the log ends now; what an earlier start has written lies before it."""
    return job.log.stat().st_size if job.log.exists() else 0


def failure(job: Job, code: int, since: int = 0) -> str:
    """Why a script that has ended gave no results, in one sentence; empty if it did.

    Its log is read from `since` on, or the reason could be that of an earlier start.
    """
    if is_finished(job):
        return ""
    with open(job.log, "rb") as file:
        file.seek(max(since, job.log.stat().st_size - 10_000))
        lines = file.read().decode(errors="replace").split("\n")
    told = [line for line in lines if line.startswith("error: ")]
    reason = told[-1].removeprefix("error: ") if told else f"it ended with code {code}; see {job.log}"
    return f"{job.folder}: {reason}"


def blocked(job: Job) -> str:
    """Why a job cannot start at all; empty if it can."""
    if job.after and not is_finished(job.after):
        return f"{job.folder}: it needs {job.after.folder}, which is not finished"
    return ""


def run_local(jobs: Sequence[Job], n_jobs: int, threads: int) -> Iterator[tuple[Job, str]]:
    """Run all jobs, `n_jobs` at once with `threads` each; yields each with the reason if it failed.

    However this ends, the running scripts end with it.
    """
    waiting, running = list(jobs), dict[Path, tuple[Job, subprocess.Popen[bytes], int]]()
    try:
        while waiting or running:
            unfinished = {job.folder for job in waiting} | running.keys()
            ready = [job for job in waiting if not (job.after and job.after.folder in unfinished)]
            for job in ready[: n_jobs - len(running)]:
                waiting.remove(job)
                if reason := blocked(job):
                    yield job, reason
                else:
                    since = log_end(job)
                    running[job.folder] = job, start(job, threads, Path.cwd()), since
            ended = [job for job, process, _ in running.values() if process.poll() is not None]
            for job in ended:
                _, process, since = running.pop(job.folder)
                yield job, failure(job, process.returncode, since)
            if not ended:
                time.sleep(POLL)
    finally:
        stop([process for _, process, _ in running.values()])


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes: as Ctrl-C does, then the hard way."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
