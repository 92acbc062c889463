"""Files are whole or not there: failures while writing, JSON, a full disk in the middle of a run."""

import errno
import hashlib
import json
import logging
import os
import stat
from pathlib import Path

import pytest
import torch
from toy import call_script, read_json, refused, results, run_toy, snapshot

from kka.errors import UserError
from kka.files import check_writable, sha256, write_atomically, write_bytes, write_json
from kka.files import read_json as read_checked
from kka.runs import log_to


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_bytes_and_json_are_written_and_read(tmp_path):
    path = tmp_path / "new" / "folder" / "file.json"
    value = {"ü": [1, 0.1, None, True], "b": "花"}
    write_json(path, value)
    assert path.read_bytes() == (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8")
    assert read_checked(path) == value
    write_json(path, value, indent=2)
    assert read_checked(path) == value
    write_bytes(path, b"other")
    assert path.read_bytes() == b"other"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("function", ["fsync", "replace", "fdopen"])
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match="No space left") as error:
        write_bytes(path, b"new")
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(path)
    assert snapshot(tmp_path) == {"file": b"old"}


def test_full_device_while_data_is_written(tmp_path):
    """A real one: /dev/full refuses every byte."""

    def write(file):
        file.write(b"half")
        with open("/dev/full", "wb") as device:
            device.write(b"rest")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", write)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [ValueError("wrong"), KeyboardInterrupt()])
def test_failure_while_writing_leaves_the_old_file(tmp_path, failure):
    (tmp_path / "file").write_bytes(b"old")

    def write(file):
        file.write(b"half of the new")
        raise failure

    with pytest.raises(type(failure)):
        write_atomically(tmp_path / "file", write)
    assert snapshot(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": object()}])
def test_what_is_not_json_is_not_written(tmp_path, value):
    write_json(tmp_path / "file", 1)
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "file", value)
    assert snapshot(tmp_path) == {"file": b"1\n"}


def test_json_with_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b'\xef\xbb\xbf[1,\r\n"\xc3\xbc"]\r\n')
    assert read_checked(path) == [1, "ü"]


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe[\x001\x00]\x00", b'["\xfc"]', b"[1] 2"])
def test_malformed_json_is_named(tmp_path, data):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path} is not valid JSON"):
        read_checked(path)


def test_missing_json_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path / 'gone'} does not exist"):
        read_checked(tmp_path / "gone")


def test_checksum(tmp_path):
    data = os.urandom(3_000_000)
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_disk_full_at_the_start_of_a_run(toy_set, tmp_path, monkeypatch, function):
    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        outcome = run_toy(toy_set, tmp_path / "run")
    refused(outcome, "the disk is full while writing", "free some space", code=1)
    assert list(snapshot(tmp_path / "run")) == ["run.lock"]
    assert run_toy(toy_set, tmp_path / "run").code == 0


@pytest.mark.parametrize("name", ["checkpoint.pt", "d_samples.json", "model.safetensors", "results.json"])
def test_disk_full_in_a_run_and_then_the_same_command(toy_set, tmp_path, monkeypatch, finished, name):
    folder, replace = tmp_path / "run", os.replace

    def full_for(source, target):
        return full() if str(target).endswith(f"/{name}") else replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_for)
        outcome = run_toy(toy_set, folder)
    refused(outcome, f"the disk is full while writing {folder / name}", code=1)
    assert not (folder / "results.json").exists()
    assert [p for p in folder.rglob("*") if p.suffix == ".tmp"] == []
    assert run_toy(toy_set, folder).code == 0
    assert results(folder) == results(finished)
    for other in ("d_samples.json", "e_samples.json"):
        assert read_json(folder / other) == read_json(finished / other)


class NearlyFull:
    """A file on a disk that has room for small pieces only."""

    def __init__(self, file):
        self.file, self.flush = file, file.flush

    def write(self, data):
        return full() if len(data) > 1000 else self.file.write(data)


def test_disk_full_in_the_middle_of_a_checkpoint(toy_set, tmp_path, monkeypatch, finished):
    """torch.save then ends with an error of its own, that of the disk is behind it."""
    folder, save = tmp_path / "run", torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda value, file: save(value, NearlyFull(file)))
        outcome = run_toy(toy_set, folder)
    refused(outcome, f"the disk is full while writing {folder / 'checkpoint.pt'}", code=1)
    assert [p for p in folder.rglob("*") if p.suffix == ".tmp"] == []
    assert run_toy(toy_set, folder).code == 0
    assert results(folder) == results(finished)


def test_disk_full_for_the_log():
    def main():
        with log_to(Path("/dev/full")):
            logging.getLogger("kka").warning("epoch 1")

    refused(call_script(main, ["script"]), "the disk is full; free some space", code=1)


@pytest.mark.parametrize(
    "said",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",  # safetensors
        "basic_ios::clear: iostream error",  # torch.save to a path
    ],
)
def test_disk_full_in_the_words_of_libraries(said):
    """As where trl writes its checkpoints."""

    def main():
        try:
            raise RuntimeError(said)
        finally:
            raise RuntimeError("unexpected pos 640 vs 598")

    refused(call_script(main, ["script"]), "the disk is full; free some space", code=1)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("", " is a folder; give the name of a file"),
        ("file/x", "/file cannot be made, as a file is in its way; choose another place"),
        ("file/x/y", "/file/x cannot be made, as a file is in its way; choose another place"),
    ],
)
def test_place_that_cannot_be_written_is_one_sentence(tmp_path, name, part):
    (tmp_path / "file").write_bytes(b"old")
    refused(call_script(lambda: write_bytes(tmp_path / name, b"new"), ["script"]), f"{tmp_path}{part}")
    with pytest.raises(UserError, match=f"--out {tmp_path / name} "):
        check_writable(tmp_path / name, "--out")
    assert snapshot(tmp_path) == {"file": b"old"}


def test_place_that_is_not_there_yet_can_be_written(tmp_path):
    check_writable(tmp_path / "new" / "folder" / "x.json", "--out")
    assert not list(tmp_path.iterdir())
