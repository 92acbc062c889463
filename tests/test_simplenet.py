"""SimpleNet: parity with the official code, its loss with generated anomalies, its cache."""

import pytest
import torch
from golden_arrays import tensors
from toy_tensors import toy_images, toy_train_set

from kka.detectors.parts import gradient_step
from kka.detectors.simplenet import (
    SimpleNet,
    SimpleNetSettings,
    average_channels,
    draw_noise,
    embed_patches,
    enlarge,
    make_discriminator,
    make_optimizers,
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
    return embed_patches([expected[key] for key in LAYERS], 3, 24, 20).flatten(2).transpose(1, 2)


def close(ours, theirs, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def test_embedding_equals_official_code():
    expected = tensors("simplenet/embed_project_discriminate")
    layer2, layer3 = (expected[key] for key in LAYERS)
    first = patchify(layer2, 3)[0].flatten(1).T.unflatten(1, (8, 3, 3))
    close(first, expected["output_patchify_layer2_first_image"])
    every = patchify(layer3, 3).flatten(2).transpose(1, 2).unflatten(2, (16, 3, 3))
    close(every, expected["output_patchify_layer3"])
    every_second = patchify(layer2, 5)[0, :, ::2, ::2]
    every_second = every_second.flatten(1).T.unflatten(1, (8, 5, 5))
    close(every_second, expected["output_patchify_layer2_first_image_patchsize5_stride2"])
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
    small = {"pretrain_embed_dimension": 24, "target_embed_dimension": 20, "dsc_hidden": 16, "n_epochs": 2}
    backbone = {"backbone": "squeezenet1_0", "backbone_init": "random", "image_size": 48}
    return SimpleNet(SimpleNetSettings(**{**backbone, **small, **changes}))


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


def readable(**changes):
    """The score of a patch is its first number."""
    detector = tiny(target_embed_dimension=2, **changes)
    detector.model.adaptor = torch.nn.Identity()
    detector.model.discriminator = torch.nn.Linear(2, 1, bias=False)
    detector.model.discriminator.weight.data = torch.tensor([[1.0, 0.0]])
    return detector


@pytest.mark.parametrize(
    ("changes", "negatives"),
    [
        ({"kka_negatives": "replace"}, (1.5 + 0.25 + 2.5 + 0.0) / 4),
        ({"kka_negatives": "mixed", "kka_weight": 0.25}, 0.75 * 1.2 + 0.25 * (1.5 + 0.25 + 2.5 + 0.0) / 4),
        ({"kka_level": "images", "kka_top": 0.5}, (0.25 + 0.0) / 2),
    ],
)
def test_loss_with_generated_anomalies_by_hand(changes, negatives):
    first = torch.tensor([[0.2, 0.2], [0.2, 0.2], [0.9, 0.9]])  # scores of the patches of normals
    generated = torch.tensor([[1.0, -0.25], [2.0, -3.0]])
    true, false = (torch.stack([scores, torch.ones_like(scores)], 2) for scores in (first, generated))
    noise = torch.zeros(6, 2)
    noise[:, 0] = 0.7 - first.flatten()
    detector = readable(**changes)
    positives = (4 * 0.3 + 2 * 0.0) / 6
    mixed = noise if "mixed" in changes.values() else None
    assert detector.loss(true, mixed, false).item() == pytest.approx(positives + negatives)
    assert detector.loss(true, noise).item() == pytest.approx(positives + 1.2)


def test_worst_patches_are_the_lowest_scores():
    scores = torch.tensor([[3.0, 1.0, 2.0, 4.0], [0.0, -1.0, 5.0, 6.0]])
    assert worst_patches(scores, 0.5).tolist() == [[1.0, 2.0], [-1.0, 0.0]]
    assert worst_patches(scores, 0.01).tolist() == [[1.0], [-1.0]]


def test_averaging_is_adaptive_pooling():
    maps = torch.rand(2, 12, 3, 4)
    for n in (4, 5):  # whole groups, and groups that overlap
        pooled = torch.nn.functional.adaptive_avg_pool1d(maps.permute(0, 2, 3, 1).reshape(24, 1, 12), n)
        close(average_channels(maps, n), pooled.view(2, 3, 4, n).permute(0, 3, 1, 2))


def test_noise_has_its_levels():
    def stds(levels):
        noise = draw_noise(torch.empty(300, 1000), 0.5, levels, torch.Generator().manual_seed(0))
        return noise.std(1)

    assert ((stds(1) - 0.5).abs() < 0.06).all()
    mixed = stds(3)
    for level in (0.5, 0.55, 0.605):
        assert 50 < ((mixed - level).abs() < 0.025).sum() < 150


def weights_after(**changes):
    detector = tiny(**changes)
    detector.fit(toy_train_set())
    return detector.model.adaptor.weight.detach()


def test_cached_features_are_those_computed_anew():
    close(weights_after(), weights_after(cache_gib=0.0))


def test_switches_change_the_training():
    plain = weights_after()
    for changes in ({"augment": True}, {"kka_negatives": "mixed"}, {"kka_level": "images"}, {"mix_noise": 2}):
        again = {"kka_negatives": "mixed"} if "mix_noise" in changes else {}
        base = weights_after(**again) if again else plain
        assert not torch.equal(weights_after(**{**again, **changes}), base), changes


def test_features_of_any_backbone_are_scaled_to_the_noise():
    train, detector = toy_train_set(n_anomalies=0), tiny(feature_std=0.1, n_epochs=0)
    detector.fit(train)
    assert detector._patches(train.resized).std().item() == pytest.approx(0.1, rel=1e-4)
    assert tiny()._patches(toy_images(2, True)).std() != detector._patches(toy_images(2, True)).std()
