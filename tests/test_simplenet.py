"""SimpleNet: parity with the official code, and what must hold for any run."""

from dataclasses import replace

import pytest
import torch
from golden_arrays import tensors

from kka.detectors.parts import gradient_step
from kka.detectors.simplenet import (
    PRESETS,
    SimpleNet,
    SimpleNetSettings,
    average_channels,
    draw_noise,
    embed,
    enlarge,
    hinge,
    make_optimizers,
    make_discriminator,
    patchify,
    worst_patches,
)

LAYERS = ("input_layer2_maps", "input_layer3_maps")
DISCRIMINATOR = {"body.block1.0": "0", "body.block1.1": "1", "tail": "3"}


def official_discriminator():
    weights = tensors("simplenet/weights_discriminator")
    renamed = {}
    for key, value in weights.items():
        layer, _, name = key.rpartition(".")
        renamed[f"{DISCRIMINATOR[layer]}.{name}"] = value
    network = make_discriminator(20, 16)
    network.load_state_dict(renamed, strict=True)
    return network


def official_adaptor():
    weights = tensors("simplenet/weights_pre_projection")
    adaptor = torch.nn.Linear(20, 20)
    adaptor.load_state_dict({key.removeprefix("layers.0fc."): value for key, value in weights.items()})
    return adaptor


def patches_of(expected):
    """(N, L, 20) as the official code embeds the given maps."""
    return embed([expected[key] for key in LAYERS], 3, 24, 20).flatten(2).transpose(1, 2)


def close(ours, theirs, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    print("max difference", float((ours - theirs).abs().max()))


def test_embedding_equals_official_code():
    expected = tensors("simplenet/embed_project_discriminate")
    layer2, layer3 = (expected[key] for key in LAYERS)
    first = patchify(layer2, 3)[0].flatten(1).T.unflatten(1, (8, 3, 3))
    close(first, expected["output_patchify_layer2_first_image"])
    close(
        patchify(layer3, 3).flatten(2).transpose(1, 2).unflatten(2, (16, 3, 3)),
        expected["output_patchify_layer3"],
    )
    every_second = patchify(layer2, 5)[0, :, ::2, ::2]
    close(
        every_second.flatten(1).T.unflatten(1, (8, 5, 5)),
        expected["output_patchify_layer2_first_image_patchsize5_stride2"],
    )
    patches = patches_of(expected).flatten(0, 1)
    close(patches, expected["output_embedding_after_aggregator"])


def test_adaptor_and_discriminator_equal_official_code():
    expected = tensors("simplenet/embed_project_discriminate")
    adapted, discriminator = official_adaptor()(patches_of(expected).flatten(0, 1)), official_discriminator()
    close(adapted, expected["output_projection"])
    close(discriminator.eval()(adapted), expected["output_discriminator_eval_mode"])
    close(discriminator.train()(adapted), expected["output_discriminator_train_mode"])
    norm = discriminator[1]
    close(norm.running_mean, expected["output_batchnorm_running_mean_after_train_mode"])
    close(norm.running_var, expected["output_batchnorm_running_var_after_train_mode"])


def tiny(**changes):
    """A detector on 12 x 12 patches of 20 numbers."""
    small = dict(image_size=48, pretrain_embed_dimension=24, target_embed_dimension=20, dsc_hidden=16)
    values = {"backbone": "squeezenet1_0", "backbone_init": "random", "n_epochs": 2, **small, **changes}
    return SimpleNet(SimpleNetSettings(**values))


def official(adaptor):
    detector = tiny()
    detector.model.adaptor, detector.model.discriminator = adaptor, official_discriminator()
    detector.model.train()
    return detector


def test_hinge_and_its_gradient_equal_official_code():
    expected = tensors("simplenet/hinge")
    detector = official(torch.nn.Identity())
    true, fake = expected["input_true_patches"], expected["input_fake_patches"]
    loss = detector.loss(true[None], fake - true)
    loss.backward()
    close(loss, expected["output_hinge_loss"], atol=1e-6)
    for layer, name in (("0", "weight"), ("1", "weight"), ("1", "bias"), ("3", "weight")):
        official_layer = next(key for key, value in DISCRIMINATOR.items() if value == layer)
        gradient = expected[f"output_gradient_{official_layer.replace('.', '_')}_{name}"]
        close(detector.model.discriminator[int(layer)].get_parameter(name).grad, gradient, atol=1e-6)


def test_training_curve_equals_official_code():
    expected = tensors("simplenet/train_curve")
    detector, patches = official(official_adaptor()), patches_of(expected)
    optimizers = make_optimizers(detector.model, detector.settings)
    losses = []
    for batch, noise in zip(
        expected["input_batch_order_row_is_step"].long(), expected["input_noise_of_each_step"], strict=True
    ):
        losses.append(gradient_step(detector.loss(patches[batch], noise), optimizers, "", ""))
    close(torch.tensor(losses), expected["output_loss_per_step"], atol=0)
    close(detector.model.adaptor.weight, expected["output_projection_after_layers_0fc_weight"], 0, 1e-4)
    for key, name in {"block1_0_weight": "0.weight", "block1_1_weight": "1.weight", "block1_1_bias": "1.bias",
                      "block1_1_running_var": "1.running_var"}.items():  # fmt: skip
        after = detector.model.discriminator.state_dict()[name]
        close(after, expected[f"output_discriminator_after_body_{key}"], 0, 1e-4)
    tail = detector.model.discriminator[3].weight
    close(tail, expected["output_discriminator_after_tail_weight"], 0, 1e-4)


def test_scores_and_maps_equal_official_code():
    expected = tensors("simplenet/predict")
    with torch.no_grad():
        adapted = official_adaptor()(patches_of(expected)).flatten(0, 1)
        scores = -official_discriminator().eval()(adapted).view(4, 6, 6)
    close(scores.flatten(1), expected["output_patch_score"], 0)
    close(scores.flatten(1).amax(1), expected["output_image_score_max"], 0)
    close(enlarge(scores, (24, 20)), expected["output_map_bilinear_then_gaussian_sigma4"], 0)
