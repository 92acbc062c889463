"""src/report.py on real runs and a real loop: what is on the page, and what is refused."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_glm
from toy import call_script, refused, run_toy, snapshot

import iterate
import report
from kka.anomalies import read_items
from kka.datasets import garden
from kka.errors import UserError
from kka.metrics import format_interval
from kka.report.build import short_names
from kka.report.data import class_aucs, size_series
from kka.report.sources import FinishedRun, read_loop, read_run

SMALL = {"normal": {"train": 8, "test": 4}, "other": {"train": 1, "test": 1}}
RUN_FIGURES = {"anomalies", "scores", "convergence", "latent", "classes", "sizes", "hard_shares", "margins"}


def make_report(*words):
    return call_script(report.main, ["report.py", *map(str, words)])


def page_of(folder):
    return (folder / "index.html").read_text(encoding="utf-8")


def items_of(folder):
    """Caption, round, status, score, fate and thumbnail of each image on the page."""
    found = re.search(r'id="items">(.*?)</script>', page_of(folder), re.DOTALL)
    return json.loads(found[1])


def figures_of(folder):
    stems = {path.stem for path in folder.glob("*.png")}
    assert stems == {path.stem for path in folder.glob("*.pdf")}
    return stems


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """A finished loop of one round on a small garden, with a tiny random LLM."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(garden, "N_IMAGES", SMALL)
        garden.make_garden(root / "garden", n_anomalies=2)
    flags = {
        "dataset_name": "garden", "data_path": root / "garden", "xp_path": root / "loop", "rounds": 1,
        "mode": "add", "n_initial": 10, "n_fresh": 6, "n_untuned": 3, "n_evaluators": 2, "per_round": 2,
        "n_epochs": 2, "lr": 1e-3, "pretrain": False, "test_every": 1, "batch_size": 8, "device": "cpu",
        "llm_model": tiny_glm(root / "llm"), "llm_device": "cpu", "drawer_backend": "garden",
        "tune_device": "cpu", "tune_max_steps": 2, "tune_warmup_steps": 1, "pairs_min_pairs": 1,
        "tune_eval_every": 1, "pairs_validation_share": 0.3,
    }  # fmt: skip
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    outcome = call_script(iterate.main, ["iterate.py", *words])
    assert outcome.code == 0, outcome.stderr
    return root / "loop"


@pytest.fixture(scope="module")
def reported(loop):
    outcome = make_report(loop)
    assert outcome.code == 0, outcome.stderr
    return loop / "report"


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of a finished run that a test may break."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_loop_has_every_figure_and_its_table(loop, reported):
    # So tiny a loop may find no hard or no easy anomaly, and tunes nothing then.
    tuned = (loop / "round_1" / "adapter").exists()
    assert figures_of(reported) == (RUN_FIGURES if tuned else RUN_FIGURES - {"margins"})
    text, record = page_of(reported), read_loop(loop)
    assert ("Left out" in text) == (not tuned)
    for row in record.rounds:
        assert f"<td>{format_interval(row['test_aucs'], unit=' %')}</td>" in text


def test_gallery_holds_every_image_of_the_loop_with_its_judgement(loop, reported):
    shown = items_of(reported)
    folders = {"round 0": "round_0/0", "round 1": "round_1/fresh", "untuned LLM": "untuned/fresh"}
    expected = [
        (item.caption, name, item.status)
        for name, place in folders.items()
        for item in read_items(loop / place)
    ]
    assert sorted(tuple(row[:3]) for row in shown) == sorted(expected)
    assert all(row[5].startswith("data:image/webp;base64,") for row in shown)
    last = {item.caption for item in read_items(loop / "round_1" / "0")}
    assert {row[0] for row in shown if row[4] == "in the last set"} == last


def test_report_changes_nothing_in_a_run_and_repeats_itself(finished, tmp_path):
    before = snapshot(finished)
    for name in ("one", "two"):
        assert make_report(finished, "--out", tmp_path / name).code == 0
    assert snapshot(finished) == before
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_single_run_leaves_out_what_it_has_no_data_for(finished, tmp_path):
    assert make_report(finished, "--out", tmp_path).code == 0
    assert figures_of(tmp_path) == {"anomalies", "scores", "classes"}
    text = page_of(tmp_path)
    for reason in (
        "it needs a run without generated anomalies beside one with them", "more than one epoch",
        "different numbers of generated anomalies", "no LLM was tuned",
    ):  # fmt: skip
        assert reason in text
    statuses = [row[2] for row in items_of(tmp_path)]
    counts = [read_run(finished).results[key] for key in ("n_hard", "n_easy")]
    assert [statuses.count("hard"), statuses.count("easy")] == counts


def test_two_runs_are_compared_on_one_page(finished, toy_set, tmp_path):
    assert run_toy(toy_set, tmp_path / "none", n_anomalies=0, n_epochs=2).code == 0
    assert make_report(tmp_path / "none", finished, "--out", tmp_path / "both").code == 0
    assert figures_of(tmp_path / "both") >= {"sizes", "latent", "convergence", "classes", "scores"}
    text = page_of(tmp_path / "both")
    for run in (tmp_path / "none", finished):
        assert f">{run.name}</th>" in text
        assert f"{100 * read_run(run).auc:.2f} %</td>" in text


def test_seeds_are_averaged_and_broken_ones_named(toy_set, tmp_path):
    assert run_toy(toy_set, tmp_path / "runs", runs=3).code == 0
    aucs = [read_run(tmp_path / "runs" / f"seed_{k}").auc for k in range(3)]
    assert make_report(tmp_path / "runs").code == 0
    assert format_interval(aucs).partition(" (")[0] in page_of(tmp_path / "runs" / "report")
    (tmp_path / "runs" / "seed_1" / "results.json").unlink()
    outcome = make_report(tmp_path / "runs")
    assert outcome.code == 0
    text = page_of(tmp_path / "runs" / "report")
    assert format_interval([aucs[0], aucs[2]]).partition(" (")[0] in text
    assert "2 of 3" in text
    for place in (text, outcome.log):
        assert "seed_1 is not finished" in place


def test_seeds_of_other_settings_are_refused(toy_set, tmp_path):
    for seed, lr in ((0, 1e-3), (1, 1e-2)):
        run_toy(toy_set, tmp_path / "runs" / f"seed_{seed}", seed=seed, lr=lr)
    refused(make_report(tmp_path / "runs"), "mixes settings", "lr 0.001 there, 0.01 now")
    assert not (tmp_path / "runs" / "report").exists()


def test_images_that_are_gone_are_named_and_hostile_captions_stay_text(loop, tmp_path):
    moved = Path(shutil.copytree(loop, tmp_path / "loop"))
    gone = min((moved / "round_1" / "fresh").glob("*.png"))
    gone.unlink()
    manifest = moved / "round_0" / "0" / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[0]["caption"] = "</script><img src=x onerror=alert(1)> $x^2$"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tuning = moved / "round_1" / "adapter" / "tuning"
    tuning.mkdir(parents=True, exist_ok=True)
    rows = [{"step": 0, "eval_rewards/margins": 0.0}, {"step": 1, "rewards/margins": 0.4}]
    (tuning / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = make_report(moved)
    assert outcome.code == 0, outcome.stderr
    assert figures_of(moved / "report") == RUN_FIGURES
    text, shown = page_of(moved / "report"), items_of(moved / "report")
    assert "from +0.400 to +0.400" in text
    for place in (outcome.log, text):
        assert f"{gone} is gone or cannot be read" in place
    assert [row[5] is None for row in shown].count(True) == 1
    assert "<img src=x" not in text
    assert text.count("</script>") == 2
    assert lines[0]["caption"] in [row[0] for row in shown]


def test_moved_data_set_is_said_and_can_be_given(finished, toy_set, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    config["settings"]["data_path"] = str(tmp_path / "nowhere")
    (run / "config.json").write_text(json.dumps(config))
    assert make_report(run).code == 0
    assert figures_of(run / "report") == {"scores"}
    assert f"{tmp_path / 'nowhere'} does not exist" in page_of(run / "report")
    assert make_report(run, "--data_path", toy_set).code == 0
    assert figures_of(run / "report") == {"anomalies", "scores", "classes"}


def test_figures_of_an_earlier_report_do_not_stay(copied):
    assert make_report(copied).code == 0
    results = json.loads((copied / "results.json").read_text())
    results["test_scores"][0][1] = 1  # as if the test set were another
    (copied / "results.json").write_text(json.dumps(results))
    assert make_report(copied).code == 0
    assert figures_of(copied / "report") == {"anomalies", "scores"}
    assert "is not what it was" in page_of(copied / "report")


def test_names_are_as_long_as_needed():
    folders = [Path("/a/x/run"), Path("/a/y/run"), Path("/a/z")]
    assert list(short_names(folders).values()) == ["x/run", "y/run", "a/z"]
    assert short_names([Path("/a/x/run")]) == {Path("/a/x/run"): "run"}
    with pytest.raises(UserError, match="given twice"):
        short_names([Path("/a/b"), Path("/a/c/../b")])


def test_class_aucs_by_hand():
    rows = [[0, 0, 1.0], [1, 0, 3.0], [2, 1, 2.0], [3, 1, 4.0], [4, 1, 0.0]]
    run = FinishedRun(Path(), {}, {"test_scores": rows})
    assert class_aucs(run, ["1", "1", "7", "rust", "8"]) == {"class 7": 0.5, "rust": 1.0, "class 8": 0.0}


def test_loops_of_several_seeds_make_one_point_per_round(loop, tmp_path):
    other = Path(shutil.copytree(loop, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["identity"]["seed"] += 1
    (other / "config.json").write_text(json.dumps(config))
    both = [read_loop(folder) for folder in (loop, other)]
    alone, together = (size_series(loops, []) for loops in (both[:1], both))
    assert [len(points) for points in together.values()] == [len(points) for points in alone.values()]
    for name, points in together.items():
        for one, two in zip(alone[name], points, strict=True):
            assert (one.n, one.label) == (two.n, two.label)
            assert two.aucs == pytest.approx([sum(one.aucs) / len(one.aucs)] * 2)


def remove(name):
    return lambda run: (run / name).unlink()


def replace_in(name, old, new):
    def change(run):
        text = (run / name).read_text()
        assert re.search(old, text)
        (run / name).write_text(re.sub(old, new, text, count=1))

    return change


@pytest.mark.parametrize(
    ("breaks", "part"),
    [
        (remove("results.json"), "is not finished"),
        (remove("config.json"), "config.json is missing"),
        (replace_in("results.json", r'"test_auc": [\d.]+', '"test_auc": NaN'), "nan for an AUC"),
        (replace_in("results.json", r'"test_auc": [\d.]+', '"test_auc": 5.0'), "5.0 for an AUC"),
        (replace_in("config.json", r'"dataset_name": "ucm_caption"', '"dataset_name": "mnist"'), "'mnist'"),
        (replace_in("config.json", r'"anomaly_path": null', '"anomaly_path": 5'), "anomaly_path is 5"),
        (replace_in("config.json", r'"split": "own"', '"n_pool": 9, "split": "own"'), "is a study of"),
        (replace_in("results.json", r'"threshold": [\d.]+', '"threshold": "high"'), "'high'"),
        (replace_in("results.json", r'"test_scores"', '"scores"'), "no test scores"),
        (replace_in("results.json", r"^\{", ""), "not valid JSON"),
        (replace_in("config.json", r'"identity"', '"other"'), "not from a run"),
        (replace_in("config.json", r'"detector":', '"network":'), "another version"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_broken_run_is_refused(copied, breaks, part):
    breaks(copied)
    refused(make_report(copied), part, copied)
    assert not (copied / "report").exists()


def test_unfinished_loop_is_refused(loop, tmp_path):
    moved = Path(shutil.copytree(loop, tmp_path / "loop"))
    (moved / "results.json").unlink()
    refused(make_report(moved), "is not finished (2 rounds begun)", moved)


@pytest.mark.parametrize("value", [5.0, "x", float("nan")])
def test_a_loop_with_an_auc_that_is_none_is_refused(loop, tmp_path, value):
    moved = Path(shutil.copytree(loop, tmp_path / "loop", ignore=shutil.ignore_patterns("report")))
    results = json.loads((moved / "results.json").read_text())
    results["rounds"][0]["test_aucs"][0] = value
    (moved / "results.json").write_text(json.dumps(results))
    refused(make_report(moved), "for an AUC", moved)
    assert not (moved / "report").exists()


def test_a_file_that_is_no_table_is_said_to_be_a_file(tmp_path):
    (tmp_path / "run.txt").write_text("")
    refused(make_report(tmp_path / "run.txt"), "run.txt is a file", "loop folder")


def test_page_of_somebody_else_is_not_replaced(finished, tmp_path):
    (tmp_path / "index.html").write_text("<h1>my home page</h1>")
    refused(make_report(finished, "--out", tmp_path), "index.html is no report")
    assert (tmp_path / "index.html").read_text() == "<h1>my home page</h1>"


def test_figures_of_somebody_else_are_neither_replaced_nor_removed(finished, tmp_path):
    for name in ("margins.png", "scores.png"):  # one would not be drawn, the other would
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text("mine")
        refused(make_report(finished, "--out", out), f"{out / name} is no figure of a report")
        assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "mine")]


def test_report_is_made_anew_in_its_folder(finished, tmp_path):
    assert make_report(finished, "--out", tmp_path / "report").code == 0
    for left in ("figures.json", "index.html"):  # of an older version, and of an interrupted call
        (tmp_path / "report" / left).unlink()
        assert make_report(finished, "--out", tmp_path / "report").code == 0


@pytest.mark.parametrize("place", ["{}/file/report", "/proc/x/report", "~nosuchuser/report"])
def test_places_that_cannot_be_written_are_refused(finished, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    refused(
        make_report(finished, "--out", place.format(tmp_path)), place.format(tmp_path).split("/report")[0]
    )


def test_without_matplotlib_the_extra_is_named(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(make_report(finished, "--out", tmp_path / "report"), "pip install -e '.[plot]'")
    assert not (tmp_path / "report").exists()


def test_test_set_of_one_class_has_no_auc_and_a_page(copied):
    results = json.loads((copied / "results.json").read_text())
    results["test_scores"] = [[i, 0, score] for i, _, score in results["test_scores"]]
    results["test_auc"] = None
    (copied / "results.json").write_text(json.dumps(results))
    assert make_report(copied).code == 0
    assert "the test set has one class only" in page_of(copied / "report")
