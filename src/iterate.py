"""Algorithm 1 unattended: captions, images, detector, preference tuning, next round.

    python src/iterate.py --dataset_name flower --mode rep --rounds 2
    python src/iterate.py --dataset_name garden --llm_model DIR --drawer_backend garden

Flags of the LLM begin with --llm_, of the text-to-image model with --drawer_, of DPO with --tune_ and
--pairs_, of --evaluator frozen with --evaluator_; all others are the loop's and the detector's. An
interrupted loop continues with the same command.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kka.algorithm import run_kka
from kka.command_line import parse_command
from kka.datasets import get_spec
from kka.datasets.sources import data_root
from kka.errors import run_script
from kka.evaluator import find_evaluator
from kka.experiment import check_detector, fill_epochs, find_device
from kka.files import user_path
from kka.loop import Loop
from kka.loop_folder import check_loop, check_parts, default_folder, opened, report_loop, write_table
from kka.loop_settings import PREFIXED, LoopSettings
from kka.options import check_name
from kka.runs import RESULTS
from kka.settings import make_settings, take_prefix
from kka.tracking import check_report_to


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    torch.set_flush_denormal(True)  # before there are threads, which inherit it
    flags, detector = parse_command("Algorithm 1, unattended.", LoopSettings, **PREFIXED)
    settings = make_settings(LoopSettings, flags)
    llm, drawer, tuning, pairs = (
        make_settings(PREFIXED[name], take_prefix(name, flags)) for name in ("llm", "drawer", "tune", "pairs")
    )
    check_report_to(settings.report_to)
    check_name(settings.name)
    tuning = replace(tuning, report_to=tuning.report_to or settings.report_to)
    spec = get_spec(settings.dataset_name)
    detector = fill_epochs(detector, spec)
    check_detector(detector, None, None)
    evaluator = find_evaluator(flags)
    device, root = find_device(settings.device, strict=False), data_root(spec, settings.data_path)
    folder = user_path(settings.xp_path) if settings.xp_path else Path()
    loop = Loop(folder, root, spec, settings, detector, llm, drawer, tuning, pairs, device, evaluator)
    check_loop(loop)
    if not settings.xp_path:
        loop = replace(loop, folder=default_folder(loop))
    if not (loop.folder / RESULTS).exists():
        check_parts(loop)
    with opened(loop):
        rows: list[dict[str, Any]] = []
        for row in run_kka(loop):
            rows.append(row)
            write_table(loop, rows)
        print(report_loop(loop, rows))
    print(f"captions, images, detectors, table.md and loop.png are in {loop.folder}")


if __name__ == "__main__":
    run_script(main)
