"""Exported detectors score as the detector does, from pixels to decisions, on images of any size."""

import functools
import importlib.util
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_predict import run_predict
from toy import image_path, refused, results

from kka.datasets.images import test_view as pillow_view
from kka.detectors import build_detector
from kka.detectors.deep_sad import DeepSADSettings
from kka.detectors.dra import DRASettings
from kka.detectors.frozen import FrozenSettings
from kka.detectors.recontrast import ReContrastSettings
from kka.detectors.simplenet import SimpleNetSettings
from kka.detectors.ssd import SSDSettings
from kka.errors import UserError
from kka.export import FORMATS, largest_error, random_pictures, resize, to_pixels, trace
from kka.train_set import TrainSet
from kka.trained import Trained

MISSING = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"the extra onnx is not installed: {MISSING}")
SMALL = {"backbone": "squeezenet1_0", "backbone_init": "random", "image_size": 40}
QUICK = {
    "deep_sad": DeepSADSettings(n_epochs=1, pretrain=False, batch_size=4),
    "deep_sad, squeezenet": DeepSADSettings("squeezenet1_0", 40, pretrain=False, n_epochs=1, batch_size=4),
    "ssd": SSDSettings(arch="cifar10_LeNet", n_epochs=1, warmup=0, batch_size=4, copies=2),
    "simplenet": SimpleNetSettings(
        **SMALL, pretrain_embed_dimension=32, target_embed_dimension=16, dsc_hidden=8, n_epochs=1
    ),
    "recontrast": ReContrastSettings(**SMALL, width=0.1, bottleneck_blocks=1, decoder_blocks=(1, 1, 1),
                                     n_iterations=2, batch_size=4),
    "frozen": FrozenSettings(**SMALL),
    "frozen, logistic": FrozenSettings(**SMALL, head="logistic"),
    "dra": DRASettings(**{**SMALL, "image_size": 48}, fine_tune=False, views=1, n_epochs=1,
                       steps_per_epoch=1, batch_size=6),
}  # fmt: skip
IN_ONNX = ("deep_sad", "ssd", "simplenet", "recontrast", "frozen")


@functools.cache
def traced(name):
    """A detector and its graph, for both kinds of files."""
    trained = fitted(name)
    return trained, trace(trained, trained.threshold)


def fitted(name):
    """A detector after a moment of training, as predict.py would open it."""
    detector = build_detector(QUICK[name])
    stream = torch.Generator().manual_seed(0)
    side = detector.image_size
    images = torch.randint(0, 90, (12, 3, side, side), generator=stream, dtype=torch.uint8)
    images[8:] += 150
    targets = (torch.arange(12) >= 8).long()
    detector.fit(TrainSet(images, torch.full((12, 2), side), images, targets, -targets))
    threshold = float(detector.score(images[:8]).max())
    return Trained(None, name, detector, threshold, bgr=True, native=None)


@pytest.mark.parametrize("size", [7, 32, 48])
def test_resizing_in_the_graph_is_that_of_pillow_bit_for_bit(size):
    rng = np.random.default_rng(size)
    shapes = [(size, size), (size, 3), (1, 1), (200, 9), (9, 200), *rng.integers(1, 150, (60, 2))]
    for height, width in shapes:
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        found = resize(to_pixels([picture]), size)[0]
        assert torch.equal(found, pillow_view(picture, size)), (height, width)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [(name, ".pt2") for name in QUICK] + [pytest.param(name, ".onnx", marks=needs_onnx) for name in IN_ONNX],
)
def test_export_equals_the_detector(name, suffix):
    trained, program = traced(name)
    to_file, from_file = FORMATS[suffix]
    exported = from_file(to_file(program))
    pictures = random_pictures(trained.detector.image_size)
    assert len({picture.size for picture in pictures}) == 5
    assert largest_error(exported, trained, trained.threshold, pictures) <= 1e-5
    # The check itself can fail: for other colours, and for another threshold.
    swapped = Trained(None, name, trained.detector, trained.threshold, bgr=False, native=None)
    with pytest.raises(UserError, match="scores differently"):
        largest_error(exported, swapped, trained.threshold, pictures)
    scores, decisions = exported(to_pixels(pictures[:1]))
    large = max(abs(float(exported(to_pixels([picture]))[0])) for picture in pictures)
    wrong = float(scores[0]) + (large if decisions[0] else -large)
    with pytest.raises(UserError, match="scores differently"):
        largest_error(exported, trained, wrong, pictures)


def test_exported_file_is_used_as_the_docs_say(toy_set, finished, tmp_path, capsys):
    file, image = tmp_path / "model.pt2", image_path(toy_set)
    outcome = run_predict(image, "--model", finished, "--export", file)
    assert outcome.code == 0, outcome.stderr
    assert "exported deep_sad" in capsys.readouterr().out
    detector = torch.export.load(file).module()
    rgb = np.asarray(Image.open(image).convert("RGB"))
    score, anomalous = detector(torch.tensor(rgb).permute(2, 0, 1)[None])
    threshold = results(finished)["threshold"]
    assert bool(anomalous) == (float(score) >= threshold)
    refused(run_predict("--model", finished, "--export", file), "exists", "--overwrite")


@needs_onnx
def test_onnx_file_is_used_as_the_docs_say(toy_set, finished, tmp_path):
    import onnxruntime

    file, image = tmp_path / "model.onnx", image_path(toy_set)
    more = ["--threshold", "-1", "--out", f"{file}.csv"]
    outcome = run_predict(image, "--model", finished, "--export", file, *more)
    assert outcome.code == 0, outcome.stderr
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    rgb = np.asarray(Image.open(image).convert("RGB"))
    score, anomalous = session.run(None, {"images": rgb.transpose(2, 0, 1)[None]})
    row = (tmp_path / "model.onnx.csv").read_text().splitlines()[1].split(",")
    assert float(row[1]) == pytest.approx(float(score[0]), rel=1e-5)
    assert (row[3], bool(anomalous[0])) == ("anomalous", True)


def test_missing_extra_is_named_and_nothing_written(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    outcome = run_predict("--model", finished, "--export", tmp_path / "model.onnx")
    refused(outcome, "files need onnx", "pip install -e '.[onnx]'")
    assert not list(tmp_path.iterdir())


def test_export_that_differs_is_not_written(finished, tmp_path, monkeypatch):
    def wrong(data):
        module = from_pt2(data)
        return lambda images: (module(images)[0] * 1.0001, module(images)[1])

    to_pt2, from_pt2 = FORMATS[".pt2"]
    monkeypatch.setitem(FORMATS, ".pt2", (to_pt2, wrong))
    (tmp_path / "model.pt2").write_text("the old one")
    words = ["--model", finished, "--export", tmp_path / "model.pt2", "--overwrite"]
    refused(run_predict(*words), "exported deep_sad scores differently", "not written")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the old one"]
