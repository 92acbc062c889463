"""ReContrast: parity with the official code, and what must hold for any run."""

import pytest
import torch
from golden_arrays import tensors

from kka.detectors.recontrast import (
    global_distance,
    image_scores,
    mine_hard,
    point_distance,
    recontrast_loss,
    sum_maps,
)
from kka.detectors.parts import smooth

ALPHAS = {"minus3p0": -3.0, "minus1p0": -1.0, "0p0": 0.0, "1p0": 1.0}


def six_pairs(expected):
    return [(expected[f"input_target_{i}"], expected[f"input_decoder_output_{i}"]) for i in range(1, 7)]


def close(ours, theirs, rtol=1e-4, atol=0.0):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    print("max difference", float((ours - theirs).detach().abs().max()))


@pytest.mark.parametrize("name", ALPHAS)
def test_loss_with_hard_mining_equals_official_code(name):
    expected = tensors("recontrast/losses")
    pairs = six_pairs(expected)
    for _, output in pairs:
        output.requires_grad_()
    loss = recontrast_loss(pairs, ALPHAS[name])
    loss.backward()
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
