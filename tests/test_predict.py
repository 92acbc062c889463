"""predict.py: scores of new images equal those of the test, and what happens to bad images and models."""

import csv
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from test_detectors import quick, ran, two_epochs
from toy import DAMAGED, call_script, image_path, read_json, refused, results, snapshot, write_damaged

import predict
from kka.datasets import ucm_caption
from kka.datasets.images import MAX_PIXELS
from kka.datasets.task import Choice, parse_user_dict, read_task

SCORED = ("deep_sad", "ssd", "simplenet", "recontrast", "frozen", "dra")
MAPPED = ("simplenet", "recontrast")


@pytest.fixture(scope="module")
def runs(toy_set, tmp_path_factory):
    """The folder of a short run of some detectors."""
    folder = tmp_path_factory.mktemp("runs")
    for name in SCORED:
        ran(quick(toy_set, folder / name, name, **two_epochs(name)))
    return folder


def run_predict(*words):
    return call_script(predict.main, ["predict.py", *map(str, words), "--device", "cpu"])


def paths_of_test(toy_set):
    user_dict = parse_user_dict('{"0": [1, 0], "1": [1, 2, 3]}')
    return read_task(ucm_caption.SPEC, toy_set, Choice(user_dict=user_dict)).test.paths


@pytest.mark.parametrize("name", SCORED)
def test_scores_and_decisions_are_those_of_the_test(toy_set, runs, name, tmp_path, capsys):
    out = tmp_path / "scores.json"
    assert run_predict(*paths_of_test(toy_set), "--model", runs / name, "--out", out).code == 0
    values, rows = results(runs / name), read_json(out)["images"]
    assert [row["score"] for row in rows] == [score for _, _, score in values["test_scores"]]
    assert [row["path"] for row in rows] == [str(path) for path in paths_of_test(toy_set)]
    for row in rows:
        assert row["threshold"] == values["threshold"]
        assert row["decision"] == ("normal" if row["score"] < row["threshold"] else "anomalous")
    n = sum(row["decision"] == "anomalous" for row in rows)
    assert f"{n} of 12 are anomalous" in capsys.readouterr().out


def test_generated_images_are_scored_as_in_training(toy_set, finished, tmp_path):
    folder = toy_set / "0"
    names, out = read_json(folder / "image.json"), tmp_path / "scores.json"
    files = [folder / name for name in names]
    assert run_predict(*files, "--model", finished, "--generated", "--out", out).code == 0
    rows = [row for kind in "de" for row in read_json(finished / f"{kind}_samples.json")]
    expected = {index: score for (index, _, score), _ in rows}
    assert {i: row["score"] for i, row in enumerate(read_json(out)["images"])} == expected
    assert run_predict(*files, "--model", finished, "--overwrite", "--out", out).code == 0
    assert {i: row["score"] for i, row in enumerate(read_json(out)["images"])} != expected


def test_channels_are_swapped_for_a_model_that_was_trained_so(toy_set, tmp_path):
    ran(quick(toy_set, tmp_path / "run", "deep_sad", bgr=[]))
    out = tmp_path / "scores.json"
    assert run_predict(*paths_of_test(toy_set), "--model", tmp_path / "run", "--out", out).code == 0
    scores = [row["score"] for row in read_json(out)["images"]]
    assert scores == [score for _, _, score in results(tmp_path / "run")["test_scores"]]


def test_folders_files_and_patterns_give_each_image_once(toy_set, finished, tmp_path):
    shots = tmp_path / "shots [1]" / "déjà vu"
    shots.mkdir(parents=True)
    for k in range(3):
        shutil.copy(image_path(toy_set, k=k), shots / f"{k}.png")
    shutil.copy(shots / "0.png", shots / ".hidden.png")
    (shots / "notes.txt").write_text("no image")
    shutil.copy(shots / "0.png", tmp_path / "named.data")
    out = tmp_path / "scores.csv"
    pattern = tmp_path / "shots*" / "**" / "[01].png"
    words = [tmp_path / "shots [1]", pattern, shots / "2.png", tmp_path / "named.data"]
    assert run_predict(*words, "--model", finished, "--out", out).code == 0
    with open(out, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [str(shots / f"{k}.png") for k in range(3)] + [str(words[-1])]
    assert list(rows[0]) == ["path", "score", "threshold", "decision"]
    assert rows[0]["score"] == rows[3]["score"]


def test_a_threshold_that_is_given_decides_strictly(toy_set, finished, tmp_path):
    image, out = image_path(toy_set), tmp_path / "scores.json"
    assert run_predict(image, "--model", finished, "--out", out).code == 0
    score = read_json(out)["images"][0]["score"]
    for threshold, decision in ((score, "anomalous"), (np.nextafter(score, np.inf), "normal")):
        words = ["--threshold", repr(float(threshold)), "--out", out, "--overwrite"]
        assert run_predict(image, "--model", finished, *words).code == 0
        assert read_json(out)["images"][0]["decision"] == decision


def bomb(path):
    Image.new("1", (MAX_PIXELS // 1000 + 1, 1000)).save(path)
    return path


def test_bad_images_are_named_and_skipped(toy_set, finished, tmp_path):
    folder, out = tmp_path / "mixed", tmp_path / "scores.json"
    folder.mkdir()
    bad = [write_damaged(folder / f"{kind}.jpg", kind) for kind in DAMAGED] + [bomb(folder / "bomb.png")]
    bad += [write_damaged(folder / name, "noise") for name in ("a.HEIC", "b.npy", "c")]
    (folder / "Thumbs.db").write_text("x")
    good = [folder / "a.png", folder / "z.png"]
    for path in good:
        shutil.copy(image_path(toy_set), path)
    outcome = run_predict(folder, "--model", finished, "--out", out)
    assert outcome.code == 3
    lines = outcome.stderr.splitlines()
    assert len(lines) == len(bad)
    for path in bad:
        (line,) = (line for line in lines if line.startswith(f"skipped {path}: "))
        assert "--skip_bad_images" not in line
    report = read_json(out)
    assert [row["path"] for row in report["images"]] == [str(path) for path in good]
    assert {row["path"] for row in report["skipped"]} == {str(path) for path in bad}


def test_not_one_readable_image_is_bad_input(finished, tmp_path):
    path = write_damaged(tmp_path / "broken.jpg", "html")
    outcome = run_predict(path, "--model", finished, "--out", tmp_path / "scores.csv")
    assert outcome.code == 2
    assert outcome.stderr.splitlines()[-1] == "error: not one of the 1 images can be read; give others"
    assert not (tmp_path / "scores.csv").exists()


def test_words_without_an_image_are_refused(finished, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    for word in (tmp_path / "empty", tmp_path / "missing.png", tmp_path / "*.png"):
        refused(run_predict(word, "--model", finished), f"there is no image at {word}")
    refused(run_predict("--model", finished), "IMAGES are needed")
    refused(run_predict("", "--model", finished), "one of IMAGES is an empty word")


def test_names_do_not_break_the_table(toy_set, finished, tmp_path, capsys):
    image = tmp_path / "a\nb\x1b[2J ü.png"
    shutil.copy(image_path(toy_set), image)
    assert run_predict(image, "--model", finished).code == 0
    assert f"{tmp_path}/a\\nb\\x1b[2J ü.png" in capsys.readouterr().out


@pytest.mark.parametrize("name", MAPPED)
def test_maps_are_written_as_arrays_and_pictures_on_one_scale(toy_set, runs, name, tmp_path, capsys):
    images, folder = paths_of_test(toy_set)[3:6], tmp_path / "maps"
    assert run_predict(*images, "--model", runs / name, "--maps", folder).code == 0
    stems = [f"{i:05d}_{path.stem}" for i, path in enumerate(images)]
    ours = {"maps.json", *(f"{s}{end}" for s in stems for end in (".npy", ".png"))}
    assert {path.name for path in folder.iterdir()} == ours
    arrays = [np.load(folder / f"{stem}.npy") for stem in stems]
    assert all(array.shape == (48, 48) for array in arrays)
    low = min(array.min() for array in arrays)
    assert f"maps from {low:.4g} (as the image)" in capsys.readouterr().out
    for path, stem in zip(images, stems, strict=True):
        with Image.open(path) as image, Image.open(folder / f"{stem}.png") as picture:
            assert picture.size == image.size
            assert np.any(np.asarray(picture) != np.asarray(image.convert("RGB")))
    before = snapshot(folder)
    refused(run_predict(images[0], "--model", runs / name, "--maps", folder), "holds files", "--overwrite")
    assert snapshot(folder) == before
    words = [images[0], "--model", runs / name, "--maps", folder, "--overwrite"]
    assert run_predict(*words).code == 0
    assert {path.name for path in folder.iterdir()} == {"maps.json", f"{stems[0]}.npy", f"{stems[0]}.png"}


def test_maps_neither_replace_nor_remove_files_of_others(toy_set, runs, tmp_path):
    folder, image = tmp_path / "photos", tmp_path / "photos" / "00001_cat.png"
    folder.mkdir()
    shutil.copy(image_path(toy_set), image)
    words = ["--model", runs / "simplenet", "--maps", folder, "--overwrite"]
    before = snapshot(folder)
    refused(run_predict(image, *words), "holds 00001_cat.png, one of IMAGES")
    refused(run_predict(image_path(toy_set), *words), "holds 00001_cat.png, which is no map")
    (folder / "maps.json").write_text('["../x.png"]')
    refused(run_predict(image_path(toy_set), *words), "maps.json is no list of files")
    (folder / "maps.json").unlink()
    assert snapshot(folder) == before


def test_map_of_an_image_with_a_long_name(toy_set, runs, tmp_path):
    image = tmp_path / f"{'ä' * 123}.png"
    shutil.copy(image_path(toy_set), image)
    assert run_predict(image, "--model", runs / "simplenet", "--maps", tmp_path / "maps").code == 0
    assert len(list((tmp_path / "maps").glob("00000_ä*.npy"))) == 1


def test_map_shows_where_it_is_high():
    from kka.overlays import overlay

    values = np.zeros((8, 8))
    values[:4, :4] = 1.0
    shown = np.asarray(overlay(Image.new("RGB", (64, 64)), values, 0.0, 1.0)).sum(2)
    assert shown[4:24, 4:24].min() > 300
    assert shown[40:, 40:].max() == 0


def test_detectors_without_maps_say_so(toy_set, finished, tmp_path):
    outcome = run_predict(image_path(toy_set), "--model", finished, "--maps", tmp_path / "maps")
    refused(outcome, "--maps: deep_sad scores whole images", "simplenet or recontrast")
    assert not (tmp_path / "maps").exists()


def test_a_loop_means_its_last_finished_round(toy_set, finished, tmp_path):
    loop, image = tmp_path / "loop", image_path(toy_set)
    for k in (0, 2, 10):
        shutil.copytree(finished, loop / f"round_{k}" / "detector")
    (loop / "round_10" / "detector" / "results.json").unlink()
    outcome = run_predict(image, "--model", loop)
    assert outcome.code == 0
    assert f"taking {loop / 'round_2' / 'detector'}" in outcome.log
    assert f"taking {loop / 'round_0' / 'detector'}" in run_predict(image, "--model", loop / "round_0").log
    refused(run_predict(image, "--model", loop / "round_10"), "round_10 is no run folder")


def test_folders_that_are_no_run_are_refused(toy_set, finished, tmp_path):
    image = image_path(toy_set)
    for seed in (0, 10, 2):
        shutil.copytree(finished, tmp_path / "runs" / f"seed_{seed}")
    parts = ("several runs, seed_0, seed_2, seed_10; give one", tmp_path / "runs" / "seed_0")
    refused(run_predict(image, "--model", tmp_path / "runs"), *parts)
    (tmp_path / "runs" / "seed_0" / "results.json").unlink()
    refused(run_predict(image, "--model", tmp_path / "runs" / "seed_0"), "is no finished run")
    refused(run_predict(image, "--model", tmp_path / "nowhere"), "nowhere does not exist")
    refused(run_predict(image, "--model", finished / "model.json"), "is a file; give its folder", finished)
    refused(run_predict(image, "--model", toy_set), "is no run folder")
    refused(run_predict(image), "--model RUN is needed")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"version": 2}, "is of version 2, this program reads 1"),
        ({"detector": "gan"}, "there is no detector 'gan'"),
        ({"settings": {"net_nam": "x"}}, "unknown setting 'net_nam'"),
        ({"settings": {"net_name": "mnist_LeNet"}}, "damaged or of another version"),
        ({"settings": None}, "damaged or of another version"),
        ({"image_size": 64}, "says images of 64 px, the detector takes 32"),
        ({"threshold": float("nan")}, "its threshold is nan"),
        ({"threshold": None}, "damaged or of another version"),
    ],
)
def test_models_of_another_version_are_refused(toy_set, finished, tmp_path, change, part):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "model.json").write_text(json.dumps({**read_json(run / "model.json"), **change}))
    refused(run_predict(image_path(toy_set), "--model", run), f"--model {run}", part)


def test_damaged_models_are_refused(toy_set, finished, tmp_path):
    run, image = tmp_path / "run", image_path(toy_set)
    shutil.copytree(finished, run)
    weights = safetensors.torch.load_file(run / "model.safetensors")
    broken = {**weights, "center": weights["center"] * torch.nan}
    safetensors.torch.save_file(broken, run / "model.safetensors")
    refused(run_predict(image, "--model", run), "are not finite")
    (run / "model.safetensors").write_bytes((finished / "model.safetensors").read_bytes()[:1000])
    refused(run_predict(image, "--model", run), "model.safetensors holds no model of this project")
    (run / "model.json").write_text("{")
    refused(run_predict(image, "--model", run), "model.json is not valid JSON")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--out", "scores.txt"], "--out must end in .csv or .json, it is 'scores.txt'"),
        (["--export", "model.tar"], "--export must end in .pt2 or .onnx"),
        (["--threshold", "nan"], "setting 'threshold' must be a finite number"),
        (["--threshold", "low"], "argument --threshold: invalid float value: 'low'"),
        (["--num_threads", "-1"], "--num_threads must not be negative"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_flags_that_make_no_sense_are_refused(toy_set, finished, words, part):
    refused(run_predict(image_path(toy_set), "--model", finished, *words), part)


@pytest.mark.parametrize("flag", ["--out", "--export", "--maps"])
def test_places_that_cannot_be_written_are_refused_before_the_work(toy_set, finished, tmp_path, flag):
    (tmp_path / "file").write_text("mine")
    name = {"--out": "a.csv", "--export": "a.pt2", "--maps": "maps"}[flag]
    for place, part in (
        (tmp_path / "file", "is a file"),
        ("/proc/x", flag),
        ("~nosuchuser", "no home folder"),
    ):
        outcome = run_predict(image_path(toy_set), "--model", finished, flag, f"{place}/{name}")
        refused(outcome, part, place)


def test_results_are_not_overwritten_unless_asked(toy_set, finished, tmp_path):
    out = tmp_path / "scores.csv"
    out.write_text("mine")
    refused(run_predict(image_path(toy_set), "--model", finished, "--out", out), "exists", "--overwrite")
    assert out.read_text() == "mine"


def test_memory_is_bounded_by_parts(toy_set, finished, tmp_path, monkeypatch):
    """Parts of three images give the same scores as one of all."""
    out = [tmp_path / f"{k}.json" for k in range(2)]
    assert run_predict(*paths_of_test(toy_set), "--model", finished, "--out", out[0]).code == 0
    monkeypatch.setattr("kka.predict.CHUNK", 3)
    assert run_predict(*paths_of_test(toy_set), "--model", finished, "--out", out[1]).code == 0
    first, second = ([row["score"] for row in read_json(path)["images"]] for path in out)
    assert second == pytest.approx(first, rel=1e-5)
