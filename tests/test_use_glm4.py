"""create/use_glm4.py as it is called."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import misbehaving_server as server
import pytest
from tiny_models import tiny_adapter, tiny_glm
from toy import run_toy, write_toy_set

from kka.datasets import flower, garden, ucm_caption
from kka.prompts import generation_prompt, prompt_digest

SCRIPT = Path(__file__).resolve().parents[1] / "create" / "use_glm4.py"
PINK = "this flower has sparse thin small pink petals and a yellow center"


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
    return tiny_glm(tmp_path_factory.mktemp("glm") / "tiny-glm")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Call the script in this process with the words of its command line; returns exit code and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def call(*words):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["use_glm4.py", *map(str, words)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return call


def records(path="captions.jsonl"):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def tiny(glm, **options):
    flags = {"model": glm, "device": "cpu", "max_new_tokens": 40, **options}
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def test_captions_for_a_data_set(run, glm, tmp_path, toy_set):
    words = [
        "--dataset_name",
        "ucm_caption",
        "--data_path",
        toy_set,
        "--normal_class",
        1,
        2,
        "--n",
        15,
        *tiny(glm),
    ]
    code, errors = run(*words, "--text", "flower.txt")
    assert code == 0, errors
    captions = [record["caption"] for record in records()]
    assert len(set(captions)) == 15
    assert Path("flower.txt").read_text().splitlines() == captions
    first = records()[0]
    assert len(first["examples"]) == 2  # one for each normal folder
    assert all(example.startswith("caption") for example in first["examples"])
    assert first["prompt_sha256"] == prompt_digest(generation_prompt(ucm_caption.SPEC, first["examples"]))
    assert (first["llm"], first["adapter"], first["seed"], first["round"]) == (str(glm), None, 0, 0)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    assert run(*words, "--text", "flower.txt")[0] == 0
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before
    assert run(*words, "--seed", 1, "--out", "other.jsonl", "--n_examples", 3)[0] == 0
    assert records("other.jsonl")[0]["examples"] != first["examples"]
    assert len(records("other.jsonl")[0]["examples"]) == 3


def test_examples_by_hand_need_no_data_set(run, glm, tmp_path):
    adapter = tiny_adapter(tmp_path / "adapter", glm)
    code, errors = run(
        "--examples", PINK, "a second one is here", "--n", 3, *tiny(glm, adapter=adapter), "--round", 2
    )
    assert code == 0, errors
    first = records()[0]
    assert first["examples"] == [PINK, "a second one is here"]
    assert first["adapter"].startswith("adapter@")
    assert first["round"] == 2
    assert first["prompt_sha256"] == prompt_digest(generation_prompt(flower.SPEC, first["examples"]))


def test_representatives_by_a_run_and_known_captions(run, glm, tmp_path, toy_set):
    assert run_toy(toy_set, tmp_path / "none", n_anomalies=0, n_epochs=1).code == 0
    words = ["--dataset_name", "ucm_caption", "--data_path", toy_set, "--normal_class", 1]
    words += ["--run", tmp_path / "none", "--n_examples", 2]
    assert run(*words, "--n", 4, *tiny(glm))[0] == 0
    first = records()
    assert len(first[0]["examples"]) == 2
    again = [*words, "--n", 6, "--known", "captions.jsonl", "--out", "next.jsonl"]
    assert run(*again, *tiny(glm))[0] == 0
    assert len(records("next.jsonl")) == 6
    assert not {r["caption"] for r in first} & {r["caption"] for r in records("next.jsonl")}
    assert records("next.jsonl")[0]["examples"] == first[0]["examples"]


@pytest.mark.parametrize(("keep", "expected"), [([], 1), (["--keep_normal_captions"], 2)])
def test_normal_captions_are_dropped(run, keep, expected):
    normal = "the tiny flower has few narrow pink petals around a golden center"
    with server.serve(server.reply(normal), server.reply("a white flower, large and round")) as running:
        words = [
            "--dataset_name",
            "garden",
            "--examples",
            PINK,
            "--backend",
            "openai",
            "--base_url",
            running.url,
        ]
        assert run(*words, "--parallel", 1, "--ask", 2, "--n", expected, *keep)[0] == 0
    assert [record["caption"] for record in records()][:-1] == [normal] * (expected - 1)
    assert generation_prompt(garden.SPEC, [PINK]) == running.requests[0]["messages"][0]["content"]


def test_too_few_captions_are_an_error_that_counts(run, glm):
    code, errors = run(
        "--examples", PINK, "--n", 5, *tiny(glm, max_new_tokens=100), "--greedy", "--text", "flower.txt"
    )
    assert code == 2
    assert re.search(
        r"only [01] of 5 captions are in captions.jsonl: 5 requests in a row .*\(rejected: \d ", errors
    )
    assert Path("flower.txt").read_text().splitlines() == [record["caption"] for record in records()]


@pytest.mark.parametrize(
    ("model", "words", "says"),
    [
        (None, [], "--run damaged is no finished run; give the folder of one"),
        ("{}", [], "--run damaged is damaged or of another version of this program"),
        ("", ["--n_examples", 50], "--n_examples must lie between 1 and the number of normal images, 10"),
    ],
)
def test_run_that_chooses_no_examples_is_one_sentence(run, finished, toy_set, tmp_path, model, words, says):
    """A `model` of None: no such run; "": as it was."""
    if model is not None:
        shutil.copytree(finished, tmp_path / "damaged")
    if model:
        (tmp_path / "damaged" / "model.json").write_text(model)
    flags = ["--dataset_name", "ucm_caption", "--data_path", toy_set, "--normal_class", 1]
    code, errors = run(*flags, "--run", "damaged", *words)
    assert code == 2
    assert says in errors.splitlines()[-1]


def test_folders_without_numbers_have_no_normal_class(run):
    code, errors = run("--dataset_name", "folder", "--normal_class", 1)
    assert code == 2
    assert "--normal_class does not go with --dataset_name folder" in errors


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--n", 0], "--n must be at least 1"),
        (["--ask", 0], "--ask must be at least 1"),
        (["--n_examples", 0], "--n_examples must be at least 1"),
        (["--seed", -1], "--seed must be at least 0"),
        (["--examples", " "], "one of --examples is empty"),
        (["--out", "captions.txt"], "must end in .jsonl"),
        (["--text", "."], "--text . is a folder"),
        (["--dataset_name", "roses"], "unknown data set 'roses'"),
        (["--data_path", "nowhere"], "--data_path nowhere does not exist"),
        (["--examples", PINK, "--known", "nowhere.jsonl"], "--known nowhere.jsonl does not exist"),
        (["--temprature", 1], "unrecognized arguments"),
        (["--backend", "vllm"], "invalid choice: 'vllm'"),
        (["--examples", PINK, "--model", "./nowhere"], "--model ./nowhere does not exist"),
        (["--examples", PINK, "--adapter", "nowhere"], "--adapter nowhere: nowhere does not exist"),
        (["--examples", PINK, "--backend", "openai"], "set the environment variable OPENAI_API_KEY"),
        (["--examples", PINK, "--backend", "openai", "--base_url", "host"], "must be an address"),
    ],
)
def test_bad_input_is_one_sentence(run, words, says, tmp_path):
    code, errors = run(*words)
    assert code == 2
    assert says in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not any(path.stat().st_size for path in tmp_path.glob("captions*"))


def test_a_model_that_is_not_here_is_named_with_what_to_do(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, errors = run("--examples", PINK)
    assert code == 2
    assert "zai-org/glm-4-9b-chat-hf is not on this machine" in errors
    assert "--model PATH" in errors


def test_a_data_set_without_captions_asks_for_examples(run, tmp_path):
    root = write_toy_set(tmp_path / "toy", n_anomalies=0)
    for path in root.rglob("caption_sentence*.json"):
        path.unlink()
    words = ["--dataset_name", "ucm_caption", "--data_path", root, "--normal_class", 1]
    code, errors = run(*words)
    assert code == 2
    assert "give some with --examples" in errors


def test_as_a_command(tmp_path):
    with server.serve(server.reply("1. a white flower\n2. a large red bloom")) as running:
        words = [
            "--examples",
            PINK,
            "--backend",
            "openai",
            "--base_url",
            running.url,
            "--n",
            "2",
            "--ask",
            "1",
        ]
        command = [sys.executable, str(SCRIPT), *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [record["caption"] for record in records(tmp_path / "captions.jsonl")] == [
        "a white flower",
        "a large red bloom",
    ]
    assert "2 captions in captions.jsonl; 1 requests; rejected: none" in done.stderr
