"""Train and test a detector on one data set, with or without generated anomalies.

python src/main.py                                   # Oxford-102, class 26
python src/main.py --dataset_name garden --runs 5    # needs no data
python src/main.py --detector ssd --preset small     # another detector; --help lists the flags of each
python src/main.py --evaluator frozen                # frozen features judge the generated anomalies
"""

import logging

from kka.command_line import parse_command
from kka.detectors.frozen import FrozenSettings
from kka.errors import run_script
from kka.evaluator import find_evaluator
from kka.experiment import run_experiment
from kka.options import ExperimentSettings
from kka.settings import make_settings


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    description = "Train and test a detector on one data set, with or without generated anomalies."
    values, detector = parse_command(description, ExperimentSettings, evaluator=FrozenSettings)
    run_experiment(make_settings(ExperimentSettings, values), detector, find_evaluator(values))


if __name__ == "__main__":
    run_script(main)
