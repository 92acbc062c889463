"""SSD: what must hold for any run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from test_deep_sad import toy_train_set

from kka.detectors.ssd import (
    SSD,
    SSDSettings,
    find_clusters,
    fit_gaussians,
    learning_rate,
    nearest_distance,
)
from kka.errors import TrainingError, UserError
from kka.journal import Journal
from kka.metrics import auroc

FAST = SSDSettings(arch="cifar10_LeNet", n_epochs=2, warmup=1, batch_size=8, scale_lr=True, copies=2)


def distances(features, means, precisions):
    """`nearest_distance` of arrays."""
    return nearest_distance(*map(torch.from_numpy, (features, means, precisions))).numpy()


def test_mean_distance_of_the_training_features_is_their_dimension():
    features = np.random.default_rng(0).normal(size=(300, 12)) @ np.diag(np.arange(1, 13))
    gaussian = fit_gaussians(features, np.zeros(300), "pinv")
    assert distances(features, **gaussian).mean() == pytest.approx(12, rel=1e-9)
    assert distances(features.mean(0, keepdims=True), **gaussian) == pytest.approx(0, abs=1e-12)


def test_minimum_over_clusters_exceeds_none_of_them():
    features = np.random.default_rng(0).normal(size=(60, 4)) + np.repeat([[0], [5], [9]], 20, axis=0)
    clusters = np.repeat([0, 1, 2], 20)
    each = [fit_gaussians(features[clusters == k], np.zeros(20), "ledoit_wolf") for k in range(3)]
    single = np.stack([distances(features, **gaussian) for gaussian in each])
    np.testing.assert_allclose(
        distances(features, **fit_gaussians(features, clusters, "ledoit_wolf")), single.min(0)
    )


def test_pseudo_inverse_overlooks_what_the_normals_do_not_span_and_shrinkage_does_not():
    rng = np.random.default_rng(0)
    features = np.zeros((51, 512))
    features[:, :50] = rng.normal(size=(51, 50))
    outliers = np.zeros((2, 512))
    outliers[0, 400], outliers[1, 400] = 1, 10
    blind, shrunk = (
        distances(outliers, **fit_gaussians(features, np.zeros(51), kind)) for kind in ("pinv", "ledoit_wolf")
    )
    assert blind[1] == pytest.approx(blind[0], rel=1e-6)
    assert shrunk[1] > 50 * shrunk[0]


def test_clusters_of_one_image_are_joined(caplog):
    features = np.random.default_rng(0).normal(size=(20, 3))
    features[7] += 1000
    assert np.bincount(find_clusters(features, 1, 0)).tolist() == [20]
    assert np.bincount(find_clusters(features, 2, 0)).tolist() == [20]
    assert "1 clusters of normals instead of 2" in caplog.text
    assert set(find_clusters(features + 0 * features[7], 1, 0)) == {0}


def test_clusters_are_found():
    features = np.random.default_rng(0).normal(size=(30, 3)) + np.repeat([[0], [50], [99]], 10, axis=0)
    clusters = find_clusters(features, 3, seed=1)
    assert [len(set(clusters[k : k + 10])) for k in (0, 10, 20)] == [1, 1, 1]
    assert len(set(clusters)) == 3


def test_learning_rate_rises_and_falls():
    rates = [learning_rate(step, 10, 110, 0.01, 0.5) for step in range(111)]
    assert (rates[0], rates[10]) == (0.01, 0.5)
    assert rates[5] == pytest.approx(0.255)
    assert rates[60] == pytest.approx((0.5 + 1e-4) / 2)
    assert rates[110] == pytest.approx(1e-4)
    assert np.diff(rates[:11]).min() > 0 > np.diff(rates[10:]).max()
    assert learning_rate(0, 1, 3, 0.01, 0.002) == 0.002  # never above the highest


@pytest.mark.parametrize("n_anomalies", [0, 6])
def test_fit_moves_every_weight_and_separates(n_anomalies):
    train, test = toy_train_set(20, n_anomalies), toy_train_set(8, 8, seed=1)
    detector = SSD(replace(FAST, n_epochs=4))
    before = {name: value.clone() for name, value in detector.model.state_dict().items()}
    detector.fit(train)
    after = detector.model.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert ("known_means" in detector.statistics) == (n_anomalies > 0)
    scores = detector.score(test.resized)
    assert scores.shape == (16,)
    assert auroc(test.targets.numpy(), scores.numpy()) > 0.9


def test_labelled_anomalies_do_not_train_the_encoder_and_unlabelled_images_do():
    train = toy_train_set(10, 4)
    alone, with_anomalies, polluted = (SSD(FAST) for _ in range(3))
    alone.fit(train.take(torch.arange(10)))
    with_anomalies.fit(train)
    polluted.fit(replace(train, semi_targets=torch.zeros(14, dtype=torch.long)))
    name = "head.0.weight"
    weights = [d.model.state_dict()[name] for d in (alone, with_anomalies, polluted)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(alone.embed(train.resized), with_anomalies.embed(train.resized))


def test_rate_of_each_step_is_scaled_by_the_batch():
    detector = SSD(replace(FAST, lr=0.512, warmup=0, n_epochs=1))
    optimizer = torch.optim.SGD(detector.model.parameters(), lr=1)
    next(detector._batches(toy_train_set(8, 0), 0, [optimizer]))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.512 * 8 / 512)


def test_two_views_differ_and_belong_to_the_same_images():
    detector, train = SSD(FAST), toy_train_set(10, 0)
    optimizer = torch.optim.SGD(detector.model.parameters(), lr=1)
    batches = list(detector._batches(train, 0, [optimizer]))
    assert sorted(torch.cat([batch for batch, _, _ in batches]).tolist()) == list(range(10))
    assert all(not torch.equal(first, second) for _, first, second in batches)
    assert [len(batch) for batch, _, _ in list(detector._batches(toy_train_set(9, 0), 0, [optimizer]))] == [8]


def test_resumed_training_ends_with_the_same_numbers(tmp_path):
    train, settings = toy_train_set(), replace(FAST, n_epochs=3)
    whole = SSD(settings)
    whole.fit(train)
    interrupt(SSD(settings), train, tmp_path, epochs=2)
    journal = Journal(tmp_path, every=0)
    assert len(journal.series("train", "loss")) == 1
    resumed = SSD(settings, seed=0)
    resumed.fit(train, journal)
    assert torch.equal(resumed.score(train.resized), whole.score(train.resized))
    assert len(journal.series("train", "loss")) == 4


def interrupt(detector, train, folder, epochs):
    """Train until that many epochs are recorded; the last of them is not checkpointed."""
    journal = Journal(folder, every=0)
    record = journal.record

    def record_until(phase, epoch, **values):
        record(phase, epoch, **values)
        if epoch + 1 == epochs:
            raise KeyboardInterrupt

    journal.record = record_until
    with pytest.raises(KeyboardInterrupt):
        detector.fit(train, journal)


def test_scores_do_not_depend_on_the_batch_or_the_call():
    train = toy_train_set(20, 6)
    detector = SSD(FAST)
    detector.fit(train)
    scores = detector.score(train.resized)
    assert torch.equal(detector.score(train.resized), scores)
    one_by_one = torch.cat([detector.score(image[None]) for image in train.resized])
    torch.testing.assert_close(one_by_one, scores, rtol=1e-3, atol=1e-2)


def test_test_every_records_the_curve():
    train, journal = toy_train_set(), Journal()
    detector = SSD(replace(FAST, n_epochs=3, test_every=2))
    detector.fit(train, journal, lambda score: auroc(train.targets.numpy(), score(train.resized).numpy()))
    curve = journal.series("train", "test_auc")
    assert len(curve) == 2
    assert curve[-1] == auroc(train.targets.numpy(), detector.score(train.resized).numpy())


@pytest.mark.parametrize(
    ("train", "change", "part"),
    [
        (toy_train_set(1, 4), {}, "at least 2 images that are no labelled anomalies, there is 1"),
        (toy_train_set(0, 4), {}, "there is 0"),
        (toy_train_set(3, 0), {"clusters": 4}, "--clusters 4 is more than the 3 normal images"),
    ],
)
def test_too_few_images_are_refused(train, change, part):
    with pytest.raises(UserError, match=part):
        SSD(replace(FAST, **change)).fit(train)


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.0}, {"temperature": 0.0}, {"warmup_lr": -1.0}, {"batch_size": 1}, {"clusters": 0},
        {"copies": 0}, {"momentum": -0.1}, {"momentum": 1.0}, {"weight_decay": -1.0}, {"n_epochs": -1},
        {"warmup": -1}, {"test_every": -1},
    ],
)  # fmt: skip
def test_settings_out_of_range_name_the_flag(change):
    with pytest.raises(UserError, match=f"--{next(iter(change))}"):
        SSD(replace(FAST, **change))


def test_infinite_loss_stops_the_run_at_its_epoch():
    with pytest.raises(TrainingError, match=r"epoch \d+; lower --lr"):
        SSD(replace(FAST, lr=1e30, warmup=0, n_epochs=20)).fit(toy_train_set())


def test_ledoit_wolf_is_scikit_learns():
    features = np.random.default_rng(0).normal(size=(9, 5))
    gaussian = fit_gaussians(features, np.zeros(9), "ledoit_wolf")
    np.testing.assert_allclose(gaussian["precisions"][0], np.linalg.inv(ledoit_wolf(features)[0]))
