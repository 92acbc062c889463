"""src/reproduce.py: which runs a table has, and a table from scratch."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
from fabricated import change, write_run
from toy import USER_DICT, call_script, read_json, refused, snapshot

import reproduce
from kka import paper
from kka.command_line import parse_command
from kka.detectors import build_detector
from kka.errors import UserError
from kka.options import ExperimentSettings
from kka.plan_tables import jobs_of, make_plan
from kka.plans import Plan, PlanSettings, to_dict
from kka.runs import ROOT
from kka.stand_ins import GARDEN_LOOP, MODELS
from kka.tables import Cell


def plan_of(name: str, extra: str = "", **settings: object) -> tuple[str, list[Cell]]:
    return make_plan(Plan(name, PlanSettings(**settings), to_dict(extra.split())))


def test_table_2_has_every_row_and_set_and_one_loop_for_all_detectors():
    _, cells = plan_of("table2", seeds=2)
    assert {cell.row for cell in cells} >= set(paper.TABLE2)
    assert {cell.column for cell in cells} == {"CIFAR-100", "Oxford-102", "UCM-Caption"}
    jobs = jobs_of(cells)
    assert len(jobs) == len({job.folder for job in jobs}) == 3 * 2 * (7 + 2 * 4)
    loops = [job for job in jobs if job.script == "iterate.py"]
    assert len(loops) == 3 * 2 * 2
    for k, job in enumerate(jobs):
        assert job.after is None or job.after.folder in {before.folder for before in jobs[:k]}
    fed = next(job for job in jobs if "simplenet_rep" in str(job.folder) and "flower" in str(job.folder))
    assert f"{fed.after.folder}/round_2/0" in fed.words
    assert fed.after.share == "rep"


@pytest.mark.parametrize("anomalies", ["loop", "folder"])
def test_every_row_of_table_2_has_valid_flags_with_weights_from_a_file(monkeypatch, anomalies):
    extra = "--backbone_weights squeezenet1_0.pth"
    _, cells = plan_of("table2", extra, seeds=1, data_sets=("flower",), preset="cpu", anomalies=anomalies)
    with_weights = set()
    for job in jobs_of(cells):
        if job.script == "main.py":
            monkeypatch.setattr(sys, "argv", [job.script, *job.words])
            _, settings = parse_command("", ExperimentSettings)
            build_detector(settings)
            with_weights |= {job.folder.parent.name} if getattr(settings, "backbone_weights", "") else set()
    assert len(with_weights) >= 3
    assert not any("random" in name for name in with_weights)


def test_folder_0_makes_one_row_for_both_modes_of_the_paper():
    _, cells = plan_of("table2", seeds=1, anomalies="folder", data_sets=("flower",))
    rows = {cell.row: cell for cell in cells}
    assert not any("(add)" in row or "(rep)" in row for row in rows)
    assert "--n_anomalies -1" in " ".join(rows["SAD+KKA"].jobs[0].words)
    assert "--n_anomalies 0" in " ".join(rows["Deep SAD"].jobs[0].words)
    both = [paper.table2(f"SAD+KKA({mode})", "flower") for mode in ("add", "rep")]
    assert rows["SAD+KKA"].paper == " / ".join(both)


def test_the_garden_brings_its_own_models_unless_others_are_given():
    _, cells = plan_of("table3", "--drawer_backend garden", seeds=1, data_sets=("garden",))
    words = " ".join(cells[0].jobs[0].words)
    assert f"--llm_model {MODELS / 'glm'}" in words
    assert words.count("--drawer_backend") == 1
    assert "--drawer_backend garden" in words
    _, cells = plan_of("table3", seeds=1, data_sets=("flower",))
    assert "--llm_model" not in cells[0].jobs[0].words


def test_figures_of_the_paper_stand_beside_the_cells():
    _, cells = plan_of("table3", seeds=1)
    assert [c.paper for c in cells if c.row == "Oxford-102, rep"] == list(paper.TABLE3["flower"])
    _, cells = plan_of("table4", seeds=1)
    assert [c.paper for c in cells] == list(paper.TABLE4["cifar100"])
    assert "--normal_class 5" in " ".join(cells[0].jobs[0].words)


def test_classes_seeds_and_folders_are_expanded(tmp_path):
    given = ("flower:26", "flower:57", "ucm_caption:20+21")
    _, cells = plan_of(
        "table2", seeds=3, normal_classes=given, rows=("SSD",), data_sets=("flower", "ucm_caption"),
        data=(f"flower={tmp_path}",), preset="small",
    )  # fmt: skip
    flower, ucm = cells
    assert len(flower.jobs) == 6
    assert len(ucm.jobs) == 3
    words = " ".join(ucm.jobs[2].words)
    assert "--normal_class 20 21 --seed 2" in words
    assert "--preset small" in words
    assert f"--data_path {tmp_path}" in " ".join(flower.jobs[0].words)
    assert "--data_path" not in words


def test_a_group_of_normal_classes_counts_once_however_it_is_given():
    given = ("flower:26", "26", "20+21", "21+20")
    _, cells = plan_of("table2", seeds=2, normal_classes=given, rows=("SSD",), data_sets=("flower",))
    names = [job.folder.name for job in cells[0].jobs]
    assert names == ["26_seed0", "26_seed1", "20_21_seed0", "20_21_seed1"]


def test_further_flags_go_to_the_runs_that_have_them_and_to_other_folders():
    before = {job.folder for job in jobs_of(plan_of("table2", seeds=1)[1])}
    _, cells = plan_of("table2", "--n_epochs 3 --llm_model tiny --lr_milestone 1 2", seeds=1)
    for job in jobs_of(cells):
        words = " ".join(job.words)
        assert ("--llm_model tiny" in words) == (job.script == "iterate.py")
        assert ("--lr_milestone 1 2" in words) == ("deep_sad" in words or job.script == "iterate.py")
        if "simplenet" in words or job.script == "iterate.py":
            assert "--n_epochs 3" in words
            assert job.folder not in before


def test_folders_depend_neither_on_the_place_of_the_checkout_nor_on_devices(monkeypatch, tmp_path):
    def folders(extra=""):
        _, cells = plan_of("table3", extra, seeds=1, data_sets=("garden",), folder=str(tmp_path))
        return [job.folder for job in jobs_of(cells)]

    here = folders()
    assert folders("--llm_device cuda --tune_device cuda --draw_batch 3") == here
    assert folders("--tune_beta 2") != here
    moved = {key: tmp_path / "kka" / value.name if isinstance(value, Path) else value
             for key, value in GARDEN_LOOP.items()}  # fmt: skip
    monkeypatch.setattr("kka.plans.GARDEN_LOOP", moved)
    assert folders() != here  # other models, which happen to have the same names
    monkeypatch.setattr("kka.plans.ROOT", tmp_path)
    monkeypatch.setattr("kka.plans.GARDEN_LOOP", {
        key: tmp_path / value.relative_to(ROOT) if isinstance(value, Path) else value
        for key, value in GARDEN_LOOP.items()
    })  # fmt: skip
    assert folders() == here


def test_anomalies_of_another_llm_are_another_run():
    folders = [
        {job.folder.parent.name for job in jobs_of(plan_of("table2", extra, seeds=1)[1]) if job.after}
        for extra in ("--llm_model a", "--llm_model b")
    ]
    assert not folders[0] & folders[1]


def test_a_loop_is_shared_only_where_both_modes_are_made():
    assert all(job.after is None for job in jobs_of(plan_of("table3", seeds=1)[1]))
    jobs = jobs_of(plan_of("table3", seeds=2, modes=("rep", "add"), data_sets=("garden",))[1])
    assert [job.after.folder.name if job.after else "" for job in jobs] == ["", "own_seed0", "", "own_seed1"]


def test_figure_4_and_ahl_and_hardness_have_their_runs(tmp_path):
    _, cells = plan_of("figure4", "--n_initial 100", seeds=1, sizes=(50, 800))
    assert [cell.row for cell in cells] == [
        "initial, 50",
        "initial, 800",
        *(f"KKA({k}), add" for k in range(3)),
    ]
    assert "--n_initial 50" in " ".join(cells[0].jobs[0].words)
    for name in ("screw", "cable"):
        (tmp_path / name / "train" / "good").mkdir(parents=True)
    _, cells = plan_of("ahl", seeds=1, data=(f"mvtec={tmp_path}",))
    assert [cell.paper for cell in cells][:2] == ["94.8", "83.2"]
    assert [job.folder.name for job in cells[0].jobs] == ["cable_seed0", "screw_seed0"]
    _, hard = plan_of("ahl", seeds=2, data=(f"mvtec={tmp_path}",), known=(1,), known_kinds=("cut", "hole"))
    assert {(cell.column, cell.paper) for cell in hard} == {("MVTec AD, hard, 1 known", "")}
    kinds = [job.words[job.words.index("--know_class") + 1] for job in hard[0].jobs]
    assert kinds == ["cut"] * 4 + ["hole"] * 4  # of two classes and two seeds
    _, cells = plan_of("hardness", "--n_base 10 --selections hard", seeds=1, rows=("deep_sad", "ssd"))
    assert ("sets", "10", "aucs", "rep hard") in cells[1].jobs[0].parts
    more = plan_of("hardness", "--n_base 10 20 --selections hard easy", seeds=1)[1]
    assert more[0].jobs[0].folder == cells[0].jobs[0].folder  # a study grows


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["table9"], ["unknown table 'table9'", "table2, table3"]),
        (["table2", "--rows", "SAD"], ["--rows 'SAD'", "SAD+KKA(add)"]),
        (["table2", "--seeds", "0"], ["--seeds"]),
        (["table2", "--rows", "SAD+KKA(rep)", "--modes", "add"], ["leave no row"]),
        (["table2", "--data_sets", "mnist"], ["mnist"]),
        (["table2", "--normal_classes", "flowers"], ["flowers", "no such class"]),
        (["table2", "--data", "flower"], ["NAME=DIR"]),
        (["table2", "--data", "flower=/nowhere"], ["--data 'flower=/nowhere'", "no folder"]),
        (["table2", "--preset", "nope"], ["--preset 'nope'"]),
        (["table3", "--preset", "cpu"], ["--preset 'cpu'"]),
        (["table2", "--normal_classes", "ucm_caption:20", "--data_sets", "flower"], ["'ucm_caption:20'"]),
        (["table2", "--data", "folder=.", "--data_sets", "flower"], ["'folder=.'", "--data_sets"]),
        (["figure4", "--sizes", "50", "-5"], ["--sizes", "-5"]),
        (["ahl", "--known", "-3"], ["--known", "-3"]),
        (["table2", "--rounds", "-1"], ["--rounds", "-1"]),
        *(([name, "--rows", "SSD"], ["--rows", name]) for name in ("table3", "table4", "figure4")),
        (["table2", "--", "--vmap_seeds", "2"], ["--vmap_seeds", "decided by the table"]),
        (["table3", "--modes", "replace"], ["--modes", "replace"]),
        (["table3", "--jobs", "0"], ["--jobs"]),
        (["table2", "--", "--n_epoch", "5"], ["--n_epoch behind --"]),
        (["table2", "--", "--detector", "ssd"], ["--detector", "decided by the table"]),
        (["table2", "--", "five"], ["'five'"]),
        (["hardness", "--rows", "svm"], ["unknown detector 'svm'"]),
        ([], ["NAME"]),
    ],
)
def test_bad_input_is_one_sentence(words, parts, tmp_path):
    outcome = call_script(reproduce.main, ["reproduce.py", *words])
    refused(outcome, *parts)


@pytest.mark.parametrize(
    ("flag", "place", "part"),
    [
        ("--out", "{}/file/table", "is a file"),
        ("--out", "/proc/x/table", "cannot be written"),
        ("--out", "~nosuchuser/table", "no home folder"),
        ("--out", "{}/notes", "notes.md is no table"),
        ("--folder", "{}/file", "is a file"),
        ("--folder", "/proc/x", "cannot be written"),
    ],
)
def test_places_that_cannot_be_written_are_refused_before_the_runs(tmp_path, flag, place, part):
    for name in ("file", "notes.md"):
        (tmp_path / name).write_text("mine")
    words = ["figure4", "--folder", str(tmp_path / "log"), flag, place.format(tmp_path)]
    refused(call_script(reproduce.main, ["reproduce.py", *words]), place.format(tmp_path), part)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"file", "notes.md"}
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_a_dry_run_makes_nothing_and_estimates_from_earlier_runs(tmp_path, capsys):
    for k, seconds in enumerate((2.0, 4.0, 90.0)):
        job = write_run(tmp_path / "log" / "old" / str(k))
        results = {**read_json(job.folder / "results.json"), "train_time": seconds}
        (job.folder / "results.json").write_text(json.dumps(results))
    before = snapshot(tmp_path)
    words = ["reproduce.py", "table2", "--dry_run", "--folder", str(tmp_path / "log"), "--seeds", "2"]
    words += ["--data_sets", "flower", "--rows", "Deep SAD", "SSD"]
    assert call_script(reproduce.main, words).code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("# ")[2] for line in lines[:-1]] == ["no estimate yet"] * 2 + ["about 5 s"] * 2
    assert lines[-1] == "4 runs to make: about 10 s, 1 at once, and 2 without an estimate yet"
    assert "main.py --dataset_name flower --detector ssd --n_anomalies 0" in lines[0]
    assert snapshot(tmp_path) == before


@pytest.fixture(scope="module")
def swept(toy_set, tmp_path_factory):
    """A small table, made by the script."""
    folder = tmp_path_factory.mktemp("swept")
    assert sweep_toy(toy_set, folder).code == 0
    return folder


def sweep_toy(root: Path, folder: Path, *extra: str, seeds: int = 2):
    """Table II's Deep SAD on the toy set."""
    words = ["table2", "--data_sets", "ucm_caption", "--data", f"ucm_caption={root}", "--rows", "Deep SAD"]
    words += ["SAD+KKA", "--anomalies", "folder", "--seeds", str(seeds), "--jobs", "2"]
    words += ["--normal_classes", "1", "--folder", str(folder / "log"), "--out", str(folder / "table")]
    words += ["--", "--n_epochs", "1", "--pretrain", "False", "--batch_size", "8", "--device", "cpu"]
    words += ["--user_dict", json.dumps(USER_DICT), *extra]
    return call_script(reproduce.main, ["reproduce.py", *words])


def test_a_table_from_scratch(swept, capsys):
    table = read_json(swept / "table.json")
    assert table["columns"] == ["UCM-Caption"]
    assert [row["name"] for row in table["rows"]] == ["Deep SAD", "SAD+KKA"]
    for row in table["rows"]:
        assert re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d \(n = 2\)", row["cells"][0]["text"])
    assert table["rows"][1]["cells"][0]["paper"] == "74.98 ± 0.49 / 74.60 ± 0.70"
    assert any(
        "batch_size 8 (32), n_epochs 1 (300), pretrain False (True)" in note for note in table["notes"]
    )
    assert any("folder 0" in note for note in table["notes"])


def test_finished_runs_are_read_and_not_made_again(swept, toy_set):
    before = snapshot(swept)
    began = time.monotonic()
    assert sweep_toy(toy_set, swept).code == 0
    assert time.monotonic() - began < 5
    assert snapshot(swept) == before


def test_a_run_that_fails_is_told_behind_the_table(toy_set, tmp_path):
    outcome = sweep_toy(toy_set, tmp_path, "--lr", "-1", seeds=1)
    refused(outcome, "--lr must be above 0", "2 of 2 runs failed", "the table has what is finished")
    cells = [row["cells"][0]["text"] for row in read_json(tmp_path / "table.json")["rows"]]
    assert cells == ["not run", "not run"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"test_auc": float("nan")}, "AUC of nan"), ({"peak_mib": "much"}, "peak_mib is 'much'")],
)
def test_a_damaged_run_ends_the_command_with_2_behind_the_table(tmp_path, capsys, changed, said):
    place = ["--folder", str(tmp_path / "log"), "--out", str(tmp_path / "table")]
    words = ["table2", "--data_sets", "flower", "--rows", "Deep SAD", "--seeds", "3", *place]
    good, *bad = jobs_of(make_plan(reproduce.parse(words)[0])[1])
    write_run(good.folder)
    for job in bad:
        change(write_run(job.folder), "results.json", **changed)
    outcome = call_script(reproduce.main, ["reproduce.py", *words])
    refused(outcome, "the table has not everything", bad[0].folder, said, "and 1 more")
    assert read_json(tmp_path / "table.json")["rows"][0]["cells"][0]["text"] == "80.00 (n = 1 of 3)"


def test_without_ray_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    from kka.ray_backend import run_on_ray

    with pytest.raises(UserError, match=r"pip install -e '\.\[ray\]'"):
        next(run_on_ray([], 0, 1, 0, None))
