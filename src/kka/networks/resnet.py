"""Encoders for images of 32 px with a projection head, as SimCLR and SSD (Sehwag et al., 2021) use them.

torchvision's ResNets get the stem of CIFAR: one 3 x 3 convolution of stride 1 without max-pooling, so that
32 px end as 4 x 4; there is no classifier. torchvision says `downsample` where the official code of SSD says
`shortcut`. The LeNet of Deep SAD is there for processors: a twentieth of the work of ResNet-18.
"""

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from kka.networks.lenet import CIFAR10LeNet

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
ENCODERS = (*RESNETS, "cifar10_LeNet")


def small_image_stem(network: ResNet) -> ResNet:
    """The network with the stem for small images, and features in place of the classifier."""
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool, network.fc = nn.Identity(), nn.Identity()
    return network


class ProjectedEncoder(nn.Module):
    """An encoder and the projection head of contrastive training, which scores do without."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        if arch in RESNETS:
            network = torchvision.models.get_model(arch, weights=None)
            n = network.fc.in_features
            self.encoder: nn.Module = small_image_stem(network)
        else:
            self.encoder, n = CIFAR10LeNet(), CIFAR10LeNet.rep_dim
        self.head = nn.Sequential(nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 128))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) normalised -> (N, 128) of length 1."""
        return nn.functional.normalize(self.head(self.encoder(x)))
