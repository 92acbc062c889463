"""DevNet: parity with the official code, sampling, what is trained."""

from dataclasses import replace

import pytest
import torch
from golden_arrays import tensors
from toy_tensors import toy_images, toy_train_set

from kka.detectors.deviation import DevNetHeads, deviation_losses, find_groups, pyramid, rotate, top_mean
from kka.detectors.devnet import DevNet, DevNetSettings
from kka.metrics import auroc
from kka.networks.backbones import Backbone

TINY = DevNetSettings(
    backbone="squeezenet1_1", backbone_init="random", image_size=64, n_epochs=3, steps_per_epoch=4,
    batch_size=8, fine_tune=False, lr=1e-2, views=2,
)  # fmt: skip


@pytest.mark.parametrize("case", ["label", "label_all_normal", "label_all_anomalous"])
def test_deviation_loss_equals_official_code(case):
    expected = tensors("devnet/deviation_loss")
    labels = {"label": expected["input_label"]}.get(case, torch.full((12,), int("anomalous" in case)))
    scores = expected["input_score"].requires_grad_()
    loss = deviation_losses(scores, labels, expected["input_reference_scores"]).mean()
    loss.backward()
    torch.testing.assert_close(loss, expected[f"output_loss_{case}"].squeeze(), rtol=1e-4, atol=1e-6)
    gradient = expected[f"output_gradient_wrt_score_{case}"]
    torch.testing.assert_close(scores.grad, gradient, rtol=1e-4, atol=1e-6)


def test_deviation_loss_of_each_image_equals_official_code():
    expected = tensors("devnet/deviation_loss")
    args = (expected[f"input_{name}"] for name in ("score", "label", "reference_scores"))
    each = expected["output_loss_of_each_sample_alone"]
    torch.testing.assert_close(deviation_losses(*args), each, rtol=1e-4, atol=1e-6)


def official_heads(topk):
    weights = tensors("devnet/weights_scorer")
    heads = DevNetHeads(16, topk)
    heads.load_state_dict({key.replace("conv.", "head.scoring."): value for key, value in weights.items()})
    return heads


@pytest.mark.parametrize(
    ("scales", "topk", "name"),
    [(2, 0.1, "two_scales_top10percent"), (1, 0.1, "one_scale_top10percent"),
     (2, 0.0, "two_scales_plain_mean"), (2, 0.01, "two_scales_top1percent")],
)  # fmt: skip
def test_scores_equal_official_code(scales, topk, name):
    expected = tensors("devnet/scorer")
    features = [expected[f"input_feature_map_scale{k}"] for k in range(scales)]
    scores = official_heads(topk)(features, [])
    torch.testing.assert_close(scores, expected[f"output_score_{name}"], rtol=1e-4, atol=1e-6)


def test_gradients_equal_official_code():
    expected, heads = tensors("devnet/scorer"), official_heads(0.1)
    features = [expected[f"input_feature_map_scale{k}"] for k in range(2)]
    scores = heads(features, [])[:, 0]
    loss = deviation_losses(scores, expected["input_label"], expected["input_reference_scores"]).mean()
    loss.backward()
    torch.testing.assert_close(loss, expected["output_deviation_loss"].squeeze(), rtol=1e-4, atol=1e-6)
    for name in ("weight", "bias"):
        gradient = expected[f"output_gradient_conv_{name}"]
        torch.testing.assert_close(getattr(heads.head.scoring, name).grad, gradient, rtol=1e-4, atol=1e-6)


def test_one_hot_place_counts_by_its_share():
    scores = torch.zeros(1, 1, 14, 14)
    scores[..., 3, 5] = -19
    assert top_mean(scores, 0.1).item() == pytest.approx(1)  # 19 of 196 places


def test_a_quarter_turn_moves_the_corners():
    image = torch.zeros(1, 3, 8, 8)
    image[..., :4, :4] = 1
    turned = rotate(image, [90.0], "zeros")
    assert turned.sum() == pytest.approx(48, abs=1e-3)
    assert turned[..., :4, :4].sum() == pytest.approx(0, abs=1e-3)
    torch.testing.assert_close(rotate(image, [0.0], "reflection"), image)


def test_batches_are_half_anomalies_that_come_in_turn():
    detector = DevNet(TINY)
    groups = find_groups(toy_train_set(7, 3, 64), False)
    steps = list(detector._batches(groups, torch.Generator().manual_seed(0)))
    assert len(steps) == 4
    assert all((rows >= 7).sum() == 4 for rows in steps)
    counts = torch.cat(steps).bincount()
    assert counts[:7].max() - counts[:7].min() <= 1
    assert counts[7:].max() - counts[7:].min() <= 1


@pytest.mark.parametrize("fine_tune", [True, False])
def test_known_anomalies_are_told_from_normals(fine_tune):
    detector = DevNet(replace(TINY, fine_tune=fine_tune, lr=1e-3 if fine_tune else 3e-2))
    before = [value.clone() for value in detector.model.backbone.state_dict().values()]
    detector.fit(toy_train_set(side=64))
    after = detector.model.backbone.state_dict().values()
    assert all(map(torch.equal, before, after)) is not fine_tune
    images = torch.cat([toy_images(8, bright, 64, seed=3) for bright in (False, True)])
    assert auroc([0] * 8 + [1] * 8, detector.score(images)) > 0.95


def test_half_size_gives_half_maps():
    backbone = Backbone(replace(TINY, image_size=448, backbone="resnet18"), 448)
    maps = pyramid(backbone, toy_images(1, True, 448), 2)
    assert [tuple(part.shape) for part in maps] == [(1, 512, 14, 14), (1, 512, 7, 7)]


def test_without_anomalies_there_is_a_warning(caplog):
    train = toy_train_set(n_anomalies=0, side=64)
    DevNet(replace(TINY, n_epochs=0)).fit(train)
    assert "there are none; see --n_anomaly" in caplog.text


def test_features_are_scaled_to_the_deviation_that_is_asked_for():
    train, images = toy_train_set(8, 4, side=64), toy_images(4, True, 64, seed=3)
    detector = DevNet(replace(TINY, feature_std=1.0, n_epochs=1))
    detector.fit(train)
    normals = find_groups(train, False).normals
    with torch.no_grad():
        assert float(detector.model.eval().pyramid(train.resized[normals])[0].std()) == pytest.approx(1)
        unscaled = pyramid(detector.model.backbone, train.resized[normals], 2)[0].std()
    assert float(unscaled) != pytest.approx(1, rel=0.1)
    again = DevNet(replace(TINY, n_epochs=1), seed=1)
    again.load_state_dict(detector.state_dict())  # the scale is a part of the model
    assert torch.equal(again.score(images), detector.score(images))
    as_they_are = DevNet(replace(TINY, n_epochs=1))
    as_they_are.fit(train)
    assert float(as_they_are.model.feature_scale) == 1
