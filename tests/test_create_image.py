"""create/create_image.py as people run it: one process, killed, several processes, an API."""

import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from image_server import serving
from tiny_diffusion import tiny_diffusion
from toy import Outcome, read_json, refused, snapshot, write_toy_set

from kka.anomalies import MANIFEST, file_name, read_items
from kka.datasets import get_spec
from kka.datasets.task import read_anomalies
from kka.errors import run_script

SCRIPT = Path(__file__).parent.parent / "create" / "create_image.py"
KEY = "sk-very-secret-1234"
COLOURS = ("red", "white", "blue", "orange", "purple", "yellow", "magenta", "lavender")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("create_image", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["create_image"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, monkeypatch, capsys, caplog):
    """Run the script in this process."""

    def run(words):
        monkeypatch.setattr(sys, "argv", ["create_image.py", *words])
        caplog.set_level(logging.INFO)
        caplog.clear()
        code = 0
        try:
            run_script(script.main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, capsys.readouterr().err, caplog.text)

    return run


def captions(path, n=24):
    """A text file of captions that the garden understands."""
    path.write_text("".join(f"flower {k} has {COLOURS[k % 8]} petals\n" for k in range(n)))
    return path


def words(path, folder, **flags):
    flags = {"captions": path, "dataset_name": "garden", "backend": "garden", "out": folder, **flags}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, script):
    """Captions, and the folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    path = captions(folder / "flower.txt", 150)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["create_image.py", *words(path, folder / "0", batch_size=16)])
        script.main()
    return path, folder / "0"


def test_folder_can_be_trained_on(whole):
    images = read_anomalies(whole[1], get_spec("garden"))
    assert len(images) == 150
    assert images.captions[17] == ("flower 17 has white petals",) * 10
    assert not list(whole[1].glob(".*.tmp"))


def test_same_command_again_changes_nothing(whole, run):
    path, folder = whole
    before = snapshot(folder)
    outcome = run(words(path, folder))
    assert outcome.code == 0
    assert "150 images of 150 captions" in outcome.log
    assert snapshot(folder) == before


def test_killed_script_goes_on_to_the_same_folder(whole, run, tmp_path):
    path, folder = whole
    command = [sys.executable, str(SCRIPT), *words(path, tmp_path / "0", batch_size=16)]
    process = subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 100
    while not len(list(tmp_path.glob("0/image_*.png"))) > 40:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "0" / "image.json").exists()
    assert 0 < len(read_items(tmp_path / "0")) < 150
    assert run(words(path, tmp_path / "0", batch_size=16)).code == 0
    assert snapshot(tmp_path / "0") == snapshot(folder)


def test_two_processes_of_accelerate_share_the_work(whole, tmp_path):
    path, folder = whole
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--main_process_port", "0"]
    command, second = [*launch, str(SCRIPT), *words(path, tmp_path / "0")], False
    process = subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        second |= (tmp_path / "0" / "manifest.1.jsonl").exists()
        time.sleep(0.002)
    stderr = process.communicate()[1]
    assert process.returncode == 0, stderr
    assert second
    assert stderr.count("150 images of 150 captions") == 1
    assert snapshot(tmp_path / "0") == snapshot(folder)


def test_diffusion_model(run, tmp_path):
    model = tiny_diffusion(tmp_path / "model")
    path = captions(tmp_path / "flower.txt", 5)
    flags = {"backend": "diffusers", "dataset_name": "flower", "model": model, "device": "cpu", "steps": 2}
    outcome = run(words(path, tmp_path / "0", **flags, batch_size=2))
    assert outcome.code == 0, outcome.stderr
    items = read_items(tmp_path / "0")
    assert len(items) == 5
    assert items[0].drawer_settings["suffix"] == "close-up photograph of a flower"
    assert read_json(tmp_path / "0" / "text_caption.json")[::10] == path.read_text().splitlines()
    refused(
        run(words(path, tmp_path / "0", **{**flags, "steps": 3})), "steps 2 there, 3 now", "another folder"
    )


def test_bank_goes_on_without_giving_an_image_twice(run, tmp_path):
    bank = write_toy_set(tmp_path / "bank")
    path = tmp_path / "captions.jsonl"
    lines = [
        json.dumps({"caption": f"caption of train_{7 * (k % 4):02d}", "round": 1}) + "\n" for k in range(8)
    ]
    flags = {"dataset_name": "ucm_caption", "backend": "bank", "bank": bank, "bank_exclude": 1}
    path.write_text("".join(lines[:5]))
    assert run(words(path, tmp_path / "0", **flags)).code == 0
    path.write_text("".join(lines))
    assert run(words(path, tmp_path / "0", **flags)).code == 0
    sources = [item.source for item in read_items(tmp_path / "0")]
    assert len(set(sources)) == 8
    assert run(words(path, tmp_path / "at_once", **flags)).code == 0
    assert [item.source for item in read_items(tmp_path / "at_once")] == sources


def api_words(path, out, server):
    return words(path, out, backend="api", model="painter", base_url=f"{server.address}/v1")


def test_api_that_stops_is_gone_on_with_and_paid_once(run, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    path = captions(tmp_path / "flower.txt", 6)
    with serving("b64", "url", "filter", "b64", "401") as server:
        first = run(api_words(path, tmp_path / "0", server))
        refused(first, "refuses with HTTP 401")
        assert len(read_items(tmp_path / "0")) == 3
        second = run(api_words(path, tmp_path / "0", server))
        assert second.code == 0, second.stderr
        asked = [re.search(r"flower (\d)", prompt)[1] for prompt in server.prompts]
        assert asked == ["0", "1", "2", "3", "4", "2", "4", "5"]  # the filtered one is tried again
    assert read_json(tmp_path / "0" / "image.json") == [file_name(k) for k in range(1, 7)]
    images = read_anomalies(tmp_path / "0", get_spec("garden"))
    assert [block[0] for block in images.captions] == path.read_text().splitlines()
    everything = b"".join(snapshot(tmp_path / "0").values()).decode("latin1")
    assert KEY not in everything + first.stderr + first.log + second.stderr + second.log


def test_captions_without_image_are_counted(run, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    path = captions(tmp_path / "flower.txt", 3)
    with serving("b64", "filter") as server:
        outcome = run(api_words(path, tmp_path / "0", server))
    assert outcome.code == 0
    assert "2 images of 3 captions" in outcome.log
    assert "1 captions gave no image (content filter: 1); the same command tries them again" in outcome.log
    assert read_json(tmp_path / "0" / "image.json") == [file_name(1), file_name(3)]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ({"captions": ""}, "--captions FILE and --out DIR"), ({"out": ""}, "--captions FILE and --out DIR"),
        ({"captions": "nowhere.jsonl"}, "--captions nowhere.jsonl does not exist"),
        ({"dataset_name": "flowers"}, "unknown data set 'flowers'"), ({"batch_size": 0}, "--batch_size"),
        ({"seed": -1}, "--seed"), ({"backend": "paint"}, "--backend"), ({"preset": "sd3"}, "--preset"),
        ({"dataset_name": "flower"}, "garden's captions only"), ({"backend": "bank"}, "--bank DIR"),
        ({"backend": "api"}, "ZHIPUAI_API_KEY"), ({"backend": "diffusers", "preset": "own"}, "--model"),
        ({"stpes": 3}, "--stpes"), ({"used": "nowhere"}, "--used nowhere does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(flags, part, run, tmp_path, monkeypatch):
    for name in ("ZHIPUAI_API_KEY", "ZAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    path = captions(tmp_path / "flower.txt")
    refused(run(words(path, tmp_path / "0", **flags)), part)
    assert not list(tmp_path.glob("0/*.png"))


def test_folder_that_cannot_be_written_is_one_sentence(run, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run(words(captions(tmp_path / "flower.txt"), tmp_path / "file")), "is a file; choose a folder")
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "image_00001.png").write_bytes(b"mine")
    refused(run(words(tmp_path / "flower.txt", tmp_path / "0")), f"holds images but no {MANIFEST}")


def test_path_with_spaces_and_umlauts(run, tmp_path):
    folder = tmp_path / "größe 1"
    folder.mkdir()
    assert run(words(captions(folder / "flöwer.txt", 3), folder / "0")).code == 0
    assert len(read_items(folder / "0")) == 3
