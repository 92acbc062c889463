"""The scheduler of many runs, and its deaths."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kka.runs import ROOT
from kka.sweep import Job, is_finished, run_local

# A script that counts its starts, and writes results unless it is told to fail or to wait.
SCRIPT = """
import json, os, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = flags["--xp_path"]
os.makedirs(folder, exist_ok=True)
with open(folder + "/starts", "a") as file:
    print(os.getpid(), os.environ["OMP_NUM_THREADS"], file=file)
time.sleep(float(flags.get("--wait", 0)))
if "--fail" in flags:
    print("error: " + flags["--fail"], file=sys.stderr)
    sys.exit(2)
with open(folder + "/results.json", "w") as file:
    json.dump({"test_auc": 0.5}, file)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def starts(job: Job) -> list[int]:
    """Process ids of all starts of SCRIPT for a job."""
    file = job.folder / "starts"
    return [int(line.split()[0]) for line in file.read_text().splitlines()] if file.exists() else []


def test_runs_are_made_in_parallel_once_and_share_the_cores(tmp_path, script):
    jobs = [Job(tmp_path / f"run{k}", script, ("--wait", "1.0")) for k in range(4)]
    began = time.monotonic()
    assert sorted(job.folder.name for job, reason in run_local(jobs, 4, 3) if not reason) == [
        "run0", "run1", "run2", "run3",
    ]  # fmt: skip
    assert time.monotonic() - began < 4.0
    assert all(is_finished(job) and len(starts(job)) == 1 for job in jobs)
    assert (tmp_path / "run0" / "starts").read_text().split()[1] == "3"


def test_a_failed_run_is_told_and_stops_only_those_that_need_it(tmp_path, script):
    bad = Job(tmp_path / "bad", script, ("--fail", "the disk is full"))
    crash = Job(tmp_path / "crash", script, ("--wait", "no number"))
    needs, good = Job(tmp_path / "needs", script, (), after=bad), Job(tmp_path / "good", script, ())
    reasons = {job.folder.name: reason for job, reason in run_local([bad, needs, crash, good], 1, 1)}
    assert reasons["bad"] == f"{tmp_path / 'bad'}: the disk is full"
    assert "it needs" in reasons["needs"]
    assert f"see {crash.log}" in reasons["crash"]
    assert reasons["good"] == ""
    assert starts(needs) == []


def test_a_reason_is_that_of_this_start_and_not_of_an_earlier_one(tmp_path, script):
    def reason(*words):
        job = Job(tmp_path / "run", script, words)
        return next(iter(run_local([job], 1, 1)))[1]

    assert reason("--fail", "the disk is full").endswith("the disk is full")
    assert "it ended with code 1" in reason("--wait", "no number")


def test_a_run_waits_for_the_one_it_needs(tmp_path, script):
    first = Job(tmp_path / "first", script, ("--wait", "0.5"))
    second = Job(tmp_path / "second", script, (), after=first)
    assert [job.folder.name for job, _ in run_local([first, second], 2, 1)] == ["first", "second"]


@pytest.mark.parametrize("parts", [(), (("test_auc",),)])
@pytest.mark.parametrize("content", ['{"test_auc": 0.', "[]", ""])
def test_results_that_cannot_be_read_are_made_again(tmp_path, script, parts, content):
    job = Job(tmp_path / "run", script, (), parts=parts)
    job.folder.mkdir()
    (job.folder / "results.json").write_text(content)
    assert not is_finished(job)
    assert [reason for _, reason in run_local([job], 1, 1)] == [""]
    assert is_finished(job)
    assert (job.folder / "damaged_results.json").read_text() == content


def gone(pid: int) -> bool:
    """Whether a process ends within ten seconds."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


SWEEP = """
import signal, sys
from pathlib import Path
from kka.sweep import Job, run_local
signal.signal(signal.SIGINT, signal.default_int_handler)  # some shells ignore it in the background
folder, script = Path(sys.argv[1]), sys.argv[2]
longs = [Job(folder / f"long{k}", script, ("--wait", "60")) for k in (0, 1)]
jobs = [Job(folder / "short", script, ()), *longs]
for job, reason in run_local(jobs, 2, 1):
    print(job.folder.name, reason, flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_runs_end_with_a_killed_sweep_and_finished_ones_stay(tmp_path, script, how):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    sweep = subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(tmp_path), script], env=environment, stderr=subprocess.DEVNULL
    )
    longs = [Job(tmp_path / f"long{k}", script, ()) for k in (0, 1)]
    until = time.monotonic() + 60
    while not all(starts(job) for job in longs) and time.monotonic() < until:
        time.sleep(0.05)
    sweep.send_signal(how)
    sweep.wait(30)
    assert all(gone(pid) for job in longs for pid in starts(job))
    short = Job(tmp_path / "short", script, ())
    assert is_finished(short)
    assert not any(is_finished(job) for job in longs)
