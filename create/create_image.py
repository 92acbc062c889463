"""Draw captions (Eq. 4): images, manifest and lists of the anomaly folder.

python create/create_image.py --captions captions.jsonl --dataset_name flower --out data/flower/0
accelerate launch create/create_image.py ...       # splits the work over GPUs or processes
"""

import logging
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from kka.anomalies import live, read_items
from kka.datasets import get_spec
from kka.datasets.layout import DataSetSpec
from kka.draw import Drawn, ImageSettings, describe_failures, draw_captions, finish, read_captions
from kka.drawers import DrawerSettings, build_drawer
from kka.errors import UserError, run_script
from kka.settings import build_parser, make_settings

log = logging.getLogger("create_image")


def main() -> None:
    """Parse the flags and draw."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it says a line for every request
    parser = build_parser(
        "Draw captions into an anomaly folder; run again to continue.", ImageSettings, DrawerSettings
    )
    flags = vars(parser.parse_args())
    settings, drawer_settings = make_settings(ImageSettings, flags), make_settings(DrawerSettings, flags)
    if not settings.captions or not settings.out:
        raise UserError("--captions FILE and --out DIR are needed; see --help")
    if settings.batch_size < 1 or settings.seed < 0:
        raise UserError("--batch_size must be at least 1 and --seed at least 0")
    for folder in settings.used:
        if not Path(folder).is_dir():
            raise UserError(f"--used {folder} does not exist; give an anomaly folder, or leave it out")
    draw(settings, drawer_settings, get_spec(settings.dataset_name), Path(settings.out))


def draw(settings: ImageSettings, drawer_settings: DrawerSettings, spec: DataSetSpec, out: Path) -> None:
    """Draw this process's part; the first process merges them."""
    from accelerate import PartialState

    records = read_captions(Path(settings.captions or ""))
    cpu = drawer_settings.backend != "diffusers" or drawer_settings.device == "cpu"
    # The first process waits for the slowest one at the end.
    state = PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=timedelta(days=30))
    shard = (state.process_index, state.num_processes)
    if shard[1] > 1:
        drawer_settings = replace(drawer_settings, device=str(state.device))
        if drawer_settings.backend == "bank":
            raise UserError(
                "--backend bank gives each image once and so runs in one process; leave accelerate out"
            )
    taken = [item.source or "" for folder in (out, *settings.used) for item in read_items(Path(folder))]
    drawer = build_drawer(drawer_settings, spec, used=taken)
    drawn = draw_captions(drawer, records, out, spec, settings.seed, settings.batch_size, shard)
    state.wait_for_everyone()
    if state.is_main_process:
        if shard[1] > 1:
            finish(out, spec, drawer.failures)
        report(out, len(records), drawn)
    state.destroy_process_group()


def report(out: Path, n_captions: int, drawn: Drawn) -> None:
    """Say what is in the folder now, and why images are missing."""
    n_images = len(live(read_items(out)))
    log.info("%s: %d images of %d captions", out, n_images, n_captions)
    if n_images < n_captions:
        log.warning(
            "%d captions gave no image (%s); the same command tries them again",
            n_captions - n_images,
            describe_failures(drawn.reasons),
        )


if __name__ == "__main__":
    run_script(main)
