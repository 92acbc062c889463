"""--report_to: TensorBoard and Weights & Biases show what metrics.jsonl says, once, also after a kill."""

import json
import shutil
import sys
import types

import pytest
from test_vmap_seeds import FAST, fitted
from torch import nn
from toy import read_json, refused, run_toy

import kka.tracking
from kka.detectors.deep_sad import DeepSADSettings
from kka.journal import Journal
from kka.tracking import EVENTS, Tracker, is_installed

needs_tensorboard = pytest.mark.skipif(
    not is_installed("tensorboard"), reason="tensorboard is not installed: pip install -e '.[tensorboard]'"
)


def events(folder):
    """{(tag, step): value} of the only event file; no step may be there twice."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (path,) = folder.glob(EVENTS)
    found = {}
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            assert (value.tag, event.step) not in found
            found[value.tag, event.step] = value.tensor.float_val[0]
    return found


def metrics(folder):
    """The same from metrics.jsonl."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        phase, epoch = row.pop("phase"), row.pop("epoch")
        found |= {(f"{phase}/{key}", epoch): value for key, value in row.items() if value is not None}
    return found


@needs_tensorboard
def test_tensorboard_by_default_shows_the_metrics(toy_set, tmp_path, monkeypatch):
    monkeypatch.setattr(kka.tracking, "DEFAULT", ("tensorboard",))
    folder = tmp_path / "run"
    outcome = run_toy(toy_set, folder, n_epochs=3, test_every=2, split="crossfit")
    assert outcome.code == 0, outcome.stderr
    assert events(folder) == pytest.approx(metrics(folder))
    assert ("train/test_auc", 1) in events(folder)
    assert events(folder / "crossfit_1") == pytest.approx(metrics(folder / "crossfit_1"))


@needs_tensorboard
def test_every_seed_trained_together_has_its_own(tmp_path):
    from kka.detectors.deep_sad_together import Training
    from kka.run import fit
    from test_deep_sad import toy_train_set  # isort: skip

    detectors, _ = fitted(DeepSADSettings(**{**FAST, "pretrain": False, "n_epochs": 0}), True)
    trainings = []
    for k, detector in enumerate(detectors):
        folder = tmp_path / str(k)
        folder.mkdir()
        detector.settings = DeepSADSettings(**{**FAST, "pretrain": False})
        journal = Journal(folder, tracker=Tracker(folder, ("tensorboard",), {}))
        trainings.append(Training(detector, toy_train_set(seed=k), journal))
    fit(trainings)
    shown = [events(tmp_path / str(k)) for k in range(len(trainings))]
    assert shown == [pytest.approx(metrics(tmp_path / str(k))) for k in range(len(trainings))]
    assert shown[0] != shown[1]


@needs_tensorboard
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_killed_run_neither_loses_nor_repeats_a_step(tmp_path, stop):
    def start(stop=None):
        journal = Journal(tmp_path, every=0, tracker=Tracker(tmp_path, ("tensorboard",), {}))
        for epoch in journal.epochs("train", 5, {"net": nn.Linear(1, 1)}):
            journal.record("train", epoch, loss=float(epoch), test_auc=None)
            if epoch == stop:
                return  # nothing is flushed or closed
        if stop is None:
            journal.close()

    start(stop)
    start()
    assert events(tmp_path) == metrics(tmp_path) == {("train/loss", k): float(k) for k in range(5)}


def test_none_writes_no_event_file_and_decides_nothing(toy_set, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    outcome = run_toy(toy_set, folder, report_to="none")
    assert "is finished" in outcome.log
    assert run_toy(toy_set, tmp_path / "other", report_to="none").code == 0
    assert not list((tmp_path / "other").glob(EVENTS))
    assert (
        read_json(folder / "config.json")["identity"] == read_json(tmp_path / "other/config.json")["identity"]
    )


class FakeRun:
    """What wandb.init gives, as far as it is used."""

    def __init__(self, calls):
        self.calls = calls

    def log(self, values, step):
        self.calls.append((values, step))

    def finish(self):
        self.calls.append("finish")


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, which needs a server; WANDB_MODE=offline works with the real one."""
    module, spec = types.ModuleType("wandb"), types.SimpleNamespace(name="wandb")
    module.__spec__, module.calls, module.started = spec, [], []
    module.init = lambda **words: module.started.append(words) or FakeRun(module.calls)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_the_rows_and_the_identity(toy_set, tmp_path, wandb):
    folder = tmp_path / "run"
    outcome = run_toy(toy_set, folder, n_epochs=2, report_to="wandb")
    assert outcome.code == 0, outcome.stderr
    (words,) = wandb.started
    assert words["config"] == read_json(folder / "config.json")["identity"] | {
        key: tuple(value) for key, value in words["config"].items() if isinstance(value, tuple)
    }
    assert wandb.calls.pop() == "finish"
    assert [step for _, step in wandb.calls] == [0, 1, 2]
    shown = {(key, v["epoch"]): v[key] for v, _ in wandb.calls for key in v if key != "epoch"}
    assert shown == metrics(folder)


@pytest.mark.parametrize(
    ("names", "part"),
    [
        ("comet", "it is 'comet'"),
        (["none", "tensorboard"], "no other"),
        ("wandb", "pip install -e '.[wandb]'"),
    ],
)
def test_bad_trackers_are_refused(toy_set, tmp_path, monkeypatch, names, part):
    monkeypatch.setattr("kka.tracking.is_installed", lambda name: name != "wandb")
    refused(run_toy(toy_set, tmp_path / "run", report_to=names), "--report_to", part)
    assert not (tmp_path / "run").exists()
