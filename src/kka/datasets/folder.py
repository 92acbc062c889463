"""Any image folder in MVTec's format: `train/good`, `test/good`, `test/<kind of anomaly>`.

Each of these folders may hold `captions.json`: {file name: caption or list of captions}.
"""

from pathlib import Path

from kka.datasets.layout import ANOMALY_FOLDER, DataSetSpec, Images, list_images, refuse_others
from kka.errors import UserError
from kka.files import read_json

SPEC = DataSetSpec(
    name="folder",
    title="folder",
    normal_classes=(),
    user_dict={},
    iterating_user_dict={},
    caption_stem="caption_sentence",
    captions_per_image=1,
    prompt=(
        "Describe one image of the same kind as the ones below, but with something in it that should "
        "not be so. Answer with one sentence only, in exactly the structure and style of these "
        "descriptions:\n{examples}"
    ),
    n_epochs=200,
)
GOOD = "good"


def read_folder(root: Path) -> tuple[Images, Images]:
    """Training normals and the test images of `root`; raises UserError if it lacks one of the folders."""
    for needed in (root / "train" / GOOD, root / "test" / GOOD):
        if not needed.is_dir():
            raise UserError(
                f"{root} has no folder {needed.relative_to(root)}; "
                "put images into train/good, test/good and test/<kind of anomaly>"
            )
    loose = list_images(root / "test")
    if loose:
        raise UserError(f"{loose[0]} is in no folder; move it to test/good or test/<kind of anomaly>")
    test = read_kind(root / "test" / GOOD, target=0)
    for kind in (folder for folder in _folders(root / "test") if folder.name != GOOD):
        test += read_kind(kind, target=1)
    return read_kind(root / "train" / GOOD, target=0), test


def read_kind(folder: Path, target: int) -> Images:
    """All images of one folder, sorted by name, with their captions if there are any."""
    refuse_others(folder)
    for inside in _folders(folder):
        if list_images(inside):
            raise UserError(f"{inside} holds images, which are not read there; move them up to {folder}")
    paths = tuple(list_images(folder))
    if not paths:
        raise UserError(f"{folder} holds no images")
    known = _read_captions(folder / "captions.json")
    unknown = sorted(set(known) - {path.name for path in paths})
    if unknown:
        raise UserError(f"{folder / 'captions.json'} names {unknown[0]!r}, which is not an image in {folder}")
    captions = tuple(known.get(path.name, ()) for path in paths)
    # The class "0" means generated everywhere; a real kind of that name is none of it.
    name = f"kind_{folder.name}" if folder.name == str(ANOMALY_FOLDER) else folder.name
    return Images(paths, (target,) * len(paths), (name,) * len(paths), captions)


def _folders(folder: Path) -> list[Path]:
    """Folders directly in `folder`, sorted by name; hidden ones are passed over."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(
            f"{path} must hold an object of file names and captions, it holds a {type(value).__name__}"
        )
    captions = {name: (text,) if isinstance(text, str) else text for name, text in value.items()}
    for name, texts in captions.items():
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}: {name!r} must have a caption or a list of captions, it has {texts!r}")
    return {name: tuple(texts) for name, texts in captions.items()}
