"""Peak memory of a command."""

import os
import subprocess
import sys
from pathlib import Path

MAIN = Path(__file__).resolve().parents[1] / "src" / "main.py"


def peak_memory(name: str, root: Path, run: Path) -> float:
    """Peak resident memory in GiB of a short run of main.py on one data set; it does not grow by epochs."""
    flags = {
        "--dataset_name": name,
        "--data_path": root,
        "--xp_path": run,
        "--n_epochs": 1,
        "--ae_n_epochs": 1,
    }
    command = [sys.executable, str(MAIN), *(str(word) for pair in flags.items() for word in pair)]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed")
    return usage.ru_maxrss / 2**20
