"""One experiment's images: normals and generated anomalies to train on, real images to test on."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kka.anomalies import has_manifest
from kka.datasets import folder, mvtec
from kka.datasets.folder import read_folder
from kka.datasets.layout import (
    ANOMALY_FOLDER,
    NAME_LIST,
    DataSetSpec,
    Images,
    UserDict,
    list_images,
    normal_folders,
    read_class_folder,
    refuse_others,
)
from kka.errors import UserError
from kka.files import read_json


@dataclass(frozen=True)
class Choice:
    """Which part of a data set an experiment takes."""

    user_dict: UserDict | None = None
    """{0: training folders, 1: test folders}; None: the data set's own"""
    iterate: bool = False
    """test on test normals and generated anomalies (the official iterating mode)"""
    normal_classes: tuple[int, ...] = ()
    """folders taken as normal instead of the data set's own"""
    category: tuple[int | str, ...] = ()
    """the class of MVTec AD"""
    n_known: int = 0
    """real anomalies that leave the test set for the training set"""
    known_kind: str | None = None
    """the kind they all are of, which leaves the test set altogether; None: any kind"""
    anomaly_path: Path | None = None
    """folder of the generated anomalies; None: folder 0 of the data set"""
    n_anomalies: int = -1
    """size of a random part of the generated anomalies; -1 all, 0 none"""
    seed: int = 0
    """of that random part"""


@dataclass(frozen=True)
class Task:
    """Images of one experiment."""

    normals: Images
    """to train on, target 0"""
    generated: Images
    """generated anomalies to train on, target 1"""
    generated_index: tuple[int, ...]
    """place of each of them in the list of the anomaly folder"""
    test: Images
    """targets 0 and 1"""
    known: Images = field(default_factory=Images)
    """real anomalies to train on, target 1"""


def read_task(spec: DataSetSpec, root: Path, choice: Choice) -> Task:
    """The lists of images that `choice` takes from the data set at `root`; no image is opened.

    Raises UserError for folders that do not exist, are given twice or as both normal and anomalous.
    """
    if not root.is_dir():
        raise UserError(f"{root} does not exist; give the folder of {spec.title} with --data_path")
    if not any(root.iterdir()):
        raise UserError(f"{root} is empty; fill it with `python src/prepare.py` or give another --data_path")
    if spec.name == mvtec.SPEC.name:
        root = mvtec.class_folder(root, choice.category)
    anomaly_path = choice.anomaly_path or root / str(ANOMALY_FOLDER)
    if spec.name in (folder.SPEC.name, mvtec.SPEC.name):
        normals, test = read_folder(root)
        wanted = choice.anomaly_path is not None or choice.n_anomalies > 0 or anomaly_path.is_dir()
        folders: UserDict = {0: [ANOMALY_FOLDER] * wanted, 1: [ANOMALY_FOLDER] * choice.iterate}
        if choice.iterate:
            test = test.take([i for i, target in enumerate(test.targets) if target == 0])
    else:
        folders, normal_classes = resolve_folders(spec, choice)
        _check_folders(spec, root, folders, anomaly_path, normal_classes)
        normals = _read_classes(spec, root, folders[0], "train", normal_classes)
        test = _read_classes(spec, root, folders[1], "test", normal_classes)
    if choice.anomaly_path is not None and ANOMALY_FOLDER not in (*folders[0], *folders[1]):
        raise UserError("--anomaly_path has no effect, because the user_dict has no folder 0 on either side")
    if not len(normals):
        raise UserError(f"{root} has no normal training images; training needs at least two")
    everything = Images()
    if choice.n_anomalies != 0 and ANOMALY_FOLDER in (*folders[0], *folders[1]):
        everything = read_anomalies(anomaly_path, spec)
    if ANOMALY_FOLDER in folders[1]:
        test += everything
    index = _choose(len(everything), choice) if ANOMALY_FOLDER in folders[0] else ()
    test, known = hold_known(test, choice, root)
    return Task(normals, everything.take(index), index, test, known)


def hold_known(test: Images, choice: Choice, root: Path) -> tuple[Images, Images]:
    """The test set without the anomalies that are known, and these; drawn at random by the seed.

    General setting: from all kinds. Hard setting: from one kind, of which none stays in the test set.
    Raises UserError if there are too few of them, no such kind, or none would be left to test on.
    """
    if choice.n_known == 0:
        return test, Images()
    kind, generated = choice.known_kind, test.generated
    real = [i for i, t in enumerate(test.targets) if t == 1 and not generated[i]]
    rows = [i for i in real if kind is None or test.classes[i] == kind]
    if kind is not None and not rows:
        kinds = ", ".join(dict.fromkeys(test.classes[i] for i in real))
        raise UserError(f"--know_class {kind!r}: the test set has no such anomalies; it has {kinds}")
    if choice.n_known > len(rows):
        of_kind, most = (f" of kind {kind}", len(rows)) if kind else ("", len(rows) - 1)
        raise UserError(
            f"--n_anomaly {choice.n_known}: the test set of {root} has only {len(rows)} anomalies{of_kind}; "
            f"give at most {max(most, 0)}"
        )
    chosen = np.random.default_rng([choice.seed, len(rows), 1]).choice(rows, choice.n_known, replace=False)
    gone = set(rows) if kind is not None else set(chosen.tolist())
    left = [i for i in range(len(test)) if i not in gone]
    if not any(test.targets[i] for i in left):
        flag = f"--n_anomaly {choice.n_known}" if kind is None else f"--know_class {kind!r}"
        remedy = "give a smaller number" if kind is None and choice.n_known > 1 else "leave it out"
        raise UserError(f"{flag} leaves no anomaly in the test set of {root} to test on; {remedy}")
    return test.take(left), test.take(sorted(chosen.tolist()))


def resolve_folders(spec: DataSetSpec, choice: Choice) -> tuple[UserDict, tuple[int, ...]]:
    """The user_dict and the normal classes that a choice means.

    --user_dict alone makes its training folders normal; normal classes alone make their own user_dict.
    """
    if choice.user_dict is not None:
        folders = choice.user_dict
        return folders, choice.normal_classes or normal_folders(folders)
    default = spec.iterating_user_dict if choice.iterate else spec.user_dict
    if not choice.normal_classes:
        return default, spec.normal_classes
    training = [*choice.normal_classes, ANOMALY_FOLDER]
    return {0: training, 1: training if choice.iterate else default[1]}, choice.normal_classes


ADVICE = "fill it with create/, give another --anomaly_path, or train without with --n_anomalies 0"


def read_anomalies(folder: Path, spec: DataSetSpec, advice: str = ADVICE) -> Images:
    """Generated anomalies in the order of `image.json`, or of their names where that list is missing.

    Raises UserError if the folder does not exist, is empty, or is still being drawn.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} with generated anomalies; {advice}")
    if (folder / NAME_LIST["train"]).exists():
        images = read_class_folder(folder, "train", 1, spec, class_name=str(ANOMALY_FOLDER))
    elif has_manifest(folder):  # the name list comes last
        raise UserError(
            f"{folder} is not finished: its images are being drawn, or were until an interruption; "
            "finish it with the same call of create/create_image.py"
        )
    else:
        refuse_others(folder)
        paths = tuple(list_images(folder))
        images = Images(paths, (1,) * len(paths), (str(ANOMALY_FOLDER),) * len(paths), ((),) * len(paths))
    if not len(images):
        raise UserError(f"{folder} holds no images; {advice}")
    return images


def parse_user_dict(text: str) -> UserDict:
    """--user_dict: JSON such as {"0": [26, 0], "1": [26, 1, 2]}, or a file with it."""
    value = _parse_json(text) if text.lstrip()[:1] in ("{", "[") else _read_json(text)
    if not isinstance(value, dict) or {str(key) for key in value} != {"0", "1"}:
        raise UserError(f'--user_dict must be {{"0": [training folders], "1": [test folders]}}, it is {text}')
    for side, folders in value.items():
        if not isinstance(folders, list) or not all(type(i) is int and i >= 0 for i in folders):
            raise UserError(f"--user_dict: side {side} must be a list of folder numbers, it is {folders!r}")
    return {int(side): folders for side, folders in value.items()}


def _read_json(path: str) -> object:
    try:
        return read_json(Path(path))
    except UserError as error:
        raise UserError(f"--user_dict: {error}") from None


def _parse_json(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--user_dict is not valid JSON ({error})") from None


def _check_folders(
    spec: DataSetSpec, root: Path, folders: UserDict, anomaly_path: Path, normal_classes: tuple[int, ...]
) -> None:
    for side, name in ((0, "training"), (1, "test")):
        twice = sorted({i for i in folders[side] if folders[side].count(i) > 1})
        if twice:
            raise UserError(f"user_dict: folder {twice[0]} stands twice on the {name} side")
        for i in folders[side]:
            if i != ANOMALY_FOLDER and not (root / str(i)).is_dir():
                known = sorted(int(p.name) for p in root.iterdir() if p.is_dir() and p.name.isdigit())
                raise UserError(
                    f"{root} has no class {i}; it has {_ranges(known) or 'no class folder at all'}"
                )
    if ANOMALY_FOLDER in normal_classes:
        raise UserError("folder 0 holds the generated anomalies and cannot be a normal class")
    other = [i for i in folders[0] if i != ANOMALY_FOLDER and i not in normal_classes]
    if other:
        raise UserError(
            f"user_dict: training folder {other[0]} is not normal ({_ranges(sorted(normal_classes))}); "
            "known anomalies come from folder 0 or --anomaly_path"
        )
    for i in normal_classes:
        if anomaly_path.resolve() == (root / str(i)).resolve():
            raise UserError(
                f"{anomaly_path} is given as normal class {i} and as the anomaly folder; it can be only one"
            )


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _read_classes(
    spec: DataSetSpec, root: Path, classes: list[int], split: str, normal_classes: tuple[int, ...]
) -> Images:
    images = Images()
    for i in classes:
        if i != ANOMALY_FOLDER:
            images += read_class_folder(root / str(i), split, int(i not in normal_classes), spec)
    return images


def _choose(n: int, choice: Choice) -> tuple[int, ...]:
    if choice.n_anomalies > n:
        raise UserError(f"--n_anomalies {choice.n_anomalies}: the anomaly folder has only {n} images")
    if choice.n_anomalies < 0:
        return tuple(range(n))
    chosen = np.random.default_rng([choice.seed, n]).choice(n, choice.n_anomalies, replace=False)
    return tuple(sorted(int(i) for i in chosen))
