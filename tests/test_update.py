"""Eq. (8): the update of the anomaly set."""

from dataclasses import replace

import numpy as np
import pytest
from anomaly_sets import GARDEN, draw_set, item, items, judge, names
from toy import snapshot

from kka.anomalies import (
    MANIFEST,
    file_name,
    file_number,
    live,
    read_items,
)
from kka.datasets.task import read_anomalies
from kka.errors import UserError
from kka.update import choose_update, update


@pytest.fixture
def sets(tmp_path):
    """Ten images of round 0, all easy, and six fresh ones of round 1, of which four are hard."""
    old, fresh = draw_set(tmp_path / "round_0" / "0", 10), draw_set(tmp_path / "fresh", 6, seed=1, round=1)
    judge(old, hard=())
    judge(fresh, hard=(0, 2, 3, 5))
    return old, fresh


def run_update(sets, out, mode="add", per_round=3, seed=0):
    old, fresh = sets
    return update(old, fresh, out, GARDEN, mode, 1, np.random.default_rng(seed), per_round)


def test_add_keeps_all_and_rep_keeps_the_size(sets, tmp_path):
    added = run_update(sets, tmp_path / "add")
    assert (added.added, added.replaced, added.size) == (3, 0, 13)
    assert names(tmp_path / "add") == [file_name(k) for k in range(1, 14)]
    replaced = run_update(sets, tmp_path / "rep", "rep")
    assert (replaced.added, replaced.replaced, replaced.size) == (3, 3, 10)
    gone = [it for it in read_items(tmp_path / "rep") if it.replaced is not None]
    assert len(gone) == 3
    assert {it.replaced for it in gone} == {1}
    assert names(tmp_path / "rep")[-3:] == [file_name(k) for k in (11, 12, 13)]
    assert not any((tmp_path / "rep" / it.file).exists() for it in gone)


def test_new_ones_are_hard_and_bring_their_provenance(sets, tmp_path):
    run_update(sets, tmp_path / "out", per_round=59)
    fresh, new = read_items(sets[1]), read_items(tmp_path / "out")[10:]
    hard = [it for it in fresh if it.status == "hard"]
    assert [replace(it, file="") for it in new] == [replace(it, file="") for it in hard]
    assert {it.round for it in new} == {1}
    for it, source in zip(new, hard, strict=True):
        assert (tmp_path / "out" / it.file).read_bytes() == (sets[1] / source.file).read_bytes()
    images = read_anomalies(tmp_path / "out", GARDEN)
    assert [block[0] for block in images.captions] == [it.caption for it in read_items(tmp_path / "out")]


def test_inputs_are_left_alone_and_repeating_gives_the_same(sets, tmp_path):
    before = snapshot(tmp_path)
    run_update(sets, tmp_path / "out", "rep")
    whole = snapshot(tmp_path / "out")
    assert {k: v for k, v in snapshot(tmp_path).items() if not k.startswith("out/")} == before
    for damage in ("image_00011.png", "image.json", "text_caption.json"):  # killed before it was written
        (tmp_path / "out" / damage).unlink()
        run_update(sets, tmp_path / "out", "rep")
        assert snapshot(tmp_path / "out") == whole
    (tmp_path / "out" / MANIFEST).write_bytes(b"")
    run_update(sets, tmp_path / "out", "rep")
    assert snapshot(tmp_path / "out") == whole
    run_update(sets, tmp_path / "other", "rep", seed=1)
    assert names(tmp_path / "other") != names(tmp_path / "out")


def test_update_killed_while_it_copies_is_repeated(sets, tmp_path, monkeypatch):
    run_update(sets, tmp_path / "whole", "rep")
    copied = []

    def stop(path, data):
        if len(copied) == 5:
            raise KeyboardInterrupt
        copied.append(path)
        path.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr("kka.update.write_bytes", stop)
        with pytest.raises(KeyboardInterrupt):
            run_update(sets, tmp_path / "out", "rep")
    assert not (tmp_path / "out" / "image.json").exists()
    run_update(sets, tmp_path / "out", "rep")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_two_rounds(sets, tmp_path):
    first, second = tmp_path / "round_1", tmp_path / "round_2"
    run_update(sets, first, "rep")
    judge(first, hard=(8, 9))
    fresh = draw_set(tmp_path / "fresh_2", 6, seed=2, round=2)
    judge(fresh, hard=range(6))
    update(first, fresh, second, GARDEN, "rep", 2, np.random.default_rng(0), per_round=59)
    everything = read_items(second)
    assert len(live(everything)) == 10
    assert [it.replaced for it in everything].count(1) == 3
    assert [it.replaced for it in everything].count(2) == 6
    assert [it.file for it in everything] == [file_name(k) for k in range(1, 20)]
    assert all(
        it.file in names(second) for it in read_items(first) if it.status == "hard" and not it.replaced
    )


def test_sizes_of_the_paper():
    base, rng = items(200, "easy"), np.random.default_rng(0)
    for _ in range(2):
        fresh = items(100, "hard", start=1 + len(base))
        leaving, entering = choose_update(base, fresh, "add", 59, rng)
        assert not leaving
        base = base + entering
    assert len(base) == 318


@pytest.mark.parametrize(
    ("n_easy", "n_hard", "per_round", "expected"),
    [(10, 4, 59, 4), (10, 4, 3, 3), (2, 4, 59, 2), (10, 0, 59, 0), (0, 4, 59, 0), (10, 4, 0, 0)],
)
def test_rep_exchanges_as_many_as_there_are(n_easy, n_hard, per_round, expected):
    base = [*items(5, "hard"), *items(n_easy, "easy", start=6)]
    fresh = [*items(n_hard, "hard", start=50), *items(3, "easy", start=80), *items(3, "new", start=90)]
    leaving, entering = choose_update(base, fresh, "rep", per_round, np.random.default_rng(0))
    assert len(leaving) == len(entering) == expected
    assert {it.status for it in leaving} <= {"easy"}
    assert {it.status for it in entering} <= {"hard"}


def test_choice_is_random_but_seeded():
    base, fresh = items(40, "easy"), items(40, "hard", start=41)
    choices = [choose_update(base, fresh, "rep", 10, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert choices[0] == choices[1] != choices[2]
    counts = np.zeros(81, int)
    for seed in range(300):
        for chosen in choose_update(base, fresh, "rep", 10, np.random.default_rng(seed)):
            counts[[file_number(it.file) for it in chosen]] += 1
    assert counts.sum() == 300 * 20
    assert counts[1:].min() > 40  # 75 expected
    assert counts[1:].max() < 115


def test_an_image_does_not_enter_twice():
    base = [item(1, "easy"), item(2, "easy", replaced=1)]
    fresh = [item(7, "hard", sha256=it.sha256) for it in base] + [item(8, "hard")]
    for mode in ("add", "rep"):
        _, entering = choose_update(base, fresh, mode, 59, np.random.default_rng(0))
        assert entering == fresh[2:]


@pytest.mark.parametrize(
    ("mode", "per_round", "part"),
    [
        ("swap", 59, "--mode must be add or rep"),
        ("add", -1, "--per_round at least 0"),
        ("rep", 59, "the current set have not been split"),
    ],
)
def test_bad_updates_are_one_sentence(mode, per_round, part):
    with pytest.raises(UserError, match=part):
        choose_update(items(3, "new"), items(3, "hard", 4), mode, per_round, np.random.default_rng(0))


def test_fresh_images_must_have_been_split():
    with pytest.raises(UserError, match=r"the fresh images have not been split.*score them first"):
        choose_update(items(3, "easy"), items(3, "new", 4), "add", 59, np.random.default_rng(0))


def test_new_set_needs_a_folder_of_its_own(sets):
    for folder in sets:
        with pytest.raises(UserError, match="is an input of the update"):
            run_update(sets, folder)


@pytest.mark.parametrize("damage", ["changed", "lost"])
def test_changed_image_is_named(damage, sets, tmp_path):
    path = sets[0] / file_name(4)
    path.write_bytes(b"x") if damage == "changed" else path.unlink()
    with pytest.raises(UserError, match=f"{path} .*restore it"):
        run_update(sets, tmp_path / "out")


@pytest.mark.parametrize("kind", ["images", "list", "file"])
def test_folders_of_others_are_refused_and_untouched(kind, sets, tmp_path):
    out = tmp_path / "0"
    if kind == "file":
        out.write_bytes(b"x")
    else:
        out.mkdir()
        (out / {"images": "mine.JPG", "list": "image.json"}[kind]).write_bytes(b"x")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"choose (another|a) folder"):
        run_update(sets, out)
    assert snapshot(tmp_path) == before
