"""Captions into an anomaly folder: order, pairing, failures, several processes."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from tiny_diffusion import tiny_diffusion
from toy import read_json, snapshot
from unreliable_drawer import CAPTIONS, GARDEN, RECORDS, Unreliable, draw

from kka.anomalies import LOCK, MANIFEST, file_name, read_items
from kka.datasets import garden
from kka.datasets.task import read_anomalies
from kka.draw import finish, image_seed, read_captions
from kka.drawers import DrawerSettings, build_drawer
from kka.errors import UserError
from kka.files import sha256


def test_folder_is_whole_and_paired(painted):
    items = read_items(painted)
    assert read_json(painted / "image.json") == [file_name(k) for k in range(1, len(CAPTIONS) + 1)]
    assert [item.caption for item in items] == CAPTIONS
    images = read_anomalies(painted, GARDEN)
    assert [set(block) for block in images.captions] == [{caption} for caption in CAPTIONS]
    assert sorted(p.name for p in painted.iterdir() if p.suffix != ".png") == sorted(
        [LOCK, MANIFEST, "image.json", "text_caption.json"]
    )
    for number, item in enumerate(items, 1):
        assert item.seed == image_seed(0, item.caption, number)
        assert sha256(painted / item.file) == item.sha256
        with Image.open(painted / item.file) as image:
            expected = garden.draw_caption(item.caption, np.random.default_rng(item.seed))
            assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_manifest_says_where_each_image_comes_from(painted):
    line = json.loads((painted / MANIFEST).read_text().splitlines()[3])
    assert {key: line[key] for key in RECORDS[3]} == RECORDS[3]
    assert line["drawer"] == "garden"
    assert line["drawer_settings"] == {"version": garden.VERSION}
    assert line["status"] == "new"
    assert list(line)[:12] == [
        "file", "sha256", "caption", "prompt_sha256", "examples", "llm", "adapter", "drawer",
        "drawer_settings", "seed", "round", "source",
    ]  # fmt: skip


def test_seeds_differ_between_images_captions_attempts_and_runs():
    seeds = [
        image_seed(seed, caption, number, attempt)
        for seed in (0, 1) for caption in "ab" for number in (1, 2) for attempt in (0, 1, 2)
    ]  # fmt: skip
    assert len(set(seeds)) == 24
    assert max(seeds) < 2**63


def test_same_caption_twice_gives_two_images(tmp_path):
    draw(tmp_path / "0", records=[{"caption": "a red flower"}] * 2)
    first, second = read_items(tmp_path / "0")
    assert first.sha256 != second.sha256
    assert (first.examples, first.llm, first.round) == ([], None, 0)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_batches_do_not_matter(batch_size, painted, tmp_path):
    drawn = draw(tmp_path / "0", batch_size=batch_size)
    assert snapshot(tmp_path / "0") == snapshot(painted)
    assert (drawn.new, drawn.kept, drawn.missing) == (len(CAPTIONS), 0, 0)


@pytest.mark.parametrize("n", [2, 3, 30])
def test_number_of_processes_does_not_matter(n, painted, tmp_path):
    for index in reversed(range(n)):
        draw(tmp_path / "0", shard=(index, n), batch_size=2)
        assert not (tmp_path / "0" / "image.json").exists()
    finish(tmp_path / "0", GARDEN, Counter())
    assert snapshot(tmp_path / "0") == snapshot(painted)


def test_failures_leave_gaps_and_later_runs_fill_them(tmp_path):
    folder, fails = tmp_path / "0", (CAPTIONS[0], CAPTIONS[7], CAPTIONS[-1])
    drawn = draw(folder, Unreliable(fails))
    assert (drawn.new, drawn.missing) == (len(CAPTIONS) - 3, 3)
    assert drawn.reasons == {"content filter": 3}
    names = read_json(folder / "image.json")
    assert names == [file_name(k) for k, caption in enumerate(CAPTIONS, 1) if caption not in fails]
    images = read_anomalies(folder, GARDEN)
    assert [block[0] for block in images.captions] == [c for c in CAPTIONS if c not in fails]
    again = Unreliable()
    draw(folder, again)
    assert [caption for caption, _ in again.drawn] == list(fails)
    draw(tmp_path / "never_failed", Unreliable())
    assert snapshot(folder) == snapshot(tmp_path / "never_failed")


def test_failed_images_are_redrawn_with_other_seeds_but_not_for_ever(tmp_path):
    drawer = Unreliable(fails=(CAPTIONS[1],), attempts=4)
    drawn = draw(tmp_path / "0", drawer, RECORDS[:3])
    assert drawn.reasons == {"content filter": 4}
    seeds = [seed for caption, seed in drawer.drawn if caption == CAPTIONS[1]]
    assert seeds == [image_seed(0, CAPTIONS[1], 2, attempt) for attempt in range(4)]
    assert len(drawer.drawn) == 6


def test_black_images_of_a_real_safety_checker_are_redrawn(tmp_path):
    model = tiny_diffusion(tmp_path / "model", flagged=0.12)
    settings = DrawerSettings(model=str(model), steps=2, device="cpu")
    drawer = build_drawer(settings, GARDEN)
    records = [{"caption": "a flower"}] * 8
    drawn = draw(tmp_path / "0", drawer, records)
    items = read_items(tmp_path / "0")
    assert drawn.reasons["safety checker"] > 0
    first = [item for item in items if item.seed == image_seed(0, "a flower", int(item.file[6:11]))]
    assert 0 < len(first) < len(items)
    for item in items:
        with Image.open(tmp_path / "0" / item.file) as image:
            assert np.asarray(image).any()
    before = snapshot(tmp_path / "0")
    again = draw(tmp_path / "0", build_drawer(settings, GARDEN), records)
    assert again.kept == len(items)
    if len(items) == len(records):
        assert snapshot(tmp_path / "0") == before


def test_no_image_at_all_is_one_sentence(tmp_path):
    drawer = Unreliable(fails=CAPTIONS)
    with pytest.raises(UserError, match=r"none of the captions could be drawn \(content filter: 24\)"):
        draw(tmp_path / "0", drawer)
    draw(tmp_path / "0", Unreliable())  # and the folder is not lost


def test_folder_of_somebody_else_is_refused_and_untouched(tmp_path):
    (tmp_path / "image_00001.png").write_bytes(b"mine")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} holds images but no manifest.jsonl"):
        draw(tmp_path)
    assert snapshot(tmp_path) == before


def test_more_captions_than_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="100000 captions are more than the 99999"):
        draw(tmp_path / "0", records=[{"caption": "x"}] * 100_000)


def test_captions_of_the_official_text_file(tmp_path):
    path = tmp_path / "flower.txt"
    path.write_bytes("\ufeffa red flower\r\n\r\n  blüe “petals”  \r\nlast".encode())
    assert [record["caption"] for record in read_captions(path)] == ["a red flower", "blüe “petals”", "last"]


def test_captions_of_the_describer(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS) + '{"caption": "hal')
    assert read_captions(path) == RECORDS


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.txt", b"", "holds no caption"),
        ("a.txt", b" \n\n", "holds no caption"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b"", "holds no caption"),
        ("a.jsonl", b"{}\n", 'line 1 must be an object with a "caption"'),
        ("a.jsonl", b'{"caption": 3}\n', "line 1 must be"),
        ("a.jsonl", b'{"caption": " "}\n', "line 1 must be"),
        ("a.jsonl", b'{"caption": "x"}\n["y"]\n', "line 2 must be"),
        ("a.jsonl", b'{"caption": "x", "examples": null}\n', "line 1 has null as 'examples'"),
        ("a.jsonl", b"x\n{}\n", "line 1 is not valid JSON"),
        ("a.jsonl", b'{"caption": "\xff"}\n', "line 1 is not valid JSON"),
    ],
)
def test_bad_caption_files_are_one_sentence(name, content, part, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=part) as error:
        read_captions(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_missing_caption_file_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_captions(tmp_path / "captions.jsonl")
