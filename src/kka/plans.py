"""The tables of the paper as lists of independent runs."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from kka import paper
from kka.anomalies import MODES
from kka.command_line import DEFAULT_DETECTOR, DetectorChoice
from kka.datasets import get_spec
from kka.datasets.layout import DataSetSpec
from kka.detectors import DETECTORS
from kka.errors import UserError
from kka.hardness_study import HardnessSettings
from kka.loop import PREFIXED, LoopSettings
from kka.options import PLACE, ExperimentSettings
from kka.runs import ROOT, fingerprint
from kka.settings import build_parser, make_settings, option
from kka.sweep import Job
from kka.tables import Cell

Flags = dict[str, list[str]]
"""name of a flag, without its dashes, and its words"""


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
    anomalies: str = option(
        "loop",
        "table2 and figure4: anomalies that Algorithm 1 generates, or folder 0 of the data set as it is",
        ("loop", "folder"),
    )
    preset: str | None = option(None, "settings of the detectors that have such a preset, e.g. cpu")
    folder: str = option(str(ROOT / "log"), "the runs are in <folder>/<table>/")


@dataclass(frozen=True)
class Row:
    """A detector of Table II or of AHL's, and the mode of its anomalies."""

    detector: str
    mode: str = ""
    flags: tuple[str, ...] = ()


TABLE2: dict[str, Row] = {
    "SSD": Row("ssd"),
    "CMDA": Row("cmda"),
    "SimpleNet": Row("simplenet"),
    "ReContrast, no pre-training": Row("recontrast", flags=("--backbone_init", "random")),
    "ReContrast": Row("recontrast"),
    "Deep SAD": Row("deep_sad"),
    "frozen": Row("frozen"),
    **{
        f"{title}+KKA({mode})": Row(detector, mode)
        for title, detector in {
            "SAD": "deep_sad", "SimpleNet": "simplenet", "ReContrast": "recontrast", "frozen": "frozen",
        }.items()
        for mode in MODES
    },
}  # fmt: skip
AHL: dict[str, Row] = {
    "DevNet": Row("devnet"),
    "DRA": Row("dra"),
    "AHL(DevNet)": Row("ahl", flags=("--base_model", "devnet", "--base_epochs", "50")),
    "AHL(DRA)": Row("ahl", flags=("--base_model", "dra")),
}
# Flags of the runs that the table decides.
RESERVED = frozenset({
    "dataset_name", "data_path", "normal_class", "normal_superclass", "seed", "runs", "xp_path", "name",
    "overwrite", "load_config", "detector", "mode", "rounds", "n_anomalies", "n_anomaly", "help",
})  # fmt: skip
GROWING = ("n_base", "selections", "modes")  # a study gets more of these in its folder
PAPER_SETS = ("cifar100", "flower", "ucm_caption")
OWN_CLASS = {"cifar100": "household_furniture", "table4": "5"}


@dataclass(frozen=True)
class Plan:
    """A table's name and settings; its methods make jobs."""

    name: str
    settings: PlanSettings
    extra: Flags
    """further flags, for each run that has them"""

    def experiments(self, default: Sequence[str]) -> Iterator[tuple[DataSetSpec, list[str], int]]:
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
        return [self._class_words(spec, word) for word in words]

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
                return str(Path(folder).expanduser().resolve())
        return None

    def job(
        self,
        script: str,
        place: str,
        experiment: tuple[DataSetSpec, list[str], int],
        *words: str,
        after: Job | None = None,
        parts: tuple[tuple[str, ...], ...] = (),
    ) -> Job:
        """A job of one experiment; `place` names its folder, further words are its flags.

        Runs of other flags, or behind a loop of other flags, get other folders.
        """
        spec, classes, seed = experiment
        flags = {"dataset_name": [spec.name], **to_dict(words)}
        detector = flags.get("detector", [DEFAULT_DETECTOR])[0]
        known = flags_of(script, detector)
        flags |= self._preset(detector) | {k: v for k, v in self.extra.items() if k in known}
        different: dict[str, Any] = {k: v for k, v in flags.items() if k not in PLACE and k not in GROWING}
        different["after"] = after.folder.parent.name if after else ""
        name, normal = f"{place}_{fingerprint(different)[:6]}", "_".join(classes) or "own"
        folder = Path(self.settings.folder).expanduser().resolve() / self.name / spec.name / name
        flags |= {"data_path": [path]} if (path := self.data_path(spec)) else {}
        flags |= ({"normal_class": classes} if classes else {}) | {"seed": [str(seed)]}
        return Job(folder / f"{normal}_seed{seed}", script, tuple(to_words(flags)), after, parts=parts)

    def _preset(self, detector: str) -> Flags:
        preset = self.settings.preset
        has = preset in getattr(DETECTORS[detector][0], "PRESETS", {})
        return {"preset": [preset]} if preset is not None and has else {}

    def loop(self, experiment: tuple[DataSetSpec, list[str], int], mode: str, *words: str) -> Job:
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
        default = 3 if spec.name == "cifar100" else 2
        return self.settings.rounds if self.settings.rounds is not None else default


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


@lru_cache
def flags_of(script: str, detector: str) -> frozenset[str]:
    """Names of all flags of a script with a detector; raises UserError for an unknown detector."""
    if detector not in DETECTORS:
        raise UserError(f"unknown detector {detector!r}; known are {', '.join(DETECTORS)}")
    scripts: dict[str, type] = {
        "main.py": ExperimentSettings, "iterate.py": LoopSettings, "hardness.py": HardnessSettings,
    }  # fmt: skip
    prefixed = PREFIXED if script == "iterate.py" else {}
    parser = build_parser("", scripts[script], DetectorChoice, DETECTORS[detector][0], **prefixed)
    return frozenset(name.removeprefix("--") for name in parser._option_string_actions if name != "-h")


def make_plan(plan: Plan) -> tuple[str, list[Cell]]:
    """Title and cells of a table; raises UserError for an unknown name, or an extra flag that no run has."""
    if plan.name not in PLANS:
        raise UserError(f"unknown table {plan.name!r}; known are {', '.join(PLANS)}")
    if plan.settings.seeds < 1:
        raise UserError(f"--seeds must be at least 1, it is {plan.settings.seeds}")
    wrong = [mode for mode in plan.settings.modes if mode not in MODES]
    if wrong:
        raise UserError(f"--modes takes {' and '.join(MODES)}, not {wrong[0]!r}")
    title, make = PLANS[plan.name]
    cells = make(plan)
    used = {word for job in jobs_of(cells) for word in job.words}
    for name in plan.extra:
        if name in RESERVED:
            raise UserError(f"--{name} behind -- is decided by the table; its own flags are before --")
        if f"--{name}" not in used:
            raise UserError(
                f"--{name} behind -- is a flag of none of the runs; see --help of the scripts in src/"
            )
    return title, cells


def jobs_of(cells: Sequence[Cell]) -> list[Job]:
    """Every job once, each behind the one that it needs."""
    found: dict[Path, Job] = {}

    def add(job: Job) -> None:
        if job.after:
            add(job.after)
        found.setdefault(job.folder, job)

    for cell in cells:
        for job in cell.jobs:
            add(job)
    return list(found.values())


def chosen_rows(rows: dict[str, Row], plan: Plan) -> dict[str, Row]:
    """Those of --rows; raises UserError for one that the table has not."""
    unknown = [name for name in plan.settings.rows if name not in rows]
    if unknown:
        raise UserError(f"--rows {unknown[0]!r} is none of {', '.join(rows)}")
    return {name: row for name, row in rows.items() if name in (plan.settings.rows or rows)}


def group(
    plan: Plan, default: Sequence[str], make: Callable[..., Job]
) -> Iterator[tuple[DataSetSpec, tuple[Job, ...]]]:
    """For each data set the jobs of all its normal classes and seeds."""
    for name in plan.settings.data_sets or default:
        own = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, data_sets=(name,)))
        yield get_spec(name), tuple(make(experiment) for experiment in own.experiments(()))


def table2(plan: Plan) -> list[Cell]:
    """Detectors alone, and with the anomalies of the last round of a loop or of folder 0."""
    cells = []
    for name, row in chosen_rows(TABLE2, plan).items():
        if row.mode and row.mode not in plan.modes():
            continue
        for spec, jobs in group(plan, PAPER_SETS, lambda experiment, row=row: _detect(plan, row, experiment)):
            from_loop = jobs[0].script == "iterate.py"
            part = str(plan.n_rounds(spec)) if from_loop else "test_auc"
            cells.append(Cell(name, spec.title, jobs, part, paper.table2(name, spec.name)))
    return cells


def _detect(plan: Plan, row: Row, experiment: tuple[DataSetSpec, list[str], int]) -> Job:
    """A run of one row; Deep SAD with a loop's anomalies is the loop's own detector."""
    spec = experiment[0]
    words = ["--detector", row.detector, *row.flags]
    place = "_".join([row.detector, *row.flags[1::2], *[row.mode] * bool(row.mode)])
    if not row.mode:
        return plan.job("main.py", place, experiment, *words, "--n_anomalies", "0")
    if plan.settings.anomalies == "folder":
        return plan.job("main.py", f"{place}_folder0", experiment, *words, "--n_anomalies", "-1")
    loop = plan.loop(experiment, row.mode)
    if row.detector == DEFAULT_DETECTOR:
        return loop
    last = loop.folder / f"round_{plan.n_rounds(spec)}" / "0"
    words += ["--anomaly_path", str(last)]
    return plan.job("main.py", place, experiment, *words, after=loop)


def rounds_table(plan: Plan) -> list[Cell]:
    """Tables III and IV: a loop's detectors without anomalies and after each round."""
    table4 = plan.name == "table4"
    figures = paper.TABLE4 if table4 else paper.TABLE3
    if plan.settings.rounds is None:
        plan = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, rounds=3))
    cells = []
    for mode in plan.modes():
        for spec, jobs in group(
            plan, ("cifar100",) if table4 else PAPER_SETS, lambda e, mode=mode: plan.loop(e, mode)
        ):
            row = f"{spec.title}, {mode}"
            given = figures.get(spec.name, ()) if mode == "rep" else ()
            for k, part in enumerate(["none", *map(str, range(plan.n_rounds(spec) + 1))]):
                column = "none" if part == "none" else f"KKA({part})"
                cells.append(Cell(row, column, jobs, part, given[k] if k < len(given) else ""))
    return cells


def figure4(plan: Plan) -> list[Cell]:
    """AUC by the number of initial anomalies, and by that of a loop that adds hard ones."""
    cells = []
    for n in plan.settings.sizes:
        for spec, jobs in group(plan, ("flower",), lambda e, n=n: _initial(plan, e, n)):
            part = "0" if jobs[0].script == "iterate.py" else "test_auc"
            cells.append(Cell(f"initial, {n}", spec.title, jobs, part))
    if plan.settings.anomalies == "loop":
        for mode in plan.settings.modes or ("add",):
            for spec, jobs in group(plan, ("flower",), lambda e, mode=mode: plan.loop(e, mode)):
                for k in range(plan.n_rounds(spec) + 1):
                    cells.append(Cell(f"KKA({k}), {mode}", spec.title, jobs, str(k)))
    return cells


def _initial(plan: Plan, experiment: tuple[DataSetSpec, list[str], int], n: int) -> Job:
    if plan.settings.anomalies == "folder":
        chosen = ("--detector", DEFAULT_DETECTOR, "--n_anomalies", str(n))
        return plan.job("main.py", f"initial_{n}", experiment, *chosen)
    begun = ("--mode", "add", "--rounds", "0", "--n_initial", str(n))
    plan = dataclasses.replace(plan, extra={k: v for k, v in plan.extra.items() if k != "n_initial"})
    return plan.job("iterate.py", f"initial_{n}", experiment, *begun)


def ahl(plan: Plan) -> list[Cell]:
    """DevNet, DRA and AHL with few known anomalies."""
    cells = []
    for name, row in chosen_rows(AHL, plan).items():
        for n in plan.settings.known:
            words = ("--detector", row.detector, *row.flags, "--n_anomaly", str(n), "--n_anomalies", "0")
            place = f"{name.replace('(', '_').replace(')', '').lower()}_known{n}"
            for spec, jobs in group(
                plan, ("mvtec",), lambda e, p=place, w=words: plan.job("main.py", p, e, *w)
            ):
                cells.append(Cell(name, f"{spec.title}, {n} known", jobs, paper=paper.AHL[name].get(n, "")))
    return cells


def hardness(plan: Plan) -> list[Cell]:
    """Studies of which anomalies help; hardness_table.py compares what is in them."""
    cells = []
    for detector in plan.settings.rows or (DEFAULT_DETECTOR,):
        own = {key: value for key, value in plan.extra.items() if key in flags_of("hardness.py", detector)}
        parser = build_parser("", HardnessSettings)
        given = vars(parser.parse_known_args(to_words(own))[0])
        asked = make_settings(HardnessSettings, given)
        parts = tuple(("sets", str(n), "aucs", name) for n in asked.n_base for name in asked.sets)
        for spec, jobs in group(
            plan,
            ("flower",),
            lambda e, d=detector, p=parts: plan.job("hardness.py", d, e, "--detector", d, parts=p),
        ):
            cells.append(Cell(detector, spec.title, jobs))
    return cells


PLANS: dict[str, tuple[str, Callable[[Plan], list[Cell]]]] = {
    "table2": ("Table II: test AUC, %", table2),
    "table3": ("Table III: test AUC by round, %", rounds_table),
    "table4": ("Table IV: test AUC by round, one fine class normal, %", rounds_table),
    "ahl": ("AHL: test AUC with few known anomalies, %", ahl),
    "figure4": ("Fig. 4: test AUC by number of generated anomalies, %", figure4),
    "hardness": ("Does hardness help? Test AUC, %", hardness),
}
