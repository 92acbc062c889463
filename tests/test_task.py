"""Which images an experiment takes: user_dict, normal classes, generated anomalies."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy import USER_DICT, image_path, write_toy_set

from kka.datasets import DATASETS, cifar100, flower, get_spec, ucm_caption
from kka.datasets.task import Choice, parse_user_dict, read_anomalies, read_task, resolve_folders
from kka.errors import UserError
from kka.experiment import choose_task, find_normal_classes
from kka.options import ExperimentSettings

UCM = ucm_caption.SPEC
CHOICE = Choice(user_dict={0: [1, 0], 1: [1, 2, 3]})
CLASS_SETS = [spec for spec in DATASETS.values() if spec.user_dict]


@pytest.mark.parametrize("module", [flower, ucm_caption, cifar100], ids=lambda module: module.SPEC.name)
def test_edited_user_dict_says_what_is_normal(module):
    edited = "user_dict: UserDict = {0: [3, 2, 0], 1: [1, 2, 3]}"
    source, n = re.subn(r"^user_dict.*$", edited, Path(module.__file__).read_text(), flags=re.MULTILINE)
    names: dict[str, Any] = {}
    exec(source, names)  # as Python would read the file after the edit
    assert n == 1
    assert resolve_folders(names["SPEC"], Choice()) == ({0: [3, 2, 0], 1: [1, 2, 3]}, (2, 3))
    assert resolve_folders(names["SPEC"], Choice(iterate=True))[0] == {0: [3, 2, 0], 1: [3, 2, 0]}


@pytest.mark.parametrize("spec", CLASS_SETS, ids=lambda spec: spec.name)
def test_default_is_the_user_dict_of_the_data_set(spec):
    folders, normal = resolve_folders(spec, Choice())
    assert normal == spec.normal_classes
    assert sorted(folders[0]) == sorted([*normal, 0])
    assert set(normal) < set(folders[1])
    assert 0 not in folders[1]
    assert len(folders[1]) == len(set(folders[1]))


@pytest.mark.parametrize("spec", CLASS_SETS, ids=lambda spec: spec.name)
def test_iterate_tests_on_normals_and_generated_anomalies(spec):
    folders, normal = resolve_folders(spec, Choice(iterate=True))
    assert sorted(folders[1]) == sorted([*normal, 0])


def test_official_user_dicts():
    assert flower.SPEC.user_dict[0] == [26, 0]
    assert sorted(flower.SPEC.user_dict[1]) == list(range(1, 103))
    assert UCM.user_dict == {0: [21, 20, 0], 1: list(range(1, 22))}
    assert cifar100.SPEC.user_dict == {0: [5, 20, 25, 84, 94, 0], 1: list(range(1, 101))}


def test_normal_classes_replace_the_data_sets_own():
    folders, normal = resolve_folders(flower.SPEC, Choice(normal_classes=(3, 9)))
    assert normal == (3, 9)
    assert folders == {0: [3, 9, 0], 1: flower.SPEC.user_dict[1]}
    folders, _ = resolve_folders(flower.SPEC, Choice(normal_classes=(3, 9), iterate=True))
    assert folders == {0: [3, 9, 0], 1: [3, 9, 0]}


def test_user_dict_makes_its_training_folders_normal():
    assert resolve_folders(UCM, CHOICE) == (CHOICE.user_dict, (1,))


def test_task_lists_normals_anomalies_and_test_images(toy_set):
    task = read_task(UCM, toy_set, CHOICE)
    assert task.normals.classes == ("1",) * 10
    assert task.normals.targets == (0,) * 10
    assert task.normals.paths[1] == image_path(toy_set, 1, 1)
    assert task.generated.classes == ("0",) * 8
    assert task.generated.targets == (1,) * 8
    assert task.generated.captions[2][0] == f"caption 0 of {image_path(toy_set, 0, 2).name}"
    assert task.generated_index == tuple(range(8))
    assert task.test.classes == ("1",) * 4 + ("2",) * 4 + ("3",) * 4
    assert task.test.targets == (0,) * 4 + (1,) * 8
    assert not set(task.normals.paths) & set(task.test.paths)


def test_several_normal_classes_are_normal_in_the_test_too(toy_set):
    task = read_task(UCM, toy_set, Choice(user_dict={0: [2, 1, 0], 1: [1, 2, 4]}))
    assert task.normals.classes == ("2",) * 10 + ("1",) * 10
    assert task.test.targets == (0,) * 8 + (1,) * 4


def test_normal_class_that_is_not_trained_on_gives_no_normals(toy_set):
    choice = replace(CHOICE, user_dict={0: [0], 1: [1, 2]}, normal_classes=(1,))
    with pytest.raises(UserError, match="no normal training images"):
        read_task(UCM, toy_set, choice)


def test_random_part_is_seeded_and_keeps_places_in_the_list(toy_set):
    everything = read_task(UCM, toy_set, CHOICE).generated
    tasks = [read_task(UCM, toy_set, replace(CHOICE, n_anomalies=3, seed=seed)) for seed in (0, 0, 1, 2, 3)]
    assert tasks[0].generated_index == tasks[1].generated_index
    assert len({task.generated_index for task in tasks}) > 1
    for task in tasks:
        assert len(set(task.generated_index)) == 3
        assert task.generated_index == tuple(sorted(task.generated_index))
        assert task.generated == everything.take(task.generated_index)


def test_no_anomalies_need_no_anomaly_folder(tmp_path):
    root = write_toy_set(tmp_path, n_anomalies=0)
    task = read_task(UCM, root, replace(CHOICE, n_anomalies=0))
    assert len(task.generated) == 0
    assert task.generated_index == ()
    assert len(task.normals) == 10


def test_more_anomalies_than_there_are_is_refused(toy_set):
    with pytest.raises(UserError, match="--n_anomalies 9: the anomaly folder has only 8 images"):
        read_task(UCM, toy_set, replace(CHOICE, n_anomalies=9))


def test_iterate_puts_every_generated_anomaly_into_the_test(toy_set):
    spec = replace(UCM, normal_classes=(1,), iterating_user_dict={0: [1, 0], 1: [1, 0]})
    task = read_task(spec, toy_set, Choice(iterate=True, n_anomalies=3))
    assert len(task.generated) == 3
    assert task.test.classes == ("1",) * 4 + ("0",) * 8
    assert task.test.targets == (0,) * 4 + (1,) * 8
    assert task.test.generated == (False,) * 4 + (True,) * 8


def test_anomalies_of_another_folder_without_a_list_come_by_name(toy_set, tmp_path):
    for name in ("b.png", "a.png"):
        (tmp_path / name).write_bytes(image_path(toy_set, 0).read_bytes())
    images = read_task(UCM, toy_set, replace(CHOICE, anomaly_path=tmp_path)).generated
    assert [path.name for path in images.paths] == ["a.png", "b.png"]
    assert images.classes == ("0", "0")
    assert images.captions == ((), ())


def test_anomaly_folder_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} holds no images"):
        read_anomalies(tmp_path, UCM)


@pytest.mark.parametrize(
    ("user_dict", "part"),
    [
        ({0: [7, 0], 1: [1]}, "has no class 7; it has 0-4"),
        ({0: [1, 0], 1: [1, 99]}, "has no class 99; it has 0-4"),
        ({0: [1, 1, 0], 1: [1]}, "folder 1 stands twice on the training side"),
        ({0: [1, 0, 0], 1: [1]}, "folder 0 stands twice on the training side"),
        ({0: [1, 0], 1: [2, 3, 2]}, "folder 2 stands twice on the test side"),
        ({0: [0], 1: [1]}, "no normal training images"),
    ],
)
def test_impossible_user_dict_is_refused(toy_set, user_dict, part):
    with pytest.raises(UserError) as error:
        read_task(UCM, toy_set, Choice(user_dict=user_dict))
    assert part in str(error.value)


def test_class_that_is_trained_on_must_be_normal(toy_set):
    choice = Choice(user_dict={0: [1, 2, 0], 1: [1, 2]}, normal_classes=(1,))
    with pytest.raises(UserError, match=r"training folder 2 is not normal \(1\)"):
        read_task(UCM, toy_set, choice)


def test_folder_0_is_never_normal(toy_set):
    with pytest.raises(UserError, match="cannot be a normal class"):
        read_task(UCM, toy_set, replace(CHOICE, normal_classes=(1, 0)))


@pytest.mark.parametrize("link", [False, True])
def test_one_folder_as_normal_and_anomaly_is_refused(toy_set, tmp_path, link):
    path = toy_set / "1"
    if link:
        path = tmp_path / "anomalies"
        path.symlink_to(toy_set / "1")
    with pytest.raises(UserError, match=f"{path} is given as normal class 1 and as the anomaly folder"):
        read_task(UCM, toy_set, replace(CHOICE, anomaly_path=path))


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist; give the folder of UCM-Caption"):
        read_task(UCM, tmp_path / "nowhere", CHOICE)
    with pytest.raises(UserError, match="is empty"):
        read_task(UCM, tmp_path, CHOICE)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="it has no class folder at all"):
        read_task(UCM, tmp_path, CHOICE)
    root = write_toy_set(tmp_path / "set", n_anomalies=0)
    with pytest.raises(UserError, match=f"no folder {root / '0'} with generated anomalies"):
        read_task(UCM, root, CHOICE)


def settings(root=None, **options):
    return ExperimentSettings(dataset_name="ucm_caption", data_path=str(root), **options)


def test_without_folder_0_a_run_that_did_not_ask_for_it_warns(tmp_path, caplog):
    root = write_toy_set(tmp_path, n_anomalies=0)
    spec = replace(UCM, normal_classes=(1,), user_dict={0: [1, 0], 1: [1, 2]})
    assert len(choose_task(settings(root), spec, root).generated) == 0
    assert f"no generated anomalies at {root / '0'}" in caplog.text


@pytest.mark.parametrize(
    "asked",
    [{"user_dict": json.dumps(USER_DICT)}, {"iterate": True}, {"anomaly_path": "gone"}, {"n_anomalies": 2}],
)
def test_without_folder_0_a_run_that_asked_for_it_is_refused(tmp_path, asked):
    root = write_toy_set(tmp_path, n_anomalies=0)
    spec = replace(
        UCM, normal_classes=(1,), user_dict={0: [1, 0], 1: [1]}, iterating_user_dict={0: [1, 0], 1: [1, 0]}
    )
    with pytest.raises(UserError, match="there is no folder"):
        choose_task(settings(root, **asked), spec, root)


@pytest.mark.parametrize("as_file", [False, True])
def test_user_dict_is_json_or_a_file_with_it(tmp_path, as_file):
    text = ' {"0": [26, 0], "1": [26, 1, 2]}'
    if as_file:
        (tmp_path / "dict.json").write_text(text)
        text = str(tmp_path / "dict.json")
    assert parse_user_dict(text) == {0: [26, 0], 1: [26, 1, 2]}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"0": [1', "--user_dict is not valid JSON"),
        ("{0: [1], 1: [1]}", "--user_dict is not valid JSON"),
        ('{"0": [1]}', "--user_dict must be"),
        ('{"0": [1], "1": [1], "2": [1]}', "--user_dict must be"),
        ('{"0": 1, "1": [1]}', "side 0 must be a list of folder numbers"),
        ('{"0": [1], "1": ["1"]}', "side 1 must be a list of folder numbers"),
        ('{"0": [1], "1": [1.0]}', "side 1 must be"),
        ('{"0": [true], "1": [1]}', "side 0 must be"),
        ('{"0": [-1], "1": [1]}', "side 0 must be"),
        ("nowhere.json", "nowhere.json does not exist"),
    ],
)
def test_malformed_user_dict_is_refused(text, part):
    with pytest.raises(UserError) as error:
        parse_user_dict(text)
    assert part in str(error.value)


def normal_classes(spec, **options):
    return find_normal_classes(ExperimentSettings(**options), spec)


@pytest.mark.parametrize("name", ["furniture", "household_furniture"])
def test_superclass_by_its_name_or_a_part_of_it(name):
    assert normal_classes(cifar100.SPEC, normal_superclass=name) == (5, 20, 25, 84, 94)


@pytest.mark.parametrize(
    ("spec", "name", "part"),
    [
        (cifar100.SPEC, "vehicles", "['vehicles_1', 'vehicles_2']"),
        (cifar100.SPEC, "unicorns", "means nothing; known are aquatic_mammals, fish"),
        (UCM, "furniture", "none, UCM-Caption has no superclasses"),
    ],
)
def test_superclass_that_means_none_or_several(spec, name, part):
    with pytest.raises(UserError) as error:
        normal_classes(spec, normal_superclass=name)
    assert part in str(error.value)


def test_exact_superclass_wins_over_names_that_contain_it():
    assert normal_classes(cifar100.SPEC, normal_superclass="fish") == (1, 32, 67, 73, 91)


def test_superclasses_hold_every_class_once():
    assert sorted(i for group in cifar100.superclasses.values() for i in group) == list(range(1, 101))


def test_normal_class_by_number():
    assert normal_classes(UCM, normal_class=(4, 2)) == (4, 2)
    assert normal_classes(UCM, normal_class=(0,)) == ()  # the official default
    with pytest.raises(UserError, match="names a class twice: 4 4"):
        normal_classes(UCM, normal_class=(4, 4))
    with pytest.raises(UserError, match="either --normal_class or --normal_superclass"):
        normal_classes(cifar100.SPEC, normal_class=(4,), normal_superclass="fish")
    with pytest.raises(UserError, match="only `good`"):
        normal_classes(get_spec("folder"), normal_class=(4,))


def test_data_set_names():
    assert get_spec("mycifar") is cifar100.SPEC
    with pytest.raises(UserError, match=r"unknown data set 'mnist'; known are flower, cifar100, .*mycifar"):
        get_spec("mnist")
