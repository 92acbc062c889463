"""The LeNets: parity with the official code, and equality of the faster forms with the plain ones."""

import pytest
import torch
import torch.nn.functional as F
from golden_arrays import tensors, unit
from torch import nn

from kka.networks.lenet import NETWORKS, Autoencoder, UpsampledDeconv, build_network, pool

OUTPUT_DIMS = {"cifar10_LeNet": 128, "fmnist_LeNet": 64, "mnist_LeNet": 32}


def official_encoder():
    network = build_network("cifar10_LeNet")
    network.load_state_dict(tensors("deep_sad/weights_cifar10_lenet"), strict=True)
    return network


def official_autoencoder():
    autoencoder = Autoencoder("cifar10_LeNet")
    weights = {f"encoder.{key}": value for key, value in tensors("deep_sad/weights_cifar10_lenet").items()}
    decoder = tensors("deep_sad/weights_cifar10_lenet_decoder")
    weights.update({f"decoder.{key}": value for key, value in decoder.items()})
    autoencoder.load_state_dict(weights, strict=True)
    return autoencoder


def test_forward_equals_official_code():
    expected = tensors("deep_sad/forward")
    network, images = official_encoder(), unit(expected["input_images_uint8"])
    network.eval()
    torch.testing.assert_close(network(images), expected["output_eval_mode"], atol=1e-5, rtol=0)
    network.train()
    torch.testing.assert_close(network(images), expected["output_train_mode"], atol=1e-5, rtol=0)
    for layer in ("bn2d1", "bn2d2", "bn2d3"):
        for statistic in ("running_mean", "running_var"):
            ours = getattr(getattr(network, layer), statistic)
            theirs = expected[f"output_{statistic}_after_train_mode_{layer}"]
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_autoencoder_equals_official_code():
    expected = tensors("deep_sad/ae_forward")
    images = unit(expected["input_images_uint8"])
    reconstruction = official_autoencoder().eval()(images)
    torch.testing.assert_close(reconstruction, expected["output_reconstruction_eval_mode"], atol=1e-5, rtol=0)
    error = (reconstruction - images).square().mean((1, 2, 3))
    torch.testing.assert_close(error, expected["output_error_per_image_eval_mode"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("net_name", NETWORKS)
def test_shapes_and_no_bias(net_name):
    autoencoder = Autoencoder(net_name)
    encoder = autoencoder.encoder
    images = torch.rand(3, encoder.channels, encoder.size, encoder.size)
    assert encoder(images).shape == (3, encoder.rep_dim) == (3, OUTPUT_DIMS[net_name])
    reconstruction = autoencoder(images)
    assert reconstruction.shape == images.shape
    assert reconstruction.min() >= 0
    assert reconstruction.max() <= 1
    assert all(name.endswith("weight") for name, _ in autoencoder.named_parameters())
    assert not any("bn" in name for name, _ in autoencoder.named_parameters())


@pytest.mark.parametrize(("n_in", "n_out", "side", "crop"), [(8, 6, 4, 0), (4, 8, 8, 1), (3, 1, 7, 0)])
def test_upsampled_deconv_equals_upsampling_and_transposed_convolution(n_in, n_out, side, crop):
    fast = UpsampledDeconv(n_in, n_out, crop)
    plain = nn.ConvTranspose2d(n_in, n_out, 5, bias=False, padding=2 + crop)
    plain.load_state_dict(fast.state_dict(), strict=True)
    x = torch.randn(2, n_in, side, side, requires_grad=True)
    y, expected = fast(x), plain(F.interpolate(x, scale_factor=2))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    seed = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, [x, fast.weight], seed),
        torch.autograd.grad(expected, [x, plain.weight], seed),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_pooling_before_activation_is_equal():
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(pool(x), F.max_pool2d(F.leaky_relu(x), 2), atol=0, rtol=0)
