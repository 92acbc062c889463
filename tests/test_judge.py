"""create/update_anomalies.py: fresh images before a trained evaluator, and the next set."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anomaly_sets import draw_set
from PIL import Image
from toy import read_json, run_toy, snapshot, write_damaged, write_toy_set

from kka.anomalies import live, read_items
from kka.datasets import get_spec
from kka.datasets.images import read_like
from kka.judge import hard_share, judge_folder, read_split
from kka.run import load_detector, load_native

SCRIPT = Path(__file__).resolve().parents[1] / "create" / "update_anomalies.py"
SPEC = get_spec("garden")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy data set, a drawn anomaly set with the run that was trained on it, and fresh images."""
    root = tmp_path_factory.mktemp("world")
    write_toy_set(root / "data", SPEC)
    for name, n, seed in (("set", 6, 0), ("fresh", 5, 1)):
        draw_set(root / name, n, seed)
    outcome = run_toy(
        root / "data", root / "run", dataset_name="garden", anomaly_path=root / "set", n_epochs=2
    )
    assert outcome.code == 0, outcome.stderr
    return root


@pytest.fixture
def call(world, tmp_path, monkeypatch, capsys):
    """The script in this process; returns exit code, stdout and stderr."""

    def run(**flags):
        given = {
            "dataset_name": "garden", "run": world / "run", "anomaly_path": world / "set",
            "fresh": world / "fresh", "out": tmp_path / "next", "mode": "add", **flags,
        }  # fmt: skip
        words = [str(word) for name, value in given.items() if value for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_hard_ones_enter_by_the_threshold_of_the_run(call, world, tmp_path):
    code, out, err = call()
    assert code == 0, err
    fresh, threshold = read_items(world / "fresh"), read_json(world / "run" / "model.json")["threshold"]
    assert [item.status == "hard" for item in fresh] == [item.score < threshold for item in fresh]
    n_hard = sum(item.status == "hard" for item in fresh)
    assert hard_share(world / "fresh") == n_hard / 5
    assert len(live(read_items(tmp_path / "next"))) == 6 + n_hard
    assert f"{100 * n_hard / 5:.1f} % of the images" in out
    assert f"{n_hard} added, 0 left" in out


def test_a_run_of_swapped_colours_judges_swapped_colours(world, tmp_path):
    outcome = run_toy(
        world / "data", tmp_path / "run", dataset_name="garden", anomaly_path=world / "set", n_epochs=2,
        bgr=True, pretrain=False, ae_n_epochs=None, ae_batch_size=None,
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    judge_folder(tmp_path / "run", world / "fresh", SPEC, torch.device("cpu"))
    scores = [item.score for item in read_items(world / "fresh")]
    paths = [world / "fresh" / item.file for item in read_items(world / "fresh")]
    detector, native = load_detector(tmp_path / "run", torch.device("cpu")), load_native(tmp_path / "run")
    pictures = [read_like(path, native).resize((32, 32), Image.Resampling.BILINEAR) for path in paths]
    swapped = np.stack([np.asarray(picture)[..., ::-1] for picture in pictures]).transpose(0, 3, 1, 2)
    expected = detector.score(torch.from_numpy(np.ascontiguousarray(swapped)))
    assert scores == pytest.approx(expected.tolist(), rel=1e-5)


def test_swapped_folders_are_told_by_their_captions(call, world):
    code, _, err = call(anomaly_path=world / "fresh", fresh=world / "set")
    assert code == 2
    assert "give the folder that the run was trained on" in err
    assert {item.status for item in read_items(world / "fresh")} <= {"new", "hard", "easy"}


def test_the_data_set_is_that_of_the_run(call, tmp_path):
    assert call(dataset_name=None)[0] == 0
    assert (tmp_path / "next" / "text_caption.json").exists()


def test_an_image_in_both_lists_of_the_official_split_is_hard(tmp_path):
    rows = [[[index, 1, 0.5], ["a"]] for index in range(3)]
    (tmp_path / "d_samples.json").write_text(json.dumps(rows[1:2]))
    (tmp_path / "e_samples.json").write_text(json.dumps(rows))
    (tmp_path / "model.json").write_text('{"threshold": 0.6}')
    split = read_split(tmp_path)
    assert split.index == (0, 1, 2)
    assert (split.hard.tolist(), split.easy.tolist()) == ([False, True, False], [0, 2])


def test_the_current_set_gets_the_split_of_the_run(call, world):
    assert call()[0] == 0
    hard = {row[0][0] for row in read_json(world / "run" / "d_samples.json")}
    statuses = [item.status for item in read_items(world / "set")]
    assert statuses == ["hard" if k in hard else "easy" for k in range(6)]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ({"run": None}, "--run DIR is needed"),
        ({"out": None}, "--out DIR is needed"),
        ({"run": "nowhere"}, "--run nowhere is no finished run"),
        ({"mode": "swap"}, "invalid choice: 'swap'"),
        ({"dataset_name": "roses"}, "unknown data set 'roses'"),
        ({"dataset_name": "ucm_caption"}, "is of Garden (drawn flowers); leave the flag out"),
        ({"device": "foo"}, "--device 'foo' is no device"),
        ({"anomaly_path": "nope"}, "--anomaly_path nope has no images in a manifest.jsonl; give a folder"),
        ({"fresh": "nope"}, "--fresh nope has no images in a manifest.jsonl; give a folder"),
    ],
)
def test_bad_input_is_one_sentence(call, flags, part, tmp_path):
    code, _, err = call(**flags)
    assert code == 2
    assert part in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "next").exists()


def test_the_current_set_is_not_judged_as_the_fresh_one(call, world, tmp_path):
    before = snapshot(world / "set")
    code, _, err = call(fresh=world / "set")
    assert code == 2
    assert f"--fresh {world / 'set'} is the current set" in err
    assert snapshot(world / "set") == before


def test_where_no_easy_one_can_leave_no_hard_one_comes_in(call, world, tmp_path):
    run = shutil.copytree(world / "run", tmp_path / "all_hard")
    rows = [row for name in ("d_samples.json", "e_samples.json") for row in read_json(run / name)]
    card = read_json(run / "model.json")
    for name, value in (
        ("d_samples.json", rows), ("e_samples.json", []), ("model.json", {**card, "threshold": 1e9}),
    ):  # fmt: skip
        (run / name).write_text(json.dumps(value))
    said = "no hard image came in: there are no easy ones that could leave"
    for mode, added in (("rep", 0), ("add", 5)):
        code, out, err = call(run=run, mode=mode, out=tmp_path / mode)
        assert code == 0, err
        assert "100.0 % of the images" in out
        assert f"{added} added, 0 left, {6 + added} images" in out
        assert (said in out) == (mode == "rep")


def test_damaged_image_is_named_without_a_flag_that_is_not_here(call, world, tmp_path):
    fresh = shutil.copytree(world / "fresh", tmp_path / "fresh")
    write_damaged(fresh / "image_00002.png", "html")
    code, _, err = call(fresh=fresh)
    assert code == 2
    assert "image_00002.png is no readable image" in err
    assert err.endswith("; restore it\n")


def test_device_that_is_not_there_is_the_cpu(call):
    code, _, err = call(device="cuda")
    assert code == 0, err


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("model.json", "{}", "is damaged or of another version of this program (KeyError: 'detector')"),
        ("config.json", "{}", "config.json is not from a run of src/main.py"),
        ("model.safetensors", "", "is damaged or of another version"),
        ("d_samples.json", "[[1, 2]]", "d_samples.json: item 0 must be [[index, label, score], [captions]]"),
        ("e_samples.json", "{}", "e_samples.json must hold a list"),
    ],
)
def test_damaged_run_is_one_sentence_and_changes_nothing(call, world, tmp_path, name, content, part):
    run = shutil.copytree(world / "run", tmp_path / "damaged")
    (run / name).write_text(content)
    before = snapshot(world / "set")
    code, _, err = call(run=run)
    assert code == 2, err
    assert part in err.splitlines()[-1]
    assert "Traceback" not in err
    assert snapshot(world / "set") == before
    assert not (tmp_path / "next").exists()
