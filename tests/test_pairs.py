"""Preference pairs: where captions come from, what is dropped, how they are split."""

from collections import Counter

import pytest
from toy import read_json
from toy_pairs import PROMPT, easy_captions, hard_captions, write_folder0, write_list, write_run

from kka.datasets import flower
from kka.errors import UserError
from kka.pairs import NothingToPreferError, PairSettings, build_pairs, pair_up, read_pairs, write_pairs


def row(chosen="a hard one", rejected="an easy one", prompt="describe"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def rows(n):
    return [row(f"hard {i}", f"easy {i}") for i in range(n)]


def build(run, folder=None, prompt=PROMPT, spec=None, seed=0, **settings):
    return build_pairs(run, folder, PairSettings(**{"min_pairs": 1, **settings}), seed, prompt, spec)


def read(path, validation=None, seed=0, **settings):
    return read_pairs(path, PairSettings(**{"min_pairs": 1, **settings}), seed, validation)


@pytest.mark.parametrize("copies", [10, 5, 1])
def test_one_caption_per_image(tmp_path, copies):
    pairs = build(write_run(tmp_path / "run", hard_captions(6), easy_captions(9), copies), validation_share=0)
    assert {pair["chosen"] for pair in pairs.train} == set(hard_captions(6))
    assert {pair["rejected"] for pair in pairs.train} <= set(easy_captions(9))
    assert {pair["prompt"] for pair in pairs.train} == {pairs.prompt} == {PROMPT}
    assert pairs.counts == {"hard_images": 6, "easy_images": 9, "train": 24, "validation": 0}


def test_pairing_is_balanced():
    pairs = pair_up(hard_captions(7), easy_captions(5), 3)
    assert len(set(pairs)) == len(pairs) == 21
    assert set(Counter(chosen for chosen, _ in pairs).values()) == {3}
    assert set(Counter(rejected for _, rejected in pairs).values()) <= {4, 5}
    assert len(pair_up(hard_captions(2), easy_captions(3), 10)) == 6


def captions_of(pairs):
    return {pair[side] for pair in pairs for side in ("chosen", "rejected")}


def test_a_seed_gives_one_pairing(tmp_path):
    run = write_run(tmp_path / "run", hard_captions(8), easy_captions(20))
    assert build(run, seed=3) == build(run, seed=3) != build(run, seed=4)


def test_validation_captions_are_unseen(tmp_path):
    pairs = build(write_run(tmp_path / "run", hard_captions(50), easy_captions(90)), validation_share=0.2)
    assert pairs.counts["train"] + pairs.counts["validation"] == 50 * 4
    assert 4 <= pairs.counts["validation"] / 4 <= 18  # 10 are expected
    assert not captions_of(pairs.train) & captions_of(pairs.validation)


def test_captions_held_out_stay_so_in_later_rounds(tmp_path):
    hard, easy = hard_captions(20), easy_captions(40)
    first = build(write_run(tmp_path / "first", hard, easy), validation_share=0.3)
    second = build(write_run(tmp_path / "second", [*easy[:30], "new 1", "new 2"], hard), validation_share=0.3)
    trained = captions_of(first.train) | captions_of(second.train)
    assert not trained & (captions_of(first.validation) | captions_of(second.validation))


def test_a_single_caption_is_not_held_out(tmp_path):
    pairs = build(write_run(tmp_path / "run", hard_captions(1), easy_captions(3)))
    assert pairs.counts["validation"] == 0
    assert pairs.counts["train"] == 2  # of three easy ones, one is held out


def test_bad_captions_are_dropped_and_counted(tmp_path):
    hard = ["a", "", None, ["list"], "A ", "both", "Both", 3]
    pairs = build(write_run(tmp_path / "run", hard, ["b", "  ", "both", "Both", "c"], 1), validation_share=0)
    assert sorted((pair["chosen"], pair["rejected"]) for pair in pairs.train) == [("a", "b"), ("a", "c")]
    assert pairs.counts == {
        "hard_images": 8, "easy_images": 5, "dropped_empty": 2, "dropped_not_text": 3, "dropped_duplicate": 3,
        "dropped_both_sides": 1, "train": 2, "validation": 0,
    }  # fmt: skip


def test_a_caption_of_several_images_counts_by_its_share_of_hard_ones(tmp_path):
    run = write_run(tmp_path / "run", ["lamp", "lamp", "car"], ["Lamp", "car", "car ", "sea"])
    pairs = build(run, validation_share=0)
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs.train} == {("lamp", "car"), ("lamp", "sea")}
    assert pairs.counts == {
        "hard_images": 3, "easy_images": 4, "dropped_duplicate": 2, "dropped_outvoted": 2, "train": 2,
        "validation": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("hard", "easy", "part"), [(0, 5, "d_samples"), (5, 0, "e_samples"), (0, 0, "d_samples")]
)
def test_nothing_to_prefer(tmp_path, hard, easy, part):
    run = write_run(tmp_path / "run", hard_captions(hard), easy_captions(easy))
    with pytest.raises(NothingToPreferError, match=f"{part}.*nothing to prefer"):
        build(run, prompt=None)


def test_where_nearly_all_are_hard_those_that_are_less_often_are_rejected(tmp_path):
    run = write_run(tmp_path / "run", ["lamp", "lamp", "car", "sea", "sea", "sea"], ["lamp", "sea"])
    pairs = build(run, validation_share=0)  # 3 of 4 are hard, 2 of 3 lamps, and of seas as many as of all
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs.train] == [("car", "lamp")]
    assert (pairs.counts["dropped_outvoted"], pairs.counts["dropped_both_sides"]) == (1, 1)


def test_only_shared_captions(tmp_path):
    run = write_run(tmp_path / "run", ["same"], ["same"])
    with pytest.raises(NothingToPreferError, match="dropped_both_sides 1"):
        build(run)


def test_too_few_pairs(tmp_path):
    run = write_run(tmp_path / "run", hard_captions(2), easy_captions(2))
    with pytest.raises(UserError, match=r"1 valid training pairs .*--min_pairs 4"):
        build(run, min_pairs=4)


def test_captions_and_prompt_of_the_manifest(tmp_path):
    captions = hard_captions(5) + easy_captions(5)
    folder = write_folder0(tmp_path / "0", captions)
    run = write_run(tmp_path / "run", hard_captions(5), easy_captions(5))
    told = build(run, folder)
    assert told == build(run, folder, prompt=None, spec=flower.SPEC)
    # Captions are found by the image where the run has none.
    bare = [[[i, 1, 0.0], []] for i in range(10)]
    write_list(run / "d_samples.json", bare[:5])
    write_list(run / "e_samples.json", bare[5:])
    assert build(run, folder) == told


def test_another_prompt_is_refused(tmp_path):
    folder = write_folder0(tmp_path / "0", hard_captions(5) + easy_captions(5))
    run = write_run(tmp_path / "run", hard_captions(5), easy_captions(5))
    with pytest.raises(
        UserError, match=r"10 of 10 images \(image_00001.png.*another prompt than 'Describe a tree'"
    ):
        build(run, folder, prompt="Describe a tree")
    with pytest.raises(UserError, match=r"cannot be read .*--prompt"):
        build(run, folder, prompt=None)
    with pytest.raises(UserError, match="prompt is empty"):
        build(run, prompt=" ")


def test_captions_from_elsewhere_take_any_prompt(tmp_path):
    folder = write_folder0(tmp_path / "0", hard_captions(5) + easy_captions(5), prompt=None)
    run = write_run(tmp_path / "run", hard_captions(5), easy_captions(5))
    assert build(run, folder, prompt="Describe a tree").prompt == "Describe a tree"


def test_another_folder_is_refused(tmp_path):
    run = write_run(tmp_path / "run", hard_captions(3), easy_captions(3))
    small = write_folder0(tmp_path / "0", hard_captions(3))
    with pytest.raises(UserError, match=r"item 0 is image 3, but .* lists 3 images.*--anomaly_path"):
        build(run, small)
    other = write_folder0(tmp_path / "other", easy_captions(6))
    with pytest.raises(
        UserError, match=r"item 0 has the caption 'hard flower number 0', the manifest has 'easy"
    ):
        build(run, other)


@pytest.mark.parametrize("value", [{"a": 1}, [1], [[1, ["x"]]], [[[0, 1], ["x"]]]])
def test_a_malformed_split_is_refused(tmp_path, value):
    run = write_run(tmp_path / "run", hard_captions(3), easy_captions(3))
    write_list(run / "d_samples.json", value)
    with pytest.raises(UserError, match=r"d_samples\.json"):
        build(run)


def test_round_trip(tmp_path):
    pairs = build(write_run(tmp_path / "run", hard_captions(6), easy_captions(6)))
    path = tmp_path / "deep" / "pairs.json"
    write_pairs(path, pairs)
    again = read(path)
    assert (again.prompt, again.train, again.validation) == (pairs.prompt, pairs.train, pairs.validation)
    assert read_json(path)["counts"] == pairs.counts


def test_official_shape(tmp_path):
    official = [{**pair, "prompt": [pair["prompt"]]} for pair in rows(20)]
    pairs = read(write_list(tmp_path / "training_data.json", official))
    assert pairs.prompt == "describe"
    assert len(pairs.train) + len(pairs.validation) == 20
    assert pairs.validation
    chosen = [{pair["chosen"] for pair in part} for part in (pairs.train, pairs.validation)]
    assert not chosen[0] & chosen[1]


def test_official_validation_file(tmp_path):
    held = [row("hard 0", "easy 9"), row("hard new", "easy 3")]
    pairs = read(write_list(tmp_path / "t.json", rows(5)), write_list(tmp_path / "v.json", held))
    assert len(pairs.train) == 5
    assert pairs.validation == [held[1]]
    assert pairs.counts == {"dropped_in_both_splits": 1, "train": 5, "validation": 1}


def test_bad_validation_file_is_named(tmp_path):
    pairs = write_list(tmp_path / "t.json", rows(5))
    with pytest.raises(UserError, match=r"--validation_pairs .*v\.json must hold a list of pairs"):
        read(pairs, write_list(tmp_path / "v.json", {"a": 1}))


def test_bad_rows_are_dropped_and_counted(tmp_path):
    bad = [
        row(chosen=""), row(rejected=None), row(rejected=["a"]), row("same", "Same "), row(prompt=None),
        row(prompt=["a", "b"]), "no row", {"prompt": "p"}, row("hard 0", "easy 0"), row("hard 1", "hard 2"),
    ]  # fmt: skip
    pairs = read(write_list(tmp_path / "t.json", rows(5) + bad), validation_share=0)
    assert [pair["chosen"] for pair in pairs.train] == ["hard 0", "hard 1", "hard 3", "hard 4"]
    assert pairs.counts == {
        "dropped_empty": 1, "dropped_not_text": 6, "dropped_equal": 1, "dropped_duplicate": 1,
        "dropped_both_sides": 2, "train": 4, "validation": 0,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"4 valid training pairs \(dropped_empty 1.*--min_pairs 5"):
        read(tmp_path / "t.json", validation_share=0, min_pairs=5)


@pytest.mark.parametrize("value", [3, "text", {"pairs": []}, {"train": [], "validation": 1}, []])
def test_a_file_without_pairs_is_refused(tmp_path, value):
    with pytest.raises(UserError, match=r"t\.json"):
        read(write_list(tmp_path / "t.json", value))


@pytest.mark.parametrize(
    ("name", "value"),
    [("pairs_per_hard", 0), ("validation_share", 1.0), ("validation_share", -0.1), ("min_pairs", 0)],
)
def test_settings_without_sense(tmp_path, name, value):
    with pytest.raises(UserError, match=f"--{name}"):
        read(tmp_path / "unread.json", **{name: value})
