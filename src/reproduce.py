"""The tables of the paper from scratch: every run that is missing, then the table.

    python src/reproduce.py table3 --data_sets garden --seeds 5 --dry_run
    python src/reproduce.py table2 --data flower=DIR ucm_caption=DIR --jobs 4 --preset cpu
    python src/reproduce.py hardness --normal_classes 26 57 82 -- --n_base 10 50 --pretrain False

Names: table2, table3, table4, ahl, figure4, hardness. Flags behind -- go to each run that has them. Runs that
are finished are not made again, interrupted ones continue. See docs/reproduce.md.
"""

import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from kka.errors import UserError, run_script
from kka.estimates import duration, kind_of_job, median_seconds, total
from kka.files import check_writable, user_path
from kka.hardness_table import compare
from kka.plan_tables import PLANS, jobs_of, make_plan
from kka.plans import Plan, PlanSettings, to_dict
from kka.ray_backend import run_on_ray
from kka.runs import ROOT
from kka.settings import build_parser, make_settings, option
from kka.sweep import Job, cores, is_finished, run_local
from kka.tables import Cell, problems_of, refuse_foreign, tabulate, to_markdown, write_table

log = logging.getLogger("reproduce")


@dataclass(frozen=True)
class SweepSettings:
    """How the runs are made."""

    dry_run: bool = option(False, "list the runs, with their time by runs made before, and make none")
    jobs: int = option(1, "runs at once; they share the cores")
    backend: str = option("local", "this machine, or the Ray cluster at RAY_ADDRESS", ("local", "ray"))
    gpus_per_run: float = option(0.0, "ray: GPUs that a run takes; 0.5 puts two on one")
    cpus_per_run: int = option(0, "threads of a run; 0: the cores divided by --jobs, with ray 1")
    retries: int = option(3, "ray: how often a run that was lost with its node is made again")
    out: str | None = option(None, "table without suffix; None: log/tables/<name>")


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    plan, sweep = parse(sys.argv[1:])
    folder = user_path(plan.settings.folder)
    if folder.is_file():
        raise UserError(f"--folder {folder} is a file; name a folder")
    title, cells = make_plan(plan)
    jobs = jobs_of(cells)
    missing = [job for job in jobs if not is_finished(job)]
    log.info("%d runs, %d finished", len(jobs), len(jobs) - len(missing))
    if sweep.dry_run:
        announce(missing, folder, sweep)
        return
    out = user_path(sweep.out) if sweep.out else ROOT / "log" / "tables" / plan.name
    check_writable(Path(f"{out}.json"), "--out")
    refuse_foreign(out)
    if missing:  # finished runs may lie where nothing can be written
        check_writable(folder, "--folder", folder=True)
    try:
        failures = run(missing, sweep)
    finally:  # also of what is there when it is interrupted
        problems = write(plan.name, title, cells, out)
    if failures:
        more = f" ({len(failures)} of {len(jobs)} runs failed)" if len(failures) > 1 else ""
        raise UserError(f"{failures[0]}{more}; the table has what is finished")
    if problems:
        more = f" (and {len(problems) - 1} more, which its notes name)" if len(problems) > 1 else ""
        raise UserError(f"the table has not everything: {problems[0]}{more}")


def parse(words: list[str]) -> tuple[Plan, SweepSettings]:
    """The table's name, our flags, and behind -- those of the runs."""
    where = words.index("--") if "--" in words else len(words)
    parser = build_parser("Tables of the paper from scratch.", PlanSettings, SweepSettings)
    parser.add_argument("name", metavar="NAME", help=", ".join(PLANS))
    parser.appendix = "\nFlags behind -- are passed to each run that has them.\n"
    values = vars(parser.parse_args(words[:where]))
    sweep = make_settings(SweepSettings, values)
    if sweep.jobs < 1:
        raise UserError(f"--jobs must be at least 1, it is {sweep.jobs}")
    for name in ("cpus_per_run", "gpus_per_run", "retries"):
        if getattr(sweep, name) < 0:
            raise UserError(f"--{name} must not be negative, it is {getattr(sweep, name)}")
    return Plan(values["name"], make_settings(PlanSettings, values), to_dict(words[where + 1 :])), sweep


def announce(missing: Sequence[Job], folder: Path, sweep: SweepSettings) -> None:
    """Print the command of each run and the time that it may take."""
    known = median_seconds(folder)
    for job in missing:
        seconds = known.get(kind_of_job(job))
        time = "no estimate yet" if seconds is None else f"about {duration(seconds)}"
        print(f"{shlex.join(['python', *job.command])}  # {time}")
    print(total(missing, known, sweep.jobs))


def run(missing: Sequence[Job], sweep: SweepSettings) -> list[str]:
    """Make the runs; returns why some failed."""
    failures = []
    with closing(start(missing, sweep)) as ended:
        for job, reason in tqdm(ended, total=len(missing), desc="runs", unit="run", disable=None):
            log.info("%s", reason or f"{job.folder} is finished")
            failures += [reason] * bool(reason)
    return failures


def start(missing: Sequence[Job], s: SweepSettings) -> Iterator[tuple[Job, str]]:
    """The runs as they end, each with the reason if it failed."""
    if s.backend == "ray":
        cpus, address = s.cpus_per_run or 1, os.environ.get("RAY_ADDRESS")
        return run_on_ray(missing, s.gpus_per_run, cpus, s.retries, address)
    return run_local(missing, s.jobs, s.cpus_per_run or max(1, cores() // s.jobs))


def write(name: str, title: str, cells: Sequence[Cell], out: Path) -> list[str]:
    """Write the table and print it; returns what is in no mean of it, and why."""
    table = compare(title, cells) if name == "hardness" else tabulate(title, cells)
    write_table(table, out)
    print(to_markdown(table))
    log.info("%s.md, .csv, .tex and .json", out)
    return problems_of(table)


if __name__ == "__main__":
    run_script(main)
