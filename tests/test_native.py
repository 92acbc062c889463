"""Generated images are first made like the normals: nothing but their content tells them apart."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from toy import read_json, results, run_toy, write_toy_folder

from kka.data import load_data
from kka.datasets.folder import SPEC
from kka.datasets.images import content_digest, decode, read_native
from kka.datasets.layout import Images
from kka.datasets.native import Native, common_native, native_of
from kka.datasets.task import Choice, Task, read_task
from kka.metrics import auroc
from kka.run import load_native

SIDE = 128


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
    monkeypatch.setenv("KKA_CACHE", "off")


def scene(rng, side):
    """Noise with structure at every scale, seen at `side` x `side` px: always the same kind of content."""
    noise = rng.normal(size=(SIDE, SIDE, 3))
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE))[..., None]
    spectrum = np.fft.fft2(noise, axes=(0, 1)) / np.maximum(frequency, 1 / SIDE)
    field = np.fft.ifft2(spectrum, axes=(0, 1)).real
    pixels = np.clip(128 + 40 * field / field.std(), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)


def write_scenes(folder, n, side, seed, **options):
    """Scenes as files; options are Pillow's, a quality makes them JPEG."""
    folder.mkdir()
    rng, suffix = np.random.default_rng(seed), "jpg" if "quality" in options else "png"
    paths = tuple(folder / f"{k}.{suffix}" for k in range(n))
    for path in paths:
        scene(rng, side).save(path, **options)
    return paths


def task_of(normals, generated):
    def images(paths, target, name):
        return Images(paths, (target,) * len(paths), (name,) * len(paths), ((),) * len(paths))

    everything = images(generated, 1, "0")
    return Task(
        images(normals, 0, "1"),
        everything,
        tuple(range(len(generated))),
        images(normals, 0, "1") + everything,
    )


def load(task, size, match):
    digests = tuple(content_digest(part.paths) for part in (task.normals, task.generated, task.test))
    return load_data(task, digests, size, skip_bad=False, threads=1, bgr=False, match=match)


def sharpness(images):
    """Mean absolute Laplacian: what a detector sees of resolution and of noise."""
    x = images.float().mean(1)
    centre = 4 * x[:, 1:-1, 1:-1]
    around = x[:, 2:, 1:-1] + x[:, :-2, 1:-1] + x[:, 1:-1, 2:] + x[:, 1:-1, :-2]
    return (centre - around).abs().mean((1, 2))


def blockiness(images):
    """How much larger steps are at every eighth column than elsewhere, as JPEG leaves them."""
    steps = images.float().mean(1).diff(dim=2).abs().mean(1)
    edge = torch.arange(steps.shape[1]) % 8 == 7
    return steps[:, edge].mean(1) / steps[:, ~edge].mean(1)


def told_apart(task, size, match, trace):
    """AUROC in [0.5, 1] with which a trace alone tells generated images from normals."""
    data = load(task, size, match)
    values = torch.cat([trace(data.normals.resized), trace(data.generated.resized)])
    targets = [0] * len(task.normals) + [1] * len(task.generated)
    value = auroc(targets, values.numpy())
    return max(value, 1 - value)


@pytest.mark.parametrize(
    ("normal", "generated", "size", "trace"),
    [
        ((32, {}), (128, {}), 112, sharpness),  # CIFAR-like normals, images of a generator
        ((48, {"quality": 60}), (128, {}), 112, sharpness),
        ((32, {}), (128, {"quality": 75}), 112, sharpness),
        ((64, {"quality": 30}), (64, {}), 64, blockiness),
        ((64, {"quality": 30}), (128, {"quality": 90}), 64, blockiness),
    ],
)
def test_no_trace_tells_generated_images_from_normals(tmp_path, normal, generated, size, trace):
    n = 24
    task = task_of(
        write_scenes(tmp_path / "1", n, normal[0], 1, **normal[1]),
        write_scenes(tmp_path / "0", n, generated[0], 2, **generated[1]),
    )
    assert told_apart(task, size, False, trace) > 0.85
    assert told_apart(task, size, True, trace) < 0.7


def test_images_that_are_like_the_normals_stay_as_they_are(tmp_path):
    task = task_of(
        write_scenes(tmp_path / "1", 3, 40, 1, quality=80), write_scenes(tmp_path / "0", 3, 40, 2, quality=80)
    )
    with_, without = load(task, 32, True), load(task, 32, False)
    assert torch.equal(with_.generated.images, without.generated.images)
    assert torch.equal(with_.generated.resized, without.generated.resized)


def test_normals_and_real_test_images_are_never_changed(tmp_path):
    root = write_toy_folder(tmp_path / "data", kinds=("0", "scratch"), n_anomalies=3)
    task = read_task(SPEC, root, Choice())
    for part in (task.normals, task.test):
        assert not any(part.generated)
    with_, without = load(task, 32, True), load(task, 32, False)
    assert torch.equal(with_.normals.images, without.normals.images)
    assert torch.equal(with_.test.resized, without.test.resized)
    assert not torch.equal(with_.generated.resized, without.generated.resized)


def test_generated_test_images_are_made_like_the_normals_too(tmp_path):
    task = task_of(write_scenes(tmp_path / "1", 3, 40, 1), write_scenes(tmp_path / "0", 3, 100, 2))
    data = load(task, 64, True)
    assert torch.equal(data.test.resized[3:], data.generated.resized)
    assert torch.equal(data.test.resized[:3], data.normals.resized)
    assert data.generated.native_sizes.tolist() == [[40, 40]] * 3


def test_proportions_are_kept(tmp_path):
    Image.new("RGB", (300, 100)).save(tmp_path / "wide.png")
    decoded = decode([tmp_path / "wide.png"], "", 16, 16, native=Native(20))
    assert decoded.native_sizes.tolist() == [[20, 60]]


def test_common_native_is_the_median_size_and_the_most_common_compression(tmp_path):
    jpeg = write_scenes(tmp_path / "jpeg", 2, 50, 1, quality=70, subsampling=0)
    png = write_scenes(tmp_path / "png", 1, 90, 2)
    native, largest = read_native([*jpeg, *png])
    assert (native.short_side, native.jpeg_sampling, largest) == (50, 0, 90)
    with Image.open(jpeg[0]) as picture:
        assert native == native_of(picture)
        assert [list(table) for table in native.jpeg_tables] == list(picture.quantization.values())
    assert common_native([Native(3), Native(9), Native(5)]) == Native(5)
    assert common_native([]) == Native(1)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpeg_of_other_modes(tmp_path, mode):
    scene(np.random.default_rng(0), 40).convert(mode).save(tmp_path / "normal.jpg", quality=50)
    scene(np.random.default_rng(1), 60).save(tmp_path / "generated.png")
    native, _ = read_native([tmp_path / "normal.jpg"])
    assert native.jpeg_tables
    decoded = decode([tmp_path / "generated.png"], "", 16, 16, native=native)
    assert decoded.native_sizes.tolist() == [[40, 40]]


def test_enlarged_images_are_warned_about(tmp_path, caplog):
    task = task_of(write_scenes(tmp_path / "1", 2, 60, 1), write_scenes(tmp_path / "0", 2, 30, 2))
    load(task, 32, False)
    assert not caplog.messages
    load(task, 32, True)
    assert "the generated images (30 px) are smaller than the normals (60 px)" in caplog.text


def test_run_remembers_what_its_generated_images_were_made_like(toy_set, tmp_path, finished):
    card = read_json(finished / "model.json")
    native = load_native(finished)
    assert (native.short_side, native.jpeg_tables) == (card["native"]["short_side"], ())
    outcome = run_toy(toy_set, tmp_path / "run", match_generated="False")
    assert outcome.code == 0, outcome.stderr
    assert load_native(tmp_path / "run") is None
    assert results(tmp_path / "run")["threshold"] != results(finished)["threshold"]


def test_native_survives_the_model_card(tmp_path):
    native = Native(7, ((1, 2), (3, 4)), 2)
    (tmp_path / "model.json").write_text(json.dumps({"native": vars(native)}))
    assert load_native(tmp_path) == native
