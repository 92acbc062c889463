"""Folder 0: its manifest and its lists."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
from anomaly_sets import GARDEN, draw_set, item, items, judge, names
from toy import read_json

from kka.anomalies import (
    MANIFEST,
    appending,
    file_name,
    file_number,
    live,
    read_items,
    read_lines,
    record_split,
    refuse_foreign,
    write_set,
)
from kka.datasets import get_spec
from kka.datasets.layout import ANOMALY_FOLDER
from kka.datasets.task import read_anomalies
from kka.errors import UserError


def test_names_are_15_characters_and_count():
    for number in (1, 42, 99_999):
        assert len(file_name(number)) == 15
        assert file_number(file_name(number)) == number


def test_lists_hold_the_images_that_are_in_the_set(tmp_path):
    everything = [item(1), item(2, replaced=1), item(4), item(5, caption='ü\u2028 "quoted"\n')]
    write_set(tmp_path, everything, GARDEN)
    assert read_items(tmp_path) == everything
    assert names(tmp_path) == ["image_00001.png", "image_00004.png", "image_00005.png"]
    flat = read_json(tmp_path / "text_caption.json")
    assert flat == [it.caption for it in live(everything) for _ in range(10)]
    assert len((tmp_path / MANIFEST).read_text().splitlines()) >= 4


@pytest.mark.parametrize("name", ["flower", "ucm_caption", "cifar100"])
def test_captions_are_in_the_format_of_the_data_set(name, tmp_path):
    spec = get_spec(name)
    folder = draw_set(tmp_path / "0", 3)
    write_set(folder, read_items(folder), spec)
    images = read_anomalies(folder, spec)
    assert [path.name for path in images.paths] == [file_name(k) for k in (1, 2, 3)]
    assert all(len(set(block)) == 1 and len(block) == spec.captions_per_image for block in images.captions)
    assert images.captions[1][0] == read_items(folder)[1].caption
    assert set(images.classes) == {str(ANOMALY_FOLDER)}


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_torn_last_line_is_passed_over_and_cut_off(cut, tmp_path):
    with appending(tmp_path) as append:
        append(items(3, "new"))
    path = tmp_path / MANIFEST
    path.write_bytes(path.read_bytes()[: -1 - cut])
    assert [it.file for it in read_items(tmp_path)] == [file_name(1), file_name(2)]
    with appending(tmp_path) as append:
        append([item(3)])
    assert read_items(tmp_path) == items(3, "new")
    assert path.read_bytes().count(b"\n") == 3


def test_whole_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / MANIFEST
    path.write_text(json.dumps(asdict(item(1))))
    assert read_items(tmp_path) == [item(1)]
    with appending(tmp_path) as append:
        append([item(2)])
    assert read_items(tmp_path) == [item(1), item(2)]


def test_character_cut_in_two_is_a_torn_line_too(tmp_path):
    with appending(tmp_path) as append:
        append([item(1), item(2, caption="ü" * 50)])
    data = (tmp_path / MANIFEST).read_bytes()
    (tmp_path / MANIFEST).write_bytes(data[: data.rindex("ü".encode()) + 1])
    assert read_items(tmp_path) == [item(1)]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[]", "line 2 is no record"),
        ('{"file": "a"}', "line 2 is no record"),
        (json.dumps({**asdict(item(1)), "file": "../../passwd"}), "line 2 names the file '../../passwd'"),
        (json.dumps({**asdict(item(1)), "file": 3}), "line 2 has 3 as 'file'; restore it or remove"),
        (json.dumps({**asdict(item(1)), "drawer_settings": None}), "line 2 has null as 'drawer_settings'"),
        (json.dumps({**asdict(item(1)), "caption": 5}), "line 2 has 5 as 'caption'"),
        (json.dumps({**asdict(item(1)), "sha256": None}), "line 2 has null as 'sha256'"),
        (json.dumps({**asdict(item(1)), "examples": ["a", 1]}), "line 2 has .* as 'examples'"),
        (json.dumps({**asdict(item(1)), "score": float("nan")}), "line 2 has NaN as 'score'"),
        (json.dumps({**asdict(item(1)), "status": "foo"}), "line 2 has the status 'foo'; it is one of new"),
    ],
)
def test_damaged_manifest_is_named_with_its_line(line, part, tmp_path):
    good = json.dumps(asdict(item(1)))
    (tmp_path / MANIFEST).write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError, match=part):
        read_items(tmp_path)


def test_last_line_of_somebody_else_is_not_cut_off(tmp_path):
    (tmp_path / MANIFEST).write_text("my notes")
    with pytest.raises(UserError, match=r"manifest\.jsonl: the last line is no JSON"), appending(tmp_path):
        pass
    assert (tmp_path / MANIFEST).read_text() == "my notes"


def test_lines_of_a_file_with_windows_ends_and_a_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"a": "ü"}\r\n\r\n{"a": 2}'.encode())
    assert read_lines(path) == [(1, {"a": "ü"}), (3, {"a": 2})]


def test_manifests_of_several_processes_are_read_together_and_merged(tmp_path):
    with appending(tmp_path) as append:
        append([item(2, seed=0)])
    for index, numbers in enumerate([(1, 4), (2, 5), (3,)]):
        with appending(tmp_path, (index, 3)) as append:
            append([item(number) for number in numbers])
    assert read_items(tmp_path) == items(5, "new")  # the newer line for image 2 counts
    write_set(tmp_path, read_items(tmp_path), GARDEN)
    assert [path.name for path in tmp_path.glob("*.jsonl")] == [MANIFEST]
    assert read_items(tmp_path) == items(5, "new")


@pytest.mark.parametrize(
    ("first", "second"), [((0, 1), (0, 1)), ((0, 1), (1, 2)), ((0, 2), (0, 1)), ((1, 2), (1, 2))]
)
def test_one_launch_at_a_time_fills_a_folder(tmp_path, first, second):
    with appending(tmp_path, first), pytest.raises(UserError, match="another process"):
        appending(tmp_path, second).__enter__()
    with appending(tmp_path, (0, 2)), appending(tmp_path, (1, 2)):
        pass
    with appending(tmp_path, second):
        pass


def test_a_split_waits_until_the_folder_is_filled(tmp_path):
    folder = draw_set(tmp_path / "0", 2)
    with appending(folder) as append:
        with pytest.raises(UserError, match="another process"):
            judge(folder, hard=(0,))
        append([item(3)])
    assert len(read_items(folder)) == 3


def test_split_is_recorded_and_changes_nothing_else(tmp_path):
    folder = draw_set(tmp_path / "0", 5)
    before = read_items(folder)
    judge(folder, hard=(1, 4), easy=(0,), scores=np.array([5.0, 1.0, 3.0, 4.0, 0.5], dtype=np.float32))
    after = read_items(folder)
    assert [it.status for it in after] == ["easy", "hard", "between", "between", "hard"]
    assert [it.score for it in after] == [5.0, 1.0, 3.0, 4.0, 0.5]
    assert [replace(it, status="new", score=None) for it in after] == before


def test_split_counts_places_of_the_live_images(tmp_path):
    write_set(tmp_path, [item(1), item(2, replaced=1), item(3)], GARDEN)
    judge(tmp_path, hard=(1,))
    assert [it.status for it in read_items(tmp_path)] == ["easy", "new", "hard"]


@pytest.mark.parametrize(
    ("index", "caption", "part"),
    [(2, "caption 3", "2 images in its manifest, fewer than were scored"), (1, "a rose", "'a rose'")],
)
def test_a_split_of_another_folder_is_refused(tmp_path, index, caption, part):
    write_set(tmp_path, items(2, "new"), GARDEN)
    split = SimpleNamespace(
        index=(index,), captions=((caption,),), scores=np.zeros(1), hard=np.ones(1, bool),
        easy=np.array([], int),
    )  # fmt: skip
    with pytest.raises(UserError, match=part):
        record_split(tmp_path, split)
    assert {it.status for it in read_items(tmp_path)} == {"new"}


def test_folders_without_images_are_nobodys(tmp_path):
    refuse_foreign(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("x")
    refuse_foreign(tmp_path)
