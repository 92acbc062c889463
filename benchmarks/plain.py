"""The plain way to train Deep SAD, as a yardstick: what the official code does at every epoch.

Written from its description: a DataLoader that opens and transforms every file anew, networks with transposed
convolutions of enlarged images, and the whole test set scored after each training epoch.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from tqdm import tqdm

from kka.augment import IMAGENET_MEAN, IMAGENET_STD, augment, normalize
from kka.datasets.layout import Images
from kka.datasets.task import Task
from kka.detectors.deep_sad import deep_sad_loss, move_from_zero
from kka.metrics import auroc
from kka.networks.lenet import CIFAR10LeNet, CIFAR10LeNetDecoder
from kka.seeds import generator
from kka.train_set import TrainSet

NORMALIZE = [T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
TRAIN = T.Compose(
    [
        T.RandomResizedCrop(32, scale=(0.2, 1.0)),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        *NORMALIZE,
    ]
)
TEST = T.Compose([T.Resize((32, 32)), *NORMALIZE])


class Files(Dataset):
    """Opens and transforms one file at a time."""

    def __init__(self, images: Images, transform: T.Compose) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.images.paths[index]) as image:
            return self.transform(image.convert("RGB")), self.images.targets[index]


class PlainEncoder(CIFAR10LeNet):
    """Activation before pooling."""

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.bn2d1), (self.conv2, self.bn2d2), (self.conv3, self.bn2d3)):
            x = F.max_pool2d(F.leaky_relu(norm(conv(x))), 2)
        return self.fc1(x.flatten(1))


class PlainDecoder(CIFAR10LeNetDecoder):
    """Transposed convolutions of enlarged images."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("deconv2", "deconv3", "deconv4"):
            ours = getattr(self, name)
            plain = nn.ConvTranspose2d(ours.in_channels, ours.out_channels, 5, bias=False, padding=2)
            plain.load_state_dict(ours.state_dict())
            setattr(self, name, plain)

    def forward(self, z: Tensor) -> Tensor:
        x = F.leaky_relu(z.view(-1, 8, 4, 4))
        for deconv, norm in (
            (self.deconv1, self.bn2d4),
            (self.deconv2, self.bn2d5),
            (self.deconv3, self.bn2d6),
        ):
            x = F.interpolate(F.leaky_relu(norm(deconv(x))), scale_factor=2)
        return torch.sigmoid(self.deconv4(x))


class PlainWay:
    """Runs pre-training and training, and times some of their epochs the plain way.

    The epochs in between train the same networks from resident tensors, so that a timed epoch meets the
    weights, and the denormal numbers, that it would meet in a whole plain run.
    """

    def __init__(self, task: Task, resident: TrainSet) -> None:
        files = Files(task.normals + task.generated, TRAIN)
        # The official code drops the last incomplete batch; a set smaller than a batch would train nothing.
        self.files = DataLoader(files, batch_size=32, shuffle=True, drop_last=len(files) >= 32)
        self.test = DataLoader(Files(task.test, TEST), batch_size=32)
        self.test_targets, self.resident = task.test.targets, resident
        self.encoder, self.decoder = PlainEncoder(), PlainDecoder()
        self.center = torch.zeros(CIFAR10LeNet.rep_dim)

    def time(self, timed: int, epochs: int) -> dict[str, float]:
        """Seconds of a whole run: the mean of `timed` evenly spaced epochs of each phase times `epochs`."""
        autoencoder = nn.Sequential(self.encoder, self.decoder)
        optimizer = torch.optim.Adam(autoencoder.parameters(), lr=1e-4, weight_decay=0.5e-3)
        pretrain = []
        for seconds in self._epochs(
            timed, epochs, lambda batches: _reconstruct(autoencoder, optimizer, batches)
        ):
            pretrain.append(seconds)
        with torch.no_grad():
            self.center = move_from_zero(self.encoder(next(iter(self.test))[0]).mean(0))
        optimizer = torch.optim.Adam(self.encoder.parameters(), lr=1e-4, weight_decay=0.5e-6)
        train, test = [], []
        for seconds in self._epochs(timed, epochs, partial(self._pull, optimizer)):
            train.append(seconds)
            test.append(_seconds(self._test))
        means = {"pretrain": mean(pretrain), "train": mean(train), "test": mean(test)}
        return {phase: epochs * seconds for phase, seconds in means.items()}

    def _epochs(self, timed: int, epochs: int, train: Callable[[Iterable], None]) -> Iterator[float]:
        stride = max(1, epochs // timed)
        for epoch in tqdm(range(epochs), desc="the plain way", disable=None, leave=False):
            if epoch % stride == stride // 2:
                yield _seconds(lambda: train(self.files))
            else:
                train(self._resident_batches(epoch))

    def _resident_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        stream, t = generator(0, "plain", epoch), self.resident
        for batch in torch.randperm(len(t), generator=stream).split(32):
            yield normalize(augment(t.images[batch], t.native_sizes[batch], 32, stream)), t.targets[batch]

    def _pull(self, optimizer: torch.optim.Optimizer, batches: Iterable) -> None:
        self.encoder.train()
        for images, targets in batches:
            optimizer.zero_grad()
            deep_sad_loss(self._distances(images), -targets).mean().backward()
            optimizer.step()

    @torch.no_grad()
    def _test(self) -> None:
        self.encoder.eval()
        auroc(self.test_targets, torch.cat([self._distances(images) for images, _ in self.test]).numpy())

    def _distances(self, images: Tensor) -> Tensor:
        return (self.encoder(images) - self.center).square().sum(1)


def _reconstruct(autoencoder: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable) -> None:
    autoencoder.train()
    for images, _ in batches:
        optimizer.zero_grad()
        F.mse_loss(autoencoder(images), images).backward()
        optimizer.step()


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def enlarge(root: Path, out: Path, side: int) -> Path:
    """A copy of a data set in class folders, every image enlarged to at least `side` px, as JPEG."""
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir())

    def copy(folder: Path) -> None:
        target = out / folder.name
        target.mkdir(parents=True)
        for path in folder.iterdir():
            if path.suffix == ".json":
                shutil.copy(path, target)
                continue
            with Image.open(path) as image:
                factor = side / min(image.size)
                size = [round(factor * length) for length in image.size]
                image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(
                    target / path.name, quality=90
                )

    with ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(copy, folders), total=len(folders), desc="enlarging", disable=None, leave=False))
    return out
