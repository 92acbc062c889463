"""Experiments to runs: the flags and the folder of each."""

import dataclasses
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from kka.command_line import DEFAULT_DETECTOR, DetectorChoice
from kka.datasets import garden, get_spec
from kka.datasets.layout import DataSetSpec
from kka.detectors import DETECTORS
from kka.errors import UserError
from kka.files import user_path
from kka.hardness_study import HardnessSettings
from kka.loop_folder import PLACE as LOOP_PLACE
from kka.loop_settings import PREFIXED, LoopSettings
from kka.options import EVALUATOR, PLACE, ExperimentSettings
from kka.runs import ROOT, fingerprint
from kka.settings import build_parser, option
from kka.stand_ins import GARDEN_LOOP
from kka.sweep import Job
from kka.update import MODES

Flags = dict[str, list[str]]
"""name of a flag, without its dashes, and its words"""
Experiment = tuple[DataSetSpec, list[str], int]
"""data set, normal classes as words of --normal_class, seed"""


@dataclass(frozen=True)
class PlanSettings:
    """What a table is made of."""

    data_sets: tuple[str, ...] = option((), "its data sets; none: the paper's")
    data: tuple[str, ...] = option((), "where they lie, as NAME=DIR; a set that is not named: data/<name>")
    normal_classes: tuple[str, ...] = option(
        (),
        "each an experiment of its own: 26, 20+21 (normal together), a superclass of CIFAR-100, a class of "
        "MVTec AD; for one of several data sets NAME:26; none: the data set's own",
    )
    rows: tuple[str, ...] = option((), "names of the rows to make, quoted; hardness: detectors; none: all")
    modes: tuple[str, ...] = option((), "add, rep, or both; none: the paper's")
    seeds: int = option(5, "runs of each experiment, seeds from 0 on")
    rounds: int | None = option(None, "updates of each loop; None: the paper's")
    sizes: tuple[int, ...] = option((50, 100, 200, 400, 800), "numbers of initial anomalies in figure4")
    known: tuple[int, ...] = option((10, 1), "numbers of known anomalies in ahl")
    known_kinds: tuple[str, ...] = option(
        (),
        "ahl: the hard setting, means over these kinds, each known alone and left out of its test; none: the "
        "general setting",
    )
    anomalies: str = option(
        "loop",
        "table2 and figure4: anomalies that Algorithm 1 generates, or folder 0 of the data set as it is",
        ("loop", "folder"),
    )
    preset: str | None = option(None, "settings of the detectors that have such a preset, e.g. cpu")
    folder: str = option(str(ROOT / "log"), "the runs are in <folder>/<table>/")


GROWING = ("n_base", "selections", "modes")  # a study gets more of these in its folder
OWN_CLASS = {"cifar100": "household_furniture", "table4": "5"}


@dataclass(frozen=True)
class Plan:
    """A table's name and settings; its methods make jobs."""

    name: str
    settings: PlanSettings
    extra: Flags
    """further flags, for each run that has them"""

    def experiments(self, default: Sequence[str]) -> Iterator[Experiment]:
        """(data set, normal classes, seed) of each."""
        for name in self.settings.data_sets or default:
            spec = get_spec(name)
            for classes, seed in product(self.classes_of(spec), range(self.settings.seeds)):
                yield spec, classes, seed

    def classes_of(self, spec: DataSetSpec) -> list[list[str]]:
        """The groups of normal classes of a data set, as words of --normal_class."""
        given = [word.partition(":") for word in self.settings.normal_classes]
        words = [second or first for first, mark, second in given if not mark or get_spec(first) is spec]
        if not words and spec.name == "mvtec":
            root = Path(self.data_path(spec) or ROOT / "data" / spec.name)
            words = sorted(path.parent.parent.name for path in root.glob("*/train/good"))
            if not words:
                raise UserError(f"{root} holds no classes of MVTec AD; give its folder with --data mvtec=DIR")
        words = words or [OWN_CLASS.get(self.name, OWN_CLASS.get(spec.name, ""))]
        groups = [self._class_words(spec, word) for word in words]
        # A group counts once, however often and in whatever order it is given: its runs would be the same.
        return list({frozenset(group): group for group in reversed(groups)}.values())[::-1]

    def _class_words(self, spec: DataSetSpec, word: str) -> list[str]:
        if not word or word.replace("+", "").isdecimal() or spec.name == "mvtec":
            return [part for part in word.split("+") if part]
        if word not in spec.superclasses:
            known = f"; superclasses are {', '.join(spec.superclasses)}" if spec.superclasses else ""
            raise UserError(f"--normal_classes {word!r}: {spec.title} has no such class{known}")
        return [str(i) for i in spec.superclasses[word]]

    def data_path(self, spec: DataSetSpec) -> str | None:
        """The folder given for a data set, absolute."""
        for word in self.settings.data:
            name, mark, folder = word.partition("=")
            if not mark:
                raise UserError(f"--data {word!r} must be NAME=DIR, e.g. flower=data/flower")
            if get_spec(name) is spec:
                path = user_path(folder).resolve()
                if not path.is_dir():
                    raise UserError(f"--data {word!r}: {path} is no folder; give that of the data set")
                return str(path)
        return None

    def job(
        self,
        script: str,
        place: str,
        experiment: Experiment,
        *words: str,
        after: Job | None = None,
        parts: tuple[tuple[str, ...], ...] = (),
    ) -> Job:
        """A job of one experiment; `place` names its folder, further words are its flags.

        Runs of other flags, or behind a loop of other flags, get other folders.
        """
        spec, classes, seed = experiment
        flags = {"dataset_name": [spec.name], **_stand_ins(script, spec), **to_dict(words)}
        detector = flags.get("detector", [DEFAULT_DETECTOR])[0]
        known = flags_of(script, detector)
        own = {k: v for k, v in self.extra.items() if k in known}
        if script == "main.py":
            own.pop(EVALUATOR, None)  # its split is nothing that a table shows
        if flags.get("backbone_init") == ["random"]:  # a row without pre-training takes no weights
            own.pop("backbone_weights", None)
        flags |= self._preset(detector) | own
        different: dict[str, Any] = {k: list(map(_portable, v)) for k, v in flags.items() if _decides(k)}
        different["after"] = after.folder.parent.name if after else ""
        name, normal = f"{place}_{fingerprint(different)[:6]}", "_".join(classes) or "own"
        folder = user_path(self.settings.folder).resolve() / self.name / spec.name / name
        flags |= {"data_path": [path]} if (path := self.data_path(spec)) else {}
        flags |= ({"normal_class": classes} if classes else {}) | {"seed": [str(seed)]}
        return Job(folder / f"{normal}_seed{seed}", script, tuple(to_words(flags)), after, parts=parts)

    def _preset(self, detector: str) -> Flags:
        preset = self.settings.preset
        has = preset in getattr(DETECTORS[detector][0], "PRESETS", {})
        return {"preset": [preset]} if preset is not None and has else {}

    def loop(self, experiment: Experiment, mode: str, *words: str) -> Job:
        """A loop; one of mode rep shares with that of mode add what the mode does not change."""
        rounds = self.settings.rounds
        flags = ["--mode", mode, *(["--rounds", str(rounds)] if rounds is not None else []), *words]
        job = self.job("iterate.py", f"loop_{mode}", experiment, *flags)
        if mode == "add" or "add" not in self.modes():
            return job
        return dataclasses.replace(job, after=self.loop(experiment, "add", *words), share=mode)

    def modes(self) -> tuple[str, ...]:
        """Modes of the loops."""
        return self.settings.modes or (("rep",) if self.name in ("table3", "table4") else MODES)

    def n_rounds(self, spec: DataSetSpec) -> int:
        """Updates of a loop, as iterate.py has them."""
        return self.settings.rounds if self.settings.rounds is not None else spec.n_updates


def _decides(flag: str) -> bool:
    """Whether runs with another value of this flag are other runs."""
    return flag not in PLACE | LOOP_PLACE | set(GROWING) and not flag.endswith("_device")


def _portable(word: str) -> str:
    """A path below this checkout as it is seen from there, so that another checkout has the same folders."""
    path = Path(word)
    return str(path.relative_to(ROOT)) if path.is_absolute() and path.is_relative_to(ROOT) else word


def _stand_ins(script: str, spec: DataSetSpec) -> Flags:
    """Flags of a loop in the garden, which has its own LLM and text-to-image model."""
    if script != "iterate.py" or spec.name != garden.SPEC.name:
        return {}
    return {name: [str(value)] for name, value in GARDEN_LOOP.items()}


def to_dict(words: Sequence[str]) -> Flags:
    """The flags of a command line; raises UserError for a word before the first of them."""
    flags: Flags = {}
    for word in words:
        if word.startswith("--"):
            name, mark, value = word.removeprefix("--").partition("=")
            flags[name] = [value] if mark else []
        elif not flags:
            raise UserError(f"{word!r} behind -- belongs to no flag")
        else:
            flags[next(reversed(flags))].append(word)
    return flags


def to_words(flags: Flags) -> list[str]:
    """The words of a command line."""
    return [word for name, values in flags.items() for word in (f"--{name}", *values)]


SCRIPTS: dict[str, type[Any]] = {
    "main.py": ExperimentSettings, "iterate.py": LoopSettings, "hardness.py": HardnessSettings,
}  # fmt: skip


@lru_cache
def parser_of(script: str, detector: str) -> ArgumentParser:
    """The parser of a script with a detector; raises UserError for an unknown detector."""
    if detector not in DETECTORS:
        raise UserError(f"unknown detector {detector!r}; known are {', '.join(DETECTORS)}")
    prefixed = PREFIXED if script == "iterate.py" else {}
    return build_parser("", SCRIPTS[script], DetectorChoice, DETECTORS[detector][0], **prefixed)


@lru_cache
def flags_of(script: str, detector: str) -> frozenset[str]:
    """Names of all flags of a script with a detector; raises UserError for an unknown detector."""
    names = parser_of(script, detector)._option_string_actions
    return frozenset(name.removeprefix("--") for name in names if name != "-h")
