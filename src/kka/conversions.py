"""Eight data sets of open-set detection -> MVTec's format: train/good, test/good, test/<kind>, ground_truth.

Which images are normal, and how they are cut, is that of DevNet, DRA and AHL (Zhu et al., CVPR 2024); each
data set is read as its authors publish it. A quarter of the normals is for testing.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from kka.datasets.folder import GOOD
from kka.datasets.layout import list_images, refuse_others
from kka.errors import UserError
from kka.files import read_json, write_bytes, write_json

RECORD = "converted.json"
TEST_SHARE, SPLIT_SEED = 0.25, 42
PATCH = 256  # width of AITEX's patches, whose images are 4096 x 256
SDD_PARTS = 3
AITEX_KINDS = {
    "002": "Broken_end", "006": "Broken_yarn", "010": "Broken_pick", "016": "Weft_curling",
    "019": "Fuzzyball", "022": "Cut_selvage", "023": "Crease", "025": "Warp_ball", "027": "Knots",
    "029": "Contamination", "030": "Nep", "036": "Weft_crack",
}  # fmt: skip
PUBLISHED = "; --source must be as the authors publish it"

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Piece:
    """An image, or a part of one, on its way into a folder of MVTec's format."""

    kind: str
    """good, or the kind of anomaly"""
    name: str
    """file name without suffix; no two pieces of a kind have the same"""
    path: Path
    box: Box | None = None
    """the part that is taken; None: the whole image"""
    mask: Image.Image | None = None
    """where the anomaly is, white on black"""
    split: str | None = None
    """train or test, where the data set says so; None: normals are divided, by image"""


def convert(name: str, source: Path, out: Path) -> None:
    """Write a data set in MVTec's format; a finished one is left alone, an interrupted one continued.

    Raises UserError if the source is not as its authors publish it, or `out` holds something else.
    """
    if not source.is_dir():
        raise UserError(f"--source {source} is no folder; unpack {name} there")
    if out.exists() and any(out.iterdir()) and not (out / RECORD).exists():
        raise UserError(f"{out} holds other files; choose another --out")
    record = read_json(out / RECORD) if (out / RECORD).exists() else {"name": name, "counts": None}
    if not (isinstance(record, dict) and {"name", "counts"} <= record.keys()):
        raise UserError(f"{out / RECORD} is no record of a conversion; choose another --out")
    if record["name"] != name:
        raise UserError(f"{out} holds {record['name']}; choose another --out")
    if record["counts"]:
        print(f"{out} already holds {name}; nothing to do")
        return
    pieces = divide(list(CONVERSIONS[name](source)), source)
    write_json(out / RECORD, record)
    counts: dict[str, int] = {}
    for piece in tqdm(pieces, desc=f"writing {out}", unit="image", disable=None):
        folder = f"{piece.split}/{piece.kind}"
        counts[folder] = counts.get(folder, 0) + 1
        image = out / folder / f"{piece.name}.png"
        if piece.mask is not None:
            _write(out / "ground_truth" / piece.kind / f"{piece.name}_mask.png", piece.mask)
        if not image.exists():  # it was written atomically, after its mask
            _write(image, _open(piece.path).crop(piece.box) if piece.box else _open(piece.path))
    write_json(out / RECORD, {**record, "counts": counts}, indent=1)
    print(f"{out}: " + ", ".join(f"{count} {folder}" for folder, count in sorted(counts.items())))


def divide(pieces: Sequence[Piece], source: Path) -> list[Piece]:
    """Give every piece its split. Parts of one image stay together, or training would show the test images.

    Raises UserError without normals, without anomalies, or for two pieces of one name.
    """
    normals = sorted({piece.path for piece in pieces if piece.kind == GOOD and piece.split is None})
    if sum(piece.kind == GOOD for piece in pieces) < 2 or len(normals) == 1:
        raise UserError(f"{source} has fewer than two normal images")
    if all(piece.kind == GOOD for piece in pieces):
        raise UserError(f"{source} has no anomalous images")
    test: set[Path] = set()
    if normals:
        test = set(train_test_split(normals, test_size=TEST_SHARE, random_state=SPLIT_SEED)[1])
    placed: dict[tuple[str, str, str], Piece] = {}
    for piece in pieces:
        split = piece.split or ("test" if piece.kind != GOOD or piece.path in test else "train")
        key = (split, piece.kind, piece.name)
        if key in placed:
            raise UserError(f"{piece.path} and {placed[key].path} would have the same name; rename one")
        placed[key] = Piece(piece.kind, piece.name, piece.path, piece.box, piece.mask, split)
    return list(placed.values())


def aitex(source: Path) -> Iterator[Piece]:
    """NODefect_images/<fabric>/, Defect_images/<n>_<code>_<m>.png, Mask_images/<the same>_mask.png."""
    for path in _images(source / "NODefect_images", "*/*"):
        for k, box in enumerate(_strips(path)):
            yield Piece(GOOD, f"{path.stem}_{k}", path, box)
    known = ", ".join(AITEX_KINDS)
    for path in _images(source / "Defect_images", "*"):
        code = path.stem.split("_")[1] if "_" in path.stem else ""
        if code not in AITEX_KINDS:
            raise UserError(f"{path}: its second number, {code!r}, is no known defect; known are {known}")
        masks = sorted((source / "Mask_images").glob(f"{path.stem}_mask*.png"))
        if not masks:
            raise UserError(f"{path} has no mask {path.stem}_mask.png in {source / 'Mask_images'}")
        mask = _union(masks)
        for k, box in enumerate(_strips(path)):
            part = mask.crop(box)
            if part.getbbox():  # a strip that shows the defect; the others are left out
                yield Piece(AITEX_KINDS[code], f"{path.stem}_{k}", path, box, part)


def sdd(source: Path) -> Iterator[Piece]:
    """kos<n>/Part<m>.jpg with Part<m>_label.bmp; each in three parts along the height."""
    for path in _images(source, "kos*/Part*.jpg"):
        mask = _binary(_needed(path.with_name(f"{path.stem}_label.bmp"), path))
        width, height = _open(path).size
        for k in range(SDD_PARTS):
            box = (0, k * height // SDD_PARTS, width, (k + 1) * height // SDD_PARTS)
            part = mask.crop(box)
            name = f"{path.parent.name}_{path.stem}_{k}"
            yield Piece("defect", name, path, box, part) if part.getbbox() else Piece(GOOD, name, path, box)


def elpv(source: Path) -> Iterator[Piece]:
    """labels.csv with lines "images/cell0001.png  1.0  mono"; cells that may be defective are left out."""
    table = _needed(source / "labels.csv", source)
    for number, line in enumerate(_read_text(table).splitlines(), 1):
        match = re.fullmatch(r"\s*(\S+)\s+([0-9]+(?:\.[0-9]*)?)\s+(mono|poly)\s*", line)
        if not match:
            raise UserError(
                f"{table}, line {number} must be a file, a probability, and mono or poly, it is {line!r}"
            )
        path, probability = _listed(source, match[1], table), float(match[2])
        if probability in (0, 1):
            yield Piece(GOOD if probability == 0 else match[3], path.stem, path)


def optical(source: Path) -> Iterator[Piece]:
    """DAGM: Class<n>/Train|Test/<m>.PNG with Label/Labels.txt and Label/<m>_label.PNG."""
    for folder in sorted(source.glob("Class*/T*")):
        table = _needed(folder / "Label" / "Labels.txt", folder)
        digits = re.fullmatch("Class([0-9]+)", folder.parent.name)
        if not digits:
            raise UserError(f"{folder.parent} must be called Class and a number{PUBLISHED}")
        number = int(digits[1]) - 1
        for line in _read_text(table).splitlines()[1:]:
            words = line.split()
            if len(words) != 5:
                raise UserError(f"{table}: a line must have five columns, it is {line!r}")
            path = _listed(folder, words[2], table)
            name = f"{folder.parent.name}_{folder.name}_{path.stem}"
            if words[1] == "0":
                yield Piece(GOOD, name, path)
            else:
                mask = _binary(_listed(folder / "Label", words[4], table))
                yield Piece(f"Class{number}", name, path, mask=mask)


def mastcam(source: Path) -> Iterator[Piece]:
    """train_typical/, test_typical/, test_novel/<kind>/ with images, or arrays whose first bands are RGB."""
    for split in ("train", "test"):
        for path in _images(source / f"{split}_typical", "*", arrays=True):
            yield Piece(GOOD, path.stem, path, split=split)
    for path in _images(source / "test_novel", "*/*", arrays=True):
        if path.parent.name != "all":  # the kinds once more, together
            yield Piece(path.parent.name, path.stem, path)


def brainmri(source: Path) -> Iterator[Piece]:
    """no/ and yes/."""
    for folder, kind in (("no", GOOD), ("yes", "defect")):
        for path in _images(source / folder, "*"):
            yield Piece(kind, path.name.replace(".", "_"), path)  # the same number comes as jpg and png


def headct(source: Path) -> Iterator[Piece]:
    """head_ct/<number>.png and labels.csv with lines "number, 0 or 1"."""
    table = _needed(source / "labels.csv", source)
    lines = csv.reader(_read_text(table).splitlines())
    rows = [[cell.strip() for cell in row] for row in lines if row][1:]
    for row in rows:
        if len(row) != 2 or not re.fullmatch("[0-9]+", row[0]) or row[1] not in ("0", "1"):
            raise UserError(f"{table}: a line must be a number and 0 or 1, it is {', '.join(row)!r}")
        number, label = row
        path = _needed(source / "head_ct" / f"{int(number):03d}.png", table)
        yield Piece("defect" if label == "1" else GOOD, path.stem, path)


def hyperkvasir(source: Path) -> Iterator[Piece]:
    """upper-gi-tract/anatomical-landmarks/<place>/ is normal, .../pathological-findings/<kind>/ is not."""
    root = source / "labeled-images" if (source / "labeled-images").is_dir() else source
    tract = root / "upper-gi-tract"
    for path in _images(tract / "anatomical-landmarks", "*/*"):
        yield Piece(GOOD, f"{path.parent.name}_{path.stem}", path)
    for path in _images(tract / "pathological-findings", "*/*"):
        yield Piece(path.parent.name, path.stem, path)


CONVERSIONS: dict[str, Callable[[Path], Iterator[Piece]]] = {
    "aitex": aitex,
    "sdd": sdd,
    "elpv": elpv,
    "optical": optical,
    "mastcam": mastcam,
    "brainmri": brainmri,
    "headct": headct,
    "hyperkvasir": hyperkvasir,
}


def _images(folder: Path, pattern: str, arrays: bool = False) -> list[Path]:
    """Image files below a folder; raises UserError if there are none, or files that are neither."""
    parents = sorted({path.parent for path in folder.glob(pattern)}) if folder.is_dir() else []
    for parent in parents:
        refuse_others(parent, pattern, [".npy"] * arrays)
    found = [p for parent in parents for p in list_images(parent) if p.match(pattern)]
    if arrays:
        found += sorted(folder.glob(f"{pattern}.npy"))
    if not found:
        raise UserError(f"there are no images at {folder / pattern}{PUBLISHED}")
    return found


def _listed(folder: Path, name: str, table: Path) -> Path:
    """A file that a table names; raises UserError if it is missing or not in the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{table} lists {name!r}, which is not in {folder}{PUBLISHED}")
    return _needed(folder / name, table)


def _needed(path: Path, where: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{where} needs {path}, which does not exist{PUBLISHED}")
    return path


def _read_text(table: Path) -> str:
    try:
        return table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is no UTF-8 text ({error.reason}); restore it") from None


def _open(path: Path) -> Image.Image:
    try:
        if path.suffix == ".npy":
            return _read_array(path)
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except Exception as error:  # Pillow and NumPy raise many kinds for a damaged file
        raise UserError(f"{path} cannot be read ({error}); restore it") from None


def _read_array(path: Path) -> Image.Image:
    """The first three bands of an array of bytes, (H, W, at least 3); raises ValueError for another."""
    array = np.load(path)
    if array.ndim != 3 or array.shape[2] < 3:
        raise ValueError(f"its shape is {array.shape}, not (height, width, at least 3 bands)")
    bands = array[..., :3]
    if not (np.isfinite(bands).all() and bands.min() >= 0 and bands.max() <= 255):
        raise ValueError("its values do not lie in 0 to 255")
    if bands.dtype.kind == "f" and 0 < bands.max() <= 1:  # as bytes they would be all black
        raise ValueError("its values lie in 0 to 1, not in 0 to 255")
    return Image.fromarray(bands.astype(np.uint8))


def _binary(path: Path) -> Image.Image:
    return _open(path).convert("L").point(lambda value: 255 * (value > 0))


def _union(paths: Sequence[Path]) -> Image.Image:
    masks = [np.asarray(_binary(path)) for path in paths]
    return Image.fromarray(np.maximum.reduce(masks))


def _strips(path: Path) -> list[Box]:
    width, height = _open(path).size
    return [(left, 0, left + PATCH, height) for left in range(0, width - PATCH + 1, PATCH)]


def _write(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())
