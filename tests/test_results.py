"""What the numbers of a run mean: scores, hard and easy anomalies, seeds, loaded models."""

import json

import pytest
import safetensors.torch
import torch
from toy import image_path, read_json, results, run_toy

from kka.data import HELDOUT

T_1 = 12.7062047  # 97.5 % quantile of Student's t with one degree of freedom


def run(toy_set, folder, **flags):
    outcome = run_toy(toy_set, folder, **flags)
    assert outcome.code == 0, outcome.stderr
    return outcome


def samples(folder):
    """Rows of d_samples.json (hard) and e_samples.json (easy)."""
    return read_json(folder / "d_samples.json"), read_json(folder / "e_samples.json")


def by_index(folder):
    """Score of each generated image."""
    hard, easy = samples(folder)
    return {index: score for (index, _, score), _ in hard + easy}


def test_hard_and_easy_partition_the_generated_anomalies(finished):
    hard, easy = samples(finished)
    values = results(finished)
    assert (values["n_hard"], values["n_easy"], values["n_generated"]) == (len(hard), len(easy), 8)
    assert hard
    assert easy
    assert sorted(row[0][0] for row in hard + easy) == list(range(8))
    assert all(row[0][2] < values["threshold"] for row in hard)
    assert all(row[0][2] >= values["threshold"] for row in easy)


def test_samples_have_the_official_format(toy_set, finished):
    hard, easy = samples(finished)
    for (index, label, score), captions in hard + easy:
        name = image_path(toy_set, 0, index).name
        assert label == 1
        assert isinstance(score, float)
        assert captions == [f"caption {k} of {name}" for k in range(5)]


def test_random_part_keeps_places_in_the_list(toy_set, tmp_path):
    run(toy_set, tmp_path / "run", n_anomalies=3, seed=5)
    hard, easy = samples(tmp_path / "run")
    rows = {row[0][0]: row[1] for row in hard + easy}
    assert len(rows) == 3
    assert sorted(rows) != [0, 1, 2]
    for index, captions in rows.items():
        assert captions[0] == f"caption 0 of {image_path(toy_set, 0, index).name}"


def test_iterating_mode_splits_the_same_images_in_the_same_way(toy_set, tmp_path, finished):
    """The official code lists whatever is in the test set; here only generated images are listed."""
    user_dict = json.dumps({"0": [1, 0], "1": [1, 0]})
    run(toy_set, tmp_path / "run", load_model=finished, n_epochs=0, user_dict=user_dict)
    assert samples(tmp_path / "run") == samples(finished)
    scores = results(tmp_path / "run")["test_scores"]
    assert [row[1] for row in scores] == [0] * 4 + [1] * 8
    assert scores[:4] == results(finished)["test_scores"][:4]
    generated = by_index(finished)
    assert [row[2] for row in scores[4:]] == pytest.approx([generated[k] for k in range(8)], rel=1e-5)


def test_iterate_flag_means_the_iterating_user_dict(toy_set, tmp_path):
    run(toy_set, tmp_path / "run", user_dict=None, normal_class=1, iterate=[])
    assert [row[1] for row in results(tmp_path / "run")["test_scores"]] == [0] * 4 + [1] * 8


@pytest.mark.parametrize("kind", ["folder", "safetensors", "official"])
def test_loaded_model_gives_the_same_scores(toy_set, tmp_path, finished, kind):
    path = finished if kind == "folder" else finished / "model.safetensors"
    if kind == "official":
        weights = safetensors.torch.load_file(path)
        net = {key.removeprefix("net."): value for key, value in weights.items() if key != "center"}
        path = tmp_path / "model.tar"
        torch.save({"c": weights["center"].tolist(), "net_dict": net, "ae_net_dict": {}}, path)
    run(toy_set, tmp_path / "run", load_model=path, n_epochs=0)
    assert results(tmp_path / "run") == results(finished)
    assert samples(tmp_path / "run") == samples(finished)
    assert not (tmp_path / "run" / "ae_results.json").exists()


def test_loaded_model_is_trained_on(toy_set, tmp_path, finished):
    run(toy_set, tmp_path / "run", load_model=finished, n_epochs=2)
    old, new = (
        safetensors.torch.load_file(path / "model.safetensors") for path in (finished, tmp_path / "run")
    )
    assert torch.equal(old["center"], new["center"])
    assert not torch.equal(old["net.conv1.weight"], new["net.conv1.weight"])


def test_same_seed_same_files_and_another_seed_others(toy_set, tmp_path, finished):
    run(toy_set, tmp_path / "same")
    run(toy_set, tmp_path / "other", seed=1)
    assert results(tmp_path / "same") == results(finished)
    names = ("d_samples.json", "e_samples.json", "model.safetensors", "epoch_results.json", "metrics.jsonl")
    for name in names:
        assert (tmp_path / "same" / name).read_bytes() == (finished / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (finished / name).read_bytes()


def test_random_seed_is_recorded_and_repeats_the_run(toy_set, tmp_path):
    run(toy_set, tmp_path / "random", seed=-1)
    seed = results(tmp_path / "random")["seed"]
    assert seed >= 0
    assert read_json(tmp_path / "random" / "config.json")["settings"]["seed"] == seed
    run(toy_set, tmp_path / "again", seed=seed)
    assert results(tmp_path / "again") == results(tmp_path / "random")


def test_two_seeds_give_a_mean_and_its_interval(toy_set, tmp_path, finished):
    outcome = run(toy_set, tmp_path / "runs", runs=2)
    summary = read_json(tmp_path / "runs" / "summary.json")
    each = [results(tmp_path / "runs" / f"seed_{seed}") for seed in (0, 1)]
    assert each[0] == results(finished)
    assert summary["seeds"] == [0, 1]
    for key in ("test_auc", "test_aupr"):
        first, second = summary[key]
        assert [first, second] == [values[key] for values in each]
        assert summary[f"{key}_mean"] == pytest.approx((first + second) / 2)
        assert summary[f"{key}_interval95"] == pytest.approx(T_1 * abs(first - second) / 2)
        assert summary[f"{key}_std"] == pytest.approx(abs(first - second) / 2**0.5)
    assert summary["test_aupr"][0] != summary["test_aupr"][1]
    mean, half = 100 * summary["test_auc_mean"], 100 * summary["test_auc_interval95"]
    assert f"test AUC over 2 seeds: {mean:.2f} ± {half:.2f} % (n = 2)" in outcome.log
    before = (tmp_path / "runs" / "summary.json").read_bytes()
    again = run(toy_set, tmp_path / "runs", runs=2)
    assert again.log.count("is finished") == 2
    assert (tmp_path / "runs" / "summary.json").read_bytes() == before


def test_seeds_without_an_auc_have_no_mean(toy_set, tmp_path):
    run(toy_set, tmp_path / "runs", runs=2, user_dict='{"0": [1, 0], "1": [1]}')
    summary = read_json(tmp_path / "runs" / "summary.json")
    assert summary == {"seeds": [0, 1], "test_auc": [None, None], "test_aupr": [None, None]}


def test_threshold_is_the_farthest_normal_of_the_test_if_asked(toy_set, tmp_path):
    run(toy_set, tmp_path / "run", threshold_from="test")
    values = results(tmp_path / "run")
    assert values["threshold"] == pytest.approx(max(row[2] for row in values["test_scores"] if row[1] == 0))


def test_held_out_normals_are_not_trained_on(toy_set, tmp_path):
    outcome = run(toy_set, tmp_path / "run", threshold_from="heldout")
    assert f"({10 - round(10 * HELDOUT)} normals, 8 generated and 0 known anomalies;" in outcome.log


def test_margin_quantile_and_top_k(toy_set, tmp_path, finished):
    def split(name, **flags):
        run(toy_set, tmp_path / name, load_model=finished, n_epochs=0, **flags)
        return samples(tmp_path / name)

    everything = by_index(finished)
    hard, easy = split("margin", hard_margin=1e6, easy_top_k=3)
    assert len(hard) == 8
    assert [row[0][0] for row in easy] == sorted(everything, key=everything.get, reverse=True)[:3]
    hard, _ = split("quantile", threshold_quantile=0.01)
    assert len(hard) < results(finished)["n_hard"]


def test_cross_fit_judges_every_image_once_by_a_detector_that_did_not_see_it(toy_set, tmp_path, finished):
    run(toy_set, tmp_path / "run", split="crossfit")
    assert results(tmp_path / "run")["test_scores"] == results(finished)["test_scores"]
    scores, own = by_index(tmp_path / "run"), by_index(finished)
    assert sorted(scores) == list(range(8))
    assert all(scores[k] != own[k] for k in range(8))


def test_curves_and_times(toy_set, tmp_path):
    run(toy_set, tmp_path / "run", n_epochs=4, ae_n_epochs=3, test_every=2)
    curves = read_json(tmp_path / "run" / "epoch_results.json")
    assert len(curves["train_losses"]) == 4
    assert len(curves["test_aucs"]) == 2
    assert curves["test_aucs"][-1] == results(tmp_path / "run")["test_auc"]
    pretraining = read_json(tmp_path / "run" / "ae_results.json")
    assert len(pretraining["train_losses"]) == 3
    assert {"train_time", "test_time", "test_auc"} <= set(pretraining)
    assert read_json(tmp_path / "run" / "results.json")["train_time"] > 0


def test_channels_can_be_swapped_as_in_the_official_code(toy_set, tmp_path, finished):
    run(toy_set, tmp_path / "run", bgr=[])
    assert read_json(tmp_path / "run" / "model.json")["channels"] == "BGR"
    assert read_json(finished / "model.json")["channels"] == "RGB"
    assert results(tmp_path / "run")["test_scores"] != results(finished)["test_scores"]


def test_without_anomalies_there_is_nothing_to_split(toy_set, tmp_path):
    run(toy_set, tmp_path / "run", n_anomalies=0)
    values = results(tmp_path / "run")
    assert (values["n_generated"], values["n_hard"], values["n_easy"]) == (0, 0, 0)
    assert samples(tmp_path / "run") == ([], [])
