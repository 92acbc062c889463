"""SSD: parity with the official code, and what must hold for any run."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_arrays import golden, tensors, unit
from sklearn.covariance import ledoit_wolf
from test_deep_sad import toy_train_set
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from kka.detectors.ssd import (
    BASE_TEMPERATURE,
    SSD,
    SSDSettings,
    contrastive_loss,
    find_clusters,
    fit_gaussians,
    learning_rate,
    nearest_distance,
    standardize,
    to_unit_length,
)
from kka.errors import TrainingError, UserError
from kka.journal import Journal
from kka.metrics import aupr, auroc
from kka.networks.resnet import ProjectedEncoder, small_image_stem

FAST = SSDSettings(arch="cifar10_LeNet", n_epochs=2, warmup=1, batch_size=8, scale_lr=True, copies=2)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 0.1])
def test_loss_equals_official_code(labelled, temperature):
    expected = tensors("ssd/contrastive_loss")
    first, second = (expected[f"input_z{k}"].requires_grad_() for k in (1, 2))
    labels = expected["input_labels"] if labelled else None
    loss = contrastive_loss(first, second, temperature, labels)
    loss.backward()
    suffix = f"{'' if labelled else 'un'}labelled_t{temperature}".replace(".", "p")
    torch.testing.assert_close(loss, expected[f"output_loss_{suffix}"], rtol=1e-4, atol=0)
    for k, z in ((1, first), (2, second)):
        gradient = expected[f"output_gradient_wrt_z{k}_{suffix}"]
        torch.testing.assert_close(z.grad, gradient, rtol=1e-4, atol=1e-5)
    if suffix == "unlabelled_t0p5":
        plain = expected["output_loss_unlabelled_t0p5_base0p5"]
        torch.testing.assert_close(loss * BASE_TEMPERATURE / 0.5, plain, rtol=1e-4, atol=0)


@pytest.mark.parametrize("n", [2, 7])
def test_loss_of_equal_views_and_orthogonal_images(n):
    z, t = torch.eye(n, 16), 0.5
    by_hand = -(t / 0.07) * (1 / t - math.log(math.exp(1 / t) + 2 * n - 2))
    assert float(contrastive_loss(z, z, t)) == pytest.approx(by_hand, rel=1e-6)


def test_loss_does_not_depend_on_the_order():
    z = nn.functional.normalize(torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)), dim=2)
    order = torch.tensor([3, 0, 8, 1, 2, 7, 6, 5, 4])
    torch.testing.assert_close(
        contrastive_loss(z[0], z[1], 0.5), contrastive_loss(z[0, order], z[1, order], 0.5)
    )


def formula_weights(network):
    """The weights of the fixture's README: a hash of each entry's place."""
    state = {}
    for p, (name, value) in enumerate(network.state_dict().items()):
        u = (np.arange(1, value.numel() + 1) * 2654435761 + (p + 1) * 2654404711) % 2**32
        for shift, factor in ((15, 2246822519), (13, 3266489917)):
            u = ((u ^ (u >> shift)).astype(np.uint64) * np.uint64(factor)) % np.uint64(2**32)
            u = u.astype(np.int64)
        h = (u ^ (u >> 16)) / 2**32
        fan = value[0].numel() if value.ndim > 1 else 1
        kinds = {
            "num_batches_tracked": 0 * h,
            "running_var": 0.5 + h,
            "running_mean": 0.2 * (h - 0.5),
            "weight": 0.75 + 0.5 * h if value.ndim < 2 else (h - 0.5) * np.sqrt(6 * value.ndim / fan),
            "bias": 0.2 * (h - 0.5),
        }
        state[name] = torch.from_numpy(kinds[name.rpartition(".")[2]]).to(value).view(value.shape)
    return state


def test_resnet18_equals_official_code():
    expected = tensors("ssd/resnet18_formula_weights")
    network = ProjectedEncoder("resnet18")
    state = formula_weights(network)
    network.load_state_dict(state, strict=True)
    sizes = [value.numel() for value in state.values()]
    assert sizes == expected["output_number_of_entries_of_each_state_dict_item"].tolist()
    ends = torch.stack([value.flatten()[[0, -1]] for value in state.values() if value.is_floating_point()])
    torch.testing.assert_close(ends, expected["output_first_and_last_value_of_each_floating_state_dict_item"])
    images = unit(expected["input_images_uint8"])
    network.eval()
    with torch.no_grad():
        features, projected = network.encoder(images), network(images)
    torch.testing.assert_close(features, expected["output_encoder_features_eval_mode"], rtol=1e-3, atol=1e-3)
    key = "output_projection_normalised_eval_mode"
    torch.testing.assert_close(projected, expected[key], rtol=1e-3, atol=1e-3)


def test_bottleneck_equals_official_code():
    expected = tensors("ssd/resnet_small_features")
    network = ResNet(Bottleneck, [1, 1, 1, 1])
    network.layer3, network.layer4 = nn.Identity(), nn.Identity()
    network = small_image_stem(network)
    weights = tensors("ssd/weights_resnet_bottleneckblock_1100")
    network.load_state_dict({k.replace("shortcut", "downsample"): v for k, v in weights.items()}, strict=True)
    images = unit(expected["input_images_uint8"])
    for mode in ("eval", "train"):
        with torch.no_grad():
            features = network.train(mode == "train")(images)
        key = f"output_features_bottleneckblock_{mode}_mode"
        torch.testing.assert_close(features, expected[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("arch", "dim", "n_blocks"), [("resnet34", 512, 16), ("resnet50", 2048, 16)])
def test_architectures(arch, dim, n_blocks):
    encoder = ProjectedEncoder(arch).encoder
    assert sum(isinstance(module, BasicBlock | Bottleneck) for module in encoder.modules()) == n_blocks
    encoder.fc = nn.Flatten()
    with torch.no_grad():
        assert encoder.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, dim)
        assert encoder.layer4(encoder.layer3(torch.zeros(1, dim // 4, 16, 16))).shape[-1] == 4


def scale_of(expected):
    normalised = to_unit_length(expected["input_train_features"].astype(np.float64))
    return {"mean": normalised.mean(0), "std": normalised.std(0)}


@pytest.mark.parametrize("n_clusters", [1, 2])
def test_scores_equal_official_code(n_clusters):
    expected = golden("ssd/scores")
    scale, scores = scale_of(expected), {}
    train = standardize(expected["input_train_features"], **scale)
    np.testing.assert_allclose(train, expected["output_normalised_train_features"], rtol=1e-4, atol=1e-5)
    clusters = expected["input_train_cluster_of_each_row"] * (n_clusters > 1)
    gaussians = fit_gaussians(train, clusters, "pinv")
    for part in ("test", "outlier"):
        scores[part] = nearest_distance(standardize(expected[f"input_{part}_features"], **scale), **gaussians)
        suffix = f"{n_clusters}cluster{'s' * (n_clusters > 1)}"
        np.testing.assert_allclose(scores[part], expected[f"output_score_{part}_{suffix}"], rtol=1e-3)
    both, targets = np.concatenate(list(scores.values())), [0] * 20 + [1] * 17
    metrics = expected[f"output_fpr95_auroc_aupr_{suffix}"]
    assert [auroc(targets, both), aupr(targets, both)] == pytest.approx(list(metrics[1:]), abs=1e-6)


@pytest.mark.parametrize("name", ["ssdk_scores", "ssdk_scores_more_dims_than_samples"])
def test_ssdk_scores_equal_official_code(name):
    expected = golden(f"ssd/{name}")
    scale = scale_of(expected)

    def gaussian(part):
        features = standardize(expected[f"input_{part}_features"], **scale)
        return fit_gaussians(features, np.zeros(len(features)), "ledoit_wolf")

    inside, outside = gaussian("train"), gaussian("known_outlier")
    for part in ("test", "outlier"):
        features = standardize(expected[f"input_{part}_features"], **scale)
        scores = nearest_distance(features, **inside) - nearest_distance(features, **outside)
        np.testing.assert_allclose(scores, expected[f"output_score_{part}_ssdk"], rtol=1e-3, atol=1e-3)


def test_shrunk_covariance_equals_official_code():
    expected = golden("ssd/ssdk_scores_more_dims_than_samples")
    train = expected["input_train_features"].astype(np.float64)
    gaussian = fit_gaussians(train, np.zeros(len(train)), "ledoit_wolf")
    covariance = expected["output_ledoit_wolf_covariance_of_raw_train_features"]
    np.testing.assert_allclose(np.linalg.inv(gaussian["precisions"][0]), covariance, rtol=1e-3, atol=1e-5)
    scores = nearest_distance(expected["input_test_features"].astype(np.float64), **gaussian)
    key = "output_score_test_one_ledoit_wolf_without_normalisation"
    np.testing.assert_allclose(scores, expected[key], rtol=1e-3, atol=1e-3)


def test_mean_distance_of_the_training_features_is_their_dimension():
    features = np.random.default_rng(0).normal(size=(300, 12)) @ np.diag(np.arange(1, 13))
    gaussian = fit_gaussians(features, np.zeros(300), "pinv")
    assert nearest_distance(features, **gaussian).mean() == pytest.approx(12, rel=1e-9)
    assert nearest_distance(features.mean(0, keepdims=True), **gaussian) == pytest.approx(0, abs=1e-12)


def test_minimum_over_clusters_exceeds_none_of_them():
    features = np.random.default_rng(0).normal(size=(60, 4)) + np.repeat([[0], [5], [9]], 20, axis=0)
    clusters = np.repeat([0, 1, 2], 20)
    each = [fit_gaussians(features[clusters == k], np.zeros(20), "ledoit_wolf") for k in range(3)]
    single = np.stack([nearest_distance(features, **gaussian) for gaussian in each])
    np.testing.assert_allclose(
        nearest_distance(features, **fit_gaussians(features, clusters, "ledoit_wolf")), single.min(0)
    )


def test_pseudo_inverse_overlooks_what_the_normals_do_not_span_and_shrinkage_does_not():
    rng = np.random.default_rng(0)
    features = np.zeros((51, 512))
    features[:, :50] = rng.normal(size=(51, 50))
    outliers = np.zeros((2, 512))
    outliers[0, 400], outliers[1, 400] = 1, 10
    blind, shrunk = (
        nearest_distance(outliers, **fit_gaussians(features, np.zeros(51), kind))
        for kind in ("pinv", "ledoit_wolf")
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
        {"copies": 0}, {"momentum": -0.1}, {"weight_decay": -1.0}, {"n_epochs": -1}, {"warmup": -1},
        {"test_every": -1},
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
