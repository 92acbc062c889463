"""Where the rows of metrics.jsonl also go: TensorBoard event files (by default), Weights & Biases.

Nothing here decides a number. A tracker is opened at its first row and writes all earlier ones again, so that
a resumed run neither loses nor repeats a step.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kka.errors import UserError
from kka.runs import fingerprint

TRACKERS = ("none", "tensorboard", "wandb")
DEFAULT = ("tensorboard",)  # those that are installed
EVENTS = "events.out.tfevents.*"
HELP = "none, tensorboard, wandb, or several; not given: tensorboard if it is installed"


def check_report_to(names: Sequence[str]) -> None:
    """Raises UserError for an unknown tracker, or one that is asked for and not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--report_to must be of {', '.join(TRACKERS)}; it is {name!r}")
        if name != "none" and not is_installed(name):
            raise UserError(f"--report_to {name} needs {name}; install it with pip install -e '.[{name}]'")
    if "none" in names and len(set(names)) > 1:
        raise UserError(f"--report_to none goes with no other; it is {' '.join(names)}")


def is_installed(name: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


def is_unicode(folder: Path) -> bool:
    """Whether TensorBoard takes the name of a folder, which may be in another encoding than UTF-8."""
    return not any("\udc80" <= letter <= "\udcff" for letter in str(folder.absolute()))


class Tracker:
    """Sends rows {"phase", "epoch", values} to what `report_to` names, as <phase>/<key> at step <epoch>."""

    def __init__(self, folder: Path, report_to: Sequence[str], config: Mapping[str, Any]) -> None:
        self.folder, self.config = folder, config
        self.names = report_to or [name for name in DEFAULT if is_installed(name) and is_unicode(folder)]
        self.sinks: list[Any] = []
        self.n_written = 0

    def follow(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows that are not written yet; `rows` are all of the run."""
        if not self.sinks and rows:
            kinds = {"tensorboard": TensorBoard, "wandb": WandB}
            self.sinks = [kinds[name](self.folder, self.config) for name in self.names if name in kinds]
        for number in range(self.n_written, len(rows)):
            values = {k: v for k, v in rows[number].items() if k not in ("phase", "epoch") and v is not None}
            named = {f"{rows[number]['phase']}/{key}": value for key, value in values.items()}
            for sink in self.sinks:
                sink.write(named, rows[number]["epoch"], number)
        self.n_written = len(rows)

    def close(self) -> None:
        """Flush; the next row would open all anew."""
        for sink in self.sinks:
            sink.close()
        self.sinks, self.n_written = [], 0


class TensorBoard:
    """An event file in the folder, in place of those of earlier starts."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for old in folder.glob(EVENTS):
            old.unlink()
        self.writer = SummaryWriter(str(folder))

    def write(self, values: Mapping[str, float], epoch: int, number: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases that belongs to the folder; it takes no step a second time."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        name = folder.resolve()
        self.run = wandb.init(
            project="kka", name=f"{name.parent.name}/{name.name}", id=fingerprint(str(name)),
            dir=str(folder), config=dict(config), resume="allow", reinit="create_new",
        )  # fmt: skip

    def write(self, values: Mapping[str, float], epoch: int, number: int) -> None:
        self.run.log({**values, "epoch": epoch}, step=number)

    def close(self) -> None:
        self.run.finish()
