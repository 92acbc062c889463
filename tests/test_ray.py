"""Runs on a real Ray cluster of two nodes on this machine, one of which is killed in the middle."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from test_sweep import SCRIPT, starts

from kka.sweep import Job, is_finished

ray = pytest.importorskip("ray", reason="Ray is not installed; pip install -e '.[ray]'")


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    quick = {
        "health_check_period_ms": 2000,
        "health_check_timeout_ms": 3000,
        "health_check_failure_threshold": 3,
    }
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "_system_config": quick})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def parent(pid: int) -> int:
    """The process that started another one."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def raylet(pid: int) -> str:
    """The node that a worker of Ray, or what it has started, belongs to."""
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return next(each.partition("=")[2] for each in variables if each.startswith("RAY_RAYLET_PID="))


def alive_on(node, jobs: list[Job]) -> dict[str, int]:
    """Runs that a node is making: name and process id of the worker."""
    own, found = str(node.all_processes["raylet"][0].process.pid), {}
    for job in jobs:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, IndexError):
            pid = starts(job)[0]
            if raylet(pid) == own and not is_finished(job):
                found[job.folder.name] = parent(pid)
    return found


def kill_node(cluster, node, workers: dict[str, int]) -> None:
    """What a lost machine takes with it: the node and its workers."""
    cluster.remove_node(node, allow_graceful=False)
    for worker in workers.values():
        with contextlib.suppress(ProcessLookupError):  # it has followed its node
            os.kill(worker, signal.SIGKILL)


def test_runs_of_a_lost_node_are_made_again_and_finished_ones_never(cluster, tmp_path):
    from kka.ray_backend import run_on_ray

    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    second = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    short = [Job(tmp_path / f"short{k}", str(script), ()) for k in range(2)]
    long = [Job(tmp_path / f"long{k}", str(script), ("--wait", "8")) for k in range(4)]
    behind = Job(tmp_path / "behind", str(script), (), after=long[0])
    failing = Job(tmp_path / "failing", str(script), ("--fail", "no room"))
    done = Job(tmp_path / "done", str(script), ())
    done.folder.mkdir()
    (done.folder / "results.json").write_text("{}")

    lost: dict[str, int] = {}

    def lose_a_node() -> None:
        until = time.monotonic() + 300
        while not lost and time.monotonic() < until:
            time.sleep(0.1)
            if all(map(is_finished, short)):
                lost.update(alive_on(second, long))
        kill_node(cluster, second, lost)

    thread = threading.Thread(target=lose_a_node)
    thread.start()
    jobs = [done, *short, failing, *long, behind]
    reasons = {job.folder.name: reason for job, reason in run_on_ray(jobs, 0, 1, 3, cluster.address)}
    thread.join()
    assert reasons.pop("failing") == f"{tmp_path / 'failing'}: no room"
    assert set(reasons) == {job.folder.name for job in jobs} - {"failing"}
    assert not any(reasons.values()), reasons
    assert all(is_finished(job) for job in [*short, *long, behind])
    assert not starts(done)
    assert [len(starts(job)) for job in short] == [1, 1]
    assert lost, "the node that was killed had no run"
    assert all(len(starts(job)) > 1 for job in long if job.folder.name in lost)
    for job in long:
        assert all(not Path(f"/proc/{pid}").exists() for pid in starts(job))
