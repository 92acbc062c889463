"""Deep SAD: parity with the official code, and what must hold for any run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_arrays import tensors, unit
from test_networks import official_autoencoder, official_encoder
from torchvision.models import get_model

from kka.detectors.deep_sad import (
    DeepSAD,
    DeepSADSettings,
    Hypersphere,
    deep_sad_loss,
    make_optimizer,
    move_from_zero,
    reconstruction_error,
)
from kka.detectors.parts import gradient_step
from kka.errors import TrainingError, UserError
from kka.journal import Journal
from kka.metrics import auroc
from kka.networks.lenet import build_network
from kka.train_set import TrainSet

FAST = DeepSADSettings(n_epochs=2, ae_n_epochs=1, batch_size=8, ae_batch_size=8)


def toy_train_set(n_normal=10, n_anomalies=6, side=32, seed=0):
    """Normals are dark, anomalies are bright."""
    stream = torch.Generator().manual_seed(seed)
    n = n_normal + n_anomalies
    images = torch.randint(0, 90, (n, 3, side, side), generator=stream, dtype=torch.uint8)
    images[n_normal:] += 150
    targets = (torch.arange(n) >= n_normal).long()
    return TrainSet(images, torch.full((n, 2), side), images[:, :, :32, :32], targets, -targets)


@pytest.mark.parametrize(("eta", "suffix"), [(1.0, "eta1"), (2.5, "eta2p5")])
def test_loss_equals_official_code(eta, suffix):
    expected = tensors("deep_sad/losses")
    phi = expected["input_phi"].requires_grad_()
    distances = (phi - expected["input_c"]).square().sum(1)
    losses = deep_sad_loss(distances, expected["input_semi_target"], eta)
    losses.mean().backward()
    torch.testing.assert_close(distances, expected["output_squared_distance"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses, expected[f"output_per_sample_loss_{suffix}"], rtol=1e-4, atol=1e-6)
    gradient = expected[f"output_gradient_of_batch_mean_wrt_phi_{suffix}"]
    torch.testing.assert_close(phi.grad, gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_without_anomalies_the_loss_is_deep_svdd():
    distances = torch.rand(7)
    assert torch.equal(deep_sad_loss(distances, torch.zeros(7)), distances)


def test_loss_by_hand():
    losses = deep_sad_loss(torch.tensor([4.0, 4.0, 4.0]), torch.tensor([0, 1, -1]), eta=2.0)
    torch.testing.assert_close(losses, torch.tensor([4.0, 8.0, 0.5]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["center", "center_of_amplified_images"])
def test_center_equals_official_code(name):
    expected = tensors(f"deep_sad/{name}")
    factor = expected.get("setting_multiplier_of_images", torch.tensor(1))
    with torch.no_grad():
        mean = official_encoder().eval()(factor * unit(expected["input_images_uint8"])).mean(0)
    torch.testing.assert_close(mean, expected["output_mean_before_clamping"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(move_from_zero(mean), expected["output_c"], rtol=1e-4, atol=1e-5)


def test_no_center_coordinate_stays_near_zero():
    center = move_from_zero(torch.tensor([0.0, -0.05, 0.05, -0.3, 0.3]))
    torch.testing.assert_close(center, torch.tensor([0.1, -0.1, 0.1, -0.3, 0.3]))


def test_training_curve_equals_official_code():
    expected = tensors("deep_sad/train_curve")
    model = Hypersphere(build_network("cifar10_LeNet"))
    model.net = official_encoder()
    model.center.copy_(expected["input_c"])
    before = {name: weight.detach().clone() for name, weight in model.net.named_parameters()}
    optimizer = make_optimizer("adam", model, lr=1e-4, weight_decay=0.5e-6)
    images, semi_targets = unit(expected["input_train_images_uint8"]), expected["input_train_semi_target"]
    model.train()
    for step, batch in enumerate(expected["input_batch_order_row_is_step"].long()):
        losses = deep_sad_loss(model(images[batch]), semi_targets[batch])
        per_sample = expected["output_per_sample_loss_per_step"][step]
        torch.testing.assert_close(losses, per_sample, rtol=5e-2, atol=0)
        loss = gradient_step(losses.mean(), [optimizer], f"step {step}")
        assert loss == pytest.approx(float(expected["output_loss_per_step"][step]), rel=5e-3)
    model.eval()
    with torch.no_grad():
        scores = model(unit(expected["input_test_images_uint8"]))
    torch.testing.assert_close(scores, expected["output_test_score"], rtol=2e-2, atol=0)
    auc = auroc(expected["input_test_label"].numpy(), scores.numpy())
    assert auc == pytest.approx(float(expected["output_test_auc"]), abs=0.005)
    for name, weight in model.net.named_parameters():
        change = float((weight.detach() - before[name]).norm())
        key = f"output_l2_norm_of_change_{name.replace('.', '_')}"
        assert change == pytest.approx(float(expected[key]), rel=1e-2)
    for layer in ("bn2d1", "bn2d3"):
        variance = expected[f"output_running_var_after_training_{layer}"]
        torch.testing.assert_close(getattr(model.net, layer).running_var, variance, rtol=2e-2, atol=0)


def test_autoencoder_curve_equals_official_code():
    expected = tensors("deep_sad/ae_train_curve")
    autoencoder, images = official_autoencoder(), unit(expected["input_train_images_uint8"])
    optimizer = make_optimizer("adam", autoencoder, lr=1e-4, weight_decay=0.5e-3)
    autoencoder.train()
    for step, batch in enumerate(expected["input_batch_order_row_is_step"].long()):
        error = reconstruction_error(autoencoder(images[batch]), images[batch]).mean()
        loss = gradient_step(error, [optimizer], f"step {step}")
        assert loss == pytest.approx(float(expected["output_loss_per_step"][step]), rel=2e-3)
    autoencoder.eval()
    with torch.no_grad():
        errors = reconstruction_error(autoencoder(images[:8]), images[:8])
    key = "output_error_per_image_first_8_train_images_after_training"
    torch.testing.assert_close(errors, expected[key], rtol=2e-3, atol=0)


@pytest.mark.parametrize("pretrain", [True, False])
def test_fit_moves_every_weight_and_separates(pretrain):
    train = toy_train_set()
    detector = DeepSAD(replace(FAST, pretrain=pretrain, n_epochs=20, lr=1e-3))
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    detector.fit(train)
    after = detector.state_dict()
    moved = [name for name in before if name != "net.bn2d1.num_batches_tracked"]
    assert all(not torch.equal(before[name], after[name]) for name in moved)
    assert detector.model.center.isfinite().all()
    assert not detector.model.center.requires_grad
    scores = detector.score(train.resized)
    assert scores.shape == (16,)
    assert auroc(train.targets.numpy(), scores.numpy()) > 0.95


def test_pretrained_encoder_starts_the_detector():
    detector = DeepSAD(replace(FAST, n_epochs=0))
    detector.fit(toy_train_set())
    for ours, theirs in zip(
        detector.model.net.state_dict().values(),
        detector.autoencoder.encoder.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_official_pretrain_drops_the_weights():
    random_start = DeepSAD(FAST).model.net.conv1.weight.clone()
    detector = DeepSAD(replace(FAST, n_epochs=0, official_pretrain=True))
    detector.fit(toy_train_set())
    assert torch.equal(detector.model.net.conv1.weight, random_start)
    assert not torch.equal(detector.autoencoder.encoder.conv1.weight, random_start)


def test_center_comes_from_normals_unless_all_are_asked_for():
    train = toy_train_set()
    detector = DeepSAD(replace(FAST, pretrain=False))
    detector.fit(train)
    fresh = DeepSAD(replace(FAST, pretrain=False))
    assert torch.equal(detector.model.center, fresh.find_center(train.take(torch.arange(10))))
    everything = DeepSAD(replace(FAST, pretrain=False, center_from="all"))
    assert not torch.equal(everything.find_center(train), fresh.find_center(train))
    polluted = replace(train, semi_targets=torch.zeros_like(train.semi_targets))  # unlabelled: who would know
    assert torch.equal(everything.find_center(train), fresh.find_center(polluted))


def test_state_dict_round_trip_gives_equal_scores():
    train = toy_train_set()
    trained = DeepSAD(FAST)
    trained.fit(train)
    other = DeepSAD(FAST, seed=1)
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other.score(train.resized), trained.score(train.resized))


def test_same_seed_same_scores_and_another_seed_others():
    train = toy_train_set()
    scores = []
    for seed in (3, 3, 4):
        torch.manual_seed(int(np.random.default_rng().integers(1000)))  # the global state must not matter
        detector = DeepSAD(FAST, seed)
        detector.fit(train)
        scores.append(detector.score(train.resized))
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


@pytest.mark.parametrize("net_name", ["fmnist_LeNet", "mnist_LeNet"])
def test_gray_networks_train(net_name):
    train = toy_train_set()
    detector = DeepSAD(replace(FAST, net_name=net_name))
    resized = train.resized[:, :, :28, :28]
    train = replace(train, resized=resized)
    detector.fit(train)
    assert detector.score(resized).isfinite().all()


SQUEEZENET = replace(FAST, net_name="squeezenet1_1", net_size=48, pretrain=False)


def wide(train):
    """The same images for a network that takes 48 px."""
    return replace(train, resized=torch.nn.functional.interpolate(train.resized, (48, 48)))


@pytest.mark.parametrize("fine_tune", [True, False])
def test_torchvision_network_learns_and_frozen_features_stay(fine_tune):
    train = wide(toy_train_set())
    detector = DeepSAD(replace(SQUEEZENET, fine_tune=fine_tune, n_epochs=6, lr=1e-3))
    assert detector.image_size == 48
    before = [value.clone() for value in detector.model.net.backbone.state_dict().values()]
    detector.fit(train)
    assert detector.embed(train.resized).shape == (16, 128)
    assert auroc(train.targets, detector.score(train.resized)) == 1
    after = detector.model.net.backbone.state_dict().values()
    assert all(map(torch.equal, before, after)) is not fine_tune
    other = DeepSAD(SQUEEZENET, seed=3)
    other.load_state_dict(detector.state_dict())
    assert torch.equal(other.score(train.resized), detector.score(train.resized))


def test_torchvision_network_starts_from_its_weights(tmp_path):
    weights = get_model("squeezenet1_1").state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    settings = replace(
        SQUEEZENET, pretrain=True, fine_tune=False, backbone_weights=str(tmp_path / "weights.pth")
    )
    detector = DeepSAD(settings)
    detector.fit(wide(toy_train_set()))
    backbone = detector.model.net.backbone.net.state_dict()
    assert backbone
    assert all(torch.equal(value, weights[key]) for key, value in backbone.items())


def test_unknown_network_is_refused():
    with pytest.raises(UserError, match=r"--net_name 'cifar_LeNet' is no network .* did you mean"):
        DeepSAD(replace(FAST, net_name="cifar_LeNet"))
    with pytest.raises(UserError, match="--backbone_weights means nothing"):
        DeepSAD(replace(SQUEEZENET, backbone_weights="weights.pth"))


def test_last_batch_is_kept_unless_it_is_a_single_image_or_unwanted():
    detector = DeepSAD(replace(FAST, batch_size=5))
    assert detector.epoch_size(toy_train_set(), 5) == 15  # 16 = 3 * 5 + 1
    assert detector.epoch_size(toy_train_set(n_normal=11), 5) == 17
    assert DeepSAD(replace(FAST, drop_last=True)).epoch_size(toy_train_set(n_normal=11), 5) == 15


@pytest.mark.parametrize("train", [toy_train_set(1, 0), toy_train_set(0, 4)])
def test_too_few_images_are_refused(train):
    with pytest.raises(UserError):
        DeepSAD(FAST).fit(train)


def test_drop_last_without_a_full_batch_is_refused():
    with pytest.raises(UserError, match="drop_last"):
        DeepSAD(replace(FAST, batch_size=32, drop_last=True)).fit(toy_train_set())


def test_infinite_loss_stops_the_run_at_its_epoch():
    detector = DeepSAD(replace(FAST, pretrain=False, lr=1e30, n_epochs=50))
    with pytest.raises(TrainingError, match="epoch"):
        detector.fit(toy_train_set())


@pytest.mark.parametrize(
    "change", [{"lr": 0.0}, {"batch_size": 1}, {"lr_milestone": (-1,)}, {"n_epochs": -1}]
)
def test_settings_out_of_range_name_the_flag(change):
    with pytest.raises(UserError, match=f"--{next(iter(change))}"):
        DeepSAD(replace(FAST, **change))


def weights_after(n_epochs, milestone):
    detector = DeepSAD(replace(FAST, pretrain=False, n_epochs=n_epochs, lr_milestone=milestone))
    detector.fit(toy_train_set())
    return detector.model.net.fc1.weight.detach()


def test_learning_rate_drops_after_the_milestone_epoch():
    first, second = weights_after(1, ()), weights_after(2, ())
    dropped = weights_after(2, (1,))
    assert torch.equal(weights_after(2, (2,)), second)  # the official code drops one epoch early
    assert (dropped - first).norm() < 0.3 * (second - first).norm()


def test_test_every_records_the_curve():
    journal = Journal()
    detector = DeepSAD(replace(FAST, pretrain=False, n_epochs=4, test_every=2))
    detector.fit(toy_train_set(), journal, lambda score: float(score(toy_train_set().resized).mean()))
    assert len(journal.series("train", "test_auc")) == 2
    assert len(journal.series("train", "loss")) == 4
