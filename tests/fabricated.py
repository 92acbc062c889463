"""Folders of finished runs, loops and studies that were never run."""

import json
from dataclasses import asdict
from pathlib import Path

from kka.detectors import DETECTORS
from kka.hardness_study import HardnessSettings
from kka.loop_settings import PREFIXED, LoopSettings
from kka.options import ExperimentSettings
from kka.sweep import Job

REMOVED = object()


def change(job: Job, name: str, **values: object) -> Job:
    """Replace values of config.json's settings, or of another file; REMOVED takes one out."""
    path = job.folder / name
    content = json.loads(path.read_text())
    own = content["settings"] if name == "config.json" and not values.keys() <= content.keys() else content
    own |= values
    for key in [key for key, value in values.items() if value is REMOVED]:
        del own[key]
    path.write_text(json.dumps(content))
    return job


def write_run(folder: Path, auc: object = 0.8, seed: int = 0, **settings: object) -> Job:
    """A finished run of main.py, fabricated."""
    name = str(settings.get("detector", "deep_sad"))
    own = {"n_epochs": 200} if name == "deep_sad" else {}
    own = {"detector": name, **asdict(DETECTORS[name][0]()), **own}
    chosen = {**asdict(ExperimentSettings()), **own, "seed": seed, **settings}
    config = {"settings": chosen, "git_commit": "abc", "machine": {"gpu": None}}
    results = {
        "train_time": 7.0,
        "test_time": 1.0,
        "n_test": 2,
        "peak_mib": 900.0 + seed,
        "test_auc": auc,
        "test_scores": [[0, 1, 0.5], [1, 0, 0.1]],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "results.json").write_text(json.dumps({**results, "n_generated": 0, "seed": seed}))
    return Job(folder, "main.py", ("--dataset_name", "flower", "--n_anomalies", "0"))


def write_loop(folder: Path, none: list, *rounds: list) -> Job:
    """A finished loop, fabricated, with a tiny LLM and captioned images."""
    parts = {f"{p}_{key}": value for p, cls in PREFIXED.items() for key, value in asdict(cls()).items()}
    own = {"detector": "deep_sad", **asdict(DETECTORS["deep_sad"][0]()), "n_epochs": 200}
    llm = {
        "llm_model": "/home/someone/tiny_glm",
        "drawer_backend": "bank",
        "drawer_bank": "/home/someone/bank",
    }
    config = {"settings": {**asdict(LoopSettings()), **own, **parts, **llm}, "machine": {"gpu": "H100"}}
    rows = [{"test_aucs": aucs, "size": 200, "seconds": {"draw": 2.0, "detect": 3.0}} for aucs in rounds]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "results.json").write_text(json.dumps({"none": none, "rounds": rows}))
    return Job(folder, "iterate.py", ("--dataset_name", "flower"))


def write_study(folder: Path, seed: int, **aucs: float) -> Job:
    """A finished study of hardness, fabricated."""
    own = {"detector": "deep_sad", **asdict(DETECTORS["deep_sad"][0]()), "n_epochs": 200}
    config = {"settings": {**asdict(HardnessSettings()), **own, "seed": seed}, "machine": {}}
    named = {name.replace("_", " "): [auc] for name, auc in aucs.items()}
    sets = {"50": {"hard": 0.25, "aucs": named, "n_new": dict.fromkeys(named, 9)}}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "results.json").write_text(json.dumps({"sets": sets, "seconds": 60.0}))
    return Job(folder, "hardness.py", ("--dataset_name", "flower"))
