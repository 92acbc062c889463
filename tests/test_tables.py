"""Tables from finished runs."""

import csv
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import scipy.stats
from fabricated import REMOVED, change, write_loop, write_run, write_study
from toy import read_json

from kka.detectors import DETECTORS
from kka.differences import _describe_drawer, other_settings
from kka.errors import UserError
from kka.hardness_table import compare
from kka.loop_settings import LoopSettings
from kka.metrics import mean_interval
from kka.runs import read_results
from kka.tables import Cell, problems_of, tabulate, to_latex, to_markdown, write_table


def only_cell(table: dict) -> dict:
    return table["rows"][0]["cells"][0]


def test_a_cell_is_mean_and_t_interval_as_scipy_has_it(tmp_path):
    aucs = [0.81, 0.842, 0.79, 0.9]
    jobs = tuple(write_run(tmp_path / str(k), auc, seed=k) for k, auc in enumerate(aucs))
    table = tabulate("T", [Cell("row", "column", jobs, paper="68.21 ± 2.23")])
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(aucs), scipy.stats.sem(aucs))
    mean, half = mean_interval(aucs)
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-12)
    assert only_cell(table) == {
        "text": f"{100 * np.mean(aucs):.2f} ± {50 * (high - low):.2f} (n = 4)",
        "aucs": aucs, "paper": "68.21 ± 2.23", "runs": 4,
        "cost": {"training, s": 7.0, "images/s": 2.0, "MiB": 903.0},
    }  # fmt: skip


def test_notes_are_of_the_runs_of_every_column(tmp_path):
    flower, ucm = (
        write_run(tmp_path / name, dataset_name=name, n_epochs=2) for name in ("flower", "ucm_caption")
    )
    for job in (flower, ucm):
        change(job, "results.json", n_generated=200)
    change(flower, "config.json", git_commit="earlier")
    notes = tabulate("T", [Cell("row", "a", (flower,)), Cell("row", "b", (ucm,))])["notes"]
    assert [note.split(":")[0] for note in notes[:2]] == [
        "Generated anomalies of Oxford-102", "Generated anomalies of UCM-Caption",
    ]  # fmt: skip
    assert notes[2:] == [
        "Not the paper's settings: row: n_epochs 2 (200); or n_epochs 2 (300).",
        "Made by commit abc, earlier on CPU.",
    ]


def test_one_run_shows_no_interval(tmp_path):
    table = tabulate("T", [Cell("row", "column", (write_run(tmp_path / "a"),))])
    assert only_cell(table)["text"] == "80.00 (n = 1)"


@pytest.mark.parametrize(
    ("auc", "said"),
    [(float("nan"), "AUC of nan"), (None, "one class only"), (1.5, "AUC of 1.5"), ("x", "AUC of x")],
)
def test_a_run_without_a_figure_is_named_and_not_averaged(tmp_path, auc, said):
    jobs = (write_run(tmp_path / "good"), write_run(tmp_path / "bad", auc, seed=1))
    table = tabulate("T", [Cell("row", "column", jobs)])
    assert only_cell(table)["text"] == "80.00 (n = 1 of 2)"
    assert any(said in note and str(tmp_path / "bad") in note for note in table["notes"])


def test_missing_unfinished_and_damaged_runs_are_named(tmp_path):
    names = ("missing", "unfinished", "damaged", "foreign")
    missing, unfinished, damaged, foreign = (write_run(tmp_path / name) for name in names)
    for path in missing.folder.iterdir():
        path.unlink()
    missing.folder.rmdir()
    (unfinished.folder / "results.json").unlink()
    (damaged.folder / "results.json").write_text('{"test_auc": 0.')
    (foreign.folder / "config.json").write_text("[]")
    table = tabulate("T", [Cell("row", "column", (missing, unfinished, damaged, foreign))])
    assert only_cell(table) == {"text": "not run", "aucs": [], "paper": "", "runs": 0}
    for name, words in zip(names, ("missing", "not finished", "damaged", "not from a run"), strict=True):
        assert any(str(tmp_path / name) in note and words in note for note in table["notes"])


NAN = float("nan")


@pytest.mark.parametrize(
    ("write", "name", "values", "said"),
    [
        ("run", "config.json", {"detector": REMOVED}, "no detector"),
        ("run", "config.json", {"detector": "svm"}, "detector is 'svm'"),
        ("run", "config.json", {"detector": ["ssd"]}, "detector is ['ssd']"),
        ("run", "config.json", {"dataset_name": REMOVED}, "no dataset_name"),
        ("run", "config.json", {"dataset_name": "mnist"}, "unknown data set 'mnist'"),
        ("run", "config.json", {"anomaly_path": REMOVED}, "no anomaly_path"),
        ("run", "config.json", {"normal_class": 26}, "normal_class is 26"),
        ("run", "config.json", {"machine": None}, "machine is None"),
        ("run", "results.json", {"test_time": 0}, "test_time is 0"),
        ("run", "results.json", {"test_time": None}, "test_time is None"),
        ("run", "results.json", {"peak_mib": "900"}, "peak_mib is '900'"),
        ("run", "results.json", {"train_time": NAN}, "train_time is nan"),
        ("loop", "config.json", {"llm_model": REMOVED}, "no llm_model"),
        ("loop", "config.json", {"llm_backend": "gpt"}, "llm_backend is 'gpt'"),
        ("loop", "results.json", {"none": []}, "AUCs of none are []"),
        ("loop", "results.json", {"none": None}, "AUCs of none are None"),
        ("loop", "results.json", {"none": 0.5}, "AUCs of none are 0.5"),
        ("loop", "results.json", {"rounds": [{"test_aucs": []}]}, "AUCs of round 0 are []"),
        ("loop", "results.json", {"rounds": [{"test_aucs": None}]}, "AUCs of round 0 are None"),
        ("loop", "results.json", {"rounds": [3]}, "AUCs of round 0 are 3"),
        ("loop", "results.json", {"rounds": []}, "rounds are []"),
    ],
)
def test_one_damaged_run_is_named_with_what_to_do_and_the_others_are_tabulated(
    tmp_path, write, name, values, said
):
    def make(place):
        return write_run(place) if write == "run" else write_loop(place, [0.8], [0.8])

    good, bad = make(tmp_path / "good"), change(make(tmp_path / "bad"), name, **values)
    part = "test_auc" if write == "run" else "none"
    table = tabulate("T", [Cell("row", "column", (good, bad), part)])
    assert only_cell(table)["text"] == "80.00 (n = 1 of 2)"
    (problem,) = problems_of(table)
    for words in (str(bad.folder), said, "delete that folder"):
        assert words in problem
    to_markdown(table)


def test_the_deviation_stands_beside_the_interval_where_it_is_asked_for(tmp_path):
    jobs = tuple(write_run(tmp_path / str(k), auc, seed=k) for k, auc in enumerate((0.7, 0.8)))
    shown = [only_cell(tabulate("T", [Cell("r", "c", jobs[:n], deviates=True)]))["text"] for n in (2, 1)]
    assert shown == ["75.00 ± 63.53 (n = 2), std 7.07", "70.00 (n = 1)"]


def test_a_gpu_is_named_only_for_runs_that_asked_for_it(tmp_path):
    jobs = [write_run(tmp_path / name, device=name) for name in ("cpu", "cuda")]
    jobs = [change(job, "config.json", machine={"gpu": "H100"}) for job in jobs]
    loop = write_loop(tmp_path / "loop", [0.5], [0.6])
    change(loop, "config.json", device="cpu")  # LLM, drawer and DPO on the GPU
    for job, device in zip((*jobs, loop), ("CPU", "H100", "H100"), strict=True):
        notes = tabulate("T", [Cell("row", "column", (job,), "0" if job is loop else "test_auc")])["notes"]
        assert any(note.endswith(f" on {device}.") for note in notes), device


def test_mixed_settings_are_no_cell(tmp_path):
    same = (write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1, num_threads=4, normal_class=[3]))
    assert only_cell(tabulate("T", [Cell("row", "column", same)]))["runs"] == 2
    mixed = (*same, write_run(tmp_path / "c", seed=2, lr=0.01))
    table = tabulate("T", [Cell("row", "column", mixed)])
    assert only_cell(table)["text"] == "mixed settings"
    assert only_cell(table)["aucs"] == []
    assert any("lr (0.0001, 0.01)" in note for note in table["notes"])


def test_loops_that_are_tracked_in_different_ways_are_one_cell(tmp_path):
    jobs = tuple(write_loop(tmp_path / name, [0.7], [0.8]) for name in "ab")
    path = jobs[0].folder / "config.json"
    config = read_json(path)
    del config["settings"]["tune_report_to"]  # as a version before the option wrote it
    path.write_text(json.dumps(config))
    assert only_cell(tabulate("T", [Cell("row", "none", jobs, part="none")]))["runs"] == 2


def test_rounds_of_a_loop_are_means_of_their_detectors(tmp_path):
    job = write_loop(tmp_path / "loop", [0.5, 0.7], [0.8, 0.9], [0.7, 0.7])
    cells = [Cell("rep", name, (job,), part) for name, part in (("none", "none"), ("0", "0"), ("2", "2"))]
    table = tabulate("T", cells)
    assert [cell["aucs"] for cell in table["rows"][0]["cells"]] == [
        pytest.approx([0.6]),
        pytest.approx([0.85]),
        [],
    ]
    assert any("no result of 2" in note for note in table["notes"])


def test_notes_say_what_stands_in_for_what_and_no_path(tmp_path):
    job = write_loop(tmp_path / "loop", [0.5], [0.8])
    notes = " ".join(tabulate("T", [Cell("rep", "0", (job,), "0")])["notes"])
    assert "LLM: tiny_glm" in notes
    assert "stands in for zai-org/glm-4-9b-chat-hf" in notes
    assert "nearest captioned image" in notes
    assert "H100" in notes
    assert "someone" not in notes


def test_a_checkpoint_of_ones_own_stands_in_for_stable_diffusion():
    own = {"drawer_backend": "diffusers", "drawer_preset": "own", "drawer_model": "/home/someone/tiny"}
    assert _describe_drawer(own) == "Drawer: tiny (diffusers), which stands in for Stable Diffusion 1.5."
    assert "stands in" not in _describe_drawer({**own, "drawer_preset": "sd15", "drawer_model": None})


def test_notes_name_settings_that_are_not_the_papers(tmp_path):
    jobs = (write_run(tmp_path / "a", lr=0.01, dataset_name="garden", n_epochs=5),)
    notes = " ".join(tabulate("T", [Cell("SAD", "garden", jobs)])["notes"])
    assert "SAD: lr 0.01 (0.0001), n_epochs 5 (200)." in notes
    assert "stands in for Oxford-102" in notes
    notes = " ".join(tabulate("T", [Cell("SAD", "flower", (write_run(tmp_path / "b"),))])["notes"])
    assert "Not the paper's" not in notes


def test_notes_compare_a_loop_with_the_sizes_of_its_data_set():
    defaults = {**asdict(LoopSettings()), **asdict(DETECTORS["deep_sad"][0]()), "detector": "deep_sad"}
    loop = {**defaults, "llm_backend": "transformers", "dataset_name": "cifar100", "n_epochs": 150}
    assert other_settings(loop) == ""
    assert other_settings({**loop, "n_initial": 50, "repeats": 1}) == "n_initial 50 (1000), repeats 1 (10)"
    assert other_settings({**loop, "n_initial": 1000, "repeats": 10}) == ""


def test_scores_of_images_are_passed_over(tmp_path):
    job = write_run(tmp_path / "a")
    assert read_results(job.folder / "results.json") == {
        **read_json(job.folder / "results.json"), "test_scores": None,
    }  # fmt: skip


def test_four_files_say_the_same(tmp_path):
    jobs = tuple(write_run(tmp_path / str(k), 0.8 + k / 100, seed=k) for k in range(2))
    cells = [
        Cell("A & B_1", "x", jobs, paper="70.00 ± 1.00"),
        Cell("C", "x", jobs[:1]),
        Cell("C", "y", jobs[:1]),
    ]
    table = tabulate("T", cells)
    write_table(table, tmp_path / "tables" / "t")
    assert read_json(tmp_path / "tables" / "t.json") == table
    text = to_markdown(table)
    assert "|  | x | paper | y |" in text
    assert "| C | 80.00 (n = 1) |  | 80.00 (n = 1) |" in text
    with open(tmp_path / "tables" / "t.csv") as file:
        first = next(csv.DictReader(file))
    assert float(first["mean"]) == pytest.approx(0.805)
    assert first["values"] == "0.8 0.81"
    latex = to_latex(table)
    assert r"A \& B\_1 & 80.50 $\pm$" in latex
    assert len({line.count(" & ") for line in latex.splitlines() if line.endswith(r"\\")}) == 1


def test_what_runs_cost_stands_below_the_table(tmp_path):
    jobs = tuple(write_run(tmp_path / str(k), 0.8, seed=k) for k in range(2))
    loop = write_loop(tmp_path / "loop", [0.6], [0.8])
    table = tabulate("T", [Cell("A", "x", jobs), Cell("B", "x", (loop,), "none")])
    text = to_markdown(table)
    assert "|  | x: training, s | x: images/s | x: MiB |" in text
    assert "| A | 7 | 2 | 901 |" in text
    assert "| B |  |  |  |" in text
    for job in jobs:
        change(job, "results.json", seconds=60.0)
    whole = to_markdown(tabulate("T", [Cell("A", "x", jobs), Cell("B", "x", (loop,), "none")]))
    assert "|  | x: run, s | x: images/s | x: MiB |" in whole
    assert "| A | 60 | 2 | 901 |" in whole
    older = read_json(jobs[1].folder / "results.json")
    del older["peak_mib"]
    (jobs[1].folder / "results.json").write_text(json.dumps(older))
    assert "images/s" not in to_markdown(tabulate("T", [Cell("A", "x", jobs)]))


def test_normal_classes_are_named(tmp_path):
    jobs = tuple(write_run(tmp_path / str(k), seed=k, normal_class=[k, 9]) for k in range(2))
    assert "Normal: 0 + 9, 1 + 9." in tabulate("T", [Cell("A", "x", jobs)])["notes"]


def study_rows(*jobs):
    table = compare("T", [Cell("deep_sad", "Oxford-102", jobs)])
    return {row["name"].removeprefix("Oxford-102, deep_sad, "): row["cells"] for row in table["rows"]}, table


def test_a_study_that_has_grown_keeps_its_cells_and_what_others_lack_is_said(tmp_path):
    first, *others = (
        write_study(tmp_path / str(k), k, base=0.5 + k / 10, add_random=0.6, add_hard=0.7) for k in range(3)
    )
    for job in others:
        sets = read_json(job.folder / "results.json")["sets"]
        sets["100"] = {"hard": 0.5, "aucs": {"base": [0.9]}, "n_new": {"base": 0}}
        del sets["50"]["aucs"]["add random"]
        change(job, "results.json", sets=sets)
        change(job, "config.json", n_base=[50, 100], selections=["hard"], modes=["add"])
    asked = replace(others[0], parts=(("sets", "50", "aucs", "add random"),))
    rows, table = study_rows(first, asked, others[1])
    assert rows["50: base"][2]["text"].endswith("(n = 3)")
    assert rows["50: add random"][2]["text"] == "60.00 (n = 1 of 3)"
    assert rows["50: add hard"][3]["text"] == "+10.00 (n = 1 of 3)"
    assert rows["100: base"][2]["text"] == "90.00 ± 0.00 (n = 2 of 3)"
    assert problems_of(table) == [f"{asked.folder} has no Oxford-102, deep_sad, 50: add random"]
    lacking = "50: add random; 100: base"  # of others[1] and of the first, which were asked for neither
    assert f"Not in all studies: Oxford-102, deep_sad, {lacking}." in table["notes"]


@pytest.mark.parametrize(
    ("n", "values", "said"),
    [
        ("50", {"aucs": {"base": [None]}}, "AUCs of base are [None]"),
        ("50", {"aucs": {"base": [NAN]}}, "AUCs of base are [nan]"),
        ("50", {"aucs": {"base": []}}, "AUCs of base are []"),
        ("50", {"n_new": {}}, "None new ones"),
        ("50", {"hard": None}, "share of hard ones"),
        ("abc", {}, "size abc"),
    ],
)
def test_a_damaged_study_is_named_and_left_out(tmp_path, n, values, said):
    good, bad = (write_study(tmp_path / str(k), k, base=0.5) for k in range(2))
    size = read_json(bad.folder / "results.json")["sets"]["50"]
    change(bad, "results.json", sets={n: {**size, **values}})
    rows, table = study_rows(good, bad)
    assert rows["50: base"][2]["text"] == "50.00 (n = 1 of 2)"
    (problem,) = problems_of(table)
    for words in (str(bad.folder), said, "delete that folder"):
        assert words in problem


def test_studies_are_compared_in_pairs(tmp_path):
    jobs = (
        write_study(tmp_path / "0", 0, base=0.70, add_random=0.75, add_hard=0.80),
        write_study(tmp_path / "1", 1, base=0.50, add_random=0.55, add_hard=0.60),
    )
    rows = {row["name"]: row["cells"] for row in compare("T", [Cell("deep_sad", "Oxford-102", jobs)])["rows"]}
    hard, new, auc, against, _, base = rows["Oxford-102, deep_sad, 50: add hard"]
    assert (hard["text"], new["text"]) == ("25", "9")
    assert auc["aucs"] == [0.8, 0.6]
    assert against["text"] == "+5.00 ± 0.00"  # though the AUCs themselves lie 20 points apart
    assert base["text"] == "+10.00 ± 0.00"
    assert rows["Oxford-102, deep_sad, 50: add hard"][4]["text"] == ""
    assert rows["Oxford-102, deep_sad, 50: add random"][4]["text"] == "-5.00 ± 0.00"
    assert [cell["text"] for cell in rows["Oxford-102, deep_sad, 50: base"][3:]] == [""] * 3


@pytest.mark.parametrize(("name", "text"), [("notes.md", "mine"), ("notes.json", "{}"), ("notes.json", "[")])
def test_files_of_others_are_not_replaced(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    table = tabulate("T", [Cell("A", "x", (write_run(tmp_path / "run"),))])
    with pytest.raises(UserError, match=name):
        write_table(table, tmp_path / "notes")
    assert (tmp_path / name).read_text() == text
    write_table(table, tmp_path / "other")
    write_table(table, tmp_path / "other")
