"""Official archives -> the class-folder layout of `kka.datasets.layout`, checked and resumable.

`prepared.partial.json` marks a folder as ours while we work in it, `prepared.json` marks it as done.
"""

import io
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import CIFAR100, Flowers102
from tqdm import tqdm

from kka import archives
from kka.archives import UCM_IMAGES, Original, check_md5, find, open_original, read_flower_texts
from kka.datasets import cifar100, flower, ucm_caption
from kka.datasets.layout import ANOMALY_FOLDER, NAME_LIST, DataSetSpec, write_class_folder
from kka.errors import UserError
from kka.files import read_json, sha256, write_bytes, write_json

SPECS: dict[str, DataSetSpec] = {module.SPEC.name: module.SPEC for module in (flower, cifar100, ucm_caption)}
RECORD, PARTIAL = "prepared.json", "prepared.partial.json"
WRITERS = 8  # threads, because an image that is safely on the disk is mostly waited for
WORK = ".source"  # downloads and unpacked archives, removed at the end

# Share of each class that is for training. The paper has 51 normals of Oxford-102, that is 51 of Gaura's 67,
# and 158 of UCM-Caption, that is 79 of 100 in each of two classes.
SHARE = {"flower": 0.7612, "ucm_caption": 0.79}
_BY_CLASS = "numpy default_rng([seed, class]) shuffles each class; the first round({} n) train, the rest test"
RULES = {"cifar100": "official split", **{name: _BY_CLASS.format(share) for name, share in SHARE.items()}}

APPLE = 100  # folder of CIFAR-100's fine label 0, because folder 0 holds the generated anomalies
UCM_CLASSES = (
    "agricultural", "airplane", "baseballdiamond", "beach", "buildings", "chaparral", "denseresidential",
    "forest", "freeway", "golfcourse", "harbor", "intersection", "mediumresidential", "mobilehomepark",
    "overpass", "parkinglot", "river", "runway", "sparseresidential", "storagetanks", "tenniscourt",
)  # fmt: skip
UCM_BLOCK = 100  # images of a class, numbered one after the other

WHERE = "get {} from the page of its authors and give it with --source"
WHERE_UCM = (
    "get UCM_captions (Qu et al. 2016, 'Deep semantic understanding of high resolution remote sensing "
    "image'; GitHub's RSICD_optimal links it), unpack it and its imgs.rar, and give that folder with --source"
)
N_TEXTS = flower.SPEC.captions_per_image
TEXTS = "cvpr2016_flowers.tar.gz"
WHERE_TEXTS = (
    f"get {TEXTS} (Reed et al. 2016, 'Learning Deep Representations of Fine-grained Visual Descriptions'; "
    "GitHub's reedscot/cvpr2016 links it) and give it with --captions"
)


@dataclass(frozen=True)
class Picture:
    """One image on its way into a class folder."""

    number: int
    """names the file; no two pictures of a data set have the same"""
    class_id: int
    split: str
    """"train" or "test" """
    suffix: str
    read: Callable[[], bytes]
    """gives the image file's content"""
    captions: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """15 characters, as the official reader wants it."""
        return f"image_{self.number:05d}{self.suffix}"


@dataclass(frozen=True)
class Content:
    """What was found in a source."""

    pictures: list[Picture]
    classes: dict[int, str]
    """class id -> name"""
    sources: dict[str, str]
    """file name -> SHA-256 of what it comes from"""
    texts: Path | None = None
    """captions that lie beside the images (Oxford-102)"""


def prepare(
    name: str,
    out: Path,
    source: Path | None = None,
    captions: Path | None = None,
    seed: int = 0,
    check: bool = True,
) -> None:
    """Write a data set in the official layout; a finished one is left alone, an interrupted one continued.

    Args:
        name: "flower", "cifar100" or "ucm_caption".
        out: new folder, or one that an earlier call with the same name and seed worked in.
        source: archive, or folder with the archive or its content; None lets torchvision download it.
        captions: Reed's texts for the flowers, archive or folder; may be added to a finished data set.
        seed: of the split (0 or larger).
        check: compare with the published checksums and counts; False is for copies that are meant to differ.

    Raises UserError for bad input; what is in place by then is used by the next call.
    """
    _check_arguments(name, source, captions, seed)
    settings = {"name": name, "seed": seed, "rule": RULES[name]}
    record = _earlier_record(out, settings)
    if "counts" in record and (record["captions"] or captions is None):
        shutil.rmtree(out / WORK, ignore_errors=True)
        print(f"{out} already holds {SPECS[name].title}; nothing to do")
        _say_captions(record)
    elif "counts" in record:
        texts, text_sources = read_flower_texts(captions, out / WORK, N_TEXTS)
        _add_texts(out, texts)
        _finish(out, record | {"captions": True, "sources": record["sources"] | text_sources})
    else:
        write_json(out / PARTIAL, record | settings)  # the folder is ours from here on
        content = READERS[name](source, out / WORK, seed, check)
        texts, text_sources = read_flower_texts(captions or content.texts, out / WORK, N_TEXTS)
        sources = content.sources | text_sources
        _refuse_other_sources(out, record.get("sources", {}), sources)
        write_json(out / PARTIAL, settings | {"sources": sources})
        _write_pictures(out, content, SPECS[name])
        _add_texts(out, texts)
        has_captions = name != "flower" or bool(texts)
        _finish(out, settings | {"captions": has_captions, "counts": _count(content), "sources": sources})


def shuffled_split(
    numbers: Sequence[int], share: float, seed: int, class_id: int
) -> tuple[list[int], list[int]]:
    """Training and test part of one class, each in ascending order; the same for the same seed and class."""
    order = np.random.default_rng([seed, class_id]).permutation(len(numbers))
    n_train = round(share * len(numbers))
    return sorted(numbers[i] for i in order[:n_train]), sorted(numbers[i] for i in order[n_train:])


def photo_caption(name: str) -> str:
    """Caption made from a class name of CIFAR-100: "a photo of an oak tree"."""
    words = name.replace("_", " ")
    return f"a photo of {'an' if words[0] in 'aeiou' else 'a'} {words}"


def _check_arguments(name: str, source: Path | None, captions: Path | None, seed: int) -> None:
    if name not in SPECS:
        raise UserError(f"there is no data set {name!r} to prepare; choose from {', '.join(SPECS)}")
    if captions is not None and name != "flower":
        raise UserError(f"--captions is for flower; {name} brings its own captions")
    for flag, path in (("--source", source), ("--captions", captions)):
        if path is not None and not path.exists():
            raise UserError(f"{flag} {path} does not exist; give the archive, or the folder that holds it")
    if seed < 0:
        raise UserError(f"--seed must be 0 or larger, it is {seed}")


def _earlier_record(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of an earlier call, finished or not; {} for a new folder."""
    for file in (out / RECORD, out / PARTIAL):
        if file.exists():
            record = read_json(file)
            for key, value in settings.items():
                if "sources" in record and record.get(key) != value:  # without sources it is still empty
                    raise UserError(
                        f"{out} was prepared with {key} {record.get(key)!r}, not {value!r}; "
                        "choose another --out or remove that folder"
                    )
            return record
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds something else than a prepared data set; choose a new --out")
    return {}


def _refuse_other_sources(out: Path, earlier: dict[str, str], now: dict[str, str]) -> None:
    for name in earlier.keys() & now.keys():
        if earlier[name] != now[name]:
            raise UserError(
                f"{out} was begun with another {name} (SHA-256 {earlier[name]}, now {now[name]}); "
                "continue with that one, or remove the folder"
            )


def _write_pictures(out: Path, content: Content, spec: DataSetSpec) -> None:
    write_json(out / "classes.json", content.classes)
    classes = sorted({picture.class_id for picture in content.pictures})
    lists: dict[tuple[int, str], list[Picture]] = {(k, split): [] for k in classes for split in NAME_LIST}
    for picture in content.pictures:
        lists[picture.class_id, picture.split].append(picture)
    with tqdm(total=len(content.pictures), desc=spec.title, unit="image", disable=None) as bar:
        for (class_id, split), pictures in lists.items():
            if not (out / str(class_id) / NAME_LIST[split]).exists():
                _write_split(out / str(class_id), split, pictures, spec)
            bar.update(len(pictures))


def _write_split(folder: Path, split: str, pictures: list[Picture], spec: DataSetSpec) -> None:
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda picture: write_bytes(folder / picture.name, picture.read()), pictures))
    names = [picture.name for picture in pictures]
    if spec.name == "flower":  # the texts come later, perhaps in another call
        write_json(folder / NAME_LIST[split], names)
    else:
        write_class_folder(folder, split, names, [picture.captions for picture in pictures], spec)


def _count(content: Content) -> dict[str, int]:
    splits = [picture.split for picture in content.pictures]
    classes = {picture.class_id for picture in content.pictures}
    return {"classes": len(classes), "train": splits.count("train"), "test": splits.count("test")}


def _finish(out: Path, record: dict[str, Any]) -> None:
    for leftover in out.rglob(".*.tmp"):  # of a call that was killed
        leftover.unlink()
    write_json(out / PARTIAL, record, indent=2)
    os.replace(out / PARTIAL, out / RECORD)
    shutil.rmtree(out / WORK, ignore_errors=True)
    counts, title = record["counts"], SPECS[record["name"]].title
    print(f"{title} is in {out}: {counts['train']:,} training and {counts['test']:,} test images")
    _say_captions(record)


def _say_captions(record: dict[str, Any]) -> None:
    if not record["captions"]:
        print(f"it has no captions yet: to add them, {WHERE_TEXTS}", file=sys.stderr)


def _add_texts(out: Path, texts: dict[str, list[str]]) -> None:
    """Write the caption lists beside the name lists; nothing is written unless each image has them."""
    if not texts:
        return
    lists = {
        (file.parent, split): read_json(file)
        for split, list_name in NAME_LIST.items()
        for file in sorted(out.glob(f"*/{list_name}"))
        if file.parent.name != str(ANOMALY_FOLDER)
    }
    for stem in (Path(name).stem for names in lists.values() for name in names):
        if stem not in texts:
            raise UserError(f"the captions lack {stem}.txt, which {out} has an image for; {WHERE_TEXTS}")
    for (folder, split), names in lists.items():
        write_class_folder(folder, split, names, [texts[Path(name).stem] for name in names], flower.SPEC)


def _read_cifar100(source: Path | None, work: Path, seed: int, check: bool) -> Content:
    meta, key = CIFAR100.meta["filename"], CIFAR100.meta["key"]
    where = WHERE.format(CIFAR100.filename)
    original = Original(CIFAR100.filename, meta, where, CIFAR100.url, CIFAR100.tgz_md5, size=169_001_437)
    folder, sources = open_original(original, source, work, check)
    [[train, train_md5]], [[test, test_md5]] = CIFAR100.train_list, CIFAR100.test_list
    for name, md5 in ((meta, CIFAR100.meta["md5"]), (train, train_md5), (test, test_md5)):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}; {where}")
        if check:  # before the pickle is opened
            check_md5(folder / name, md5)
        sources[name] = sha256(folder / name)
    names = archives.load_pickle(folder / meta).get(key)
    if not isinstance(names, list) or len(names) != 100:
        raise UserError(f"{folder / meta} does not name 100 classes; {where}")
    classes = {label or APPLE: name for label, name in enumerate(names)}
    pictures: list[Picture] = []
    for split, name in (("train", train), ("test", test)):
        for image, label in zip(*archives.read_cifar(folder / name), strict=True):
            class_id = label or APPLE
            text = (photo_caption(classes[class_id]),)
            pictures.append(Picture(len(pictures) + 1, class_id, split, ".png", partial(_png, image), text))
    return Content(pictures, classes, sources)


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return buffer.getvalue()


def _read_flower(source: Path | None, work: Path, seed: int, check: bool) -> Content:
    url, (tgz, md5) = Flowers102._download_url_prefix, Flowers102._file_dict["image"]
    original = Original(tgz, "image_00001.jpg", WHERE.format(tgz), url + tgz, md5, size=344_862_509)
    folder, sources = open_original(original, source, work, check)
    labels = _flower_labels(source, work, folder, check)
    sources[labels.name] = sha256(labels)
    pictures = []
    for number, class_id in enumerate(archives.read_flower_labels(labels), start=1):
        file = folder / f"image_{number:05d}.jpg"
        if not file.is_file():
            raise UserError(f"{file} does not exist, but {labels.name} names its class; {original.where}")
        pictures.append(Picture(number, class_id, "", ".jpg", file.read_bytes))
    texts = _beside(source, folder, "text_c10") or _beside(source, folder, TEXTS)
    classes = dict(enumerate(Flowers102.classes, start=1))
    return Content(_split(pictures, SHARE["flower"], seed), classes, sources, texts)


def _flower_labels(source: Path | None, work: Path, images: Path, check: bool) -> Path:
    name, md5 = Flowers102._file_dict["label"]
    if source is None:
        return archives.download(Flowers102._download_url_prefix + name, md5, work)
    labels = _beside(source, images, name)
    if labels is None:
        raise UserError(f"there is no {name} in or beside {source}; {WHERE.format(name)}")
    if check:
        check_md5(labels, md5)
    return labels


def _beside(source: Path | None, images: Path, name: str) -> Path | None:
    """A file called `name` in the source or, if that is an archive or the folder of images, beside it."""
    if source is None:
        return None
    folder = source if source.is_dir() else source.parent
    return find(folder, name) or find(images.parent, name)


def _read_ucm_caption(source: Path | None, work: Path, seed: int, check: bool) -> Content:
    original = Original("UCM_captions.zip", "dataset.json", WHERE_UCM)
    folder, sources = open_original(original, source, work, check)
    dataset = folder / original.marker
    found = archives.read_ucm(dataset, ucm_caption.SPEC.captions_per_image)
    if check and len(found) != UCM_IMAGES:
        raise UserError(
            f"{dataset} lists {len(found)} of {UCM_IMAGES} images; {WHERE_UCM}, or use --no_check"
        )
    pictures = [
        Picture(number, (number - 1) // UCM_BLOCK + 1, "", file.suffix.lower(), file.read_bytes, sentences)
        for number, (file, sentences) in sorted(found.items())
    ]
    classes = dict(enumerate(UCM_CLASSES, start=1))
    sources[dataset.name] = sha256(dataset)
    return Content(_split(pictures, SHARE["ucm_caption"], seed), classes, sources)


def _split(pictures: list[Picture], share: float, seed: int) -> list[Picture]:
    """The pictures with their split: `shuffled_split` in each class."""
    train: set[int] = set()
    for class_id in {picture.class_id for picture in pictures}:
        numbers = [picture.number for picture in pictures if picture.class_id == class_id]
        train.update(shuffled_split(numbers, share, seed, class_id)[0])
    return [replace(picture, split="train" if picture.number in train else "test") for picture in pictures]


READERS = {"cifar100": _read_cifar100, "flower": _read_flower, "ucm_caption": _read_ucm_caption}
