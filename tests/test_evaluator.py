"""--evaluator frozen of main.py: frozen features judge the anomalies, the detector is tested."""

import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from anomaly_sets import draw_set
from torchvision.models import get_model
from toy import read_json, refused, run_toy, snapshot, write_toy_set

from kka.anomalies import read_items
from kka.datasets import get_spec
from kka.datasets.task import read_anomalies
from kka.errors import UserError
from kka.evaluator import judging_run
from kka.judge import UpdateSettings, read_split, update_anomalies
from kka.run import load_detector
from kka.trained import views

SPEC = get_spec("garden")
N = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy garden, two drawn sets, weights of a backbone, and a run that frozen features split."""
    root = tmp_path_factory.mktemp("world")
    write_toy_set(root / "data", SPEC)
    draw_set(root / "set", N, 0)
    draw_set(root / "fresh", 5, 1)
    safetensors.torch.save_file(get_model("squeezenet1_0").state_dict(), root / "weights.safetensors")
    outcome = run(root, root / "run")
    assert outcome.code == 0, outcome.stderr
    return root


def run(root, folder, **flags):
    """main.py with frozen features as the judge."""
    given = {
        "dataset_name": "garden", "anomaly_path": root / "set", "evaluator": "frozen", "split": "crossfit",
        "evaluator_backbone": "squeezenet1_0", "evaluator_image_size": 48,
        "evaluator_backbone_weights": root / "weights.safetensors", **flags,
    }  # fmt: skip
    return run_toy(root / "data", folder, **given)


def test_the_run_is_the_detectors_and_the_split_is_by_frozen_features(world):
    inner = judging_run(world / "run")
    assert [read_json(folder / "model.json")["detector"] for folder in (world / "run", inner)] == [
        "deep_sad", "frozen",
    ]  # fmt: skip
    config = read_json(inner / "config.json")["settings"]
    assert (config["split"], config["image_size"], config["backbone"]) == ("crossfit", 48, "squeezenet1_0")
    assert len(read_split(inner).index) == N
    plain = run_toy(
        world / "data", world / "plain", dataset_name="garden", anomaly_path=world / "set", evaluator=None
    )
    assert plain.code == 0, plain.stderr
    scores = [read_json(world / name / "results.json")["test_scores"] for name in ("run", "plain")]
    assert scores[0] == scores[1]  # who judges does not change what is tested
    assert judging_run(world / "plain") == world / "plain"


def test_the_next_set_is_judged_by_frozen_features(world, tmp_path):
    settings = UpdateSettings(
        run=str(world / "run"), anomaly_path=str(world / "set"), fresh=str(world / "fresh"),
        out=str(tmp_path / "next"), mode="add",
    )  # fmt: skip
    _, share = update_anomalies(settings)
    fresh = read_items(world / "fresh")
    inner = judging_run(world / "run")
    threshold = read_json(inner / "model.json")["threshold"]
    assert [item.status == "hard" for item in fresh] == [item.score < threshold for item in fresh]
    assert share == np.mean([item.status == "hard" for item in fresh])
    images = read_anomalies(world / "fresh", SPEC)
    judge = load_detector(inner, torch.device("cpu"))
    scores = judge.score(views(inner, judge, images, "fresh anomalies"))
    assert [item.score for item in fresh] == pytest.approx(scores.tolist())


def test_an_unfinished_evaluator_is_named(world, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(world / "run", folder, ignore=lambda *_: ["evaluator"])  # killed before it began
    settings = UpdateSettings(
        run=str(folder), anomaly_path=str(world / "set"), fresh=str(world / "fresh"), out=str(tmp_path / "n")
    )
    with pytest.raises(UserError, match="evaluator is no finished run"):
        update_anomalies(settings)


def test_settings_of_the_evaluator_come_with_the_config(world, tmp_path):
    outcome = run_toy(
        world / "data", tmp_path / "again", dataset_name="garden", load_config=world / "run" / "config.json",
        user_dict=None,
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    again, first = (read_split(judging_run(folder)) for folder in (tmp_path / "again", world / "run"))
    assert again.scores.tolist() == first.scores.tolist()


def test_what_is_finished_stays(world, tmp_path):
    before = snapshot(world / "run")
    assert run(world, world / "run").code == 0
    assert snapshot(world / "run") == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"evaluator": None}, "--evaluator_backbone needs --evaluator frozen"),
        ({"evaluator_n_neighbors": 0}, "--evaluator_n_neighbors must be above 0"),
        ({"evaluator_backbone": "nope"}, "nope"),
        ({"evaluator": "own"}, "--evaluator"),
    ],
)
def test_bad_flags(world, tmp_path, flags, words):
    refused(run(world, tmp_path / "run", **flags), words)
