"""Bottleneck and decoder of reverse distillation (RD4AD, Deng and Li, CVPR 2022) with ReContrast's two heads.

At width 1 on a Wide ResNet-50 they are the official ones; other backbones and widths scale them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]


def conv_norm(n_in: int, n_out: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (divided by the stride), and its BatchNorm."""
    conv = nn.Conv2d(n_in, n_out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out))


def deconv_norm(n_in: int, n_out: int) -> nn.Sequential:
    """A transposed convolution that doubles the size, and its BatchNorm."""
    return nn.Sequential(nn.ConvTranspose2d(n_in, n_out, 2, stride=2, bias=False), nn.BatchNorm2d(n_out))


class Residual(nn.Module):
    """1 x 1, `middle` (3 x 3, or 2 x 2 transposed) and 1 x 1 convolutions beside a skip."""

    def __init__(self, n_in: int, inner: int, n_out: int, middle: nn.Module, skip: nn.Module) -> None:
        super().__init__()
        self.reduce, self.middle, self.expand = conv_norm(n_in, inner), middle, conv_norm(inner, n_out)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.middle(F.relu(self.reduce(x))))
        return F.relu(self.expand(y) + self.skip(x))


def stage(first: Residual, n: int, inner: int, blocks: int) -> nn.Sequential:
    """A block that changes the size, and blocks - 1 that keep it. `n` channels come out."""
    same = [Residual(n, inner, n, conv_norm(inner, inner, 3), nn.Identity()) for _ in range(blocks - 1)]
    return nn.Sequential(first, *same)


def resized(x: Tensor, size: Size) -> Tensor:
    """Bilinear, where the size differs: only in backbones whose strides do not halve exactly."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


class Bottleneck(nn.Module):
    """Three levels of features (strides 4, 8, 16) -> one code at stride 32."""

    def __init__(self, channels: Sequence[int], width: float = 1.0, blocks: int = 3) -> None:
        super().__init__()
        c1, c2, c3 = channels
        mid, inner = max(1, round(width * c2)), max(1, round(width * c3))
        self.n_out = 2 * inner
        self.down1 = nn.Sequential(
            conv_norm(c1, mid, 3, 2), nn.ReLU(), conv_norm(mid, inner, 3, 2), nn.ReLU()
        )
        self.down2 = nn.Sequential(conv_norm(c2, inner, 3, 2), nn.ReLU())
        n_in = 2 * inner + c3
        first = Residual(
            n_in, inner, self.n_out, conv_norm(inner, inner, 3, 2), conv_norm(n_in, self.n_out, 1, 2)
        )
        self.stage = stage(first, self.n_out, inner, blocks)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """[(N, C_l, h_l, w_l)] * 3 -> (N, 2 C_3, h_3 / 2, w_3 / 2), at width 1."""
        grid = (levels[2].shape[2], levels[2].shape[3])
        same = [resized(self.down1(levels[0]), grid), resized(self.down2(levels[1]), grid), levels[2]]
        return self.stage(torch.cat(same, 1))


class Decoder(nn.Module):
    """The code -> features of three levels, rebuilt twice: a set of 1 x 1 convolutions for each encoder."""

    def __init__(
        self, n_in: int, channels: Sequence[int], width: float = 1.0, blocks: Sequence[int] = (3, 4, 6)
    ) -> None:
        super().__init__()
        self.stages, self.heads = nn.ModuleList(), nn.ModuleList([nn.ModuleList(), nn.ModuleList()])
        for channel, number in zip(reversed(channels), blocks, strict=True):
            inner = max(1, round(width * channel / 2))
            n = 2 * inner
            first = Residual(n_in, inner, n, deconv_norm(inner, inner), deconv_norm(n_in, n))
            self.stages.append(stage(first, n, inner, number))
            for head in self.heads:
                head.append(nn.Conv2d(n, channel, 1))  # type: ignore[operator]
            n_in = n

    def forward(self, code: Tensor, sizes: Sequence[Size]) -> tuple[list[Tensor], list[Tensor]]:
        """(N, C, h, w), sizes of the levels -> both sets of [(N, C_l, h_l, w_l)] * 3, shallow level first."""
        rebuilt: tuple[list[Tensor], list[Tensor]] = ([], [])
        for i, size in enumerate(reversed(sizes)):
            code = resized(self.stages[i](code), size)
            for levels, head in zip(rebuilt, self.heads, strict=True):
                levels.insert(0, head[i](code))  # type: ignore[index]
        return rebuilt


def kaiming(module: nn.Module) -> None:
    """Kaiming normal initialisation (fan out) of all convolutions."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
