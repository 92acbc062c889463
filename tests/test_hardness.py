"""Rules that choose anomalies, and the study that compares them."""

import numpy as np
import pytest
from toy import call_script, read_json, refused, snapshot, write_toy_folder, write_toy_set

import hardness
import kka.hardness_study
from kka.hardness import RULES, Pool, leaving, lowest, some, spread

POOL = Pool(np.array([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]), 3.5, np.arange(12.0).reshape(6, 2))  # hard: 1, 3, 4


def choose(name: str, n: int, pool: Pool = POOL) -> list[int]:
    """Rows by one rule."""
    return RULES[name](pool, n, 2, np.random.default_rng(0)).tolist()


def test_rules_choose_what_they_are_called():
    assert sorted(choose("random", 6)) == list(range(6))
    assert sorted(choose("hard", 9)) == [1, 3, 4]
    assert sorted(choose("easy", 9)) == [0, 2, 5]
    assert choose("hardest", 4) == [1, 3, 4, 2]
    assert choose("semi-hard", 2) == [2, 0]
    assert sorted(choose("hard-clusters", 9)) == [1, 3, 4]


@pytest.mark.parametrize("name", RULES)
def test_no_rule_gives_more_than_asked_or_fails_where_nothing_is_hard_or_all_is(name):
    assert len(choose(name, 2)) == len(set(choose(name, 2))) == 2
    assert choose(name, 0) == []
    for threshold in (0.0, 10.0):
        assert len(choose(name, 3, Pool(POOL.scores, threshold, POOL.features))) in (0, 3)


def test_eq_6_is_strict():
    assert not Pool(np.array([3.5]), 3.5, np.zeros((1, 1))).hard.any()


def test_spread_takes_from_every_cluster_in_turn():
    features = np.repeat([[0.0, 0.0], [9.0, 9.0], [0.0, 9.0]], (50, 3, 2), axis=0)
    mask = np.ones(55, bool)
    mask[50] = False
    rows = spread(features, mask, 6, 3, np.random.default_rng(1))
    assert sorted(row // 50 + (row > 52) for row in rows) == [0, 0, 1, 1, 2, 2]
    assert 50 not in rows


def test_ties_and_random_rows_are_repeatable():
    assert lowest(np.zeros(4), np.array([0, 1, 1, 1], bool), 2).tolist() == [1, 2]
    rows = [some(np.ones(50, bool), 5, np.random.default_rng(3)).tolist() for _ in range(2)]
    assert rows[0] == rows[1]
    assert len(set(rows[0])) == 5


def test_easy_ones_leave_first():
    easy = np.array([False, True, False, True, True])
    order = leaving(easy, np.random.default_rng(0))
    assert set(order[:3]) == {1, 3, 4}
    assert set(order[3:]) == {0, 2}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A toy set with enough anomalies of other classes."""
    return write_toy_set(tmp_path_factory.mktemp("many"), classes=tuple(range(1, 22)), n_anomalies=0)


def study(root, folder, *words, n_base=(4, 8), selections=("random", "hard", "hard-crossfit")):
    """src/hardness.py on the toy set."""
    small = ["--dataset_name", "ucm_caption", "--data_path", str(root), "--xp_path", str(folder)]
    small += ["--normal_class", "1", "--n_epochs", "1", "--pretrain", "False", "--num_threads", "1"]
    small += ["--batch_size", "8", "--n_pool", "12", "--n_chosen", "4", "--threshold_quantile", "1.0"]
    small += ["--n_base", *map(str, n_base), "--selections", *selections]
    return call_script(hardness.main, ["hardness.py", *small, *words])


def outcome(folder) -> dict:
    """results.json without its times."""
    return {key: value for key, value in read_json(folder / "results.json").items() if key != "seconds"}


@pytest.fixture(scope="module")
def studied(many, tmp_path_factory):
    """A finished study."""
    folder = tmp_path_factory.mktemp("studied") / "run"
    done = study(many, folder)
    assert done.code == 0, done.stderr
    return folder


def test_every_set_is_trained_and_tested(studied):
    sets = outcome(studied)["sets"]
    assert list(sets) == ["4", "8"]
    for n, found in sets.items():
        names = {"base", *(f"{m} {r}" for m in ("add", "rep") for r in ("random", "hard", "hard-crossfit"))}
        assert set(found["aucs"]) == names
        assert all(0 <= auc <= 1 for aucs in found["aucs"].values() for auc in aucs)
        assert found["n_new"]["add random"] == found["n_new"]["add hard"] > 0
        assert found["n_new"]["rep random"] == round(0.3 * int(n))


def test_smaller_base_sets_are_parts_and_the_pool_is_fresh(many, monkeypatch, tmp_path):
    seen = []
    true = kka.hardness_study.Study._fit
    monkeypatch.setattr(
        kka.hardness_study.Study,
        "_fit",
        lambda self, rows, *purpose: seen.append((self, rows, purpose)) or true(self, rows, *purpose),
    )
    assert study(many, tmp_path / "run").code == 0
    task = seen[0][0].data.task
    assert not set(task.generated.paths) & set(task.test.paths)
    assert len(set(task.generated.paths)) == len(task.generated) == 8 + 12
    assert "1" not in task.generated.classes
    by_purpose = {tuple(map(str, purpose)): rows.tolist() for _, rows, purpose in seen}
    assert by_purpose["judge", "4"] == [0, 1, 2, 3]
    folds = [by_purpose["crossfit", "4", str(k)] for k in (0, 1)]
    assert sorted(folds[0][4:] + folds[1][4:]) == list(range(8, 20))
    tested = [rows.tolist() for _, rows, purpose in seen if purpose[0] == "detector"]
    assert any(len(rows) == 8 for rows in tested)


def test_a_killed_study_continues_to_the_same_numbers(many, studied, tmp_path, monkeypatch):
    true, calls = kka.hardness_study.Study._test, iter(range(3))

    def dies(self, rows, i):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return true(self, rows, i)

    with monkeypatch.context() as patch:
        patch.setattr(kka.hardness_study.Study, "_test", dies)
        assert study(many, tmp_path / "run").code == 130
    kept = read_json(tmp_path / "run" / "trainings.json")
    assert study(many, tmp_path / "run").code == 0
    after = read_json(tmp_path / "run" / "trainings.json")
    assert all(after[key] == value for key, value in kept.items())
    assert outcome(tmp_path / "run") == outcome(studied)


def test_further_selections_and_sizes_repeat_nothing(many, studied, monkeypatch):
    before = read_json(studied / "trainings.json")
    assert study(many, studied).code == 0
    assert read_json(studied / "trainings.json") == before
    assert study(many, studied, selections=("random", "easy"), n_base=(4,)).code == 0
    after = read_json(studied / "trainings.json")
    assert set(after) - set(before) <= {"4 add easy 0", "4 rep easy 0"}
    assert study(many, studied).code == 0
    assert set(outcome(studied)["sets"]) == {"4", "8"}


def test_the_garden_draws_its_anomalies(tmp_path):
    words = ["--dataset_name", "garden", "--xp_path", str(tmp_path / "run"), "--n_epochs", "1"]
    words += ["--pretrain", "False", "--n_base", "10", "--n_pool", "20", "--n_chosen", "5"]
    words += ["--selections", "random", "--modes", "add"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kka.hardness_study, "N_DRAWN", 40)
        done = call_script(hardness.main, ["hardness.py", *words])
    assert done.code == 0, done.stderr
    assert len(read_json(tmp_path / "run" / "drawn" / "0" / "image.json")) == 40
    assert set(outcome(tmp_path / "run")["sets"]["10"]["aucs"]) == {"base", "add random"}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--n_base", "0"], ["--n_base"]),
        (["--modes", "swap"], ["--modes", "swap"]),
        (["--selections", "best"], ["--selections", "best"]),
        (["--n_pool", "0"], ["--n_pool"]),
        (["--max_replaced", "1.5"], ["--max_replaced"]),
        (["--n_base", "5000"], ["5000", "there are 200"]),
    ],
)
def test_bad_input_is_one_sentence(many, tmp_path, words, parts):
    refused(study(many, tmp_path / "run", *words), *parts)


def test_another_seed_does_not_take_the_folder(many, studied):
    before = snapshot(studied)
    refused(study(many, studied, "--seed", "7"), "other settings", "seed 0 there, 7 now")
    assert {k: v for k, v in snapshot(studied).items() if k != "run.lock"} == {
        k: v for k, v in before.items() if k != "run.lock"
    }


def test_folders_without_training_anomalies_say_what_to_give(tmp_path):
    from toy import write_toy_folder

    root = write_toy_folder(tmp_path / "folder")
    words = ["--dataset_name", "folder", "--data_path", str(root), "--xp_path", str(tmp_path / "run")]
    refused(call_script(hardness.main, ["hardness.py", *words]), "--anomaly_path")


def test_classes_of_mvtec_and_anomalies_that_are_no_test_images(tmp_path):
    root = write_toy_folder(tmp_path / "set" / "screw", n_anomalies=8)
    words = [
        "hardness.py",
        "--dataset_name",
        "mvtec",
        "--data_path",
        str(root.parent),
        "--normal_class",
        "screw",
    ]
    words += ["--xp_path", str(tmp_path / "run"), "--n_base", "3", "--n_pool", "3", "--n_epochs", "1"]
    words += ["--pretrain", "False", "--device", "cpu", "--selections", "random", "--modes", "add"]
    refused(call_script(hardness.main, words), "no training images of other classes; give --anomaly_path")
    for folder, part in (
        (root / "test" / "scratch", "is a test image"),
        (root / "gone", "there is no folder"),
    ):
        outcome = call_script(hardness.main, [*words, "--anomaly_path", str(folder)])
        refused(outcome, folder, part, "give another --anomaly_path")
        assert "--n_anomalies" not in outcome.stderr
    outcome = call_script(hardness.main, [*words, "--anomaly_path", str(root / "0")])
    assert outcome.code == 0, outcome.stderr
