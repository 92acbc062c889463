"""MVTec AD and data sets in its format: <data_path>/<class>/train/good, test/good, test/<kind of anomaly>.

One class is an experiment of its own, named with --normal_class.
"""

from dataclasses import replace
from pathlib import Path

from kka.datasets import folder
from kka.errors import UserError

SPEC = replace(folder.SPEC, name="mvtec", title="MVTec AD")


def class_names(root: Path) -> list[str]:
    """Its classes; raises UserError if there are none."""
    known = sorted(path.parent.parent.name for path in root.glob(f"*/train/{folder.GOOD}"))
    if not known:
        raise UserError(f"{root} holds no classes of MVTec AD (<class>/train/good); give their folder")
    return known


def class_folder(root: Path, classes: tuple[int | str, ...]) -> Path:
    """The folder of the one class that is named; raises UserError listing what there is."""
    known = class_names(root)
    if len(classes) != 1:
        raise UserError(
            f"--dataset_name mvtec needs one --normal_class; {root} has {', '.join(known)} "
            f"(where the flag takes numbers only, give --dataset_name folder --data_path {root / known[0]})"
        )
    if str(classes[0]) not in known:
        raise UserError(f"{root} has no class {str(classes[0])!r}; it has {', '.join(known)}")
    return root / str(classes[0])
