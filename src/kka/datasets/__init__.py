"""Data sets by name. To add one, write a module with a `SPEC` and name it here."""

from kka.datasets import cifar100, flower, folder, garden, mvtec, ucm_caption
from kka.datasets.layout import DataSetSpec
from kka.errors import UserError

DATASETS: dict[str, DataSetSpec] = {
    module.SPEC.name: module.SPEC for module in (flower, cifar100, ucm_caption, garden, folder, mvtec)
}
ALIASES = {"mycifar": "cifar100"}  # the official code's name


def get_spec(name: str) -> DataSetSpec:
    """The data set of that name or alias; raises UserError listing the known ones."""
    name = ALIASES.get(name, name)
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}; known are {', '.join([*DATASETS, *ALIASES])}")
    return DATASETS[name]
