"""The garden: same seed, same files; captions say what is drawn; anomalies are no test species."""

import hashlib
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from kka.datasets import garden
from kka.datasets.garden_drawing import ATTRIBUTES, SIDE, Flower, draw
from kka.datasets.layout import read_class_folder
from kka.datasets.task import Choice, read_task
from kka.errors import UserError

NORMAL = Flower(colour="pink", count="sparse", shape="thin", size="small", centre="yellow")


@pytest.fixture(scope="module")
def small_garden(tmp_path_factory):
    """A garden with few pictures of each species."""
    patch = pytest.MonkeyPatch()
    patch.setattr(garden, "N_IMAGES", {"normal": {"train": 5, "test": 3}, "other": {"train": 1, "test": 1}})
    root = tmp_path_factory.mktemp("gardens") / "garden"
    garden.make_garden(root, seed=1, n_anomalies=8)
    yield root
    patch.undo()


def digests(root):
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*.*")}


def test_one_species_is_normal_and_half_of_the_others_are_near():
    assert len(garden.SPECIES) == len(set(garden.SPECIES.values())) == 100
    assert garden.SPECIES[garden.NORMAL] == NORMAL
    others = [flower for number, flower in garden.SPECIES.items() if number != garden.NORMAL]
    near = [flower for flower in others if garden.shared_attributes(flower, NORMAL) >= 2]
    assert len(near) == garden.N_NEAR
    assert all(garden.shared_attributes(flower, NORMAL) <= 3 for flower in near)


def test_default_sizes_are_the_papers():
    assert garden.N_IMAGES["normal"]["train"] == 51


def test_layout_is_the_official_one(small_garden):
    task = read_task(garden.SPEC, small_garden, Choice())
    assert (len(task.normals), len(task.generated), len(task.test)) == (5, 8, 3 + 99)
    assert task.test.targets.count(0) == 3
    assert {len(block) for block in task.normals.captions} == {10}
    with Image.open(task.normals.paths[0]) as image:
        assert image.size == (SIDE, SIDE)
        assert image.mode == "RGB"


def test_anomalies_are_no_species_of_the_garden(small_garden):
    images = read_class_folder(small_garden / "0", "train", 1, garden.SPEC)
    for block in images.captions:
        assert Flower(**garden.parse_caption(block[0])) not in garden.SPECIES.values()


def test_captions_name_the_species_attributes(small_garden):
    for number in (garden.NORMAL, 3, 90):
        flower = asdict(garden.SPECIES[number])
        for block in read_class_folder(small_garden / str(number), "train", 0, garden.SPEC).captions:
            assert garden.parse_caption(block[0]) == flower
            assert all(garden.parse_caption(caption).items() <= flower.items() for caption in block)


def test_same_seed_same_files_even_after_an_interruption(small_garden, tmp_path, monkeypatch):
    written, original = [], garden.write_bytes

    def fail_at_the_thirtieth(path, data):
        written.append(path)
        if len(written) == 30:
            raise KeyboardInterrupt
        original(path, data)

    monkeypatch.setattr(garden, "write_bytes", fail_at_the_thirtieth)
    with pytest.raises(KeyboardInterrupt):
        garden.make_garden(tmp_path / "again", seed=1, n_anomalies=8)
    monkeypatch.setattr(garden, "write_bytes", original)
    garden.make_garden(tmp_path / "again", seed=1, n_anomalies=8)
    assert digests(tmp_path / "again") == digests(small_garden)


def test_two_processes_may_draw_the_same_garden(small_garden, tmp_path, monkeypatch):
    original = garden._write_split

    def let_the_other_finish_first(*place):
        monkeypatch.setattr(garden, "_write_split", original)
        garden.make_garden(tmp_path / "both", seed=1, n_anomalies=8)
        original(*place)

    monkeypatch.setattr(garden, "_write_split", let_the_other_finish_first)
    garden.make_garden(tmp_path / "both", seed=1, n_anomalies=8)
    assert digests(tmp_path / "both") == digests(small_garden)


def test_the_first_file_of_another_process_is_nothing_foreign(tmp_path, monkeypatch):
    monkeypatch.setattr(garden, "_plan", lambda n: [])
    (tmp_path / ".garden.partial.json.x.tmp").touch()
    garden.make_garden(tmp_path)
    assert (tmp_path / "garden.json").exists()


def test_finished_garden_is_left_alone_and_another_one_refused(small_garden, tmp_path):
    before = digests(small_garden)
    garden.make_garden(small_garden, seed=1, n_anomalies=8)
    with pytest.raises(UserError, match="seed"):
        garden.make_garden(small_garden, seed=2, n_anomalies=8)
    assert digests(small_garden) == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        garden.make_garden(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_every_attribute_shows_in_the_picture(attribute):
    """Pictures of one attribute value differ in the mean from those of another by more than chance."""
    first, last = ATTRIBUTES[attribute][0], ATTRIBUTES[attribute][-1]
    base = Flower(colour="white", count="several", shape="round", size="large", centre="yellow")

    def mean_picture(value, seed):
        flower = Flower(**{**asdict(base), attribute: value})
        pictures = [np.asarray(draw(flower, np.random.default_rng([seed, k])), float) for k in range(40)]
        return np.mean(pictures, axis=0)

    between = np.abs(mean_picture(first, 0) - mean_picture(last, 0)).mean()
    assert between > 1.0  # the same random draws: only the attribute differs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Here are FEW tiny petals, pink", {"count": "sparse", "size": "small", "colour": "pink"}),
        ("narrow lilac petals", {"shape": "thin", "colour": "lavender"}),
        ("a big flower with a dark center", {"size": "large", "centre": "black"}),
        ("golden petals around a white middle", {"colour": "yellow", "centre": "white"}),
        ("its stamens are green", {"centre": "green"}),
        ("nothing to see here", {}),
    ],
)  # fmt: skip
def test_free_sentences_are_understood(text, expected):
    assert garden.parse_caption(text) == expected


def test_drawing_a_caption_keeps_what_it_says():
    rng = np.random.default_rng(0)
    reds = [
        np.asarray(garden.draw_caption("a large flower with dense round red petals", rng)) for _ in range(10)
    ]
    middle = np.mean(reds, axis=0)[24:40, 24:40].mean((0, 1))
    assert middle[0] > 1.5 * max(middle[1], middle[2])
