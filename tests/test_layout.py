"""The official class folders: name lists, flat caption lists, and what may be wrong with them."""

import json

import pytest
from toy import image_path, write_toy_class

from kka.datasets import cifar100, flower, ucm_caption
from kka.datasets.layout import Images, caption_file, list_images, read_class_folder, write_class_folder
from kka.errors import UserError

SPECS = [flower.SPEC, ucm_caption.SPEC, cifar100.SPEC]  # 10, 5 and 1 captions
UCM = ucm_caption.SPEC


@pytest.fixture
def folder(tmp_path):
    """Class 3 with three training and two test images."""
    path = tmp_path / "3"
    write_toy_class(path, UCM, {"train": 3, "test": 2}, bright=True)
    return path


def write_list(folder, value, name="image.json"):
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_was_written_is_read(tmp_path, spec, split):
    names = ["b.png", "a.jpg"]
    captions = [[f"{name} {k}" for k in range(spec.captions_per_image)] for name in names]
    for name in names:
        (tmp_path / name).touch()
    write_class_folder(tmp_path, split, names, captions, spec)
    images = read_class_folder(tmp_path, split, 1, spec, class_name="7")
    assert images.paths == (tmp_path / "b.png", tmp_path / "a.jpg")
    assert images.targets == (1, 1)
    assert images.classes == ("7", "7")
    assert images.captions == tuple(map(tuple, captions))
    flat = json.loads((tmp_path / caption_file(spec, split)).read_text())
    assert flat == [text for block in captions for text in block]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_wrong_number_of_captions_is_not_written(tmp_path, spec):
    with pytest.raises(ValueError, match=r"a\.png: 2 captions"):
        write_class_folder(tmp_path, "train", ["a.png"], [["x", "y"]], spec)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_number_of_captions_is_refused(tmp_path, spec, change):
    folder = tmp_path / "1"
    write_toy_class(folder, spec, {"train": 3}, bright=False)
    path = folder / caption_file(spec, "train")
    given, wanted = 3 * spec.captions_per_image + change, 3 * spec.captions_per_image
    write_list(folder, ["text"] * given, path.name)
    with pytest.raises(UserError) as error:
        read_class_folder(folder, "train", 0, spec)
    assert f"{path} holds {given} captions for 3 images, not {wanted}" in str(error.value)
    if change < 0:
        assert str(error.value).endswith("is number 2")


def test_captions_may_be_missing(folder):
    (folder / caption_file(UCM, "train")).unlink()
    assert read_class_folder(folder, "train", 1, UCM).captions == ((), (), ())


def test_byte_order_mark_windows_line_ends_and_other_alphabets(folder):
    texts = ["naïve flower", "花びらは白い", "Größe", "пять", "🌼"]
    names = ["übung.png", "b.png", "c.png"]
    for name in names:
        (folder / name).touch()
    for name, value in (("image.json", names), (caption_file(UCM, "train"), texts * 3)):
        text = json.dumps(value, indent=1, ensure_ascii=False).replace("\n", "\r\n")
        (folder / name).write_bytes(b"\xef\xbb\xbf" + text.encode("utf-8"))
    images = read_class_folder(folder, "train", 1, UCM)
    assert images.paths[0].name == "übung.png"
    assert images.captions == (tuple(texts),) * 3


def test_generated_folder_has_one_caption_list_for_both_splits(tmp_path):
    folder = tmp_path / "0"
    write_toy_class(folder, UCM, {"train": 2}, bright=True)
    write_list(folder, ["train_07.png"], "image_test.json")
    write_list(folder, ["only"] * 5, caption_file(UCM, "train"))
    assert read_class_folder(folder, "test", 1, UCM).captions == (("only",) * 5,)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("[", "is not valid JSON"),
        ('{"a.png": 0}', "must hold a list of strings, it holds a dict"),
        ("null", "it holds a NoneType"),
        ([0], "item 0 must be a string, it is 0"),
        (["train_00.png", ["b"]], "item 1 must be a string, it is ['b']"),
        (["notes.txt"], "'notes.txt', which is not an image file"),
        ([""], "'', which is not an image file"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_malformed_name_list_is_named(folder, value, part, split):
    path = folder / {"train": "image.json", "test": "image_test.json"}[split]
    write_list(folder, value, path.name)
    with pytest.raises(UserError) as error:
        read_class_folder(folder, split, 1, UCM)
    assert str(path) in str(error.value)
    assert part in str(error.value)


@pytest.mark.parametrize("value", ["{}", '"text"', '["a", 2]', "[", "\x00"])
def test_malformed_captions_are_named(folder, value):
    path = folder / caption_file(UCM, "train")
    write_list(folder, value, path.name)
    with pytest.raises(UserError) as error:
        read_class_folder(folder, "train", 1, UCM)
    assert str(path) in str(error.value)


def test_list_in_another_encoding_is_named(folder):
    (folder / "image.json").write_bytes('["ü.png"]'.encode("latin-1"))
    with pytest.raises(UserError, match=r"image\.json is not valid JSON"):
        read_class_folder(folder, "train", 1, UCM)


def test_missing_list_and_missing_image_are_named(folder):
    gone = image_path(folder.parent, 3, 1)
    gone.unlink()
    with pytest.raises(UserError) as error:
        read_class_folder(folder, "train", 1, UCM)
    assert str(folder / "image.json") in str(error.value)
    assert f"{gone} does not exist" in str(error.value)
    (folder / "image.json").unlink()
    with pytest.raises(UserError, match=r"image\.json does not exist"):
        read_class_folder(folder, "train", 1, UCM)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "/etc/passwd.png",
        "../../outside.png",
        "../outside.png",
        "..\\outside.png",
        "sub/../../outside.png",
    ],
)
def test_path_outside_the_folder_is_never_taken(folder, name):
    (folder / "sub").mkdir()
    for place in (folder.parent, folder.parent.parent):
        (place / "outside.png").write_bytes(b"secret")
    write_list(folder, [name] * 3)
    with pytest.raises(UserError) as error:
        read_class_folder(folder, "train", 1, UCM)
    assert repr(name) in str(error.value)
    assert ("points outside" in str(error.value)) == name.endswith(".png")


@pytest.mark.parametrize(
    "name", ["/home/author/3/train_00.png", "data\\3\\train_00.png", "../3/train_00.png"]
)
def test_path_of_another_machine_means_the_file_of_that_name_in_the_folder(folder, name):
    write_list(folder, [name] * 3)
    assert read_class_folder(folder, "train", 1, UCM).paths == (folder / "train_00.png",) * 3


def test_image_in_a_subfolder(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "x.png").touch()
    write_list(folder, ["sub/x.png"] * 3)
    assert read_class_folder(folder, "train", 1, UCM).paths[0] == folder / "sub" / "x.png"


def test_folder_named_like_an_image_is_no_image(folder):
    (folder / "x.png").mkdir()
    write_list(folder, ["x.png"] * 3)
    with pytest.raises(UserError, match=r"x\.png does not exist"):
        read_class_folder(folder, "train", 1, UCM)


def test_image_files_are_sorted_without_hidden_and_other_files(tmp_path):
    for name in ("b.PNG", "a.jpeg", ".c.png", "notes.txt", "d.webp"):
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpeg", "b.PNG", "d.webp"]


def test_lists_of_images_are_joined_and_taken_in_order(folder):
    train, test = read_class_folder(folder, "train", 0, UCM), read_class_folder(folder, "test", 1, UCM)
    both = train + test
    assert len(both) == 5
    assert both.targets == (0, 0, 0, 1, 1)
    chosen = both.take([4, 0])
    assert chosen == Images(*((field[4], field[0]) for field in vars(both).values()))
    assert (train + Images()) == train
