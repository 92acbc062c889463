"""The LeNets of Deep SVDD and Deep SAD with their autoencoders (Ruff et al., 2018 and 2020).

No layer has a bias and BatchNorm is not affine: a bias could learn the constant solution phi(x) = c.
Parameter names are the official ones, so official weights load. Two things are computed faster than in the
official code and give the same numbers: pooling comes before the (increasing) LeakyReLU, and the transposed
convolution of an enlarged image is evaluated at the small size (`UpsampledDeconv`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(n_in: int, n_out: int) -> nn.Conv2d:
    """A 5 x 5 convolution that keeps the size."""
    return nn.Conv2d(n_in, n_out, 5, bias=False, padding=2)


def bn2d(n: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(n, eps=1e-4, affine=False)


def bn1d(n: int) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(n, eps=1e-4, affine=False)


def pool(x: Tensor) -> Tensor:
    """LeakyReLU, then 2 x 2 maximum; the maximum first is equal and four times less work."""
    return F.leaky_relu(F.max_pool2d(x, 2))


class UpsampledDeconv(nn.ConvTranspose2d):
    """5 x 5 transposed convolution of the input enlarged twice by nearest neighbour.

    (N, n_in, H, W) -> (N, n_out, 2H, 2W), less `crop` pixels at each border. An output pixel 2i + p sees
    only the source pixels i-1, i, i+1, so the five taps of each phase p fold into three and the whole is one
    3 x 3 convolution at the small size: 36 products instead of 100 per output block.
    """

    taps: Tensor

    def __init__(self, n_in: int, n_out: int, crop: int = 0) -> None:
        super().__init__(n_in, n_out, 5, bias=False, padding=2 + crop)
        self.crop = crop
        folds = [
            [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]],
            [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]],
        ]
        self.register_buffer(
            "taps", torch.tensor(folds, dtype=torch.float32), persistent=False
        )  # (phase, 3, 5)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        kernel = self.weight.flip(2, 3)  # a transposed convolution is a correlation with the turned kernel
        kernel = kernel.unflatten(0, (self.groups, -1))
        folded = torch.einsum("giokl,pak,qbl->gopqabi", kernel, self.taps, self.taps)
        folded = folded.flatten(0, 3).permute(0, 3, 1, 2)  # (4 n_out, n_in, 3, 3), channels last in memory
        y = F.pixel_shuffle(F.conv2d(x, folded, padding=1, groups=self.groups), 2)
        return y[..., self.crop : -self.crop, self.crop : -self.crop] if self.crop else y


class Encoder(nn.Module):
    """What a detector needs to know of its network."""

    channels: int
    """1 gray or 3 RGB"""
    size: int
    """side of the images"""
    rep_dim: int
    """dimensions of the output"""


class CIFAR10LeNet(Encoder):
    """(N, 3, 32, 32) -> (N, 128)."""

    channels, size, rep_dim = 3, 32, 128

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn2d1 = conv(3, 32), bn2d(32)
        self.conv2, self.bn2d2 = conv(32, 64), bn2d(64)
        self.conv3, self.bn2d3 = conv(64, 128), bn2d(128)
        self.fc1 = nn.Linear(128 * 4 * 4, self.rep_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pool(self.bn2d1(self.conv1(x)))
        x = pool(self.bn2d2(self.conv2(x)))
        x = pool(self.bn2d3(self.conv3(x)))
        return self.fc1(x.flatten(1))


class CIFAR10LeNetDecoder(nn.Module):
    """(N, 128) -> (N, 3, 32, 32) in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.deconv1, self.bn2d4 = nn.ConvTranspose2d(8, 128, 5, bias=False, padding=2), bn2d(128)
        self.deconv2, self.bn2d5 = UpsampledDeconv(128, 64), bn2d(64)
        self.deconv3, self.bn2d6 = UpsampledDeconv(64, 32), bn2d(32)
        self.deconv4 = UpsampledDeconv(32, 3)
        for layer in (self.deconv1, self.deconv2, self.deconv3, self.deconv4):
            nn.init.xavier_uniform_(layer.weight, gain=nn.init.calculate_gain("leaky_relu"))

    def forward(self, z: Tensor) -> Tensor:
        x = F.leaky_relu(z.unflatten(1, (-1, 4, 4)))
        x = F.leaky_relu(self.bn2d4(self.deconv1(x)))
        x = F.leaky_relu(self.bn2d5(self.deconv2(x)))
        x = F.leaky_relu(self.bn2d6(self.deconv3(x)))
        return torch.sigmoid(self.deconv4(x))


class FashionMNISTLeNet(Encoder):
    """(N, 1, 28, 28) -> (N, 64)."""

    channels, size, rep_dim = 1, 28, 64

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn2d1 = conv(1, 16), bn2d(16)
        self.conv2, self.bn2d2 = conv(16, 32), bn2d(32)
        self.fc1, self.bn1d1 = nn.Linear(32 * 7 * 7, 128, bias=False), bn1d(128)
        self.fc2 = nn.Linear(128, self.rep_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pool(self.bn2d1(self.conv1(x)))
        x = pool(self.bn2d2(self.conv2(x)))
        return self.fc2(F.leaky_relu(self.bn1d1(self.fc1(x.flatten(1)))))


class FashionMNISTLeNetDecoder(nn.Module):
    """(N, 64) -> (N, 1, 28, 28) in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc3, self.bn1d2 = nn.Linear(FashionMNISTLeNet.rep_dim, 128, bias=False), bn1d(128)
        self.deconv1, self.bn2d3 = UpsampledDeconv(8, 32), bn2d(32)
        self.deconv2, self.bn2d4 = UpsampledDeconv(32, 16, crop=1), bn2d(16)
        self.deconv3 = UpsampledDeconv(16, 1)

    def forward(self, z: Tensor) -> Tensor:
        x = F.leaky_relu(self.bn1d2(self.fc3(z)).unflatten(1, (-1, 4, 4)))
        x = F.leaky_relu(self.bn2d3(self.deconv1(x)))
        x = F.leaky_relu(self.bn2d4(self.deconv2(x)))
        return torch.sigmoid(self.deconv3(x))


class MNISTLeNet(Encoder):
    """(N, 1, 28, 28) -> (N, 32)."""

    channels, size, rep_dim = 1, 28, 32

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(1, 8), bn2d(8)
        self.conv2, self.bn2 = conv(8, 4), bn2d(4)
        self.fc1 = nn.Linear(4 * 7 * 7, self.rep_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pool(self.bn1(self.conv1(x)))
        x = pool(self.bn2(self.conv2(x)))
        return self.fc1(x.flatten(1))


class MNISTLeNetDecoder(nn.Module):
    """(N, 32) -> (N, 1, 28, 28) in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.deconv1, self.bn3 = UpsampledDeconv(2, 4), bn2d(4)
        self.deconv2, self.bn4 = UpsampledDeconv(4, 8, crop=1), bn2d(8)
        self.deconv3 = UpsampledDeconv(8, 1)

    def forward(self, z: Tensor) -> Tensor:
        x = F.leaky_relu(z.unflatten(1, (-1, 4, 4)))
        x = F.leaky_relu(self.bn3(self.deconv1(x)))
        x = F.leaky_relu(self.bn4(self.deconv2(x)))
        return torch.sigmoid(self.deconv3(x))


class Autoencoder(nn.Module):
    """Encoder and decoder of one LeNet; the encoder's weights start the detector."""

    def __init__(self, net_name: str) -> None:
        super().__init__()
        encoder, decoder = NETWORKS[net_name]
        self.encoder, self.decoder = encoder(), decoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


NETWORKS: dict[str, tuple[type[Encoder], type[nn.Module]]] = {
    "cifar10_LeNet": (CIFAR10LeNet, CIFAR10LeNetDecoder),
    "fmnist_LeNet": (FashionMNISTLeNet, FashionMNISTLeNetDecoder),
    "mnist_LeNet": (MNISTLeNet, MNISTLeNetDecoder),
}


def build_network(net_name: str) -> Encoder:
    """A new encoder by its official name; raises KeyError for an unknown one."""
    return NETWORKS[net_name][0]()
