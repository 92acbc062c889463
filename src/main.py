"""Train and test a detector on one data set, with or without generated anomalies.

python src/main.py                                   # Oxford-102, class 26
python src/main.py --dataset_name garden --runs 5    # needs no data
"""

import logging
from pathlib import Path

from kka.detectors.deep_sad import DeepSADSettings
from kka.errors import UserError, run_script
from kka.experiment import run_experiment
from kka.files import read_json
from kka.options import ExperimentSettings
from kka.settings import build_parser, check_keys, make_settings

CLASSES = (ExperimentSettings, DeepSADSettings)


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    description = "Train and test a detector on one data set, with or without generated anomalies."
    flags = vars(build_parser(description, *CLASSES).parse_args())
    values = {**load_config(flags.get("load_config")), **flags}
    run_experiment(make_settings(ExperimentSettings, values), make_settings(DeepSADSettings, values))


def load_config(path: str | None) -> dict[str, object]:
    """Settings of a config.json, ours or the official code's, less the folder it wrote to."""
    if path is None:
        return {}
    try:
        config = read_json(Path(path))
    except UserError as error:
        raise UserError(f"--load_config: {error}") from None
    settings = config.get("settings", config) if isinstance(config, dict) else None
    if not isinstance(settings, dict):
        raise UserError(f"--load_config {path} must hold an object of settings")
    check_keys(settings, *CLASSES)
    return {key: value for key, value in settings.items() if key not in ("xp_path", "name", "overwrite")}


if __name__ == "__main__":
    run_script(main)
