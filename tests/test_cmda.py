"""CMDA: parity with the official code, captions, mixing, resume."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_arrays import tensors
from test_deep_sad import toy_train_set
from test_ssd import interrupt
from tiny_models import FLOWER_WORDS, word_tokenizer
from torch import nn
from toy import image_path, refused, run_toy, write_toy_set

from kka.detectors.cmda import (
    CMDA,
    CMDASettings,
    TextNetwork,
    mix,
    mixing_entropy,
    mixing_weights,
)
from kka.detectors.ssd import SSD, SSDSettings, contrastive_loss
from kka.errors import UserError
from kka.journal import Journal
from kka.metrics import auroc
from kka.sentence_vectors import encode_sentences

FAST = CMDASettings(arch="cifar10_LeNet", n_epochs=2, batch_size=8, text_width=16, copies=2)
CPU = torch.device("cpu")
CAPTIONS = ("a dark photo", "noise, seen from above", "black and gray dots")


def captioned(n_normal=10, n_anomalies=0, seed=0):
    """Every normal has one to three captions, no anomaly has one."""
    train = toy_train_set(n_normal, n_anomalies, seed=seed)
    captions = [tuple(f"{c} number {k}" for c in CAPTIONS[: 1 + k % 3]) for k in range(n_normal)]
    return replace(train, captions=(*captions, *((),) * n_anomalies))


@pytest.fixture(scope="module")
def expected():
    return tensors("cmda/mixing_step")


def vectors(expected):
    names = ("caption_vectors_after_text_network", "image_vectors_of_view1", "image_vectors_of_view2")
    return (nn.functional.normalize(expected[f"input_{name}"]) for name in names)


@pytest.mark.parametrize(
    ("kind", "key", "images"),
    [
        ("official", "output_official_W", "output_official_generated_images"),
        ("abs", "output_correct_W_rows_sum_to_1", "output_correct_generated_images"),
    ],
)
def test_mixtures_equal_official_code_and_its_mended_form(expected, kind, key, images):
    captions, first, _ = vectors(expected)
    weights = mixing_weights(captions, first, kind, 0.5)
    torch.testing.assert_close(weights, expected[key], rtol=1e-4, atol=1e-5)
    mixed = mix(weights, expected["input_view1_images"])
    torch.testing.assert_close(mixed, expected[images], rtol=1e-4, atol=1e-5)


def test_losses_equal_official_code(expected):
    captions, first, second = vectors(expected)
    cross = contrastive_loss(first, captions, 0.5)
    torch.testing.assert_close(cross, expected["output_official_cross_loss"], rtol=1e-4, atol=1e-5)
    whole = contrastive_loss(first, second, 0.5) + CMDASettings().cross_weight * cross
    key = "output_official_first_loss_views_plus_0p1_cross"
    torch.testing.assert_close(whole, expected[key], rtol=1e-4, atol=1e-5)
    mixed = nn.functional.normalize(expected["input_image_vector_given_to_every_generated_image"], dim=0)
    loss = contrastive_loss(mixed.expand_as(second), second, 0.5)
    key = "output_official_second_loss_generated_vs_view2"
    torch.testing.assert_close(loss, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["abs", "softmax"])
def test_rows_of_the_weights_sum_to_1(kind):
    texts, images = nn.functional.normalize(torch.randn(2, 7, 5), dim=2)
    weights = mixing_weights(texts, images, kind, 0.5)
    torch.testing.assert_close(weights.sum(1), torch.ones(7))
    assert (weights >= 0).all()
    assert mixing_weights(torch.zeros(3, 5), images[:3], kind, 0.5).isfinite().all()


def test_identity_weights_copy_the_images_and_even_ones_give_their_mean():
    views = torch.rand(6, 3, 8, 8)
    assert torch.equal(mix(torch.eye(6), views), views)
    even = mix(torch.full((6, 6), 1 / 6), views)
    torch.testing.assert_close(even, views.mean(0, keepdim=True).expand_as(views))


def test_entropy_of_the_weights():
    assert mixing_entropy(torch.eye(5)) == 0
    assert mixing_entropy(torch.full((5, 5), 0.2)) == pytest.approx(1)
    halves = torch.tensor([[0.5, 0.5, 0, 0], [3.0, 3.0, 0, 0]]).repeat(2, 1)  # rows need not sum to 1
    assert mixing_entropy(halves) == pytest.approx(0.5)


def test_text_network_has_the_official_layers():
    network = TextNetwork(1024, 4096)
    assert [m.out_features for m in network if isinstance(m, nn.Linear)] == [4096, 4096, 128]
    torch.testing.assert_close(network(torch.randn(3, 1024)).norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(
    ("change", "n_anomalies"),
    [
        ({}, 0),
        ({}, 6),
        ({"mix_space": "joint"}, 0),
        ({"mix_space": "features"}, 0),
        ({"mix_weights": "official"}, 0),
    ],
)
def test_fit_separates(change, n_anomalies):
    train, test, journal = captioned(16, n_anomalies), toy_train_set(8, 8, seed=1), Journal()
    detector = CMDA(replace(FAST, **change))
    before = detector.model.encoder.conv1.weight.clone()
    detector.fit(train, journal)
    assert not torch.equal(detector.model.encoder.conv1.weight, before)
    assert auroc(test.targets.numpy(), detector.score(test.resized).numpy()) > 0.9
    assert journal.series("train", "mixed") == [16, 16]
    for name in ("loss_views", "loss_mixed", "entropy"):
        assert np.isfinite(journal.series("train", name)).all()
    assert all(0 < entropy <= 1 for entropy in journal.series("train", "entropy"))


def test_without_captions_in_the_loss_the_first_step_is_ssds():
    train, ours, theirs = captioned(8), Journal(), Journal()
    CMDA(replace(FAST, cross_weight=0.0, n_epochs=1)).fit(train, ours)
    SSD(SSDSettings(arch=FAST.arch, n_epochs=1, warmup=0, batch_size=8)).fit(train, theirs)
    assert ours.series("train", "loss_views") == theirs.series("train", "loss")


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_of_the_weights_are_cut_unless_asked_for(detach):
    detector = CMDA(replace(FAST, mix_detach=detach))
    text = TextNetwork(4, 8)
    weights = detector.weigh(torch.randn(3, 3, 32, 32), torch.randn(3, 4), text)
    assert weights.requires_grad is not detach
    assert detector.model.training


def test_mixtures_can_have_statistics_of_their_own():
    first, second = torch.rand(2, 6, 3, 32, 32)
    weights = torch.full((6, 6), 1 / 6)
    for space in ("apart", "joint"):
        detector = CMDA(replace(FAST, mix_space=space))
        a, b = detector._project_mixed(weights, first, second)
        alone = [detector.project(mix(weights, first))[0], detector.project(second)[0]]
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip((a, b), alone, strict=True)) == (
            space == "apart"
        )


def test_every_image_has_one_of_its_captions_in_each_epoch():
    train = captioned(9)
    detector = CMDA(FAST)
    normals, encoded, first, counts = detector._pair(train)
    assert (len(normals), len(encoded), counts.tolist()) == (9, 18, [1, 2, 3] * 3)
    assert first.tolist() == [0, 1, 3, 6, 7, 9, 12, 13, 15]
    normals, encoded, first, counts = CMDA(replace(FAST, all_captions=True))._pair(train)
    assert (len(normals), first.tolist(), set(counts.tolist())) == (18, list(range(18)), {1})
    assert torch.equal(normals.images[3], train.images[2])


def test_all_captions_are_shown_if_asked():
    journal = Journal()
    CMDA(replace(FAST, all_captions=True, n_epochs=1)).fit(captioned(9), journal)
    assert journal.series("train", "mixed") == [18]


def test_resumed_training_ends_with_the_same_numbers(tmp_path):
    train, settings = captioned(), replace(FAST, n_epochs=3)
    whole, journal = CMDA(settings), Journal()
    whole.fit(train, journal)
    interrupt(CMDA(settings), train, tmp_path, epochs=2)
    resumed, continued = CMDA(settings), Journal(tmp_path, every=0)
    assert len(continued.rows) == 1
    resumed.fit(train, continued)
    assert torch.equal(resumed.score(train.resized), whole.score(train.resized))
    assert continued.rows == journal.rows


def test_constant_rate_of_the_first_loss_is_another_training():
    train, scores = captioned(), []
    for constant in (False, True):
        detector = CMDA(replace(FAST, constant_cross_lr=constant))
        detector.fit(train)
        scores.append(detector.score(train.resized))
    assert not torch.equal(*scores)


@pytest.mark.parametrize(
    ("captions", "part"),
    [
        ((), "10 of 10 have none, the first of them number 0"),
        ((("a dark photo",),) * 4 + ((), (" ", "")) + (("noise",),) * 4, "2 of 10 .* number 4"),
    ],
)
def test_missing_captions_are_refused(captions, part):
    with pytest.raises(UserError, match=part):
        CMDA(FAST).fit(replace(captioned(), captions=captions))


def test_captions_without_words_are_refused():
    with pytest.raises(UserError, match="have no words"):
        CMDA(FAST).fit(replace(captioned(), captions=(("?!",),) * 10))


def test_one_normal_image_is_refused():
    with pytest.raises(UserError, match="there is 1"):
        CMDA(FAST).fit(captioned(1, 3))


@pytest.mark.parametrize("change", [{"text_dim": 0}, {"text_width": 0}, {"cross_weight": -1.0}, {"lr": 0.0}])
def test_settings_out_of_range_name_the_flag(change):
    with pytest.raises(UserError, match=f"--{next(iter(change))}"):
        CMDA(replace(FAST, **change))


def test_missing_captions_end_the_command_with_one_sentence(tmp_path):
    data = write_toy_set(tmp_path / "data")
    image_path(data).with_name("caption_sentence.json").unlink()
    flags = {"detector": "cmda", "preset": "cpu", "ae_n_epochs": None, "ae_batch_size": None}
    outcome = run_toy(data, tmp_path / "run", **flags)
    refused(outcome, "--detector cmda needs captions of the normal images; 10 of 10 have none")
    assert not (tmp_path / "run" / "results.json").exists()


def test_tfidf_keeps_words_and_reduces_many(tmp_path):
    few = encode_sentences(["a red flower", "a blue flower", "a red flower"], "tfidf", 10, 0, CPU)
    assert few.shape == (3, 4)
    assert torch.equal(few[0], few[2])
    assert not torch.equal(few[0], few[1])
    sentences = [" ".join(np.random.default_rng(k).choice(FLOWER_WORDS.split(), 8)) for k in range(40)]
    many = encode_sentences(sentences, "tfidf", 6, 0, CPU)
    assert (many.shape, many.dtype) == ((40, 6), torch.float32)
    assert torch.equal(many, encode_sentences(sentences, "tfidf", 6, 0, CPU))
    assert encode_sentences(sentences[:3], "tfidf", 6, 0, CPU).shape == (3, 3)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """A BERT of random weights."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = word_tokenizer(FLOWER_WORDS.split(), chat_template=False)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_local_text_model_gives_vectors_that_do_not_depend_on_padding(text_model):
    sentences = ["the red flower", "the red flower has many small petals and a yellow center"]
    together = encode_sentences(sentences, text_model, 1, 0, CPU)
    assert together.shape == (2, 16)
    alone = encode_sentences(sentences[:1], text_model, 1, 0, CPU)
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1])


def test_local_text_model_trains(text_model):
    train = replace(captioned(), captions=(("the red flower",), ("a small blue flower", "petals")) * 5)
    detector = CMDA(replace(FAST, text_encoder=text_model, n_epochs=1))
    detector.fit(train)
    assert detector.score(train.resized).isfinite().all()


def test_damaged_text_model_is_refused(text_model, tmp_path):
    folder = shutil.copytree(text_model, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"is no text model on this machine .*; give tfidf, a folder"):
        encode_sentences(["a flower"], str(folder), 1, 0, CPU)


def test_unknown_text_model_is_refused(tmp_path):
    for name in ("no/such-model", str(tmp_path)):
        with pytest.raises(UserError, match=f"--text_encoder {name} is no text model on this machine"):
            CMDA(replace(FAST, text_encoder=name)).fit(captioned())
