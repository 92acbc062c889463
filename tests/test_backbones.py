"""Torchvision backbones: features, weights, layers, and one sentence for bad input."""

import urllib.request

import pytest
import safetensors.torch
import torch
from torchvision.models import get_model
from torchvision.transforms.v2 import functional

from kka.augment import IMAGENET_MEAN, IMAGENET_STD
from kka.errors import UserError
from kka.networks.backbones import Backbone, BackboneSettings, usual_layers


def images(n=2, side=64):
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )


def random_backbone(name="squeezenet1_0", size=64, strides=(-1,), seed=0, layers=(), trainable=False):
    return Backbone(BackboneSettings(name, None, "random", layers), size, strides, seed, trainable)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Weights of a resnet18, as a .pth and as a .safetensors file, and the network."""
    torch.manual_seed(5)
    network, folder = get_model("resnet18").eval(), tmp_path_factory.mktemp("weights")
    torch.save(network.state_dict(), folder / "weights.pth")
    safetensors.torch.save_file(network.state_dict(), folder / "weights.safetensors")
    return folder, network


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_features_are_those_of_torchvision_with_the_weights_of_the_file(saved, suffix):
    folder, network = saved
    backbone = Backbone(BackboneSettings("resnet18", str(folder / f"weights.{suffix}")), 64)
    backbone.load_pretrained()
    normalized = functional.normalize(images().float() / 255, IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        [features] = backbone(images())
        expected = network(normalized)
        torch.testing.assert_close(network.fc(features.mean((2, 3))), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(backbone(images().float() / 255)[0], features, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "n"), [("resnet18", 4), ("squeezenet1_0", 3), ("squeezenet1_1", 3), ("mobilenet_v2", 4)]
)
def test_usual_layers_have_their_strides(name, n):
    strides = (4, 8, 16, 32)[:n]
    backbone = random_backbone(name, 128, strides)
    for stride, (_, height, width) in zip(strides, backbone.shapes, strict=True):
        assert height == width
        assert abs(128 / height - stride) < 0.4 * stride, (stride, height)  # SqueezeNet does not pad
    assert usual_layers(name, (-1,)) == backbone.layers[-1:]


@pytest.mark.parametrize("name", ["wide_resnet50_2", "mobilenet_v3_large", "efficientnet_b0"])
def test_strides_of_large_networks(name):
    with torch.device("meta"):
        shapes = random_backbone(name, 128, (4, 8, 16, 32)).shapes
    assert [128 // shape[1] for shape in shapes] == [4, 8, 16, 32]


def test_layers_by_name_in_their_order():
    backbone = random_backbone("resnet18", layers=("layer3", "layer1.0.relu"))
    assert backbone.shapes == [(256, 4, 4), (64, 16, 16)]
    assert not any(key.startswith("net.layer4") for key in backbone.state_dict())


def test_random_weights_belong_to_the_seed():
    first, again, other = (random_backbone(seed=seed)(images())[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    backbone = random_backbone(seed=1)
    backbone.load_pretrained()
    assert torch.equal(backbone(images())[0], first)


def test_frozen_stays_in_evaluation_mode_without_gradients():
    frozen, trained = random_backbone("resnet18"), random_backbone("resnet18", trainable=True)
    for backbone in (frozen, trained):
        backbone.train()
        before = backbone.net.bn1.running_mean.clone()
        features = backbone(images())[0]
        moved = not torch.equal(backbone.net.bn1.running_mean, before)
        assert features.requires_grad == moved == (backbone is trained)


def test_classifier_of_another_shape_does_not_matter(saved, tmp_path):
    weights = {**saved[1].state_dict(), "fc.weight": torch.zeros(3, 512), "fc.bias": torch.zeros(3)}
    torch.save(weights, tmp_path / "tuned.pth")
    Backbone(BackboneSettings("resnet18", str(tmp_path / "tuned.pth")), 64).load_pretrained()


@pytest.mark.parametrize(
    ("settings", "size", "words"),
    [
        ({"backbone": "resnet81"}, 64, "did you mean resnet18"),
        ({"backbone": "zzz"}, 64, "is no network of torchvision"),
        ({"backbone": "resnet18", "layers": ("layr3",)}, 64, "there are layer3"),
        ({"backbone": "alexnet"}, 64, "--layers"),
        ({"backbone": "squeezenet1_0"}, 8, "cannot take images of 8 px; --image_size 21"),
        ({"backbone_init": "random", "backbone_weights": "x.pth"}, 64, "exclude each other"),
    ],
)
def test_bad_settings_are_one_sentence(settings, size, words):
    with pytest.raises(UserError, match=words):
        Backbone(BackboneSettings(**settings), size)


def test_images_of_another_size_and_layers_without_maps_are_refused():
    with pytest.raises(UserError, match=r"\(N, 3, 64, 64\)"):
        random_backbone()(images(side=32))
    with pytest.raises(UserError, match="not a square map"):
        random_backbone("resnet18", layers=("flatten",)).check_maps()


def test_weights_that_do_not_fit_name_the_first_difference(saved, tmp_path):
    folder, network = saved
    with pytest.raises(UserError, match=r"does not fit squeezenet1_0: features.0.weight is missing"):
        Backbone(BackboneSettings("squeezenet1_0", str(folder / "weights.pth")), 64).load_pretrained()
    torch.save({**network.state_dict(), "conv1.weight": torch.zeros(64, 1, 7, 7)}, tmp_path / "gray.pth")
    with pytest.raises(UserError, match=r"conv1.weight has shape \(64, 1, 7, 7\), expected \(64, 3, 7, 7\)"):
        Backbone(BackboneSettings("resnet18", str(tmp_path / "gray.pth")), 64).load_pretrained()


@pytest.mark.parametrize("content", [None, b"<html>", b"\x80\x02K\x01."])
def test_damaged_or_missing_weights_are_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"--backbone_weights {path}"):
        Backbone(BackboneSettings("squeezenet1_0", str(path)), 64).load_pretrained()


def test_without_a_network_the_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "_opener", None)
    with pytest.raises(UserError, match=r"cannot be downloaded .* --backbone_weights"):
        Backbone(BackboneSettings("squeezenet1_0"), 64).load_pretrained()
