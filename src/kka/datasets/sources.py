"""Where a data set lies, and how it comes there when nobody said."""

import logging
from pathlib import Path

from kka.datasets import garden
from kka.datasets.layout import DataSetSpec
from kka.errors import UserError
from kka.files import user_path
from kka.prepare import PARTIAL, prepare
from kka.runs import ROOT

DOWNLOADED = ("flower", "cifar100")

log = logging.getLogger(__name__)


def data_root(spec: DataSetSpec, data_path: str | None) -> Path:
    """The folder of a data set; without `data_path` data/<name>, drawn or downloaded if it is missing.

    Raises UserError that says what to fetch from where, and that the garden needs nothing.
    """
    root = user_path(data_path) if data_path is not None else ROOT / "data" / spec.name
    if data_path is not None:
        if not root.is_dir():
            raise UserError(
                f"--data_path {root} does not exist; give the folder of {spec.title}, make it with "
                f"`python src/prepare.py`, or try --dataset_name garden, which needs no data"
            )
        return root
    if spec.name == garden.SPEC.name:
        garden.make_garden(root)
    elif spec.name in DOWNLOADED and not is_here(spec):
        log.info("%s is not at %s yet; downloading it", spec.title, root)
        try:
            prepare(spec.name, root)
        except UserError as error:
            raise UserError(f"{error}; or try --dataset_name garden, which needs no data") from None
    elif not root.is_dir():
        raise UserError(
            f"{spec.title} is not at {root}; give its folder with --data_path, make it with "
            "`python src/prepare.py`, or try --dataset_name garden, which needs no data"
        )
    return root


def is_here(spec: DataSetSpec) -> bool:
    """Whether data/<name> is there, and not only begun."""
    root = ROOT / "data" / spec.name
    return root.is_dir() and not (root / PARTIAL).exists()
