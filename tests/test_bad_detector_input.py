"""What a detector cannot work with, through main.py: one sentence and exit code 2."""

import pytest
import torch
from PIL import Image
from test_detectors import OTHERS, quick, ran, two_epochs
from torchvision.models import get_model
from toy import refused, results, write_toy_class, write_toy_set

from kka.datasets import ucm_caption


@pytest.fixture(scope="module")
def other_sets(tmp_path_factory):
    """Toy sets with one training image, and without captions; a file of weights of another network."""
    root = tmp_path_factory.mktemp("sets")
    write_toy_set(root / "single", n_train=1)
    for path in write_toy_set(root / "mute").rglob("caption_sentence*.json"):
        path.unlink()
    torch.save(get_model("squeezenet1_1").state_dict(), root / "other.pth")
    return root


@pytest.mark.parametrize("name", OTHERS)
def test_one_training_image_is_refused(other_sets, tmp_path, name):
    outcome = quick(other_sets / "single", tmp_path / "run", name, n_anomalies=0)
    refused(outcome, "training needs at least 2", "image")


def test_missing_captions_are_refused(other_sets, tmp_path):
    refused(quick(other_sets / "mute", tmp_path / "run", "cmda"), "caption")


@pytest.mark.parametrize("name", ["simplenet", "recontrast", "frozen", "devnet", "dra"])
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"backbone": "squeezenet1_2"}, ["--backbone 'squeezenet1_2' is no network", "mean squeezenet1_1"]),
        ({"layers": ["features.5", "features.99", "features.10"]}, ["--layers", "no layer 'features.99'"]),
        ({"image_size": 8}, ["squeezenet1_0 cannot take images of 8 px", "--image_size 21"]),
        ({"image_size": 100_000}, ["images of 100000 px", "--image_size 8000 is the largest"]),
        ({"image_size": 0}, ["--image_size must be above 0"]),
        ({"backbone_init": None, "backbone_weights": "other.pth"}, ["does not fit squeezenet1_0"]),
        ({"backbone_weights": "other.pth"}, ["--backbone_init random and --backbone_weights exclude"]),
    ],
)  # fmt: skip
def test_backbones_that_cannot_be_had_are_refused(toy_set, other_sets, tmp_path, name, flags, parts):
    if "backbone_weights" in flags:
        flags = {**flags, "backbone_weights": other_sets / flags["backbone_weights"]}
    refused(quick(toy_set, tmp_path / "run", name, **flags), *parts)


@pytest.mark.parametrize("name", OTHERS)
def test_test_set_of_one_class_and_anomalies_of_another_size_work(toy_set, tmp_path, name):
    large = tmp_path / "large"
    write_toy_class(large / "0", ucm_caption.SPEC, {"train": 4}, bright=True)
    for path in large.rglob("*.png"):
        Image.open(path).resize((70, 50)).save(path)
    user_dict = '{"0": [1, 0], "1": [1]}'
    flags = {"user_dict": user_dict, "anomaly_path": large / "0", **two_epochs(name)}
    assert "test AUC n/a" in ran(quick(toy_set, tmp_path / "run", name, **flags)).log
    assert results(tmp_path / "run")["test_auc"] is None
    assert results(tmp_path / "run")["n_generated"] == 4
