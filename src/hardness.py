"""Does hardness help? Detectors on a base set of anomalies with others added or in its place, for one seed.

    python src/hardness.py --dataset_name flower --data_path DIR --normal_class 82 --n_base 50
    python src/hardness.py --dataset_name garden --device cpu --n_epochs 50 --pretrain False

Trainings that are finished stay in the run folder and are not repeated. src/reproduce.py hardness runs many
of these and makes the table.
"""

import logging

import torch

from kka.command_line import parse_command
from kka.datasets import get_spec
from kka.datasets.sources import data_root
from kka.errors import run_script
from kka.experiment import check_detector, fill_epochs, find_device, find_normal_classes
from kka.hardness_study import HardnessSettings, Study, check_hardness
from kka.options import ExperimentSettings
from kka.settings import make_settings


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    torch.set_flush_denormal(True)  # before there are threads, which inherit it
    values, detector = parse_command("Which anomalies help?", HardnessSettings)
    settings = make_settings(HardnessSettings, values)
    check_hardness(settings)
    spec = get_spec(settings.dataset_name)
    detector = fill_epochs(detector, spec)
    check_detector(detector, None, None)
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    classes = find_normal_classes(make_settings(ExperimentSettings, values), spec)
    root, device = data_root(spec, settings.data_path), find_device(settings.device, strict=False)
    study = Study(settings, detector, spec, root, classes, device)
    for n, found in study.execute()["sets"].items():
        print(f"base set of {n}, {100 * found['hard']:.1f} % of the pool hard")
        for name, aucs in found["aucs"].items():
            print(f"  {name:20} {found['n_new'][name]:4d} new  AUC {100 * sum(aucs) / len(aucs):.2f} %")
    print(f"results are in {study.folder}")


if __name__ == "__main__":
    run_script(main)
