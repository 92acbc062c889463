"""ReContrast: parity with the official code, its loss with generated anomalies, its BatchNorm rule."""

import copy
from dataclasses import replace

import pytest
import torch
from golden_arrays import tensors
from toy_tensors import toy_images, toy_train_set

from kka.detectors.parts import smooth
from kka.detectors.recontrast import (
    ReContrast,
    ReContrastSettings,
    global_distance,
    image_scores,
    mining_alpha,
    point_distance,
    recontrast_loss,
    repulsion,
    steps_per_epoch,
    sum_maps,
)
from kka.networks.reconstruction import Bottleneck, Decoder

ALPHAS = {"minus3p0": -3.0, "minus1p0": -1.0, "0p0": 0.0, "1p0": 1.0}


def six_pairs(expected):
    return [(expected[f"input_target_{i}"], expected[f"input_decoder_output_{i}"]) for i in range(1, 7)]


def close(ours, theirs, rtol=1e-4, atol=0.0):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ALPHAS)
def test_loss_with_hard_mining_equals_official_code(name):
    expected = tensors("recontrast/losses")
    pairs = six_pairs(expected)
    for _, output in pairs:
        output.requires_grad_()
    for target, _ in pairs:
        target.requires_grad_()
    loss = recontrast_loss(pairs, ALPHAS[name])
    loss.backward()
    assert all(target.grad is None for target, _ in pairs)  # targets are fixed
    key = f"hm_alpha_{name}_total_half_plus_half"
    close(loss, expected[f"output_loss_{key}"])
    for i, (_, output) in enumerate(pairs, 1):
        close(output.grad, expected[f"output_gradient_{key}_wrt_decoder_output_{i}"], atol=1e-6)


def test_distances_equal_official_code():
    expected = tensors("recontrast/losses")
    pairs = six_pairs(expected)
    for i, (target, output) in enumerate(pairs, 1):
        close(point_distance(target, output), expected[f"output_point_distance_{i}"], atol=1e-6)
        target.requires_grad_()
        output.requires_grad_()
    loss = sum(global_distance(*pair).mean() for pair in pairs[:3])
    loss.backward()
    close(loss, expected["output_loss_global_cosine_first_three"])
    key = "output_gradient_global_cosine"
    for i, (target, output) in enumerate(pairs[:3], 1):
        close(output.grad, expected[f"{key}_first_three_wrt_decoder_output_{i}"], atol=1e-6)
        close(target.grad, expected[f"{key}_without_stop_gradient_wrt_target_{i}"], atol=1e-6)
    region = sum(point_distance(*pair).mean() for pair in pairs[:3])
    close(region, expected["output_region_cosine_first_three"])


def test_maps_and_image_scores_equal_official_code():
    expected = tensors("recontrast/anomaly_map")
    rough = sum_maps(six_pairs(expected), (32, 32))
    close(rough, expected["output_map_sum_of_six_unsmoothed"], 0, 1e-4)
    maps = smooth(rough)
    close(maps, expected["output_map_sum_of_six_gaussian_sigma4"], 0, 1e-4)
    close(image_scores(maps, "max"), expected["output_image_score_max"], 0, 1e-4)
    close(image_scores(maps, "top"), expected["output_image_score_mean_of_top_1_percent"], 0, 1e-4)


def test_image_scores_by_hand():
    maps = torch.zeros(2, 10, 20)
    maps[1, 0, :2] = torch.tensor([3.0, 1.0])
    assert image_scores(maps, "max").tolist() == [0.0, 3.0]
    assert image_scores(maps, "top").tolist() == [0.0, 2.0]  # 1 % of 200 pixels
    assert image_scores(maps, "mean").tolist() == pytest.approx([0.0, 4.0 / 200])


def test_mining_sets_in_over_the_first_tenth():
    alphas = [mining_alpha(iteration, 1000) for iteration in (0, 25, 50, 100, 999)]
    assert alphas == pytest.approx([-3.0, -2.0, -1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("kind", "margin", "same", "orthogonal", "opposite"),
    [("margin", 1.5, 1.5, 0.5, 0.0), ("similarity", 1.5, 1.0, 0.0, 0.0), ("signed", 1.5, 0.0, -1.0, -2.0)],
)
def test_repulsion_by_hand(kind, margin, same, orthogonal, opposite):
    target, other = torch.zeros(2, 2, 3, 3), torch.zeros(2, 2, 3, 3)
    target[:, 0], other[:, 1] = 1.0, 1.0
    for output, expected in ((target, same), (other, orthogonal), (-target, opposite)):
        assert repulsion([(target, output)] * 6, kind, margin).item() == pytest.approx(expected, abs=1e-6)


def test_similarity_counts_by_place():
    target = torch.ones(1, 1, 1, 2)
    output = torch.tensor([[[[1.0, -1.0]]]])  # half of the places agree, the image as a whole does not
    assert repulsion([(target, output)], "similarity", 1.0).item() == pytest.approx(0.5)
    assert repulsion([(target, output)], "margin", 1.0).item() == pytest.approx(0.0)


def test_a_last_single_image_is_left_out():
    assert [steps_per_epoch(n, 4) for n in (2, 4, 5, 6, 9)] == [1, 1, 1, 2, 2]


def test_width_1_has_the_official_sizes():
    channels = (256, 512, 1024)
    with torch.device("meta"):
        bottleneck = Bottleneck(channels)
        decoder = Decoder(bottleneck.n_out, channels)
        levels = [torch.empty(2, n, side, side) for n, side in zip(channels, (64, 32, 16), strict=True)]
        code = bottleneck(levels)
        both = decoder(code, [level.shape[2:] for level in levels])
    assert code.shape == (2, 2048, 8, 8)
    assert bottleneck.stage[0].reduce[0].weight.shape == (1024, 3072, 1, 1)
    assert decoder.stages[0][0].reduce[0].weight.shape == (512, 2048, 1, 1)
    assert [len(stage) for stage in decoder.stages] == [3, 4, 6]
    for rebuilt in both:
        assert [level.shape for level in rebuilt] == [level.shape for level in levels]


def test_smallest_width_has_a_channel():
    bottleneck = Bottleneck((8, 16, 32), 1e-4)
    levels = [torch.zeros(2, n, side, side) for n, side in ((8, 16), (16, 8), (32, 4))]
    assert bottleneck(levels).shape == (2, 2, 2, 2)


# Resnet-18 at 32 px, for it has BatchNorm.
TINY = ReContrastSettings(
    "resnet18", None, "random", image_size=32, n_iterations=3, batch_size=4, width=0.1, bottleneck_blocks=1,
    decoder_blocks=(1, 1, 1),
)  # fmt: skip


def state_of(detector, part):
    return {key: value.clone() for key, value in detector.state_dict().items() if key.startswith(part)}


@pytest.mark.parametrize("encoder_bn", ["eval", "train"])
def test_batch_norm_of_the_encoder_follows_the_rule(encoder_bn):
    detector = ReContrast(replace(TINY, encoder_bn=encoder_bn))
    before = {part: state_of(detector, part) for part in ("encoder", "frozen")}
    for key, value in before["frozen"].items():
        assert torch.equal(value, before["encoder"][key.replace("frozen", "encoder")])
    detector.fit(toy_train_set(side=32))
    after = state_of(detector, "encoder")
    for key, value in state_of(detector, "frozen").items():
        assert torch.equal(value, before["frozen"][key])
    for key, value in after.items():
        statistic = "running" in key or "num_batches" in key
        assert torch.equal(value, before["encoder"][key]) == (statistic and encoder_bn == "eval"), key


@pytest.fixture(scope="module")
def loss_of():
    """The loss of one batch under other settings, and the statistics of a BatchNorm after it."""
    detector = ReContrast(TINY)
    start = copy.deepcopy(detector.state_dict())

    def compute(generated, **changes):
        detector.load_state_dict(start)
        detector.settings = replace(TINY, **changes)
        detector.model.train()
        loss = detector.loss(toy_images(4, False, 32), generated, alpha=1.0).item()
        return loss, detector.model.bottleneck.stage[0].reduce[1].running_mean.clone()

    return compute


def test_generated_anomalies_leave_the_statistics_to_the_normals_unless_mixed(loss_of):
    generated = toy_images(4, True, 32)
    _, alone = loss_of(None)
    assert torch.equal(loss_of(generated)[1], alone)
    assert not torch.equal(loss_of(generated, kka_batch="mixed")[1], alone)


def test_anomalies_add_the_weighted_repulsion(loss_of):
    generated = toy_images(4, True, 32)
    alone = loss_of(None)[0]
    half, whole = (loss_of(generated, kka_weight=weight)[0] for weight in (0.5, 1.0))
    assert alone < half < whole
    assert alone == pytest.approx(2 * half - whole, rel=1e-4)


def test_every_way_to_use_anomalies_is_another(loss_of):
    generated = toy_images(4, True, 32)
    ways = {"kka_loss": "margin"}, {"kka_loss": "similarity"}, {"kka_loss": "signed"}, {"kka_batch": "mixed"}
    losses = [loss_of(generated, **way)[0] for way in ways]
    assert len(set(losses)) == 4
    assert losses[2] < loss_of(None)[0]
