"""DRA: parity with the official code, pseudo anomalies, groups of images, references."""

from dataclasses import replace

import pytest
import torch
from golden_arrays import tensors
from PIL import Image
from sklearn.metrics import average_precision_score
from toy_tensors import toy_images, toy_train_set

from kka.detectors.deviation import PSEUDO, SEEN, DRAHeads, find_groups
from kka.detectors.dra import DRA, DRASettings
from kka.detectors.pseudo_anomalies import (
    KINDS,
    change_texture,
    content_of_textures,
    noise_mask,
    paste_patch,
    perlin,
    procedural_texture,
    pseudo_anomaly,
)
from kka.errors import UserError
from kka.metrics import auroc

TINY = DRASettings(
    backbone="squeezenet1_1", backbone_init="random", image_size=96, n_epochs=4, steps_per_epoch=4,
    batch_size=9, fine_tune=False, lr=1e-2, views=2, n_references=2,
)  # fmt: skip
OFFICIAL = {"normality": "holistic_head", "seen": "seen_head", "pseudo": "pseudo_head"}
OFFICIAL["residual"] = "composite_head"
OUTPUTS = ("holistic_normality", "seen_abnormality", "pseudo_abnormality", "latent_residual")


def official_heads():
    heads, weights = DRAHeads(16, 0.1), tensors("dra/weights_heads")
    heads.load_state_dict({
        key: weights[key.replace(key.split(".")[0], OFFICIAL[key.split(".")[0]], 1)].reshape(value.shape)
        for key, value in heads.state_dict().items()
    })  # fmt: skip
    return heads


def features(expected, rows):
    return [expected[f"input_feature_map_scale{k}"][rows] for k in range(2)]


def scores_of(heads, expected):
    references = [maps.mean(0) for maps in features(expected, slice(0, 5))]
    return heads(features(expected, slice(5, None)), references)


def test_scores_equal_official_code():
    expected = tensors("dra/heads")
    scores = scores_of(official_heads().eval(), expected)
    for k, name in enumerate(OUTPUTS):
        torch.testing.assert_close(scores[:, k], expected[f"output_eval_mode_{name}"], rtol=1e-4, atol=1e-5)


def test_combined_score_and_metrics_equal_official_code():
    expected = tensors("dra/combined_score")
    combined = DRAHeads.combine(scores_of(official_heads().eval(), expected)).detach()
    torch.testing.assert_close(combined, expected["output_combined_score"], rtol=1e-4, atol=1e-5)
    labels = expected["input_test_label"]
    found = [auroc(labels.tolist(), combined.numpy()), average_precision_score(labels, combined)]
    assert found == pytest.approx(expected["output_auroc_and_average_precision"].tolist(), abs=1e-6)


def test_losses_and_gradients_equal_official_code():
    expected, heads = tensors("dra/heads"), official_heads().train()
    labels, draws = expected["input_label_0_normal_1_seen_2_pseudo"], expected["input_reference_scores"]
    scores = scores_of(heads, expected)
    rows = {"seen_abnormality": labels != PSEUDO, "pseudo_abnormality": labels != SEEN}
    for k, name in enumerate(OUTPUTS):
        found = scores[rows.get(name, labels >= 0), k]
        wanted = expected[f"output_train_mode_filtered_by_label_{name}"]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    loss = heads.loss(scores, labels, draws)
    loss.backward()
    total = expected["output_deviation_loss_total"].reshape(())
    torch.testing.assert_close(loss.detach(), total, rtol=1e-4, atol=1e-5)
    compared = 0
    for key, parameter in heads.named_parameters():
        part, rest = key.split(".", 1)
        name = f"output_gradient_{OFFICIAL[part]}_{rest.replace('.', '_')}"
        gradient, wanted = parameter.grad, expected.get(name)
        if wanted is None:
            wanted = expected.get(f"{name}_first_2_filters", None)
            gradient = gradient[:2]
        if wanted is not None:
            torch.testing.assert_close(gradient.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared == 13  # all but the bias in front of the BatchNorm, whose gradient is 0
    norm = heads.residual.conv[1]
    for name in ("running_mean", "running_var"):
        wanted = expected[f"output_train_mode_batchnorm_{name}_after"]
        torch.testing.assert_close(getattr(norm, name), wanted, rtol=1e-4, atol=1e-5)


def test_heads_without_images_count_nothing():
    scores = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    draws = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1))
    assert DRAHeads.loss(scores, torch.ones(3, dtype=torch.long), draws).isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_pseudo_anomalies_differ_from_their_normals_in_a_part(kind):
    images = toy_images(4, False, 64).float() / 255
    made = [
        torch.stack([pseudo_anomaly(kind, image, 1 - image, None, stream) for image in images])
        for stream in (torch.Generator().manual_seed(3), torch.Generator().manual_seed(3))
    ]
    assert torch.equal(*made)
    changed = (made[0] != images).any(1).float().mean((1, 2))
    assert ((changed > 0) & (changed < 0.95)).all()
    assert made[0].min() >= 0
    assert made[0].max() <= 1
    brighter = (made[0] - images).amax((1, 2, 3)) > 0.5
    assert brighter.all() == (kind == "cutmix")  # whose patches come from the bright images


def test_patches_have_the_size_that_was_asked_for():
    stream = torch.Generator().manual_seed(0)
    shares = [
        paste_patch(torch.zeros(3, 100, 100), torch.ones(3, 100, 100), stream).amax(0).bool().float().mean()
        for _ in range(50)
    ]
    assert 0.015 < min(shares) < 0.05
    assert 0.12 < max(shares) < 0.16


def test_noise_is_smooth_and_zero_at_the_corners_of_cells():
    noise = perlin(64, 4, 4, torch.Generator().manual_seed(0))
    assert noise.abs().max() <= 1
    assert noise.abs()[15:17, 15:17].max() < 0.15 < noise.abs().max()
    assert noise.diff(dim=0).abs().max() < 0.2
    assert all(noise_mask(48, torch.Generator().manual_seed(k)).any() for k in range(20))


def test_textures_differ_and_stay_in_range():
    made = [procedural_texture(32, torch.Generator().manual_seed(k)) for k in range(20)]
    made += [change_texture(made[0], torch.Generator().manual_seed(k)) for k in range(20)]
    assert all(part.min() >= 0 and part.max() <= 1 and part.shape == (3, 32, 32) for part in made)
    assert len({round(part.mean().item(), 4) for part in made}) > 35


def test_textures_of_a_folder_are_used_and_count_in_the_identity(tmp_path):
    (tmp_path / "wood").mkdir()
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "wood" / "a.png")
    detector = DRA(replace(TINY, pseudo=("dream",), texture_dir=str(tmp_path)))
    train = toy_train_set(side=96)
    made = detector.made.of(train, torch.arange(7), ["dream"] * 7, torch.Generator().manual_seed(0))
    assert detector.made.textures.shape == (1, 3, 96, 96)
    assert (made - train.resized[:7].float() / 255).abs().amax((1, 2, 3)).min() > 0.1
    before = content_of_textures(detector.settings)
    Image.new("RGB", (40, 30), (0, 255, 0)).save(tmp_path / "b.png")
    assert content_of_textures(detector.settings) != before
    assert content_of_textures(TINY) == {}
    with pytest.raises(UserError, match="is no folder"):
        content_of_textures(replace(TINY, texture_dir=str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        content_of_textures(replace(TINY, texture_dir=str(tmp_path / "empty")))


def with_known_ones():
    """7 normals, 5 generated anomalies, 2 known ones."""
    images = toy_images(2, True, 96, seed=9)
    return toy_train_set(side=96).append_anomalies(images, torch.full((2, 2), 96), images, known=True)


@pytest.mark.parametrize("generated_as", ["seen", "pseudo"])
def test_generated_anomalies_count_as_the_flag_says(generated_as):
    detector, train = DRA(replace(TINY, generated_as=generated_as)), with_known_ones()
    groups = find_groups(train, detector.generated_are_pseudo)
    generated = torch.arange(7, 12)
    assert torch.equal(groups.seen[-2:], torch.tensor([12, 13]))
    assert torch.equal(groups.generated, generated if generated_as == "pseudo" else generated[:0])
    assert (groups.labels[generated] == (PSEUDO if generated_as == "pseudo" else SEEN)).all()
    steps = [rows for k in range(8) for rows in detector._batches(groups, torch.Generator().manual_seed(k))]
    rows, labels = torch.cat(steps), groups.labels[torch.cat(steps)]
    assert (labels == SEEN).float().mean() == pytest.approx(1 / 3)
    assert (labels == PSEUDO).float().mean() == pytest.approx(1 / 3, abs=0.06)
    drawn = ((rows >= 7) & (rows < 12) & (labels == PSEUDO)).sum() / (labels == PSEUDO).sum()
    assert drawn == (pytest.approx(0.5, abs=0.12) if generated_as == "pseudo" else 0)


@pytest.mark.parametrize("fine_tune", [True, False])
def test_known_anomalies_are_told_from_normals(fine_tune):
    detector = DRA(replace(TINY, fine_tune=fine_tune, lr=1e-3 if fine_tune else 1e-2))
    detector.fit(toy_train_set(side=96))
    images = torch.cat([toy_images(8, bright, 96, seed=3) for bright in (False, True)])
    scores = detector.score(images)
    assert auroc([0] * 8 + [1] * 8, scores) > 0.95
    assert all(reference.abs().sum() > 0 for reference in detector.model.references)
    again = DRA(detector.settings, seed=1)
    again.load_state_dict(detector.state_dict())
    assert torch.equal(again.score(images), scores)


def test_references_are_clean_normals():
    detector, train = DRA(TINY), toy_train_set(side=96)
    detector.set_references(train, find_groups(train, False))
    features = detector.model.pyramid(train.resized[:7])
    pairs = [
        (a, b) for a in range(7) for b in range(a)
        if torch.allclose(detector.model.references[0], features[0][[a, b]].mean(0), atol=1e-4)
    ]  # fmt: skip
    assert len(pairs) == 1


def test_without_seen_anomalies_training_works(caplog):
    train = toy_train_set(n_anomalies=0, side=96)
    DRA(replace(TINY, n_epochs=1, pseudo=KINDS)).fit(train)
    assert "there are none; see --n_anomaly" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pseudo": ("blur",)}, "--pseudo blur"),
        ({"pseudo": ()}, "--pseudo"),
        ({"n_references": 0}, "--n_references must be at least 1"),
        ({"batch_size": 2}, "--batch_size must be at least 3"),
        ({"image_size": 48, "residual_stride": 3}, "the residual head needs 3"),
    ],
)
def test_settings_that_make_no_sense_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        DRA(replace(TINY, **changes))
