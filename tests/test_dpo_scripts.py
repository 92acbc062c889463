"""dpo/dpo_train.py and dpo/dpo_test.py as a user runs them: flags, files, kill -9, several processes."""

import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_adapter, tiny_glm
from toy import Outcome, read_json, refused, snapshot
from toy_pairs import (
    PROMPT,
    WEIGHTS,
    easy_captions,
    hard_captions,
    pink_pairs,
    write_folder0,
    write_list,
    write_run,
)

from kka.errors import run_script
from kka.pairs import write_pairs

DPO = Path(__file__).resolve().parents[1] / "dpo"
SMALL = [
    "--device",
    "cpu",
    "--accumulation",
    "1",
    "--warmup_steps",
    "1",
    "--lr",
    "5e-3",
    "--eval_batch_size",
    "4",
]
NORMALS = ["this flower has small thin pink petals", "a small pink flower with few petals"]


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
    return str(tiny_glm(tmp_path_factory.mktemp("llm") / "glm"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.json"
    write_pairs(path, pink_pairs())
    return path


def run(script, *words, **patches):
    """A script in this process, with one thread as in others."""
    spec = importlib.util.spec_from_file_location(script, DPO / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    stderr, stdout, code = io.StringIO(), io.StringIO(), 0
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, words)])
        patch.setitem(sys.modules, script, module)
        spec.loader.exec_module(module)
        for name, value in patches.items():
            patch.setattr(module, name, value)
        torch.set_num_threads(1)
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
            try:
                run_script(module.main)
            except SystemExit as stop:
                code = int(stop.code or 0)
        torch.set_num_threads(threads)
    return Outcome(code, stderr.getvalue(), stdout.getvalue())


def train(*words):
    return run("dpo_train", *words, *SMALL)


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def results(out):
    return read_json(out / "tuning" / "results.json")


def test_a_run_becomes_an_adapter(glm, tmp_path):
    """Prompt, data set and anomaly folder are found in the run's config.json and in the manifest."""
    folder = write_folder0(tmp_path / "0", hard_captions(8) + easy_captions(12))
    detector = write_run(tmp_path / "run", hard_captions(8), easy_captions(12))
    recorded = {"settings": {"dataset_name": "flower", "anomaly_path": str(folder), "data_path": None}}
    (detector / "config.json").write_text(json.dumps(recorded))
    outcome = train("--run", detector, "--model", glm, "--out", tmp_path / "out", "--max_steps", 1)
    assert outcome.code == 0, outcome.stderr
    used = read_json(tmp_path / "out" / "tuning" / "pairs.json")
    assert used["prompt"] == PROMPT
    assert (len(used["train"]), len(used["validation"])) == (28, 2)
    assert results(tmp_path / "out")["steps"] == 1


def test_official_pairs_and_the_next_round(glm, tmp_path):
    rows = [{**row, "prompt": [row["prompt"]]} for row in pink_pairs(n_train=24).train]
    path = write_list(tmp_path / "training_data.json", rows)
    first, second = tmp_path / "1", tmp_path / "2"
    words = ("--pairs", path, "--model", glm, "--max_steps", 3)
    assert train(*words, "--out", first).code == 0
    outcome = train(*words, "--out", second, "--adapter", first)
    assert outcome.code == 0, outcome.stderr
    assert results(second)["margin_before"] == pytest.approx(results(first)["margin_after"], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--out DIR and either"),
        (["--out", "x"], "either --run DIR or --pairs"),
        (["--out", "x", "--run", "a", "--pairs", "b"], "either --run DIR or --pairs"),
        (["--out", "x", "--pairs", "missing.json"], "missing.json does not exist"),
        (["--out", "x", "--run", "missing"], "--run missing is no finished run (d_samples.json is missing)"),
        (["--out", "x", "--pairs", "b", "--prompt", "p"], "--prompt has no effect on the pairs of --pairs"),
        (["--out", "x", "--pairs", "b", "--dataset_name", "flower"], "--dataset_name has no effect"),
        (["--out", "x", "--run", "a", "--validation_pairs", "b"], "--validation_pairs has no effect"),
        (["--out", "x", "--pairs", "b", "--beta", "much"], "--beta"),
        (["--out", "x", "--pairs", "b", "--reference", "none"], "--reference"),
        (["--out", "x", "--pairs", "b", "--min_pairs", "0"], "--min_pairs"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    refused(train(*words), message)
    assert not any(tmp_path.iterdir())


def test_no_hard_anomalies(glm, tmp_path):
    detector = write_run(tmp_path / "run", [], easy_captions(5))
    outcome = train("--run", detector, "--prompt", "p", "--model", glm, "--out", tmp_path / "out")
    refused(outcome, "d_samples.json gives no caption", "easy_images 5", "go on without tuning")
    assert not (tmp_path / "out").exists()


def test_killed_and_run_again(glm, pairs, tmp_path):
    """kill -9 between two checkpoints; then the same command ends with the bytes of an undisturbed run."""
    words = ["--pairs", pairs, "--model", glm, "--max_steps", 8, "--eval_every", 4, "--save_every", 2]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(*words, "--out", whole).code == 0
    command = [sys.executable, DPO / "dpo_train.py", *words, *SMALL, "--out", killed]
    process = subprocess.Popen([*map(str, command)], env=environment(), stderr=subprocess.PIPE)
    state = killed / "tuning" / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    while not state.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    process.stderr.close()
    assert not (killed / WEIGHTS).exists()
    assert train(*words, "--out", killed).code == 0
    for name in (WEIGHTS, "tuning/metrics.jsonl"):
        assert snapshot(killed)[name] == snapshot(whole)[name], name


def test_two_processes(glm, pairs, tmp_path):
    """`accelerate launch`, here with two processes on the CPU."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    words = ["--pairs", pairs, "--model", glm, "--out", tmp_path / "out", "--max_steps", 4, *SMALL]
    done = subprocess.run(
        [*launch, str(DPO / "dpo_train.py"), *map(str, words)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("pairs: train 16") == 1
    assert read_json(tmp_path / "out" / "tuning" / "config.json")["identity"]["processes"] == 2
    assert results(tmp_path / "out")["margin_after"] > 0
    assert (tmp_path / "out" / WEIGHTS).exists()


def sample(glm, adapter, *words):
    words = ("--model", glm, "--adapter", adapter, "--device", "cpu", "--max_new_tokens", 24, *words)
    return run("dpo_test", *words)


def test_tuned_and_untuned_are_compared(glm, pairs, tmp_path):
    adapter = tiny_adapter(tmp_path / "adapter", glm)
    normals = write_list(tmp_path / "normals.json", NORMALS)
    outcome = sample(glm, adapter, "--pairs", pairs, "--normals", normals, "--n", 8)
    assert outcome.code == 0, outcome.stderr
    for line in (
        "untuned             tuned",
        "answers",
        "valid captions",
        "new ones",
        "similarity to normal",
    ):
        assert line in outcome.log
    report = read_json(adapter / "dpo_test.json")
    for name in ("untuned", "tuned"):
        part = report[name]
        assert len(part["captions"]) == part["new"] <= part["valid"]
        assert part["new"] + sum(part["rejected"].values()) >= part["answers"] > 0
    assert report["untuned"]["captions"] != report["tuned"]["captions"]
    again = tmp_path / "again.json"
    sample(glm, adapter, "--prompt", report["prompt"], "--normals", normals, "--n", 8, "--out", again)
    assert read_json(again)["tuned"]["captions"] == report["tuned"]["captions"]


class Answers:
    """Stands in for the LLM where its words matter."""

    def __init__(self, settings):
        self.texts = TUNED if settings.adapter else UNTUNED

    def complete(self, prompt, n, seed):
        return self.texts


UNTUNED = [
    "a large blue flower with spiky petals", "a yellow star shaped blossom", "an orange trumpet on a stem",
    "I cannot help with that", "no",
]  # fmt: skip
TUNED = [
    "a small pink flower with many thin petals", "this flower has small thin red petals",
    "this flower has small thin pink petals", "a large blue flower with spiky petals",
]  # fmt: skip


def test_figures_of_the_comparison(tmp_path):
    known = [{"prompt": "p", "chosen": "a hard one here", "rejected": TUNED[3]}]
    pairs, normals = write_list(tmp_path / "p.json", known), write_list(tmp_path / "n.json", NORMALS)
    words = ("--pairs", pairs, "--normals", normals, "--out", tmp_path / "report.json", "--adapter", "unread")
    outcome = run("dpo_test", *words, load_language_model=Answers, check_adapter=lambda *_: None)
    assert outcome.code == 0, outcome.stderr
    report = read_json(tmp_path / "report.json")
    untuned, tuned = report["untuned"], report["tuned"]
    assert (untuned["answers"], untuned["valid"], untuned["new"]) == (5, 3, 2)  # one is in the pairs
    assert untuned["rejected"] == {"duplicate": 1, "refusal": 1, "too short": 1}
    assert (tuned["answers"], tuned["valid"], tuned["new"]) == (4, 4, 2)  # and one is a normal caption
    assert tuned["rejected"] == {"copy of an example": 1, "duplicate": 1}
    assert untuned["similarity"] < 0.1 < 0.4 < tuned["similarity"] < 1
    assert tuned["nearer"] == 2
    gain = report["difference"]
    assert gain["mean"] == pytest.approx(tuned["similarity"] - untuned["similarity"])
    assert gain["low"] < gain["mean"] < gain["high"]
    assert f"difference {gain['mean']:+.3f}" in outcome.log


def test_a_missing_adapter_is_named_before_an_llm_is_loaded(tmp_path):
    normals = tmp_path / "normals.json"
    normals.write_text('["a pink flower"]')
    words = [
        "--adapter",
        tmp_path / "x",
        "--prompt",
        "p",
        "--normals",
        normals,
        "--out",
        tmp_path / "out.json",
    ]
    refused(run("dpo_test", *words, "--model", tmp_path / "no_llm"), tmp_path / "x", "does not exist")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--adapter DIR"),
        (["--adapter", "x", "--n", "0"], "--n of at least 1"),
        (["--adapter", "x"], "--prompt TEXT or --pairs FILE"),
        (["--adapter", "x", "--prompt", "p", "--out", "."], "--out . is a folder"),
        (["--adapter", "x", "--prompt", "p"], "--normals"),
        (["--adapter", "x", "--prompt", "p", "--normal_class", "1"], "--normal_class needs --dataset_name"),
        (["--adapter", "x", "--prompt", "p", "--normals", "missing.json"], "missing.json does not exist"),
    ],
)
def test_bad_flags_of_the_comparison(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    refused(run("dpo_test", *words), message)
    assert not any(tmp_path.iterdir())
