"""What each table of the paper is made of."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kka import paper
from kka.command_line import DEFAULT_DETECTOR
from kka.datasets import get_spec
from kka.datasets.layout import DataSetSpec
from kka.errors import UserError
from kka.hardness_study import HardnessSettings
from kka.plans import Experiment, Plan, flags_of, to_words
from kka.settings import build_parser, make_settings
from kka.sweep import Job
from kka.tables import Cell
from kka.update import MODES


@dataclass(frozen=True)
class Row:
    """A detector of Table II or of AHL's, and the mode of its anomalies."""

    detector: str
    mode: str = ""
    """of the loop that makes its anomalies; empty: none, or folder 0"""
    anomalies: bool = False
    """folder 0 of the data set"""
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
WITHOUT_ROWS = ("table3", "table4", "figure4")
PAPER_SETS = ("cifar100", "flower", "ucm_caption")
# Flags of the runs that the table decides.
RESERVED = frozenset({
    "dataset_name", "data_path", "normal_class", "normal_superclass", "seed", "runs", "vmap_seeds",
    "each_class", "xp_path", "name", "overwrite", "load_config", "detector", "mode", "rounds", "n_anomalies",
    "n_anomaly", "help",
})  # fmt: skip


def make_plan(plan: Plan) -> tuple[str, list[Cell]]:
    """Title and cells of a table; raises UserError for an unknown name, or an extra flag that no run has."""
    if plan.name not in PLANS:
        raise UserError(f"unknown table {plan.name!r}; known are {', '.join(PLANS)}")
    check_settings(plan)
    title, make = PLANS[plan.name]
    cells = make(plan)
    if not cells:
        raise UserError("--rows and --modes leave no row")
    check_used(plan, jobs_of(cells))
    return title, cells


def check_settings(plan: Plan) -> None:
    """Raises UserError naming the flag of the first value that makes no sense."""
    s = plan.settings
    if s.seeds < 1:
        raise UserError(f"--seeds must be at least 1, it is {s.seeds}")
    wrong = [mode for mode in s.modes if mode not in MODES]
    if wrong:
        raise UserError(f"--modes takes {' and '.join(MODES)}, not {wrong[0]!r}")
    if s.rounds is not None and s.rounds < 0:
        raise UserError(f"--rounds must not be negative, it is {s.rounds}")
    for name in ("sizes", "known"):
        if min(getattr(s, name), default=1) < 1:
            raise UserError(f"--{name} takes numbers of at least 1, not {min(getattr(s, name))}")
    if s.rows and plan.name in WITHOUT_ROWS:
        raise UserError(f"--rows is no flag of {plan.name}; choose with --data_sets and --modes")
    for word in s.data:
        plan.data_path(get_spec(word.partition("=")[0]))


def check_used(plan: Plan, jobs: Sequence[Job]) -> None:
    """Raises UserError for the first flag that no run of the table has use for."""
    used = {word for job in jobs for word in job.words}
    preset = plan.settings.preset
    if preset is not None and "--preset" not in used:
        raise UserError(
            f"--preset {preset!r} is known to none of the table's detectors; see --help of main.py"
        )
    for flag, words, mark in (
        ("normal_classes", plan.settings.normal_classes, ":"),
        ("data", plan.settings.data, "="),
    ):
        for word in words:
            name, found, _ = word.partition(mark)
            if found and get_spec(name).name not in used:
                raise UserError(
                    f"--{flag} {word!r}: {name} is none of the table's data sets; see --data_sets"
                )
    for name in plan.extra:
        if name in RESERVED:
            raise UserError(f"--{name} behind -- is decided by the table; its own flags are before --")
        if f"--{name}" not in used:
            raise UserError(
                f"--{name} behind -- is a flag of none of the runs; see --help of the scripts in src/"
            )


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
        raise UserError(f"--rows {unknown[0]!r} is none of {', '.join(map(repr, rows))}")
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
    for name, row in chosen_rows(table2_rows(plan), plan).items():
        if row.mode and row.mode not in plan.modes():
            continue
        for spec, jobs in group(plan, PAPER_SETS, lambda experiment, row=row: _detect(plan, row, experiment)):
            from_loop = jobs[0].script == "iterate.py"
            part = str(plan.n_rounds(spec)) if from_loop else "test_auc"
            figures = [paper.table2(f"{name}{mode}", spec.name) for mode in ("", "(add)", "(rep)")]
            cells.append(Cell(name, spec.title, jobs, part, " / ".join(filter(None, figures))))
    return cells


def table2_rows(plan: Plan) -> dict[str, Row]:
    """Rows of Table II; folder 0 is no outcome of a mode, so one row stands for both."""
    if plan.settings.anomalies == "loop":
        return TABLE2
    return {
        name.removesuffix(f"({MODES[0]})"): dataclasses.replace(row, anomalies=bool(row.mode), mode="")
        for name, row in TABLE2.items()
        if row.mode in ("", MODES[0])
    }


def _detect(plan: Plan, row: Row, experiment: Experiment) -> Job:
    """A run of one row; Deep SAD with a loop's anomalies is the loop's own detector."""
    spec = experiment[0]
    words = ["--detector", row.detector, *row.flags]
    place = "_".join([row.detector, *row.flags[1::2], *[row.mode] * bool(row.mode)])
    if row.anomalies:
        return plan.job("main.py", f"{place}_folder0", experiment, *words, "--n_anomalies", "-1")
    if not row.mode:
        return plan.job("main.py", place, experiment, *words, "--n_anomalies", "0")
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
            cells.append(Cell(f"initial, {n}", spec.title, jobs, part, counted=True))
    if plan.settings.anomalies == "loop":
        for mode in plan.settings.modes or ("add",):
            for spec, jobs in group(plan, ("flower",), lambda e, mode=mode: plan.loop(e, mode)):
                for k in range(plan.n_rounds(spec) + 1):
                    cells.append(Cell(f"KKA({k}), {mode}", spec.title, jobs, str(k), counted=True))
    return cells


def _initial(plan: Plan, experiment: Experiment, n: int) -> Job:
    if plan.settings.anomalies == "folder":
        chosen = ("--detector", DEFAULT_DETECTOR, "--n_anomalies", str(n))
        return plan.job("main.py", f"initial_{n}", experiment, *chosen)
    begun = ("--mode", "add", "--rounds", "0", "--n_initial", str(n))
    plan = dataclasses.replace(plan, extra={k: v for k, v in plan.extra.items() if k != "n_initial"})
    return plan.job("iterate.py", f"initial_{n}", experiment, *begun)


def ahl(plan: Plan) -> list[Cell]:
    """DevNet, DRA and AHL with few known anomalies, of all kinds or (hard) of one at a time."""
    cells, hard = [], plan.settings.known_kinds
    for name, row in chosen_rows(AHL, plan).items():
        for n in plan.settings.known:
            jobs: dict[str, tuple[Job, ...]] = {}
            for kind in hard or (None,):
                words = ("--detector", row.detector, *row.flags, "--n_anomaly", str(n), "--n_anomalies", "0")
                words += ("--know_class", kind) if kind else ()
                place = f"{name.replace('(', '_').replace(')', '').lower()}_known{n}{f'_{kind}' * bool(kind)}"
                for spec, own in group(
                    plan, ("mvtec",), lambda e, p=place, w=words: plan.job("main.py", p, e, *w)
                ):
                    jobs[spec.title] = jobs.get(spec.title, ()) + own
            figure = "" if hard else paper.AHL[name].get(n, "")
            for title, own in jobs.items():
                column = f"{title}, {'hard, ' * bool(hard)}{n} known"
                cells.append(Cell(name, column, own, paper=figure, deviates=True))
    return cells


def hardness(plan: Plan) -> list[Cell]:
    """Studies of which anomalies help; hardness_table.py compares what is in them."""
    cells = []
    for detector in dict.fromkeys(plan.settings.rows or (DEFAULT_DETECTOR,)):
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
