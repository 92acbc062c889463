"""How long runs will take, from those that were made before."""

import json
from dataclasses import asdict

from fabricated import change, write_loop, write_run, write_study
from test_reproduce import plan_of
from toy import read_json

from kka.command_line import preset_values
from kka.detectors import DETECTORS
from kka.estimates import kind_of_job, median_seconds, total
from kka.plan_tables import jobs_of
from kka.settings import make_settings


def test_a_loop_of_scripts_that_train_no_detector_is_no_estimate(tmp_path):
    job = write_loop(tmp_path / "loop", [0.5], [0.6])
    config = read_json(job.folder / "config.json")
    del config["settings"]["detector"]
    (job.folder / "config.json").write_text(json.dumps(config))
    timeless = write_run(tmp_path / "timeless")
    results = read_json(timeless.folder / "results.json")
    del results["train_time"]
    (timeless.folder / "results.json").write_text(json.dumps(results))
    assert median_seconds(tmp_path) == {}


def test_loops_and_studies_are_estimated_too(tmp_path):
    loop, study = write_loop(tmp_path / "a", [0.5], [0.6]), write_study(tmp_path / "b", 0, base=0.5)
    known = median_seconds(tmp_path)
    assert (known[kind_of_job(loop)], known[kind_of_job(study)]) == (5.0, 60.0)
    assert total([loop, study], known, 2) == "2 runs to make: about 32 s, 2 at once"
    change(loop, "results.json", seconds_beside=4.0)  # before the rounds
    assert median_seconds(tmp_path)[kind_of_job(loop)] == 9.0


def test_each_base_model_preset_and_size_has_a_time_of_its_own(tmp_path):
    def plan(**settings):
        (tmp_path / "mvtec" / "screw" / "train" / "good").mkdir(parents=True, exist_ok=True)
        data = (f"mvtec={tmp_path / 'mvtec'}",)
        return jobs_of(plan_of("ahl", seeds=1, known=(1,), rows=rows, data=data, **settings)[1])

    rows = ("AHL(DevNet)", "AHL(DRA)")
    cheap = plan(preset="cpu")
    for job, seconds in zip(cheap, (100.0, 300.0), strict=True):
        own = asdict(make_settings(DETECTORS["ahl"][0], preset_values("ahl", "cpu")))
        base = {"AHL(DevNet)": ("devnet", 50), "AHL(DRA)": ("dra", 30)}[rows[seconds > 100]]
        own |= {"detector": "ahl", "base_model": base[0], "base_epochs": base[1], "dataset_name": "mvtec"}
        change(write_run(tmp_path / "log" / job.folder.parent.name, **own), "results.json", seconds=seconds)
    known = median_seconds(tmp_path / "log")
    assert [known[kind_of_job(job)] for job in cheap] == [100.0, 300.0]
    assert (
        total(plan(), known, 1) == "2 runs to make, 1 at once: no estimate yet, as none like them is finished"
    )
