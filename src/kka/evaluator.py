"""Who judges the generated anomalies in Eq. (6): the detector that is tested, or frozen features."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kka.detectors import build_detector
from kka.detectors.frozen import FrozenSettings
from kka.errors import UserError
from kka.files import read_json
from kka.options import DETECTOR, EVALUATOR, FROZEN
from kka.run import Run
from kka.runs import CONFIG
from kka.settings import make_settings, prefixed_flags, take_prefix


def find_evaluator(values: Mapping[str, Any]) -> FrozenSettings | None:
    """The settings behind --evaluator_* for --evaluator frozen; None where the detector judges.

    Raises UserError for a value that makes no sense, and for these flags without an evaluator of their own.
    """
    given = take_prefix(EVALUATOR, values)
    if values.get(EVALUATOR) != FROZEN:
        if given:
            raise UserError(f"--{EVALUATOR}_{min(given)} needs --{EVALUATOR} {FROZEN}")
        return None
    with prefixed_flags(EVALUATOR, FrozenSettings):
        settings = make_settings(FrozenSettings, given)
        build_detector(settings)
    return settings


def evaluator_run(run: Run, settings: FrozenSettings) -> Run:
    """The run that judges the anomalies of another one, in a folder within its."""
    own = replace(
        run.settings, xp_path=str(run.folder / EVALUATOR), runs=1, vmap_seeds=1,
        evaluator=DETECTOR, load_model=None,
    )  # fmt: skip
    return replace(run, settings=own, detector_settings=settings, weights=None, evaluator=None)


def judging_run(run: Path) -> Path:
    """The folder whose split counts: that of the evaluator if a run was made with one, else the run itself.

    Anything that is no run of src/main.py is returned as it is.
    """
    config = read_json(run / CONFIG) if (run / CONFIG).is_file() else None
    settings = config.get("settings") if isinstance(config, dict) else None
    asked = settings.get(EVALUATOR) if isinstance(settings, dict) else None
    return run / EVALUATOR if asked == FROZEN else run
