"""AHL's heterogeneous distributions: features on disk, clusters of normals, tasks of two clusters each."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Generator, Tensor
from tqdm import tqdm

from kka.detectors.deviation import PSEUDO, DeviationNetwork, Features, Groups
from kka.detectors.parts import cycled
from kka.errors import UserError
from kka.files import read_json, write_json
from kka.seeds import derive_seed, generator

SMALLEST_CLUSTER = 3  # normals; smaller ones are left out
BANK_BATCH = 16
PROGRESS = "progress.json"


class FeatureBank:
    """Feature maps of many images in several views, in half precision, memory-mapped if there is a folder.

    Args:
        model: its backbone gives the features.
        images: `images(first, n)` -> (n, 3, S, S) images number first, ..., always the same ones. Behind all
            images in the first view come all of them in the second.
        n: number of images.
        views: of each image.
        folder: where the files are, and go on being filled after an interruption; None: in memory.
    """

    def __init__(
        self,
        model: DeviationNetwork,
        images: Callable[[int, int], Tensor],
        n: int,
        views: int,
        folder: Path | None,
    ) -> None:
        self.n, self.views, total, done = n, views, n * views, 0
        shapes = [(total, *reference.shape) for reference in model.references]
        if folder is None:
            self.arrays: list[np.ndarray] = [np.empty(shape, np.float16) for shape in shapes]
        else:
            folder.mkdir(exist_ok=True)
            begun = read_json(folder / PROGRESS) if (folder / PROGRESS).exists() else {}
            if begun.get("total") == total:  # not of a version that kept other ones
                done = begun["done"]
            self.arrays = [
                np.lib.format.open_memmap(
                    folder / f"features_{k}.npy", "r+" if done else "w+", np.float16, shape
                )
                for k, shape in enumerate(shapes)
            ]
        starts = range(done, total, BANK_BATCH)
        for first in tqdm(starts, desc="features", unit="batch", disable=None, leave=False):
            self._fill(model, images, first, min(BANK_BATCH, total - first), folder)

    @torch.no_grad()
    def _fill(
        self,
        model: DeviationNetwork,
        images: Callable[[int, int], Tensor],
        first: int,
        n: int,
        folder: Path | None,
    ) -> None:
        for array, maps in zip(self.arrays, model.pyramid(images(first, n)), strict=True):
            array[first : first + n] = maps.cpu().numpy()
            if isinstance(array, np.memmap):
                array.flush()
        if folder is not None:
            write_json(folder / PROGRESS, {"done": first + n, "total": self.n * self.views})

    def take(self, rows: Tensor, device: torch.device, stream: Generator | None = None) -> Features:
        """(N, C, h, w) of each size; each image in a random view, without a stream in the first."""
        if stream is not None:
            rows = rows + self.n * torch.randint(self.views, (len(rows),), generator=stream)
        return [torch.from_numpy(array[rows.numpy()]).to(device).float() for array in self.arrays]


def check_clusters(n_normals: int, n_clusters: int) -> None:
    """Raises UserError for normals that no clustering can divide into tasks; told before any training."""
    if n_normals < n_clusters:
        raise UserError(
            f"--n_clusters {n_clusters}: there are only {n_normals} normal images; lower it or add some"
        )
    if n_normals < 2 * SMALLEST_CLUSTER:
        raise UserError(
            f"there are only {n_normals} normal images, and two clusters of {SMALLEST_CLUSTER} are needed; "
            "add some"
        )


def cluster_normals(features: np.ndarray, n_clusters: int, seed: int) -> list[int]:
    """k-means on flattened features; clusters that are too small get the number -1. (N, ...) -> N numbers.

    Raises UserError for fewer normals than clusters, or if fewer than two clusters remain.
    """
    check_clusters(len(features), n_clusters)
    means = KMeans(n_clusters, n_init=10, random_state=derive_seed(seed, "clusters") % 2**32)
    numbers = means.fit_predict(features.reshape(len(features), -1).astype(np.float32))
    sizes = np.bincount(numbers, minlength=n_clusters)
    if (sizes >= SMALLEST_CLUSTER).sum() < 2:
        raise UserError(
            f"--n_clusters {n_clusters}: {len(features)} normal images fall into clusters of "
            f"{', '.join(map(str, sorted(sizes, reverse=True)))}, and at least two of "
            f"{SMALLEST_CLUSTER} are needed; add normal images"
        )
    return np.where(sizes[numbers] >= SMALLEST_CLUSTER, numbers, -1).tolist()


@dataclass(frozen=True)
class Part:
    """One half of a task: rows of the bank."""

    normals: Tensor
    pseudo: Tensor
    seen: Tensor

    @property
    def rows(self) -> Tensor:
        """All of them."""
        return torch.cat([self.normals, self.pseudo, self.seen])

    def batches(self, size: int, n: int, stream: Generator) -> list[Tensor]:
        """n batches with as many images of each kind that there is, (n, about size)."""
        kinds = [kind for kind in (self.normals, self.pseudo, self.seen) if len(kind)]
        each = size // len(kinds)
        columns = [cycled(kind, n * each, stream).view(n, each) for kind in kinds]
        return list(torch.cat(columns, 1))


@dataclass(frozen=True)
class Task:
    """One data set D_i of AHL: the model adapts to the support and is judged on the query."""

    support: Part
    query: Part


def bank_labels(groups: Groups, n_kinds: int) -> Tensor:
    """Labels of the bank: the training images, then the pseudo anomalies of the normals, kind by kind."""
    n = len(groups.labels) - len(groups.normals)
    more = torch.full((n_kinds * len(groups.normals),), PSEUDO)
    return torch.cat([groups.labels[:n], more])


def make_tasks(
    clusters: Sequence[int], groups: Groups, n_kinds: int, disjoint: bool, different: bool, seed: int
) -> list[Task]:
    """A task for each ordered pair of clusters: the support has the normals of one, the query of the other.

    Args:
        clusters: of each normal; -1: of none.
        groups: rows of the training images.
        n_kinds: of pseudo anomalies in the bank.
        disjoint: whether support and query share no seen anomaly; otherwise the query has all of them.
        different: whether their pseudo anomalies are of different kinds.
        seed: of the anomalies' halves and the kinds.
    """
    numbers = torch.tensor(clusters)
    first = len(groups.labels) - len(groups.normals)
    members = {k: torch.nonzero(numbers == k).squeeze(1) for k in sorted(set(clusters) - {-1})}
    tasks = []
    for t, pair in enumerate(itertools.permutations(members, 2)):
        stream = generator(seed, "task", t)
        seen = halves(groups.seen, disjoint, stream)
        generated = halves(groups.generated, True, stream)
        n_all = n_kinds + bool(len(groups.generated))
        kinds = torch.randperm(n_all, generator=stream)[[0, -1 if different else 0]].tolist()
        parts = []
        for side, (kind, number) in enumerate(zip(kinds, pair, strict=True)):
            made = first + kind * len(groups.normals) + members[number]
            pseudo = made if kind < n_kinds else generated[side]
            parts.append(Part(groups.normals[members[number]], pseudo, seen[side]))
        tasks.append(Task(*parts))
    return tasks


def halves(rows: Tensor, disjoint: bool, stream: Generator) -> tuple[Tensor, Tensor]:
    """A random half for the support; the rest, or all of them, for the query; a single one is in both."""
    if len(rows) < 2:
        return rows, rows
    order = rows[torch.randperm(len(rows), generator=stream)]
    middle = len(rows) // 2
    return order[:middle], order[middle:] if disjoint else order
