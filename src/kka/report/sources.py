"""What a report is made of: finished runs, folders of seeds, loops. Whatever is broken is named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kka.anomalies import Item, live, read_items, read_lines
from kka.errors import UserError
from kka.files import is_number, read_json, user_path
from kka.finished import is_auc, script_of, wrong_config
from kka.judge import read_split
from kka.results import Scored
from kka.runs import CONFIG, RESULTS, compare

NONE, ROUND, DETECTOR = "none", "round_", "detector"  # names in the folder of a loop
UNTUNED, TUNING = "untuned", Path("adapter") / "tuning"
SEED_KEYS = ("seed", "data")  # of an identity, that may differ between the seeds of one folder
NUMBERS = ("threshold", "n_generated", "n_hard", "n_easy", "train_time", "test_time", "seed")
ROW = ("round", "captions", "hard", "hard_untuned", "size", "margin", "test_aucs", "seconds")


@dataclass(frozen=True)
class FinishedRun:
    """One seed of src/main.py."""

    folder: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]

    @property
    def settings(self) -> Mapping[str, Any]:
        """What was asked for."""
        return self.config["settings"]

    @property
    def detector(self) -> str:
        """Its name."""
        return self.settings["detector"]

    @property
    def auc(self) -> float | None:
        """In [0, 1]; None if the test set has one class only."""
        return self.results["test_auc"]

    @cached_property
    def test(self) -> np.ndarray:
        """(N, 3) index, target and score of the test images."""
        return np.array(self.results["test_scores"], dtype=float)

    @cached_property
    def split(self) -> Scored:
        """Its generated anomalies with their scores, hard and easy."""
        return read_split(self.folder)

    @property
    def anomalies(self) -> Path | None:
        """Folder of its generated anomalies: where it was, or beside the run if the loop was moved."""
        given, root = self.settings["anomaly_path"], self.settings.get("data_path")
        places = [given, str(self.folder.parent / "0")] if given else [f"{root}/0"] * bool(root)
        return next((path for path in (user_path(each) for each in places) if path.is_dir()), None)

    @property
    def newest_round(self) -> int:
        """The last round of Algorithm 1 that its anomalies come from; 0 where no manifest says."""
        items = live(read_items(self.anomalies)) if self.anomalies else []
        return max((items[i].round for i in self.split.index if i < len(items)), default=0)

    def epochs(self, key: str) -> dict[int, float]:
        """A figure of metrics.jsonl by epoch of training, from 1 on."""
        path = self.folder / "metrics.jsonl"
        rows = [row for _, row in read_lines(path)] if path.exists() else []
        return {r["epoch"] + 1: r[key] for r in rows if r["phase"] == "train" and r.get(key) is not None}


@dataclass(frozen=True)
class Group:
    """A run, or all seeds of one setting."""

    name: str
    folder: Path
    runs: tuple[FinishedRun, ...]
    problems: tuple[str, ...] = ()
    """seeds that are missing or broken, a sentence each; they are in no mean"""

    @property
    def aucs(self) -> list[float]:
        """Of the seeds that have one, in [0, 1]."""
        return [run.auc for run in self.runs if run.auc is not None]

    @property
    def n_generated(self) -> int:
        """Generated anomalies in training."""
        return self.runs[0].results["n_generated"]


@dataclass(frozen=True)
class LoopRecord:
    """A finished folder of src/iterate.py."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    """AUCs without anomalies as `none`, and the rows of its table as `rounds`"""

    @property
    def rounds(self) -> Sequence[Mapping[str, Any]]:
        """The rows of its table."""
        return self.results["rounds"]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Its detectors: without anomalies, and of each round; what was deleted is a problem."""
        places = {"no anomalies": self.folder / NONE}
        places |= {f"KKA({k})": self.place(k, DETECTOR) for k in range(len(self.rounds))}
        return tuple(_loop_group(name, folder) for name, folder in places.items())

    def place(self, k: int, name: str | Path) -> Path:
        """A file or folder of round k."""
        return self.folder / f"{ROUND}{k}" / name

    def fresh(self) -> dict[str, Path]:
        """Where the images of each round are, and those of the untuned LLM."""
        rounds = {str(k): self.place(k, "fresh" if k else "0") for k in range(len(self.rounds))}
        untuned = self.folder / UNTUNED / "fresh"
        return rounds | ({UNTUNED: untuned} if untuned.is_dir() else {})

    def items(self, folder: Path) -> list[Item]:
        """The items of one of these folders; raises UserError if it is gone."""
        if not folder.is_dir():
            raise UserError(f"{folder} is gone, and with it the images of a round")
        return read_items(folder)


def is_loop(folder: Path) -> bool:
    """Whether it is a folder of src/iterate.py, finished or not."""
    return (folder / CONFIG).exists() and any((folder / name).is_dir() for name in (NONE, f"{ROUND}0"))


def read_group(folder: Path) -> Group:
    """A finished run, or a folder of seeds, of which those that are not finished become problems.

    Raises UserError if there is no finished run, or the seeds have other settings than each other.
    """
    seeds = sorted(folder.glob("seed_*"), key=lambda path: (len(path.name), path.name))
    if (folder / CONFIG).exists() or not seeds:
        return Group(folder.name, folder, (read_run(folder),))
    return _read_runs(folder.name, folder, seeds)


def _loop_group(name: str, folder: Path) -> Group:
    places = [folder, *sorted(folder.parent.glob(f"{folder.name}_seed_*"))]
    return _read_runs(name, folder, places)


def _read_runs(name: str, folder: Path, places: Sequence[Path]) -> Group:
    runs, problems = [], []
    for place in places:
        try:
            runs.append(read_run(place))
        except UserError as error:
            problems.append(str(error))
    if not runs:
        raise UserError(f"{folder} holds no finished run: {problems[0]}")
    for run in runs[1:]:
        difference = compare(_same_for_seeds(runs[0]), _same_for_seeds(run))
        if difference:
            raise UserError(
                f"{folder} mixes settings: {runs[0].folder.name} and {run.folder.name} differ "
                f"({difference}); give them one by one"
            )
    return Group(name, folder, tuple(runs), tuple(problems))


def _same_for_seeds(run: FinishedRun) -> dict[str, Any]:
    # The judge of a loop's set is also its first detector, the only one with a cross-fit.
    return {k: v for k, v in run.config["identity"].items() if k not in (*SEED_KEYS, "split")}


def read_run(folder: Path) -> FinishedRun:
    """One seed; raises UserError if it is missing, not finished, broken, or of another version."""
    config = read_config(folder)
    if script_of(config["settings"]) == "hardness.py":
        raise UserError(
            f"{folder} is a study of hardness.py, which has no page; give the table of reproduce.py hardness"
        )
    _check_config(config, folder)
    if not (folder / RESULTS).exists():
        raise UserError(f"the run in {folder} is not finished; the command that started it continues it")
    results = read_json(folder / RESULTS)
    _check_results(results, folder / RESULTS)
    return FinishedRun(folder, config, results)


def read_config(folder: Path) -> Mapping[str, Any]:
    """config.json of a run or loop; raises UserError if the folder is none."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; give a run folder, a loop folder or a table's .json")
    if not (folder / CONFIG).exists():
        classes = " ".join(sorted(map(str, folder.glob("class_*"))))
        there = f"the runs of one class each: {classes}" if classes else "a folder of main.py or iterate.py"
        raise UserError(f"{folder} holds no run ({CONFIG} is missing); give {there}")
    config = read_json(folder / CONFIG)
    parts = [config.get(key) for key in ("settings", "identity")] if isinstance(config, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{folder / CONFIG} is not from a run of this program")
    return config


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    if wrong := wrong_config(config):
        raise UserError(f"{folder / CONFIG} is damaged or from another version ({wrong}); make the run again")


def _check_results(results: Any, path: Path) -> None:
    scores = results.get("test_scores") if isinstance(results, dict) else None
    if not isinstance(scores, list) or not scores or "test_auc" not in results:
        raise UserError(f"{path} holds no test scores; make the run again")
    numbers = [results.get(key) for key in NUMBERS]
    numbers += [
        value for row in scores for value in (row if isinstance(row, list) and len(row) == 3 else [None])
    ]
    for value in numbers:
        if not is_number(value):
            raise UserError(f"{path} is broken: it holds {value!r} for a number; make the run again")
    _check_aucs([results["test_auc"]], path)


def _check_aucs(values: Any, path: Path) -> None:
    """Each is a number from 0 to 1, or None where a test set has one class only."""
    for value in values if isinstance(values, list) else [values]:
        if value is not None and not is_auc(value):
            raise UserError(f"{path} is broken: it holds {value!r} for an AUC; make the run again")


def read_loop(folder: Path) -> LoopRecord:
    """A finished loop; raises UserError if it is not finished or broken."""
    config = read_config(folder)
    if not (folder / RESULTS).exists():
        begun = sum(1 for _ in folder.glob(f"{ROUND}*"))
        raise UserError(
            f"the loop in {folder} is not finished ({begun} rounds begun); "
            "the command that started it continues it"
        )
    results = read_json(folder / RESULTS)
    rows = results.get("rounds") if isinstance(results, dict) else None
    good = isinstance(rows, list) and rows and all(isinstance(r, dict) and r.keys() >= set(ROW) for r in rows)
    if not good or not isinstance(results.get("none"), list):
        raise UserError(f"{folder / RESULTS} is not the table of a loop; run the loop's command again")
    _check_config(config, folder)
    for aucs in (results["none"], *(row["test_aucs"] for row in results["rounds"])):
        _check_aucs(aucs, folder / RESULTS)
    loop = LoopRecord(folder.name, folder, config, results)
    _ = loop.groups  # what is broken shows here
    return loop
