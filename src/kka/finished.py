"""What a run, a loop or a study left behind, checked before anything is made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kka.datasets import get_spec
from kka.detectors import DETECTORS
from kka.errors import UserError
from kka.files import is_number, read_json
from kka.language_models import DEFAULT_MODEL
from kka.runs import CONFIG, RESULTS, read_results

COST = ("test_time", "n_test", "peak_mib")  # of results.json
AGAIN = "delete that folder to make it again"
# Settings that the notes of a table are made of, by script.
NEEDED = {
    "main.py": ("anomaly_path",),
    "iterate.py": ("llm_model", "llm_backend", "drawer_backend"),
    "hardness.py": ("anomaly_path",),
}


@dataclass(frozen=True)
class Finished:
    """What a table needs of a run."""

    settings: dict[str, Any]
    config: dict[str, Any]
    results: dict[str, Any]

    @property
    def script(self) -> str:
        """Which one made it."""
        return script_of(self.settings)


def script_of(settings: Mapping[str, Any]) -> str:
    """The script whose settings these are."""
    return "iterate.py" if "llm_backend" in settings else "hardness.py" if "n_pool" in settings else "main.py"


def read_finished(folder: Path) -> Finished:
    """A finished run, loop or study.

    Raises UserError if it is missing, not finished, damaged, or of a version that wrote other things.
    """
    if not (folder / RESULTS).exists():
        raise UserError(f"{folder} is {'not finished' if (folder / CONFIG).exists() else 'missing'}")
    try:
        config, results = read_json(folder / CONFIG), read_results(folder / RESULTS)
    except UserError as error:
        raise UserError(f"{error}; {AGAIN}") from None
    if not isinstance(config, dict) or not isinstance(config.get("settings"), dict):
        raise UserError(f"{folder / CONFIG} is not from a run of this program")
    run = Finished(config["settings"], config, results)
    if wrong := wrong_config(config) or WRONG[run.script](results):
        raise UserError(f"{folder} is damaged or from another version ({wrong}); {AGAIN}")
    return run


def wrong_config(config: Mapping[str, Any]) -> str:
    """What of a config.json is not as it should be; empty if nothing is."""
    settings = config["settings"]
    for key in ("detector", "dataset_name", *NEEDED[script_of(settings)]):
        if key not in settings:
            return f"its settings have no {key}"
    if settings["detector"] not in list(DETECTORS):  # of a list, as it may be unhashable
        return f"its detector is {settings['detector']!r}"
    if "llm_backend" in settings and settings["llm_backend"] not in list(DEFAULT_MODEL):
        return f"its llm_backend is {settings['llm_backend']!r}"
    for key in ("anomaly_path", "llm_model"):
        if not isinstance(settings.get(key), str | None):
            return f"its {key} is {settings[key]!r}"
    if not isinstance(settings.get("normal_class", []), list | None):
        return f"its normal_class is {settings['normal_class']!r}, which is no list"
    if not isinstance(config.get("machine", {}), dict):
        return f"its machine is {config['machine']!r}"
    return _wrong_data_set(settings["dataset_name"])


def _wrong_data_set(name: Any) -> str:
    try:
        get_spec(str(name))
    except UserError as error:
        return str(error)
    return ""


def wrong_run(results: Mapping[str, Any]) -> str:
    """What of the results of a run is not as it should be; its AUC may be missing or NaN, which is told."""
    for key in (*COST, "train_time", "seconds"):
        value = results.get(key, 1)
        if not is_number(value) or value < 0 or (key == "test_time" and value == 0):
            return f"its {key} is {value!r}"
    return ""


def wrong_loop(results: Mapping[str, Any]) -> str:
    """The same of a loop, whose single AUCs may be missing or NaN."""
    rounds = results.get("rounds")
    if not isinstance(rounds, list) or not rounds:
        return f"its rounds are {_brief(rounds)}"
    for name, value in (("none", results.get("none")), *((f"round {k}", r) for k, r in enumerate(rounds))):
        aucs = value.get("test_aucs") if name != "none" and isinstance(value, dict) else value
        if not isinstance(aucs, list) or not aucs:
            return f"the AUCs of {name} are {_brief(aucs)}"
    return ""


def wrong_study(results: Mapping[str, Any]) -> str:
    """The same of a study of hardness, whose AUCs must all be there."""
    sets = results.get("sets")
    if not isinstance(sets, dict) or not sets:
        return f"its sets are {_brief(sets)}"
    return next((f"size {n}: {wrong}" for n, each in sets.items() if (wrong := _wrong_size(n, each))), "")


def _wrong_size(n: str, value: Any) -> str:
    if not n.isdecimal():
        return "no number"
    if not isinstance(value, dict) or not is_number(value.get("hard")):
        return "its share of hard ones is missing"
    aucs, n_new = value.get("aucs"), value.get("n_new")
    if not isinstance(aucs, dict) or not isinstance(n_new, dict):
        return "its AUCs are missing"
    for name, own in aucs.items():
        if not _are_aucs(own) or not is_number(n_new.get(name)):
            return f"the AUCs of {name} are {_brief(own)}, with {n_new.get(name)!r} new ones"
    return ""


def _are_aucs(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(map(is_auc, values))


def is_auc(value: object) -> bool:
    """Whether it is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1  # type: ignore[operator]


def _brief(value: Any) -> str:
    return repr(value)[:60]


WRONG = {"main.py": wrong_run, "iterate.py": wrong_loop, "hardness.py": wrong_study}


def n_anomalies(run: Finished, part: str) -> float | None:
    """How many generated anomalies the detectors of `part` were trained with; None if nothing says."""
    if part == "test_auc":
        value = run.results.get("n_generated")
    else:
        value = 0 if part == "none" else run.results["rounds"][int(part)].get("size")
    return value if is_number(value) else None


def value_of(run: Finished, part: str) -> float:
    """The AUC of a run, or of one round of a loop, whose detectors are averaged; in [0, 1].

    Raises UserError if there is none, or it is no such number.
    """
    try:
        if part == "test_auc":
            values: Sequence[Any] = [run.results["test_auc"]]
        else:
            values = run.results["none"] if part == "none" else run.results["rounds"][int(part)]["test_aucs"]
    except (KeyError, IndexError, TypeError):
        raise UserError(f"has no result of {part}") from None
    for value in values:
        if value is None:
            raise UserError("has no AUC, as its test set has one class only")
        if not is_auc(value):
            raise UserError(f"has an AUC of {value}; {AGAIN}")
    return sum(values) / len(values)
