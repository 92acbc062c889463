"""`make demo`: draw the garden, train Deep SAD without and with generated anomalies, compare, make a picture.

The anomalies here are drawn at random by the garden itself, a stand-in for those of an LLM and a
text-to-image model.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kka.datasets import garden
from kka.datasets.sources import data_root
from kka.detectors.deep_sad import DeepSADSettings
from kka.errors import run_script
from kka.experiment import choose_task, run_experiment
from kka.options import ExperimentSettings
from kka.picture import draw_demo
from kka.runs import ROOT
from kka.settings import build_parser, make_settings, option

log = logging.getLogger("kka.demo")


@dataclass(frozen=True)
class DemoSettings:
    """Options of the demo."""

    n_anomalies: int = option(200, "generated anomalies of the second run")
    seed: int = option(0, "seed of both runs")
    n_epochs: int = option(200, "training epochs of the detector")
    data_path: str | None = option(None, "folder for the garden; None: data/garden")
    out: str | None = option(None, "folder for runs and picture; None: log/garden/demo")


def main() -> None:
    """Run the demo; a second call finds it finished."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser = build_parser("Deep SAD on the garden, without and with generated anomalies.", DemoSettings)
    demo = make_settings(DemoSettings, vars(parser.parse_args()))
    if demo.data_path is not None:
        garden.make_garden(Path(demo.data_path))
    root = data_root(garden.SPEC, demo.data_path)
    out = Path(demo.out) if demo.out else ROOT / "log" / "garden" / "demo"
    settings = ExperimentSettings(dataset_name="garden", data_path=str(root), seed=demo.seed, device="cpu")
    detector = DeepSADSettings(n_epochs=demo.n_epochs, pretrain=False)
    results: dict[int, dict[str, Any]] = {}
    for n in (0, demo.n_anomalies):
        run = replace(settings, n_anomalies=n, xp_path=str(out / f"anomalies_{n}"))
        log.info("\nDeep SAD with %d generated anomalies", n)
        results[n] = run_experiment(run, detector)[0]
    task = choose_task(replace(settings, n_anomalies=demo.n_anomalies), garden.SPEC, root)
    draw_demo(
        out / "demo.png", task, results[0], results[demo.n_anomalies], out / f"anomalies_{demo.n_anomalies}"
    )
    print(f"\nGarden, test AUC of Deep SAD (seed {demo.seed}):")
    for n, result in results.items():
        print(f"  {n:4d} generated anomalies (drawn at random, a stand-in): {100 * result['test_auc']:.2f} %")
    print(f"picture: {out / 'demo.png'}")


if __name__ == "__main__":
    run_script(main)
