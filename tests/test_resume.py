"""Killed at any point, the same command continues and ends with the same numbers."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from toy import write_toy_set

from kka.errors import UserError, run_script
from kka.journal import Journal

MAIN = Path(__file__).parent.parent / "src" / "main.py"
EPOCHS = 6
TIMES = ("seconds", "train_time", "test_time", "peak_mib")


def start(root, folder):
    """A real process; it checkpoints after each epoch."""
    flags = {
        "--dataset_name": "ucm_caption", "--data_path": root, "--xp_path": folder, "--device": "cpu",
        "--user_dict": json.dumps({"0": [1, 0], "1": [1, 2, 3]}), "--num_threads": 1, "--split": "crossfit",
        "--n_epochs": EPOCHS, "--ae_n_epochs": EPOCHS, "--batch_size": 8, "--ae_batch_size": 8,
        "--checkpoint_every": 0, "--test_every": 1,
    }  # fmt: skip
    command = [sys.executable, str(MAIN), *(str(word) for pair in flags.items() for word in pair)]
    # A test run in the background of a shell ignores Ctrl-C, and so would its children.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=heed)


def finish(process):
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr.decode()


def rows(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill_when(process, condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def read(folder, name):
    value = json.loads((folder / name).read_text())
    return {k: v for k, v in value.items() if k not in TIMES} if isinstance(value, dict) else value


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_toy_set(root)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finish(start(root, folder))
    return root, folder


def test_killed_in_every_phase_ends_with_the_same_numbers(uninterrupted, tmp_path):
    root, whole = uninterrupted
    folder = tmp_path / "killed"
    moments = [
        lambda: rows(folder) >= 3,  # pre-training
        lambda: rows(folder) >= EPOCHS + 2,  # training
        lambda: rows(folder / "crossfit_1") >= 2,  # after the test, in the split
    ]
    for moment in moments:
        kill_when(start(root, folder), moment)
        assert not (folder / "results.json").exists()
    finish(start(root, folder))
    assert (folder / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for name in ("results.json", "epoch_results.json", "ae_results.json", "d_samples.json", "e_samples.json"):
        assert read(folder, name) == read(whole, name)
    assert not list(folder.glob("checkpoint*"))


def test_interrupted_by_ctrl_c_says_so_and_continues(uninterrupted, tmp_path):
    root, whole = uninterrupted
    for attempt in range(5):  # on busy cores the whole run may be over before the signal arrives
        folder = tmp_path / f"run_{attempt}"
        process = start(root, folder)
        while rows(folder) < 2:
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        if process.returncode != 0:
            break
    assert process.returncode == 130, stderr.decode()
    assert b"the same command continues" in stderr
    assert b"Traceback" not in stderr
    finish(start(root, folder))
    assert read(folder, "results.json") == read(whole, "results.json")


def test_ctrl_c_inside_a_library_that_fails_then_is_still_one(capsys):
    def main():
        try:
            raise KeyboardInterrupt
        finally:  # torch.save, interrupted in the middle of a file
            raise RuntimeError("unexpected pos 222272 vs 222168")

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 130
    assert "the same command continues" in capsys.readouterr().err


def test_after_ctrl_c_nobody_is_told_to_overwrite_what_is_there(capsys, monkeypatch):
    def main():
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["main.py", "--overwrite", "--seed", "1"])
    with pytest.raises(SystemExit):
        run_script(main)
    assert "the same command without --overwrite continues" in capsys.readouterr().err


def parts():
    return {"net": nn.Linear(2, 1)}


def run_epochs(journal, n_epochs, stop=None):
    done = []
    for epoch in journal.epochs("train", n_epochs, parts()):
        journal.record("train", epoch, loss=float(epoch))
        done.append(epoch)
        if epoch == stop:
            break
    return done


def test_journal_continues_after_its_last_checkpoint(tmp_path):
    assert run_epochs(Journal(tmp_path, every=0), 5, stop=2) == [0, 1, 2]
    journal = Journal(tmp_path, every=0)
    assert journal.series("train", "loss") == [0.0, 1.0]  # epoch 2 was not checkpointed
    assert run_epochs(journal, 5) == [2, 3, 4]
    assert run_epochs(Journal(tmp_path, every=0), 5) == []


def test_truncated_checkpoint_falls_back_to_the_one_before(tmp_path):
    run_epochs(Journal(tmp_path, every=0), 5, stop=3)
    newest = tmp_path / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:200])
    assert run_epochs(Journal(tmp_path, every=0), 5) == [2, 3, 4]


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_pickle_payload_in_a_checkpoint_is_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"schema": 1, "parts": Payload()}, tmp_path / "checkpoint.pt")
    assert run_epochs(Journal(tmp_path, every=0), 2) == [0, 1]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("key", "value"), [("schema", 0), ("fingerprint", "other")])
def test_checkpoint_of_another_version_or_run_is_refused(tmp_path, key, value):
    run_epochs(Journal(tmp_path, every=0, fingerprint="ours"), 3)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save({**state, key: value}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="overwrite"):
        Journal(tmp_path, fingerprint="ours")


def test_time_adds_up_over_interruptions(tmp_path):
    journal = Journal(tmp_path, every=0)
    for epoch in journal.epochs("train", 3, parts()):
        time.sleep(0.02)
        if epoch == 1:
            break
    again = Journal(tmp_path, every=0)
    assert again.seconds("train") >= 0.02
    for _ in again.epochs("train", 3, parts()):
        time.sleep(0.02)
    assert again.seconds("train") >= 0.06
    assert again.elapsed >= again.seconds("train")
    for _ in again.epochs("other", 1, parts()):
        time.sleep(0.02)
    time.sleep(0.02)
    last = Journal(tmp_path, every=0, began=time.monotonic() - 5)
    assert 5.08 <= last.elapsed <= 5 + again.elapsed  # of all starts and phases, with what no phase has
