"""The folder of a loop, and the table at its end."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kka.errors import UserError
from kka.files import read_json, write_bytes, write_json
from kka.loop import Loop, describe_settings
from kka.runs import ROOT, claim, fingerprint, locked, write_config

# Settings of a loop that decide where or how fast it runs, not its numbers.
PLACE = frozenset(
    {"data_path", "xp_path", "name", "overwrite", "device", "llm_device", "drawer_device", "draw_batch"}
)

log = logging.getLogger(__name__)


def identity_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the numbers."""
    return {key: value for key, value in settings.items() if key not in PLACE and not key.endswith("_device")}


def default_folder(loop: Loop) -> Path:
    """log/<data set>/<name>, where the name says mode and seed and holds a hash of the settings."""
    s = loop.settings
    digest = fingerprint(identity_of(describe_settings(loop)))[:6]
    return ROOT / "log" / loop.spec.name / (s.name or f"kka_{s.mode}_seed{s.seed}_{digest}")


@contextmanager
def opened(loop: Loop) -> Iterator[None]:
    """Hold the loop's folder; raises UserError if it belongs to other settings or another process has it."""
    settings = describe_settings(loop)
    with locked(loop.folder):
        claim(loop.folder, identity_of(settings), loop.settings.overwrite)
        write_config(loop.folder, identity_of(settings), settings)
        yield


def report_loop(loop: Loop, rows: list[dict[str, Any]]) -> str:
    """Write results.json and table.md, and return the table."""
    none = read_json(loop.folder / "none" / "results.json")["test_auc"]
    write_json(loop.folder / "results.json", {"none": none, "rounds": rows}, indent=1)
    table = to_table(none, rows)
    write_bytes(loop.folder / "table.md", table.encode())
    return table


def to_table(none: float | None, rows: list[dict[str, Any]]) -> str:
    """A markdown table: one line without anomalies, then one per round."""
    stages = ("describe", "draw", "tune", "detect")
    head = [
        "",
        "fresh captions",
        "hard among fresh",
        "set",
        "DPO margin",
        "test AUC",
        *(f"{s}, s" for s in stages),
    ]
    lines = [head, ["---"] * len(head), ["none", "", "", "0", "", _percent(none), *[""] * len(stages)]]
    for row in rows:
        margin = "" if row["margin"] is None else f"{row['margin']:+.3f}"
        seconds = [f"{row['seconds'].get(stage, 0):.0f}" for stage in stages]
        cells = [
            f"KKA({row['round']})",
            str(row["captions"]),
            _percent(row["hard"]),
            str(row["size"]),
            margin,
        ]
        lines.append([*cells, _percent(row["test_auc"]), *seconds])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f} %"


def check_loop(loop: Loop) -> None:
    """Raises UserError naming the flag of the first setting that makes no sense."""
    s = loop.settings
    for name in ("n_fresh", "n_initial", "n_clusters", "draw_batch"):
        if (getattr(s, name) or 1) < 1 or getattr(s, name) == 0:
            raise UserError(f"--{name} must be at least 1, it is {getattr(s, name)}")
    if loop.n_rounds < 0 or s.per_round < 0:
        raise UserError("--rounds and --per_round must not be negative")
    if loop.n_rounds and loop.llm.backend != "transformers":
        raise UserError("a tuned LLM needs --llm_backend transformers; with a server give --rounds 0")
