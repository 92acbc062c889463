"""The tensors of one experiment and the labels of its training images."""

import logging
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kka.datasets.images import Decoded, content_digest, decode, read_native, working_side
from kka.datasets.layout import Images
from kka.datasets.native import Native
from kka.datasets.task import Task
from kka.errors import UserError
from kka.files import sha256
from kka.seeds import derive_seed
from kka.semi_supervised import paper_setting, ratio_setting, solve_counts
from kka.train_set import TrainSet

HELDOUT = 0.2  # share of the normals kept from training by --threshold_from heldout

log = logging.getLogger(__name__)


class LabelSettings(Protocol):
    """The options that decide which training image is labelled what."""

    @property
    def ratio_known_normal(self) -> float | None: ...
    @property
    def ratio_known_outlier(self) -> float | None: ...
    @property
    def ratio_pollution(self) -> float | None: ...
    @property
    def threshold_from(self) -> str: ...


@dataclass(frozen=True)
class Data:
    """Decoded images of a task; the lists name exactly the images that could be read."""

    task: Task
    normals: Decoded
    generated: Decoded
    test: Decoded
    known: Decoded
    native: Native | None
    """what the generated images were made like"""

    @property
    def n_skipped(self) -> int:
        """Number of unreadable images that were left out."""
        parts = (self.normals, self.generated, self.test, self.known)
        return sum(int((~part.good).sum()) for part in parts)


def digest_task(task: Task) -> tuple[str, ...]:
    """Content digests of normals, generated and test images, and of known anomalies if there are any.

    Raises UserError if a generated image is a test image.
    """
    parts = [task.normals, task.generated, task.test, *[task.known] * bool(len(task.known))]
    digests = tuple(content_digest(part.paths) for part in parts)
    refuse_test_images(task.generated, task.test)
    return digests


def refuse_test_images(anomalies: Images, test: Images) -> None:
    """Raises UserError if an anomaly to train on has the content of a real test image.

    Only files of one size are read. Known anomalies have left the test set and are none of these.
    """
    real = [path for path, generated in zip(test.paths, test.generated, strict=True) if not generated]
    mine, theirs = ({path: path.stat().st_size for path in paths} for paths in (anomalies.paths, real))
    sizes = {*mine.values()} & {*theirs.values()}
    known = {sha256(path): path for path, size in theirs.items() if size in sizes}
    for path, size in mine.items():
        if size in sizes and (twin := known.get(sha256(path))):
            raise UserError(
                f"{path} is a test image, {twin}, and must not be trained on; give another --anomaly_path"
            )


def load_data(
    task: Task,
    digests: tuple[str, ...],
    size: int,
    skip_bad: bool,
    threads: int,
    bgr: bool,
    match: bool = True,
) -> Data:
    """Decode a task's images; training images also at the working size. See `decode` for the arguments.

    With `match` generated images are first made like the normals, in size and compression.
    """
    common, largest = read_native(task.normals.paths, skip_bad)
    native, side = common if match else None, working_side(largest, size)
    if match:
        _warn_of_small(task.generated, common, skip_bad)

    def read(part: Images, digest: str, side: int, name: str) -> Decoded:
        decoded = decode(
            part.paths, digest, side, size, skip_bad, threads, name, native, generated=part.generated
        )
        return _swap_channels(decoded) if bgr else decoded

    normals = read(task.normals, digests[0], side, "normal images")
    generated = read(task.generated, digests[1], side, "generated anomalies")
    test = read(task.test, digests[2], 0, "test images")
    known = read(task.known, (*digests, "")[3], side, "known anomalies")
    kept = np.flatnonzero(generated.good.numpy())
    index = tuple(task.generated_index[i] for i in kept)
    pairs = ((task.normals, normals), (task.generated, generated), (task.test, test), (task.known, known))
    for part, decoded in pairs:
        for i in np.flatnonzero(~decoded.good.numpy()):
            log.warning("skipped %s, which cannot be read", part.paths[i])
    kept_parts = [_kept(part, decoded) for part, decoded in pairs]
    task = Task(kept_parts[0], kept_parts[1], index, kept_parts[2], kept_parts[3])
    data = Data(task, normals, generated, test, known, native)
    if data.n_skipped:
        log.warning("%d unreadable images were skipped", data.n_skipped)
    return data


def build_train_set(data: Data, settings: LabelSettings, seed: int) -> tuple[TrainSet, Tensor]:
    """The training set with its semi-supervised labels, and the rows of normals that are kept out of it.

    Without any ratio every normal is unlabelled and every generated anomaly labelled (the paper); with one,
    the counts are the official ones. Known real anomalies, which come last, are labelled always. Normals are
    held out only for --threshold_from heldout.
    """
    rng = np.random.default_rng(derive_seed(seed, "labels"))
    n_normal, n_generated = len(data.normals.images), len(data.generated.images)
    order = rng.permutation(n_normal)
    n_heldout = round(HELDOUT * n_normal) if settings.threshold_from == "heldout" else 0
    if settings.threshold_from == "heldout" and n_heldout < 1:
        raise UserError(f"--threshold_from heldout needs more normals than {n_normal}")
    used = np.sort(order[n_heldout:])
    rows, semi_targets = _label(len(used), n_generated, settings, rng)
    rows = np.r_[used, n_normal + np.arange(n_generated)][rows]
    both = _concatenate(data.normals, data.generated)
    captions = data.task.normals.captions + data.task.generated.captions
    index = torch.from_numpy(rows)
    train = TrainSet(
        both.images[index],
        both.native_sizes[index],
        both.resized[index],
        (index >= n_normal).long(),
        torch.from_numpy(semi_targets),
        captions=tuple(captions[i] for i in rows),
    )
    return add_known(train, data), torch.from_numpy(np.sort(order[:n_heldout]))


def add_known(train: TrainSet, data: Data) -> TrainSet:
    """The training set with the known real anomalies behind it."""
    k = data.known
    return train.append_anomalies(k.images, k.native_sizes, k.resized, True) if len(k.images) else train


def _label(
    n_normal: int, n_generated: int, settings: LabelSettings, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    ratios = (settings.ratio_known_normal, settings.ratio_known_outlier, settings.ratio_pollution)
    if all(ratio is None for ratio in ratios):
        return paper_setting(n_normal, n_generated)
    known_normal, known_outlier, pollution = (ratio or 0.0 for ratio in ratios)
    counts = solve_counts(n_normal, known_normal, known_outlier, pollution)
    if counts.known_outlier == 0 and known_outlier > 0:
        log.warning(
            "--ratio_known_outlier %s labels no anomaly at all: %d labelled and %d unlabelled normals, "
            "%d anomalies treated as normal, 0 labelled anomalies; leave out the ratios to label all of them",
            known_outlier, counts.known_normal, counts.unlabelled_normal, counts.unlabelled_outlier,
        )  # fmt: skip
    return ratio_setting(counts, n_normal, n_generated, rng)


def _kept(images: Images, decoded: Decoded) -> Images:
    return images.take([i for i, good in enumerate(decoded.good.tolist()) if good])


def _warn_of_small(generated: Images, normal: Native, skip_bad: bool) -> None:
    """What was never drawn cannot be made up for: enlarged images are blurred."""
    own = read_native(generated.paths, skip_bad)[0]
    if len(generated) and own.short_side < normal.short_side:
        log.warning(
            "the generated images (%d px) are smaller than the normals (%d px) and are enlarged: a detector "
            "that takes large images may tell them by their blur", own.short_side, normal.short_side,
        )  # fmt: skip


def _swap_channels(decoded: Decoded) -> Decoded:
    return replace(decoded, images=decoded.images.flip(1), resized=decoded.resized.flip(1))


def _concatenate(*parts: Decoded) -> Decoded:
    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return Decoded(joined("images"), joined("native_sizes"), joined("resized"), joined("good"))
