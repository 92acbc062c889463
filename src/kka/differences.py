"""What runs differ by from the paper and from each other, read from their own config.json."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from kka.datasets import DATASETS, get_spec
from kka.detectors import DETECTORS
from kka.hardness_study import HardnessSettings
from kka.language_models import DEFAULT_MODEL
from kka.loop_folder import PLACE as LOOP_PLACE
from kka.loop_settings import PREFIXED, LoopSettings
from kka.options import PLACE, ExperimentSettings


class Run(Protocol):
    """A finished run."""

    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def results(self) -> dict[str, Any]: ...


# What a table varies, or says in its titles; and what changes no number.
VARIED = frozenset({"seed", "normal_class", "normal_superclass", "dataset_name", "know_class"})
ASKED = frozenset({
    "detector", "mode", "rounds", "n_anomalies", "n_anomaly", "base_model", "selections", "modes", "n_base",
})  # fmt: skip
SPEED = frozenset({"llm_parallel", "llm_timeout", "drawer_max_requests", "llm_max_requests"})
IN_WORDS = frozenset({
    "llm_model", "llm_backend", "llm_base_url", "drawer_backend", "drawer_model", "drawer_preset",
    "drawer_bank", "drawer_bank_exclude", "drawer_base_url",
})  # fmt: skip


def mixed_settings(runs: Sequence[Run], ignored: Sequence[str] = ()) -> str:
    """Names and values of settings in which runs of one cell differ; empty if none.

    Seed and class may differ, and what is `ignored`.
    """
    if len({str(run.settings) for run in runs}) < 2:
        return ""
    found = []
    keys = sorted({key for run in runs for key in run.settings if _decides(key)} - set(ignored))
    for key in keys:
        values = list(dict.fromkeys(shown(run.settings.get(key)) for run in runs))
        if len(values) > 1:
            found.append(f"{key} ({', '.join(values)})")
    return ", ".join(found)


def _decides(key: str) -> bool:
    return key not in VARIED | PLACE | LOOP_PLACE | SPEED and not key.endswith("_device")


def shown(value: Any) -> str:
    """A value for publication: of a path only its name."""
    if isinstance(value, str) and "/" in value and Path(value).is_absolute():
        return Path(value).name
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def describe_runs(rows: Mapping[str, Sequence[Run]]) -> list[str]:
    """Notes on where runs stand apart from the paper: settings, LLM, drawer, data, machines."""
    runs = [run for each in rows.values() for run in each]
    if not runs:
        return []
    by_text: dict[str, list[str]] = {}
    for row, own in rows.items():
        texts = dict.fromkeys(text for run in own if (text := other_settings(run.settings)))
        by_text.setdefault("; or ".join(texts), []).append(row)
    by_text.pop("", None)
    notes = [f"Not the paper's settings: {', '.join(names)}: {text}." for text, names in by_text.items()]
    return [*stand_ins(runs), *_classes(runs), *notes, *_where(runs)]


def other_settings(settings: Mapping[str, Any]) -> str:
    """Settings with other values than the defaults, which are the paper's, as "lr 0.001 (0.0001), ..." """
    defaults = _defaults(settings)
    spec = get_spec(settings["dataset_name"])
    by_data_set = {"n_epochs": spec.n_epochs, "n_initial": spec.n_initial, "repeats": spec.caption_repeats}
    for key in by_data_set.keys() & settings.keys():
        if defaults.get(key) is None and settings[key] is not None:
            defaults[key] = by_data_set[key]
    return ", ".join(
        f"{key} {shown(value)} ({shown(defaults[key])})"
        for key, value in sorted(settings.items())
        if key in defaults and _decides(key) and key not in ASKED | IN_WORDS
        and value not in (defaults[key], _listed(defaults[key]))
    )  # fmt: skip


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of the script that the settings are of."""
    detector = asdict(DETECTORS[settings["detector"]][0]())
    if "n_pool" in settings:
        return {**asdict(HardnessSettings()), **detector}
    if "llm_backend" not in settings:
        return {**asdict(ExperimentSettings()), **detector}
    prefixed = {f"{p}_{key}": value for p, cls in PREFIXED.items() for key, value in asdict(cls()).items()}
    return {**asdict(LoopSettings()), **detector, **prefixed}


def stand_ins(runs: Iterable[Run]) -> list[str]:
    """Sentences on data, LLM, drawer and anomalies that stand for others."""
    found: dict[str, None] = {}
    for run in runs:
        s = run.settings
        if s["dataset_name"] == "garden":
            found["Garden is drawn by this project and stands in for Oxford-102."] = None
        if "llm_backend" in s:
            found[_describe_llm(s)] = found[_describe_drawer(s)] = None
        elif "n_pool" in s:
            anomalies = "a folder of anomalies" if s["anomaly_path"] else "real images of other classes"
            drawn = (
                "drawings of the garden" if s["dataset_name"] == "garden" and not s["anomaly_path"] else ""
            )
            found[f"Base sets and pools: {drawn or anomalies}, stand-ins for perfect drawings."] = None
        elif run.results.get("n_generated") and not s["anomaly_path"]:
            title = DATASETS[get_spec(s["dataset_name"]).name].title
            found[f"Generated anomalies of {title}: its folder 0 as it is, wherever its images are from."] = (
                None
            )
    return list(found)


def _describe_llm(s: Mapping[str, Any]) -> str:
    model = s["llm_model"] or DEFAULT_MODEL[s["llm_backend"]]
    if model == DEFAULT_MODEL["transformers"]:
        return f"LLM: {model}, as in the paper."
    return f"LLM: {shown(model)} ({s['llm_backend']}), which stands in for {DEFAULT_MODEL['transformers']}."


def _describe_drawer(s: Mapping[str, Any]) -> str:
    if s["drawer_backend"] == "bank":
        return (
            "Drawer: the nearest captioned image of a local collection, which stands in for a text-to-image "
            "model."
        )
    if s["drawer_backend"] == "garden":
        return "Drawer: the garden's own, which stands in for a text-to-image model."
    if s["drawer_backend"] == "diffusers" and s.get("drawer_preset") == "own":
        return (
            f"Drawer: {shown(s.get('drawer_model'))} (diffusers), which stands in for Stable Diffusion 1.5."
        )
    model = s.get("drawer_model") or s.get("drawer_preset") or "its default model"
    return f"Drawer: {s['drawer_backend']}, {shown(model)} (paper: CogView-3-Plus or Stable Diffusion)."


def _classes(runs: Iterable[Run]) -> list[str]:
    """Which classes were normal, where that was chosen."""
    chosen = [run.settings.get("normal_class") or [] for run in runs]
    names = dict.fromkeys(" + ".join(map(str, classes)) for classes in chosen if classes)
    return [f"Normal: {', '.join(names)}."] if names else []


def _where(runs: Iterable[Run]) -> list[str]:
    """Commits and accelerators."""
    runs = list(runs)
    commits = sorted({str(run.config.get("git_commit")) for run in runs})
    machines = sorted({_processor(run) for run in runs})
    return [f"Made by commit {', '.join(commits)} on {', '.join(machines)}."]


def _processor(run: Run) -> str:
    """The GPU of the machine if any part of the run was meant for it."""
    asked = any(str(v).startswith("cuda") for k, v in run.settings.items() if k.endswith("device"))
    return str(run.config.get("machine", {}).get("gpu") or "CPU") if asked else "CPU"
