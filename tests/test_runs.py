"""Run folders: repeated, refused, locked, continued; nothing of the user's is lost."""

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from toy import MAIN, image_path, read_json, refused, results, run_toy, snapshot, toy_flags

from kka.runs import LOCK, claim, compare, fingerprint, locked


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def files(folder):
    """What is in a folder, but for the lock."""
    return {name: data for name, data in snapshot(folder).items() if name != LOCK}


def test_what_a_run_leaves_behind(finished):
    names = {
        "ae_results.json",
        "config.json",
        "d_samples.json",
        "e_samples.json",
        "epoch_results.json",
        "log.txt",
    }
    names |= {"metrics.jsonl", "model.json", "model.safetensors", "results.json", LOCK}
    assert set(snapshot(finished)) == names
    config = read_json(finished / "config.json")
    assert config["settings"]["n_epochs"] == 1
    assert config["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "test AUC" in (finished / "log.txt").read_text()


def test_same_command_again_finds_the_run_finished(toy_set, folder):
    before = files(folder)
    outcome = run_toy(toy_set, folder)
    assert outcome.code == 0
    assert f"{folder} is finished" in outcome.log
    assert files(folder) == before


def test_place_and_speed_are_no_other_settings(toy_set, folder, tmp_path):
    data = shutil.copytree(toy_set, tmp_path / "elsewhere")
    outcome = run_toy(data, folder, n_jobs_dataloader=2, checkpoint_every=0, anomaly_path=data / "0")
    assert "is finished" in outcome.log


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ({"n_epochs": 2}, "n_epochs 1 there, 2 now"),
        ({"seed": 1, "eta": 2}, "eta 1.0 there, 2.0 now; seed 0 there, 1 now"),
        ({"n_anomalies": 3}, "n_anomalies -1 there, 3 now"),
        ({"user_dict": '{"0": [1, 0], "1": [1, 2]}'}, "data "),
    ],
)
def test_other_settings_are_refused_with_the_difference_and_replaced_if_asked(
    toy_set, folder, flags, difference
):
    before = files(folder)
    refused(run_toy(toy_set, folder, **flags), folder, difference, "--overwrite")
    assert files(folder) == before
    (folder / "old").mkdir()
    outcome = run_toy(toy_set, folder, overwrite=[], **flags)
    assert outcome.code == 0, outcome.stderr
    assert not (folder / "old").exists()
    assert files(folder) != before


def test_changed_data_are_refused(toy_set, folder, tmp_path):
    data = shutil.copytree(toy_set, tmp_path / "data")
    shutil.copy(image_path(data, 2), image_path(data, 3, split="test"))
    refused(run_toy(data, folder), folder, "other settings (data ")


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_of_something_else_is_refused_and_left_alone(toy_set, tmp_path, overwrite):
    folder = tmp_path / "thesis"
    (folder / "figures").mkdir(parents=True)
    (folder / "chapter.tex").write_text("years of work")
    refused(run_toy(toy_set, folder, overwrite=overwrite), folder, "holds other files", "no run")
    assert files(folder) == {"chapter.tex": b"years of work"}
    assert (folder / "figures").is_dir()


def test_refused_folder_gets_no_lock_file(toy_set, tmp_path):
    (tmp_path / "chapter.tex").touch()
    refused(run_toy(toy_set, tmp_path), "holds other files")
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("config", ['{"model_type": "glm4"}', "[]"])
def test_config_of_something_else_is_no_run(toy_set, tmp_path, overwrite, config):
    folder = tmp_path / "glm4"
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "weights.bin").write_bytes(b"9 GB")
    refused(run_toy(toy_set, folder, overwrite=overwrite), folder)
    assert files(folder) == {"config.json": config.encode(), "weights.bin": b"9 GB"}


def test_data_folder_is_no_run_folder(toy_set, tmp_path):
    data = shutil.copytree(toy_set, tmp_path / "data")
    refused(run_toy(data, data, overwrite=[]), "holds other files")
    assert files(data) == files(toy_set)


def test_leftover_of_a_killed_process_is_no_other_file(toy_set, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.x.tmp").touch()
    assert run_toy(toy_set, tmp_path / "run").code == 0
    assert not list((tmp_path / "run").glob(".*"))


def hold(folder, ready, release):
    with locked(folder):
        ready.set()
        release.wait(30)


def test_second_process_is_refused_until_the_first_is_gone(toy_set, folder):
    before, fork = files(folder), multiprocessing.get_context("fork")
    ready, release = fork.Event(), fork.Event()
    first = fork.Process(target=hold, args=(folder, ready, release))
    first.start()
    assert ready.wait(30)
    refused(
        run_toy(toy_set, folder, n_epochs=2, overwrite=[]), f"{folder} is in use by process {first.pid} on "
    )
    assert files(folder) == before
    first.kill()
    first.join()
    outcome = run_toy(toy_set, folder)
    assert "is finished" in outcome.log


def test_lock_says_who_has_it(folder):
    (folder / LOCK).write_text("process 1 on a machine that is gone")
    with locked(folder):
        assert (folder / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_folder_that_cannot_be_made(toy_set, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder, problem in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "run", "cannot be written"),
    ):
        refused(run_toy(toy_set, folder), f"the run folder {folder} {problem}", "--xp_path")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_read_only_folder(toy_set, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(run_toy(toy_set, tmp_path / "locked" / "run"), "cannot be written (Permission denied)")


def test_permission_denied_in_the_middle_is_one_sentence(toy_set, tmp_path, monkeypatch):
    def denied(source, target):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(os, "replace", denied)
    outcome = run_toy(toy_set, tmp_path / "run")
    refused(outcome, f"no permission to write {tmp_path / 'run' / 'config.json'}")


@pytest.mark.parametrize("name", ["a run with spaces", "übung_花_🌼", "-x", "a'b\"c;$(d)"])
def test_any_folder_name_works(toy_set, tmp_path, finished, name):
    data = shutil.copytree(toy_set, tmp_path / name / "data")
    outcome = run_toy(data, tmp_path / name / "run")
    assert outcome.code == 0, outcome.stderr
    assert results(tmp_path / name / "run") == results(finished)


@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
def test_a_folder_name_in_another_encoding_works(toy_set, tmp_path, finished):
    folder = tmp_path / os.fsdecode(b"gr\xfcn")
    data = shutil.copytree(toy_set, folder / "data")
    # In a process of its own: pytest-xdist cannot send the name, which is in the log, from one to another.
    command = [sys.executable, str(MAIN), *toy_flags(data, folder / "run")]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert results(folder / "run") == results(finished)


def test_default_folder_is_made_from_the_settings(toy_set, checkout):
    for flags in ({}, {"seed": 1}, {"n_anomalies": 3}, {"name": "mine"}, {}):
        assert run_toy(toy_set, None, **flags).code == 0
    names = sorted(path.name for path in (checkout / "log" / "ucm_caption").iterdir())
    assert len(names) == 4
    assert names[-1] == "mine"
    starts = ["deep_sad_1_anomalies3_seed0_", "deep_sad_1_anomalies8_seed0_", "deep_sad_1_anomalies8_seed1_"]
    assert all(name.startswith(start) for name, start in zip(names, starts, strict=False))


def test_several_seeds_do_not_mix_with_a_single_run(toy_set, folder):
    before = files(folder)
    refused(run_toy(toy_set, folder, runs=2), folder, "holds a single run", "--xp_path")
    assert files(folder) == before


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def interrupt(folder, checkpoint):
    """Make a finished run look like one that was killed after this checkpoint."""
    (folder / "results.json").unlink()
    if isinstance(checkpoint, bytes):
        (folder / "checkpoint.pt").write_bytes(checkpoint)
    else:
        torch.save(checkpoint, folder / "checkpoint.pt")


@pytest.mark.parametrize("checkpoint", [b"", b"<html>", {"schema": 1, "parts": Payload()}, Payload()])
def test_useless_checkpoint_starts_the_run_anew(toy_set, folder, finished, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    interrupt(folder, checkpoint)
    outcome = run_toy(toy_set, folder)
    assert outcome.code == 0, outcome.stderr
    assert f"{folder / 'checkpoint.pt'} is damaged" in outcome.log
    assert results(folder) == results(finished)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("checkpoint", [{"schema": 0}, [1], {"schema": 1, "fingerprint": "other"}])
def test_checkpoint_of_another_version_or_run_is_refused(toy_set, folder, finished, checkpoint):
    interrupt(folder, checkpoint)
    refused(run_toy(toy_set, folder), folder / "checkpoint.pt", "--overwrite")
    assert (folder / "checkpoint.pt").exists()
    assert run_toy(toy_set, folder, overwrite=[]).code == 0
    assert results(folder) == results(finished)


def test_claim_and_compare(tmp_path):
    assert claim(tmp_path, {"lr": 1}, overwrite=False) is False
    assert (
        compare({"lr": 1, "gone": 2}, {"lr": 3, "new": 4})
        == "gone 2 there, None now; lr 1 there, 3 now; new None there, 4 now"
    )
    assert compare({"lr": 1}, {"lr": 1}) == ""
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})
