"""main.py with bad input: one sentence that names the thing, exit code 2, and nothing made."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from toy import (
    DAMAGED,
    image_path,
    read_json,
    refused,
    results,
    run_command,
    run_main,
    run_toy,
    toy_flags,
    write_damaged,
    write_toy_set,
)

import kka.run
from kka.errors import TrainingError

ITSELF = json.dumps({"0": [1, 0], "1": [1]})


@pytest.fixture
def data(toy_set, tmp_path):
    """A data set that the test may damage."""
    return shutil.copytree(toy_set, tmp_path / "data")


@pytest.fixture
def folder(tmp_path):
    """The run folder."""
    return tmp_path / "run"


def test_missing_data_folder_says_how_to_prepare_it(tmp_path, folder):
    outcome = run_toy(tmp_path / "gone", folder)
    refused(outcome, f"--data_path {tmp_path / 'gone'} does not exist", "prepare.py", "--dataset_name garden")
    assert not folder.exists()


def test_real_command_prints_the_sentence_only(tmp_path, folder):
    outcome = run_command(toy_flags(tmp_path / "gone", folder))
    refused(outcome, f"--data_path {tmp_path / 'gone'} does not exist")
    assert not folder.exists()


def test_data_that_is_not_there_yet_says_how_to_prepare_it(checkout, folder):
    outcome = run_main(["--dataset_name", "ucm_caption", "--xp_path", str(folder)])
    refused(outcome, checkout / "data" / "ucm_caption", "prepare.py")
    assert not checkout.exists()


def test_empty_data_folder_and_file_as_data_folder(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    refused(run_toy(tmp_path / "empty", folder), tmp_path / "empty", "is empty")
    refused(run_toy(tmp_path / "file", folder), f"--data_path {tmp_path / 'file'}")
    assert not folder.exists()


def test_unknown_data_set(tmp_path, folder):
    outcome = run_toy(tmp_path, folder, dataset_name="flowers")
    refused(
        outcome, "unknown data set 'flowers'; known are flower, cifar100, ucm_caption, garden, folder, mvtec"
    )


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"user_dict": '{"0": [9, 0], "1": [1]}'}, ["has no class 9; it has 0-4"]),
        ({"user_dict": '{"0": [1, 1, 0], "1": [1]}'}, ["folder 1 stands twice on the training side"]),
        ({"user_dict": '{"0": [1'}, ["--user_dict is not valid JSON"]),
        ({"user_dict": '{"0": [1]}'}, ["--user_dict must be"]),
        ({"anomaly_path": "{data}/1"}, ["/1 is given as normal class 1 and as the anomaly folder"]),
        ({"anomaly_path": "{data}/gone"}, ["there is no folder", "/gone"]),
        ({"normal_class": [1, 1]}, ["--normal_class names a class twice: 1 1"]),
        ({"normal_superclass": "fish"}, ["--normal_superclass 'fish' means nothing"]),
        ({"n_anomalies": 9}, ["--n_anomalies 9", "only 8 images"]),
        ({"n_epochs": "many"}, ["--n_epochs"]),
        ({"lr": 0}, ["--lr must be above 0"]),
        ({"batch_size": 1}, ["--batch_size must be at least 2"]),
        ({"device": "gpu"}, ["--device 'gpu' is no device"]),
        ({"device": "mps"}, ["--device 'mps' is not supported"]),
        ({"load_model": "{data}/gone"}, ["--load_model: ", "/gone does not exist"]),
    ],
)
def test_refused_before_anything_is_made(toy_set, folder, flags, parts):
    flags = {k: v.replace("{data}", str(toy_set)) if isinstance(v, str) else v for k, v in flags.items()}
    refused(run_toy(toy_set, folder, **flags), *parts)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"num_threads": -1}, ["--num_threads"]),
        ({"n_jobs_dataloader": -1}, ["--n_jobs_dataloader"]),
        ({"hard_margin": "nan"}, ["hard_margin"]),
        ({"ratio_known_normal": "nan"}, ["ratio_known_normal"]),
        ({"checkpoint_every": "nan"}, ["checkpoint_every"]),
        ({"user_dict": "{data}"}, ["--user_dict"]),
        ({"user_dict": "[[1, 0], [1]]" + " " * 300}, ["--user_dict"]),
    ],
)
def test_refused_with_a_sentence(data, folder, monkeypatch, flags, parts):
    monkeypatch.setenv("KKA_CACHE", "off")
    flags = {k: v.replace("{data}", str(data)) if isinstance(v, str) else v for k, v in flags.items()}
    refused(run_toy(data, folder, **flags), *parts)


@pytest.mark.parametrize(
    ("ratios", "part"),
    [
        ({"ratio_known_outlier": 1}, "--ratio_known_outlier must lie in [0, 1)"),
        ({"ratio_pollution": -0.1}, "--ratio_pollution must lie in [0, 1)"),
        ({"ratio_known_normal": 0.6, "ratio_known_outlier": 0.4}, "must sum to less than 1"),
        ({"ratio_known_outlier": 0.6}, "the ratios ask for 15 labelled and 0 unlabelled anomalies"),
        ({"threshold_from": "heldout", "ratio_pollution": 0.9}, "the anomaly folder has 8"),
    ],
)
def test_impossible_ratios(toy_set, folder, ratios, part):
    refused(run_toy(toy_set, folder, **ratios), part)
    assert not (folder / "results.json").exists()


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("image.json", "[", ["is not valid JSON"]),
        ("image.json", '{"a": 1}', ["must hold a list of strings"]),
        ("image.json", '["/etc/passwd"]', ["'/etc/passwd'", "not an image file"]),
        ("image_test.json", '["../../x.png"]', ["'../../x.png'", "points outside"]),
        ("image_test.json", '["gone.png"]', ["'gone.png'", "does not exist"]),
        ("caption_sentence.json", '["one"]', ["holds 1 captions for 10 images, not 50 (5 per image)"]),
    ],
)
def test_bad_lists_stop_before_training(data, folder, name, text, parts):
    (data / "1" / name).write_text(text)
    refused(run_toy(data, folder), data / "1" / name, *parts)
    assert not folder.exists()


def test_without_normal_images(data, folder):
    for name in ("image.json", "caption_sentence.json"):
        (data / "1" / name).write_text("[]")
    refused(run_toy(data, folder), f"{data} has no normal training images")


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_image_stops_and_is_named(data, folder, kind):
    bad = write_damaged(image_path(data, 2, split="test"), kind)
    refused(run_toy(data, folder), bad, "restore it or give --skip_bad_images")
    assert not (folder / "results.json").exists()


BAD_PLACES = [
    pytest.param(0, "train", id="generated"),
    pytest.param(2, "test", id="test"),
    pytest.param(1, "train", id="normal"),
]


@pytest.mark.parametrize(("class_id", "split"), BAD_PLACES)
def test_damaged_image_is_skipped_and_counted(data, folder, class_id, split):
    bad = write_damaged(image_path(data, class_id, 2, split), "html")
    outcome = run_toy(data, folder, skip_bad_images=[])
    assert outcome.code == 0, outcome.stderr
    assert f"skipped {bad}, which cannot be read" in outcome.log
    assert "1 unreadable images were skipped" in outcome.log
    values = results(folder)
    assert len(values["test_scores"]) == 12 - (class_id == 2)
    assert values["n_generated"] == 8 - (class_id == 0)
    rows = read_json(folder / "d_samples.json") + read_json(folder / "e_samples.json")
    assert {row[0][0] for row in rows} == set(range(8)) - ({2} if class_id == 0 else set())


def test_truncated_normal_is_skipped(data, folder):
    write_damaged(image_path(data, 1), "truncated")
    outcome = run_toy(data, folder, skip_bad_images=True)
    assert outcome.code == 0, outcome.stderr
    assert "17 training images (9 normals" in outcome.log


def test_skipped_images_are_named_in_every_run(data, folder):
    bad = write_damaged(image_path(data, 2, 1, "test"), "noise")
    logs = [run_toy(data, folder / name, skip_bad_images=True).log for name in ("first", "second")]
    assert [f"skipped {bad}, which" in log for log in logs] == [True, True]


def test_after_bad_input_the_mended_command_runs(data, folder):
    bad = image_path(data, 2, split="test")
    good = bad.read_bytes()
    write_damaged(bad, "empty")
    refused(run_toy(data, folder), bad)
    bad.write_bytes(good)
    assert run_toy(data, folder).code == 0


@pytest.mark.parametrize("flags", [{"batch_size": 32}, {"ae_batch_size": 32}])
def test_fewer_images_than_a_batch(toy_set, folder, flags):
    refused(run_toy(toy_set, folder, drop_last=[], **flags), "18 training images do not fill one batch of 32")
    assert run_toy(toy_set, folder.with_name("kept"), **flags).code == 0


def test_one_image_is_too_few(tmp_path, folder):
    data = write_toy_set(tmp_path / "data", n_train=1, n_anomalies=0)
    outcome = run_toy(data, folder, n_anomalies=0)
    refused(outcome, "training needs at least 2 images")


def test_known_anomalies_rounded_to_0_are_warned_about(toy_set, folder):
    outcome = run_toy(toy_set, folder, ratio_known_outlier=0.01, ratio_pollution=0.1)
    assert outcome.code == 0, outcome.stderr
    counts = "0 labelled and 10 unlabelled normals, 1 anomalies treated as normal, 0 labelled anomalies"
    assert f"--ratio_known_outlier 0.01 labels no anomaly at all: {counts}" in outcome.log


def test_exploding_loss_stops(toy_set, folder):
    outcome = run_toy(toy_set, folder, lr=1e30, n_epochs=3)
    refused(outcome, "the loss became", "epoch", "lower --lr or --eta", code=1)
    assert not (folder / "results.json").exists()


def test_collapse_stops_without_an_auc(toy_set, folder, finished):
    """A network of zeros gives every image the distance of the centre to 0."""
    weights = safetensors.torch.load_file(finished / "model.safetensors")
    zeros = {key: value if key == "center" else torch.zeros_like(value) for key, value in weights.items()}
    safetensors.torch.save_file(zeros, folder.with_name("zeros.safetensors"))
    outcome = run_toy(toy_set, folder, load_model=folder.with_name("zeros.safetensors"), n_epochs=0)
    refused(outcome, "hypersphere collapsed", code=1)
    assert not (folder / "results.json").exists()


def test_a_seed_that_collapses_does_not_stop_the_others(toy_set, folder, monkeypatch):
    calls = []

    def collapse_at_first(name, *scores):
        calls.append(name)
        if len(calls) == 1:
            raise TrainingError("hypersphere collapsed")

    monkeypatch.setattr(kka.run, "check_scores", collapse_at_first)
    outcome = run_toy(toy_set, folder, runs=3)
    where = folder / "seed_0"
    refused(outcome, f"{where}: hypersphere collapsed; 2 of 3 runs are finished, and", code=1)
    assert not (where / "results.json").exists()
    assert not (folder / "summary.json").exists()
    assert run_toy(toy_set, folder, runs=3).code == 0
    assert read_json(folder / "summary.json")["seeds"] == [0, 1, 2]
    assert len(calls) == 4


def test_test_set_with_one_class_has_no_auc(toy_set, folder):
    outcome = run_toy(toy_set, folder, user_dict=ITSELF)
    assert outcome.code == 0, outcome.stderr
    assert "test AUC n/a: the test set has one class only" in outcome.log
    assert (results(folder)["test_auc"], results(folder)["test_aupr"]) == (None, None)
    assert len(results(folder)["test_scores"]) == 4


@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_device_that_is_not_there(toy_set, folder, device):
    outcome = run_toy(toy_set, folder, device=device, strict_device=True)
    refused(outcome, f"--device {device} is not there", "--strict_device")
    assert not folder.exists()
    outcome = run_toy(toy_set, folder, device=device)
    assert outcome.code == 0, outcome.stderr
    assert f"{device} is not there; running on the CPU" in outcome.log


@pytest.mark.parametrize("name", ["model.safetensors", "model.tar"])
@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: b"<html>" * 50])
def test_damaged_model(toy_set, folder, finished, name, damage):
    path = folder.with_name(name)
    path.write_bytes(damage((finished / "model.safetensors").read_bytes()))
    refused(run_toy(toy_set, folder, load_model=path), f"--load_model: {path} holds no model of this project")
    assert not folder.exists()


def test_model_of_another_network(toy_set, folder, finished):
    outcome = run_toy(toy_set, folder, load_model=finished, net_name="fmnist_LeNet")
    refused(outcome, "--load_model", "fmnist_LeNet")
