"""Cells of a table: each is one call of src/main.py with several seeds, made once and read again."""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kka.errors import UserError
from kka.files import read_json, write_json
from kka.runs import CONFIG, RESULTS, ROOT

SUMMARY, PEAK = "summary.json", "peak.json"

log = logging.getLogger("cells")


def run_cell(folder: Path, words: Sequence[str], seeds: int) -> None:
    """All seeds of a cell that are not finished, and the peak of memory while they trained.

    A finished cell stays as it is, also if a default has changed since: then its folder has to go first.
    Raises UserError if src/main.py fails.
    """
    if (folder / SUMMARY).exists() and len(read_json(folder / SUMMARY)["seeds"]) == seeds:
        return
    log.info("%s", folder)
    more = ["--xp_path", str(folder), "--runs", str(seeds)]
    process = subprocess.Popen([sys.executable, str(ROOT / "src" / "main.py"), *words, *more])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"the runs in {folder} failed; see above, and start this command again")
    write_json(folder / PEAK, usage.ru_maxrss / 1024)


def read_cell(folder: Path, seeds: int) -> dict[str, Any] | None:
    """AUCs, seconds, images per second, MiB and commits of a finished cell, None if it is not."""
    if not (folder / SUMMARY).exists():
        return None
    runs = [read_json(folder / f"seed_{k}" / RESULTS) for k in range(seeds)]
    speeds = [len(r["test_scores"]) / r["test_time"] for r in runs]
    return {
        "aucs": [r["test_auc"] for r in runs],
        "train_seconds": sum(r["train_time"] for r in runs) / len(runs),
        "test_images_per_second": sum(speeds) / len(speeds),
        "peak_mib": read_json(folder / PEAK) if (folder / PEAK).exists() else None,
        "commits": sorted(
            {str(read_json(folder / f"seed_{k}" / CONFIG)["git_commit"]) for k in range(seeds)}
        ),
    }
