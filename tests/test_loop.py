"""Algorithm 1 on the garden with real libraries: a tiny random LLM, the garden as drawer, short trainings."""

import contextlib
import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_models import tiny_glm
from torchvision.models import get_model
from toy import write_toy_set

import iterate
from kka.anomalies import live, read_items
from kka.datasets import garden, get_spec
from kka.detectors.deep_sad import DeepSADSettings
from kka.drawers import DrawerSettings, build_drawer
from kka.errors import run_script
from kka.files import read_json, sha256
from kka.loop import Loop
from kka.loop_settings import PREFIXED, LoopSettings
from kka.records import read_records
from kka.stand_ins import MODELS

ITERATE = Path(iterate.__file__)
SMALL = {"normal": {"train": 8, "test": 4}, "other": {"train": 1, "test": 1}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small garden and a tiny LLM."""
    root = tmp_path_factory.mktemp("world")
    patch = pytest.MonkeyPatch()
    patch.setattr(garden, "N_IMAGES", SMALL)
    garden.make_garden(root / "garden", n_anomalies=2)
    patch.undo()
    tiny_glm(root / "llm")
    return root


def command(world, folder, **flags):
    small = {
        "dataset_name": "garden", "data_path": world / "garden", "xp_path": folder, "rounds": 2,
        "mode": "add", "n_initial": 10, "n_fresh": 6, "n_untuned": 3, "n_evaluators": 2, "per_round": 2,
        "n_epochs": 12, "lr": 1e-3, "pretrain": False,
        "batch_size": 8, "device": "cpu", "llm_model": world / "llm", "llm_device": "cpu",
        "drawer_backend": "garden", "tune_device": "cpu", "tune_max_steps": 2, "tune_warmup_steps": 1,
        "pairs_min_pairs": 1,
    }  # fmt: skip
    words = [str(word) for name, value in {**small, **flags}.items() for word in (f"--{name}", value)]
    return [sys.executable, str(ITERATE), *words]


def run(world, folder, **flags):
    words, environment = command(world, folder, **flags), {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)


def snapshot(folder):
    """What decides the result, without times."""
    rows = json.loads((folder / "results.json").read_text())
    assert rows.pop("seconds_beside") > 0
    for row in rows["rounds"]:
        row.pop("seconds")
    sets = [
        [(i.sha256, i.caption, i.status) for i in read_items(folder / f"round_{k}" / "0")] for k in range(3)
    ]
    return rows, sets


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loops") / "whole"
    done = run(world, folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_table_and_sets(finished):
    folder, done = finished
    rows, _ = snapshot(folder)
    assert [row["round"] for row in rows["rounds"]] == [0, 1, 2]
    for name in ("none", "KKA(0)", "KKA(1)", "KKA(2)"):
        assert f"| {name} |" in done.stdout
    sizes = [len(live(read_items(folder / f"round_{k}" / "0"))) for k in range(3)]
    assert sizes[0] == 10
    assert sizes == [row["size"] for row in rows["rounds"]]
    assert sizes == sorted(sizes)  # mode add
    for k, n in ((0, 10), (1, 6), (2, 6)):
        records = read_records(folder / f"round_{k}" / "captions.jsonl", "caption", str)
        assert len(records) == n
        assert {record["round"] for record in records} == {k}


def test_what_happened_inside_is_tabulated(finished, tmp_path, monkeypatch, capsys):
    benchmarks = ITERATE.parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    words = [str(finished[0].parent), "--out", str(tmp_path / "loops")]
    monkeypatch.setattr(sys, "argv", ["loops.py", *words])
    runpy.run_path(str(benchmarks / "loops.py"), run_name="__main__")
    text = (tmp_path / "loops.md").read_text()
    assert text in capsys.readouterr().out
    assert "mode add, 1 seeds" in text
    rounds = json.loads((finished[0] / "results.json").read_text())["rounds"]
    auc = sum(rounds[2]["test_aucs"]) / len(rounds[2]["test_aucs"])
    (row,) = (line for line in text.splitlines() if line.startswith("| KKA(2) |"))
    assert row.endswith(f"| {100 * auc:.2f} |")
    report = json.loads((tmp_path / "loops.json").read_text())
    assert str(finished[0].parent) not in json.dumps(report["settings"])
    monkeypatch.setattr(sys, "argv", ["loops.py", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(benchmarks / "loops.py"), run_name="__main__")
    assert ended.value.code == 2
    assert "no finished loop" in capsys.readouterr().err


def test_commands_by_hand_make_the_same_files(world, finished, tmp_path, monkeypatch):
    folder, done = finished
    lines = [line.partition(": ")[2] for line in done.stderr.splitlines() if line.startswith("by hand: ")]
    scripts = Counter(line.split()[1] for line in lines)
    assert set(scripts) == {
        "src/main.py", "create/use_glm4.py", "create/create_image.py", "create/update_anomalies.py",
        "dpo/dpo_train.py",
    }  # fmt: skip
    other = tmp_path / "hand"
    for line in lines:
        script, *words = shlex.split(line.replace(str(folder), str(other)))[1:]
        monkeypatch.setattr(sys, "argv", [script, *words])
        with contextlib.suppress(SystemExit):  # create_image ends itself
            runpy.run_path(str(ITERATE.parent.parent / script), run_name="__main__")
    for path in folder.rglob("adapter_model.safetensors"):
        if "checkpoint" not in str(path):
            assert (other / path.relative_to(folder)).read_bytes() == path.read_bytes()
    for name in ("none", "round_0/detector", "round_1/detector_seed_1", "round_2/detector"):
        aucs = [
            json.loads((root / name / "results.json").read_text())["test_auc"] for root in (folder, other)
        ]
        assert aucs[0] == aucs[1]
    for name in ("untuned/fresh", "round_0/0", "round_1/fresh", "round_1/0", "round_2/0"):
        assert len(live(read_items(folder / name))) > 0
        assert items_of(other / name) == items_of(folder / name)


def items_of(folder):
    """What an anomaly set is, without the judgement of its last evaluator."""
    return [(i.file, i.sha256, i.caption, i.round, i.replaced) for i in read_items(folder)]


def test_untuned_images_are_judged_and_never_trained_on(finished):
    folder, _ = finished
    fresh = {item.sha256 for item in read_items(folder / "untuned" / "fresh")}
    assert len(fresh) == 3
    for k in range(3):
        assert not fresh & {item.sha256 for item in read_items(folder / f"round_{k}" / "0")}
    rows, _ = snapshot(folder)
    assert [row["hard_untuned"] is None for row in rows["rounds"]] == [True, False, False]
    assert all(len(row["test_aucs"]) == 2 for row in rows["rounds"])


def test_a_fresh_split_is_made_before_an_image_is_trained_on(world, finished, tmp_path):
    done = run(world, tmp_path, split="fresh", mode="rep")
    assert done.returncode == 0, done.stderr
    threshold = read_json(tmp_path / "none" / "model.json")["threshold"]
    first = read_items(tmp_path / "round_0" / "0")
    assert [item.status == "hard" for item in first] == [item.score < threshold for item in first]
    whole = {
        item.sha256: item.status for k in (1, 2) for item in read_items(tmp_path / f"round_{k}" / "fresh")
    }
    whole |= {item.sha256: item.status for item in first}
    last = live(read_items(tmp_path / "round_2" / "0"))
    assert [item.status for item in last] == [whole[item.sha256] for item in last]
    lists = [read_json(tmp_path / "round_0" / "split" / f"{name}_samples.json") for name in "de"]
    assert sorted(row[0][0] for rows in lists for row in rows) == list(range(10))


def test_frozen_evaluator_judges_and_the_detectors_are_only_tested(world, tmp_path):
    weights = world / "weights.safetensors"
    safetensors.torch.save_file(get_model("squeezenet1_0").state_dict(), weights)
    flags = {
        "evaluator": "frozen", "evaluator_backbone": "squeezenet1_0", "evaluator_image_size": 48,
        "evaluator_backbone_weights": weights, "rounds": 1, "n_evaluators": 1,
    }  # fmt: skip
    done = run(world, tmp_path / "loop", **flags)
    assert done.returncode == 0, done.stderr
    detector = tmp_path / "loop" / "round_0" / "detector"
    evaluator = detector.with_name("detector_evaluator")
    cards = [read_json(folder / "model.json") for folder in (detector, evaluator)]
    assert [card["detector"] for card in cards] == ["deep_sad", "frozen"]
    judged = live(read_items(tmp_path / "loop" / "round_0" / "0"))
    split = read_json(evaluator / "d_samples.json")
    assert sum(item.status == "hard" for item in judged) == len(split)
    before = (tmp_path / "loop" / "results.json").read_bytes()
    other = shutil.copy(weights, world / "other.safetensors")  # the content counts, not the place
    assert run(world, tmp_path / "loop", **{**flags, "evaluator_backbone_weights": other}).returncode == 0
    assert (tmp_path / "loop" / "results.json").read_bytes() == before  # times, too
    safetensors.torch.save_file(get_model("squeezenet1_0").state_dict(), other)
    refused = run(world, tmp_path / "loop", **{**flags, "evaluator_backbone_weights": other})
    assert refused.returncode == 2
    assert "evaluator_backbone_weights" in refused.stderr


def test_no_caption_comes_twice(finished):
    folder, _ = finished
    for k in range(3):
        captions = [item.caption for item in live(read_items(folder / f"round_{k}" / "0"))]
        assert len(captions) == len(set(captions))


def test_an_llm_with_one_caption_is_compared_with_nothing_and_ends(world, tmp_path):
    done = run(world, tmp_path, llm_model=MODELS / "glm", llm_greedy=True, rounds=1, n_evaluators=1)
    assert done.returncode == 2
    assert "only 1 of 10 captions (rejected: 5 duplicate)" in done.stderr
    assert "the rounds are not compared with the untuned LLM" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'round_1'}: the LLM gave no usable caption")
    assert "--repeats" in last
    assert "KKA(0)" in (tmp_path / "table.md").read_text()  # what was finished is not lost


def test_a_caption_that_comes_again_is_another_image(world, tmp_path):
    flags = {"llm_model": MODELS / "glm", "llm_greedy": True, "repeats": 8, "n_initial": 8}
    done = run(world, tmp_path, rounds=1, n_evaluators=1, **flags)
    assert done.returncode == 0, done.stderr
    places = ("round_0/0", "untuned/fresh", "round_1/fresh")
    items = [item for place in places for item in read_items(tmp_path / place)]
    assert len(items) == 8 + 3 + 6
    assert len({item.caption for item in items[:11]}) == 1
    assert len({item.sha256 for item in items}) == len(items)


def test_killed_loop_continues_to_the_same_result(world, finished, tmp_path):
    folder = tmp_path / "killed"
    for moment in ("round_0/0/manifest.jsonl", "round_0/detector/metrics.jsonl", "round_1/described.json"):
        process = subprocess.Popen(
            command(world, folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not (folder / moment).exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run(world, folder)
    assert done.returncode == 0, done.stderr
    assert snapshot(folder) == snapshot(finished[0])


def test_finished_loop_of_other_settings_is_refused(world, finished):
    folder, _ = finished
    before = (folder / "results.json").read_bytes()
    done = run(world, folder, per_round=3)
    assert done.returncode == 2
    assert "per_round 2 there, 3 now" in done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ({"n_initial": 0}, "--n_initial"),
        ({"llm_backend": "openai"}, "--rounds 0"),
        ({"llm_model": "/nowhere/glm"}, "/nowhere/glm"),
        ({"n_clusters": 99}, "--n_clusters"),
        ({"n_evaluators": 0}, "--n_evaluators"),
        ({"threshold_quantile": 1.5}, "--threshold_quantile"),
        ({"seed": -1}, "--seed must not be negative"),
        ({"examples": "rose"}, "--examples rose is neither representatives nor random"),
        ({"llm_temperature": 0}, "--llm_temperature must be above 0"),
        ({"llm_adapter": "/nowhere"}, "--llm_adapter /nowhere"),
        ({"drawer_size": 3}, "--drawer_size must be a multiple"),
        ({"drawer_backend": "bank"}, "give their folder with --drawer_bank DIR"),
        ({"tune_max_steps": 0}, "--tune_max_steps must be at least 1"),
        ({"pairs_validation_share": 5}, "--pairs_validation_share must lie in"),
        ({"evaluator": "frozen", "evaluator_backbone": "nope"}, "--evaluator_backbone"),
        ({"name": "a/../../b"}, "--name 'a/../../b' must be one folder name"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_trained(
    world, tmp_path, monkeypatch, capsys, flags, part
):
    words = command(world, tmp_path / "loop", **{"n_epochs": 1, **flags})
    monkeypatch.setattr(sys, "argv", words[1:])
    with pytest.raises(SystemExit) as stop:
        run_script(iterate.main)
    stderr = capsys.readouterr().err
    assert stop.value.code == 2
    assert part in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert not (tmp_path / "loop").exists()


def test_captions_and_adapter_that_are_given_are_where_the_loop_begins(world, finished, tmp_path):
    given = next(finished[0].glob("round_*/adapter"))
    done = run(world, tmp_path, examples="a small pink flower", llm_adapter=given)
    assert done.returncode == 0, done.stderr
    for item in read_items(tmp_path / "round_0" / "0"):
        assert item.examples == ["a small pink flower"]
        assert item.adapter is not None
    first = min(tmp_path.glob("round_*/adapter"))
    tuned = read_json(first / "tuning" / "config.json")["identity"]
    assert tuned["adapter"] == sha256(given / "adapter_model.safetensors")


def bank_loop(tmp_path, spec):
    write_toy_set(tmp_path, spec, classes=(1, 2, *spec.normal_classes))
    parts = {name: cls() for name, cls in PREFIXED.items()}
    parts["drawer"] = DrawerSettings(backend="bank", bank=str(tmp_path))
    names = (parts[name] for name in ("llm", "drawer", "tune", "pairs"))
    settings = LoopSettings(normal_class=(1,))
    return Loop(tmp_path, tmp_path, spec, settings, DeepSADSettings(), *names, torch.device("cpu"))


def test_the_bank_of_a_loop_gives_nothing_that_is_normal_in_it(tmp_path):
    spec = get_spec("ucm_caption")
    loop = bank_loop(tmp_path, spec)
    classes = {source.split("/")[0] for source in build_drawer(loop.own_drawer, spec).sources}
    assert classes == {"2", *map(str, spec.normal_classes)}


def test_captions_that_cannot_be_drawn_are_told(tmp_path, caplog):
    loop = bank_loop(tmp_path, get_spec("ucm_caption"))
    (tmp_path / "round_0").mkdir()
    lines = [json.dumps({"caption": caption}) for caption in ("caption 0 of train_07.png", "nothing alike")]
    loop.place(0, "captions.jsonl").write_text("\n".join(lines) + "\n")
    loop.draw(0)
    assert len(live(read_items(loop.place(0, "0")))) == 1
    assert "1 captions gave no image (no caption of the bank has a word in common: 1)" in caplog.text


def test_a_bank_with_too_few_images_is_refused_before_anything_is_trained(world, tmp_path):
    bank = {"drawer_backend": "bank", "drawer_bank": world / "garden"}
    done = run(world, tmp_path / "loop", **bank, n_fresh=1000)
    assert done.returncode == 2
    assert f"--drawer_bank {world / 'garden'} has" in done.stderr
    assert "the loop asks for 2013" in done.stderr
    assert not (tmp_path / "loop").exists()
