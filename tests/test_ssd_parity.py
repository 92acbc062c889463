"""SSD: losses, network and scores against the official code."""

import math

import numpy as np
import pytest
import torch
from golden_arrays import golden, tensors, unit
from test_ssd import distances
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from kka.detectors.ssd import (
    BASE_TEMPERATURE,
    SSDSettings,
    contrastive_loss,
    fit_gaussians,
    standardize,
    to_unit_length,
)
from kka.metrics import aupr, auroc
from kka.networks.resnet import ProjectedEncoder, small_image_stem

FAST = SSDSettings(arch="cifar10_LeNet", n_epochs=2, warmup=1, batch_size=8, scale_lr=True, copies=2)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 0.1])
def test_loss_equals_official_code(labelled, temperature):
    expected = tensors("ssd/contrastive_loss")
    first, second = (expected[f"input_z{k}"].requires_grad_() for k in (1, 2))
    labels = expected["input_labels"] if labelled else None
    loss = contrastive_loss(first, second, temperature, labels)
    loss.backward()
    suffix = f"{'' if labelled else 'un'}labelled_t{temperature}".replace(".", "p")
    torch.testing.assert_close(loss, expected[f"output_loss_{suffix}"], rtol=1e-4, atol=0)
    for k, z in ((1, first), (2, second)):
        gradient = expected[f"output_gradient_wrt_z{k}_{suffix}"]
        torch.testing.assert_close(z.grad, gradient, rtol=1e-4, atol=1e-5)
    if suffix == "unlabelled_t0p5":
        plain = expected["output_loss_unlabelled_t0p5_base0p5"]
        torch.testing.assert_close(loss * BASE_TEMPERATURE / 0.5, plain, rtol=1e-4, atol=0)


@pytest.mark.parametrize("n", [2, 7])
def test_loss_of_equal_views_and_orthogonal_images(n):
    z, t = torch.eye(n, 16), 0.5
    by_hand = -(t / 0.07) * (1 / t - math.log(math.exp(1 / t) + 2 * n - 2))
    assert float(contrastive_loss(z, z, t)) == pytest.approx(by_hand, rel=1e-6)


def test_loss_does_not_depend_on_the_order():
    z = nn.functional.normalize(torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)), dim=2)
    order = torch.tensor([3, 0, 8, 1, 2, 7, 6, 5, 4])
    torch.testing.assert_close(
        contrastive_loss(z[0], z[1], 0.5), contrastive_loss(z[0, order], z[1, order], 0.5)
    )


def formula_weights(network):
    """The weights of the fixture's README: a hash of each entry's place."""
    state = {}
    for p, (name, value) in enumerate(network.state_dict().items()):
        u = (np.arange(1, value.numel() + 1) * 2654435761 + (p + 1) * 2654404711) % 2**32
        for shift, factor in ((15, 2246822519), (13, 3266489917)):
            u = ((u ^ (u >> shift)).astype(np.uint64) * np.uint64(factor)) % np.uint64(2**32)
            u = u.astype(np.int64)
        h = (u ^ (u >> 16)) / 2**32
        fan = value[0].numel() if value.ndim > 1 else 1
        kinds = {
            "num_batches_tracked": 0 * h,
            "running_var": 0.5 + h,
            "running_mean": 0.2 * (h - 0.5),
            "weight": 0.75 + 0.5 * h if value.ndim < 2 else (h - 0.5) * np.sqrt(6 * value.ndim / fan),
            "bias": 0.2 * (h - 0.5),
        }
        state[name] = torch.from_numpy(kinds[name.rpartition(".")[2]]).to(value).view(value.shape)
    return state


def test_resnet18_equals_official_code():
    expected = tensors("ssd/resnet18_formula_weights")
    network = ProjectedEncoder("resnet18")
    state = formula_weights(network)
    network.load_state_dict(state, strict=True)
    sizes = [value.numel() for value in state.values()]
    assert sizes == expected["output_number_of_entries_of_each_state_dict_item"].tolist()
    ends = torch.stack([value.flatten()[[0, -1]] for value in state.values() if value.is_floating_point()])
    torch.testing.assert_close(ends, expected["output_first_and_last_value_of_each_floating_state_dict_item"])
    images = unit(expected["input_images_uint8"])
    network.eval()
    with torch.no_grad():
        features, projected = network.encoder(images), network(images)
    torch.testing.assert_close(features, expected["output_encoder_features_eval_mode"], rtol=1e-3, atol=1e-3)
    key = "output_projection_normalised_eval_mode"
    torch.testing.assert_close(projected, expected[key], rtol=1e-3, atol=1e-3)


def test_bottleneck_equals_official_code():
    expected = tensors("ssd/resnet_small_features")
    network = ResNet(Bottleneck, [1, 1, 1, 1])
    network.layer3, network.layer4 = nn.Identity(), nn.Identity()
    network = small_image_stem(network)
    weights = tensors("ssd/weights_resnet_bottleneckblock_1100")
    network.load_state_dict({k.replace("shortcut", "downsample"): v for k, v in weights.items()}, strict=True)
    images = unit(expected["input_images_uint8"])
    for mode in ("eval", "train"):
        with torch.no_grad():
            features = network.train(mode == "train")(images)
        key = f"output_features_bottleneckblock_{mode}_mode"
        torch.testing.assert_close(features, expected[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("arch", "dim", "n_blocks"), [("resnet34", 512, 16), ("resnet50", 2048, 16)])
def test_architectures(arch, dim, n_blocks):
    encoder = ProjectedEncoder(arch).encoder
    assert sum(isinstance(module, BasicBlock | Bottleneck) for module in encoder.modules()) == n_blocks
    encoder.fc = nn.Flatten()
    with torch.no_grad():
        assert encoder.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, dim)
        assert encoder.layer4(encoder.layer3(torch.zeros(1, dim // 4, 16, 16))).shape[-1] == 4


def scale_of(expected):
    normalised = to_unit_length(expected["input_train_features"].astype(np.float64))
    return {"mean": normalised.mean(0), "std": normalised.std(0)}


@pytest.mark.parametrize("n_clusters", [1, 2])
def test_scores_equal_official_code(n_clusters):
    expected = golden("ssd/scores")
    scale, scores = scale_of(expected), {}
    train = standardize(expected["input_train_features"], **scale)
    np.testing.assert_allclose(train, expected["output_normalised_train_features"], rtol=1e-4, atol=1e-5)
    clusters = expected["input_train_cluster_of_each_row"] * (n_clusters > 1)
    gaussians = fit_gaussians(train, clusters, "pinv")
    for part in ("test", "outlier"):
        scores[part] = distances(standardize(expected[f"input_{part}_features"], **scale), **gaussians)
        suffix = f"{n_clusters}cluster{'s' * (n_clusters > 1)}"
        np.testing.assert_allclose(scores[part], expected[f"output_score_{part}_{suffix}"], rtol=1e-3)
    both, targets = np.concatenate(list(scores.values())), [0] * 20 + [1] * 17
    metrics = expected[f"output_fpr95_auroc_aupr_{suffix}"]
    assert [auroc(targets, both), aupr(targets, both)] == pytest.approx(list(metrics[1:]), abs=1e-6)


@pytest.mark.parametrize("name", ["ssdk_scores", "ssdk_scores_more_dims_than_samples"])
def test_ssdk_scores_equal_official_code(name):
    expected = golden(f"ssd/{name}")
    scale = scale_of(expected)

    def gaussian(part):
        features = standardize(expected[f"input_{part}_features"], **scale)
        return fit_gaussians(features, np.zeros(len(features)), "ledoit_wolf")

    inside, outside = gaussian("train"), gaussian("known_outlier")
    for part in ("test", "outlier"):
        features = standardize(expected[f"input_{part}_features"], **scale)
        scores = distances(features, **inside) - distances(features, **outside)
        np.testing.assert_allclose(scores, expected[f"output_score_{part}_ssdk"], rtol=1e-3, atol=1e-3)


def test_shrunk_covariance_equals_official_code():
    expected = golden("ssd/ssdk_scores_more_dims_than_samples")
    train = expected["input_train_features"].astype(np.float64)
    gaussian = fit_gaussians(train, np.zeros(len(train)), "ledoit_wolf")
    covariance = expected["output_ledoit_wolf_covariance_of_raw_train_features"]
    np.testing.assert_allclose(np.linalg.inv(gaussian["precisions"][0]), covariance, rtol=1e-3, atol=1e-5)
    scores = distances(expected["input_test_features"].astype(np.float64), **gaussian)
    key = "output_score_test_one_ledoit_wolf_without_normalisation"
    np.testing.assert_allclose(scores, expected[key], rtol=1e-3, atol=1e-3)
