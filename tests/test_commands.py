"""The commands of the README and the demo, at toy size."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_dpo_scripts import run as run_dpo
from tiny_models import tiny_adapter
from toy import run_main, write_toy_folder, write_toy_set
from toy_pairs import pink_pairs

import demo
from kka.datasets import flower, garden, get_spec
from kka.pairs import write_pairs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python src/main\.py(.*?)(?:#.*)?$", README, flags=re.MULTILINE)
BY_HAND = re.findall(r"^python ((?:create|dpo)/\S+\.py) (.*?)(?:#.*)?$", README, flags=re.MULTILINE)
SMALL = {"normal": {"train": 5, "test": 3}, "other": {"train": 1, "test": 1}}
FAST = ["--n_epochs", "1", "--ae_n_epochs", "1", "--device", "cpu"]
FAST_AHL = [
    "--n_epochs", "1", "--base_epochs", "1", "--device", "cpu", "--preset", "cpu",
    "--backbone_init", "random",
    "--image_size", "48", "--residual_stride", "1", "--n_clusters", "2", "--steps_per_epoch", "1",
]  # fmt: skip


@pytest.fixture
def small_garden(tmp_path, monkeypatch):
    monkeypatch.setattr(garden, "N_IMAGES", SMALL)
    garden.make_garden(tmp_path / "garden", n_anomalies=8)
    return tmp_path / "garden"


def toy_data(name, tmp_path):
    """A folder that looks like the data set, and the flags that choose its classes."""
    if name == "folder":
        return [str(write_toy_folder(tmp_path / "toy", n_anomalies=4))]
    if name == "mvtec":
        root = write_toy_folder(tmp_path / "toy" / "screw", ("bent", "crack", "cut", "rust"))
        for path in sorted((root / "train" / "good").iterdir())[:4]:  # two kinds of normals, for two clusters
            Image.open(path).rotate(90).point(lambda value: value // 3).save(path)
        return [str(root.parent)]
    root = write_toy_set(tmp_path / "toy", get_spec(name))
    return [str(root), "--user_dict", json.dumps({"0": [1, 0], "1": [1, 2, 3]})]


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command_runs(command, tmp_path, request):
    words = shlex.split(command)
    name = words[words.index("--dataset_name") + 1] if "--dataset_name" in words else flower.SPEC.name
    if name == garden.SPEC.name:
        data = [str(request.getfixturevalue("small_garden"))]
    else:
        data = toy_data(name, tmp_path)
    words = [str(tmp_path / "toy" / "0") if word == "DIR" else word for word in words]
    fast = FAST_AHL if "ahl" in words else FAST
    result = run_main([*words, "--data_path", *data, *fast, "--xp_path", str(tmp_path / "run")])
    assert result.code == 0, result.stderr
    runs = [path.parent for path in (tmp_path / "run").rglob("results.json")]
    assert len(runs) == (int(words[words.index("--runs") + 1]) if "--runs" in words else 1)
    for run in runs:
        results = json.loads((run / "results.json").read_text())
        assert 0 <= results["test_auc"] <= 1


@pytest.mark.parametrize(("script", "words"), BY_HAND)
def test_readme_flags_exist(script, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not stop.value.code
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert set(re.findall(r"--\w+", words)) <= known


def test_readme_comparison_of_llms_runs(glm, tmp_path, monkeypatch):
    """As it stands there, but for where data and LLM are."""
    (words,) = [words for script, words in BY_HAND if script == "dpo/dpo_test.py"]
    monkeypatch.chdir(tmp_path)
    tiny_adapter(Path("adapter"), glm)
    write_pairs(Path("adapter/tuning/pairs.json"), pink_pairs())
    data = write_toy_set(tmp_path / "toy", flower.SPEC)
    places = ["--data_path", data, "--normal_class", 1, "--model", glm, "--device", "cpu", "--n", 4]
    outcome = run_dpo("dpo_test", *shlex.split(words), *places, "--max_new_tokens", 24)
    assert outcome.code == 0, outcome.stderr
    assert "similarity to normal" in outcome.log
    assert Path("adapter/dpo_test.json").exists()


def test_readme_names_every_kind_of_command():
    assert len(COMMANDS) >= 5
    assert len(BY_HAND) >= 5
    assert README.index("make demo") < README.index("make test") < README.index("python src")


def test_demo_runs_the_loop(small_garden, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    flags = {
        "data_path": small_garden, "xp_path": out, "rounds": 1, "n_initial": 12, "n_fresh": 4, "n_untuned": 3,
        "n_evaluators": 1, "n_epochs": 2, "batch_size": 8, "tune_max_steps": 2, "tune_warmup_steps": 1,
        "pairs_min_pairs": 1, "split": "own",
    }  # fmt: skip
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["demo.py", *words])
    demo.main()
    printed = capsys.readouterr().out
    assert "| KKA(1) |" in printed
    assert (out / "table.md").read_text() in printed
    rows = json.loads((out / "results.json").read_text())["rounds"]
    assert [row["captions"] for row in rows] == [12, 4]
    with Image.open(out / "loop.png") as picture:
        assert picture.width > 600
        assert len(picture.convert("RGB").getcolors(10**6)) > 1000
