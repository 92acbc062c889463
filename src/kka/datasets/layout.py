"""The official folder layout: `<data_path>/<class id>/` with images, name lists and flat caption lists."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from kka.errors import UserError
from kka.files import read_json, write_json

IMAGE_SUFFIXES = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm",
        ".jp2",
    }
)  # fmt: skip
SIDE_SUFFIXES = frozenset(
    {
        ".txt", ".md", ".rst", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".xmp", ".yaml", ".yml", ".html",
        ".htm", ".pdf", ".ini", ".log", ".db", ".md5", ".sha256",
    }
)  # fmt: skip
SIDE_NAMES = ("readme", "licen", "copying", "checksum")  # how those without suffix begin
ANOMALY_FOLDER = 0  # the class id of the generated anomalies
NAME_LIST = {"train": "image.json", "test": "image_test.json"}

UserDict = dict[int, list[int]]


@dataclass(frozen=True)
class DataSetSpec:
    """What is particular about one data set; everything else is shared code."""

    name: str
    """value of --dataset_name"""
    title: str
    """name in tables and messages"""
    normal_classes: tuple[int, ...]
    """folders whose images are normal (target 0)"""
    user_dict: UserDict
    """{0: training folders, 1: test folders}; test holds all real classes"""
    iterating_user_dict: UserDict
    """the same with test normals and generated anomalies on the test side"""
    caption_stem: str
    """captions are in <stem>.json and <stem>_test.json"""
    captions_per_image: int
    """length of one image's block in the flat caption list"""
    prompt: str
    """request to the LLM with a place for {examples}, captions of normal images"""
    n_epochs: int
    """training epochs of the detector (paper, Section IV)"""
    n_initial: int = 200
    """generated anomalies of round 0 (paper)"""
    n_updates: int = 2
    """updates of the anomaly set (paper)"""
    caption_repeats: int = 1
    """times that the LLM may give one caption: more where captions only name a thing"""
    superclasses: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """named groups of folders for --normal_superclass"""


def normal_folders(folders: UserDict) -> tuple[int, ...]:
    """The class folders on the training side of a user_dict: what is trained on is normal."""
    return tuple(sorted(i for i in folders[0] if i != ANOMALY_FOLDER))


@dataclass(frozen=True)
class Images:
    """A list of image files with what is known about each; all fields have the same length."""

    paths: tuple[Path, ...] = ()
    targets: tuple[int, ...] = ()
    """0 normal, 1 anomaly"""
    classes: tuple[str, ...] = ()
    """class folder or kind of anomaly"""
    captions: tuple[tuple[str, ...], ...] = ()
    """captions of each image; empty where there are none"""

    def __len__(self) -> int:
        return len(self.paths)

    def __add__(self, other: "Images") -> "Images":
        return Images(
            self.paths + other.paths,
            self.targets + other.targets,
            self.classes + other.classes,
            self.captions + other.captions,
        )

    def take(self, indices: Sequence[int]) -> "Images":
        """The images at `indices`, in that order."""
        return Images(
            tuple(self.paths[i] for i in indices),
            tuple(self.targets[i] for i in indices),
            tuple(self.classes[i] for i in indices),
            tuple(self.captions[i] for i in indices),
        )

    @property
    def generated(self) -> tuple[bool, ...]:
        """True for images of the anomaly folder."""
        return tuple(name == str(ANOMALY_FOLDER) for name in self.classes)


def read_class_folder(
    folder: Path, split: str, target: int, spec: DataSetSpec, class_name: str = ""
) -> Images:
    """Images of one class folder.

    Args:
        folder: `<data_path>/<class id>`.
        split: "train" or "test".
        target: 0 normal, 1 anomaly, given to every image.
        spec: tells the caption file and the captions per image.
        class_name: recorded for each image; the folder's name by default.

    Raises UserError naming the file if an image is missing or outside the folder, or captions do not fit.
    """
    name_list = folder / NAME_LIST[split]
    names = _read_strings(name_list)
    paths = tuple(_locate(folder, name, name_list) for name in names)
    captions = _read_captions(folder, split, len(names), spec)
    count = len(names)
    return Images(paths, (target,) * count, (class_name or folder.name,) * count, captions)


def write_class_folder(
    folder: Path, split: str, names: Sequence[str], captions: Sequence[Sequence[str]], spec: DataSetSpec
) -> None:
    """Write the name list and the flat caption list of one split; `captions[i]` belongs to `names[i]`.

    Every image must have `spec.captions_per_image` captions. The name list comes last, so that a folder
    that has it is complete.
    """
    for name, block in zip(names, captions, strict=True):
        if len(block) != spec.captions_per_image:
            raise ValueError(
                f"{name}: {len(block)} captions, {spec.name} has {spec.captions_per_image} per image"
            )
    write_json(folder / caption_file(spec, split), [caption for block in captions for caption in block])
    write_json(folder / NAME_LIST[split], list(names))


def caption_file(spec: DataSetSpec, split: str) -> str:
    """File name of a split's flat caption list."""
    return f"{spec.caption_stem}{'_test' if split == 'test' else ''}.json"


def list_images(folder: Path) -> list[Path]:
    """Image files directly in `folder`, sorted by name; hidden files are passed over."""
    return sorted(
        p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
    )


def is_side_file(path: Path) -> bool:
    """Whether a file is known to lie beside images: hidden ones, text, captions, Thumbs.db."""
    suffix, name = path.suffix.lower(), path.name.lower()
    return name.startswith(".") or suffix in SIDE_SUFFIXES or (not suffix and name.startswith(SIDE_NAMES))


def refuse_others(folder: Path, pattern: str = "*", known: Sequence[str] = ()) -> None:
    """Raises UserError for a file that is neither an image nor a side file: nobody's images are passed over.

    Only files that match `pattern` count; `known` are suffixes that the caller reads itself.
    """
    read = {*IMAGE_SUFFIXES, *known}
    files = (p for p in folder.iterdir() if p.match(pattern) and not (p.is_dir() or is_side_file(p)))
    others = sorted(path.name for path in files if path.suffix.lower() not in read)
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            f"{folder} holds {others[0]!r}{more}, whose type is not read; convert it to PNG or remove it"
        )


def _read_strings(path: Path) -> list[str]:
    value = read_json(path)
    if not isinstance(value, list):
        raise UserError(f"{path} must hold a list of strings, it holds a {type(value).__name__}")
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise UserError(f"{path}: item {index} must be a string, it is {item!r}")
    return value


def _locate(folder: Path, name: str, name_list: Path) -> Path:
    """The file that a name list means: a path inside the folder, or its last part (official code)."""
    entry = PurePosixPath(name.replace("\\", "/"))
    outside = entry.is_absolute() or ".." in entry.parts
    path = folder / (entry.name if outside else entry)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(
            f"{name_list} lists {name!r}, which is not an image file ({'/'.join(sorted(IMAGE_SUFFIXES))})"
        )
    if path.is_file():
        return path
    if (folder / entry.name).is_file():
        return folder / entry.name
    if outside:
        raise UserError(
            f"{name_list} lists {name!r}, which points outside {folder}; entries must lie in that folder"
        )
    raise UserError(f"{name_list} lists {name!r}, but {path} does not exist; restore it or remove the entry")


def _read_captions(folder: Path, split: str, count: int, spec: DataSetSpec) -> tuple[tuple[str, ...], ...]:
    path = folder / caption_file(spec, split)
    if folder.name == str(ANOMALY_FOLDER):
        path = folder / caption_file(spec, "train")
    if not path.exists():
        return ((),) * count
    flat, each = _read_strings(path), spec.captions_per_image
    if len(flat) != count * each:
        raise UserError(
            f"{path} holds {len(flat)} captions for {count} images, not {count * each} ({each} per image); "
            f"{_where(len(flat), count, each)}"
        )
    return tuple(tuple(flat[i * each : (i + 1) * each]) for i in range(count))


def _where(given: int, images: int, each: int) -> str:
    if given > images * each:
        return f"{given - images * each} are too many"
    return f"the first image without its full {each} is number {given // each}"
