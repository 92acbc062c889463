"""Drawing that was interrupted, at any point, goes on and ends with the same folder."""

import errno
import multiprocessing
import os
import shutil
import signal
import time

import pytest
from tiny_diffusion import tiny_diffusion
from toy import read_json, snapshot
from unreliable_drawer import CAPTIONS, GARDEN, RECORDS, Stopping, Unreliable, draw, painter

from kka.anomalies import MANIFEST, file_name, read_items
from kka.datasets.task import read_anomalies
from kka.draw import draw_captions
from kka.drawers import DrawerSettings, build_drawer
from kka.errors import UserError
from kka.files import sha256


def test_another_number_of_processes_goes_on(painted, tmp_path):
    folder = tmp_path / "0"
    draw(folder, shard=(1, 3))
    with pytest.raises(KeyboardInterrupt):
        draw_captions(Stopping(4), RECORDS, folder, GARDEN, shard=(0, 2), batch_size=2)
    drawn = draw(folder)
    assert snapshot(folder) == snapshot(painted)
    assert drawn.kept == 8 + 4


def test_nothing_is_drawn_twice(tmp_path):
    folder = tmp_path / "0"
    with pytest.raises(KeyboardInterrupt):
        draw(folder, Unreliable(stops_after=9), batch_size=3)
    assert not (folder / "image.json").exists()
    second = Unreliable()
    drawn = draw(folder, second, batch_size=3)
    assert [caption for caption, _ in second.drawn] == CAPTIONS[9:]
    assert (drawn.new, drawn.kept) == (len(CAPTIONS) - 9, 9)
    before, third = snapshot(folder), Unreliable()
    assert draw(folder, third).new == 0
    assert third.drawn == []
    assert snapshot(folder) == before


def test_a_set_that_is_being_drawn_is_not_trained_on(tmp_path):
    folder = tmp_path / "0"
    with pytest.raises(KeyboardInterrupt):
        draw(folder, Unreliable(stops_after=9), batch_size=3)
    with pytest.raises(UserError, match=f"{folder} is not finished"):
        read_anomalies(folder, GARDEN)
    draw(folder, Unreliable())
    assert len(read_anomalies(folder, GARDEN)) == len(CAPTIONS)


def test_images_that_cost_money_are_stored_one_by_one(tmp_path):
    drawer = Unreliable(stops_after=5)
    drawer.one_at_a_time = True
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "0", drawer, batch_size=8)
    assert len(read_items(tmp_path / "0")) == 5


def run_and_kill(target, condition):
    """Run a function in a process of its own and kill it as soon as the condition holds."""
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    deadline = time.monotonic() + 60
    while not condition():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


class Slow(Stopping):
    def draw(self, captions, seeds):
        time.sleep(0.01)
        return super().draw(captions, seeds)


def test_killed_at_any_point_ends_with_the_same_folder(painted, tmp_path):
    folder = tmp_path / "0"
    for n_images in (1, 6, 10, 17):
        run_and_kill(
            lambda: draw(folder, Slow(10**6), batch_size=4),
            lambda n=n_images: len(list(folder.glob("image_*.png"))) >= n,
        )
        assert not (folder / "image.json").exists()
        for item in read_items(folder):
            assert sha256(folder / item.file) == item.sha256
    draw(folder, batch_size=4)
    assert snapshot(folder) == snapshot(painted)


def test_diffusion_killed_ends_with_the_same_folder(tmp_path):
    model = tiny_diffusion(tmp_path / "model")
    drawer = build_drawer(DrawerSettings(model=str(model), steps=2, device="cpu"), GARDEN)
    draw(tmp_path / "whole", drawer, RECORDS[:12], batch_size=3)
    folder = tmp_path / "0"
    drawer.draw = slowed(drawer.draw)
    run_and_kill(
        lambda: draw(folder, drawer, RECORDS[:12], batch_size=3),
        lambda: len(list(folder.glob("image_*.png"))) >= 5,
    )
    draw(folder, drawer, RECORDS[:12], batch_size=3)
    assert snapshot(folder) == snapshot(tmp_path / "whole")


def slowed(function):
    def wrapped(*words):
        time.sleep(0.05)
        return function(*words)

    return wrapped


@pytest.mark.parametrize("cut", [1, 40])
def test_torn_manifest_and_images_without_line_are_mended(cut, painted, tmp_path):
    folder = shutil.copytree(painted, tmp_path / "0")
    manifest = folder / MANIFEST
    manifest.write_bytes(manifest.read_bytes()[:-cut])
    (folder / file_name(len(CAPTIONS))).write_bytes(
        b"half an image" if cut > 1 else (painted / file_name(24)).read_bytes()
    )
    for name in ("image.json", "text_caption.json"):
        (folder / name).unlink()
        (folder / f".{name}.x7_a.tmp").write_bytes(b"[")
    (folder / ".image_00003.png.abc.tmp").write_bytes(b"half")
    (folder / ".manifest.jsonl.abc.tmp").write_bytes(b"half")
    draw(folder)
    assert snapshot(folder) == snapshot(painted)


def test_lost_image_is_drawn_again_and_a_changed_one_is_named(painted, tmp_path):
    folder = shutil.copytree(painted, tmp_path / "0")
    (folder / file_name(5)).unlink()
    assert draw(folder).new == 1
    assert snapshot(folder) == snapshot(painted)
    (folder / file_name(5)).write_bytes((folder / file_name(6)).read_bytes())
    with pytest.raises(UserError, match=r"image_00005\.png was changed since it was drawn"):
        draw(folder)


def test_full_disk_loses_nothing(painted, tmp_path, monkeypatch):
    folder, calls = tmp_path / "0", []
    fsync = os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as error:
            draw(folder, batch_size=4)
    assert str(folder) in error.value.filename
    assert not list(folder.glob(".*.tmp"))
    draw(folder, batch_size=4)
    assert snapshot(folder) == snapshot(painted)


def test_longer_list_of_captions_goes_on(painted, tmp_path):
    folder = tmp_path / "0"
    draw(folder, records=RECORDS[:10])
    assert len(read_json(folder / "image.json")) == 10
    assert draw(folder).kept == 10
    assert snapshot(folder) == snapshot(painted)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("caption", r"other captions \(image_00003.png\)"),
        ("shorter", r"other captions \(image_00006.png\)"),
        ("drawer", "drawer garden there, unreliable now"),
        ("settings", "version 0 there, 1 now"),
        ("seed", "another --seed"),
    ],
)
def test_folder_of_another_run_is_refused_and_untouched(change, part, tmp_path):
    folder, drawer = tmp_path / "0", painter()
    if change == "settings":
        drawer.settings = {"version": 0}
    draw(folder, drawer, RECORDS[:6])
    before, records = snapshot(folder), list(RECORDS[:6])
    if change == "caption":
        records[2] = {"caption": "another"}
    with pytest.raises(UserError, match=f"{part}.*choose another folder"):
        draw(
            folder,
            Unreliable() if change == "drawer" else painter(),
            records[:5] if change == "shorter" else records,
            seed=1 if change == "seed" else 0,
        )
    assert snapshot(folder) == before


def test_two_processes_cannot_fill_one_folder(tmp_path):
    drawer, inner, second = painter(), painter().draw, Unreliable()

    def draw_and_try(captions, seeds):
        with pytest.raises(UserError, match="being filled by another process"):
            draw(tmp_path / "0", second)
        return inner(captions, seeds)

    drawer.draw = draw_and_try
    draw(tmp_path / "0", drawer)
    assert second.drawn == []
