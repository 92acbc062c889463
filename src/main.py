"""Train and test a detector on one data set, with or without generated anomalies.

python src/main.py                                   # Oxford-102, class 26
python src/main.py --dataset_name garden --runs 5    # needs no data
python src/main.py --detector ssd --preset small     # another detector; --help lists the flags of each
"""

import logging

from kka.command_line import parse_command
from kka.errors import run_script
from kka.experiment import run_experiment
from kka.options import ExperimentSettings
from kka.settings import make_settings


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    description = "Train and test a detector on one data set, with or without generated anomalies."
    values, detector = parse_command(description, ExperimentSettings)
    run_experiment(make_settings(ExperimentSettings, values), detector)


if __name__ == "__main__":
    run_script(main)
