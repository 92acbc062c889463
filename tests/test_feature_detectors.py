"""What must hold for every detector with a backbone: frozen features, SimpleNet, ReContrast."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from toy_tensors import toy_images, toy_train_set

from kka.detectors.frozen import Frozen, FrozenSettings
from kka.detectors.recontrast import ReContrast, ReContrastSettings
from kka.detectors.simplenet import SimpleNet, SimpleNetSettings
from kka.errors import TrainingError, UserError
from kka.journal import Journal
from kka.metrics import auroc
from kka.settings import make_settings

TINY = {"backbone": "squeezenet1_0", "backbone_init": "random", "image_size": 48}
PATCHES = {"pretrain_embed_dimension": 48, "target_embed_dimension": 32, "dsc_hidden": 16, "feature_std": 0.1}
SIMPLENET = SimpleNetSettings(**TINY, **PATCHES, n_epochs=4, batch_size=4)
RECONTRAST = ReContrastSettings(
    **TINY, n_iterations=7, batch_size=4, width=0.1, bottleneck_blocks=1, decoder_blocks=(1, 1, 1)
)
TRAINED = [(SimpleNet, SIMPLENET), (ReContrast, RECONTRAST)]
LOGISTIC = FrozenSettings(**TINY, head="logistic")
DETECTORS = [*TRAINED, (Frozen, FrozenSettings(**TINY)), (Frozen, LOGISTIC)]


def trained(kind, settings, train=None, seed=0, journal=None):
    detector = kind(settings, seed)
    detector.fit(toy_train_set() if train is None else train, journal)
    return detector


@cache
def finished(kind, settings):
    """A trained detector that tests only look at."""
    return trained(kind, settings)


def mixed_images():
    return torch.cat([toy_images(10, False, seed=1), toy_images(9, True, seed=1)])


def equal_states(first, second):
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize(("kind", "settings"), DETECTORS)
def test_scores_are_finite_floats_on_the_cpu(kind, settings):
    detector = finished(kind, settings)
    assert detector.image_size == 48
    scores = detector.score(toy_images(3, False, seed=1))
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert not scores.requires_grad


@pytest.mark.parametrize(("kind", "settings"), DETECTORS)
def test_same_seed_same_weights_and_another_seed_others(kind, settings):
    detectors = []
    for seed in (0, 1):
        torch.manual_seed(int(np.random.default_rng().integers(1000)))  # the global state must not matter
        detectors.append(trained(kind, settings, seed=seed))
    assert equal_states(finished(kind, settings), detectors[0])
    assert not equal_states(*detectors)


@pytest.mark.parametrize(("kind", "settings"), DETECTORS)
def test_state_holds_all_that_scores_need(kind, settings):
    detector, other = finished(kind, settings), kind(settings, seed=9)
    other.load_state_dict(detector.state_dict())
    images = toy_images(4, True, seed=1)
    assert torch.equal(other.score(images), detector.score(images))
    other.fit(toy_train_set())  # weights that were loaded are not replaced by others of the backbone
    backbone = [key for key in detector.state_dict() if key.startswith(("backbone", "frozen"))]
    assert backbone
    assert all(torch.equal(detector.state_dict()[key], other.state_dict()[key]) for key in backbone)


@pytest.mark.parametrize(("kind", "settings"), DETECTORS)
def test_scores_do_not_depend_on_the_batch(kind, settings):
    detector, images = finished(kind, settings), mixed_images()
    alone = torch.cat([detector.score(image[None]) for image in images])
    torch.testing.assert_close(detector.score(images), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "settings"), DETECTORS)
def test_features_of_whole_images(kind, settings):
    features = finished(kind, settings).embed(mixed_images())
    assert (len(features), features.ndim) == (19, 2)
    assert features.isfinite().all()
    assert len(features.unique(dim=0)) == 19


@pytest.mark.parametrize(("kind", "settings"), DETECTORS)
def test_weights_of_another_network_are_refused(kind, settings):
    detector = kind(settings)
    with pytest.raises(RuntimeError):
        detector.load_state_dict({"net.conv1.weight": torch.zeros(1)})
    other = kind(replace(settings, backbone="squeezenet1_1"))
    with pytest.raises(RuntimeError):
        other.load_state_dict(finished(kind, settings).state_dict())


@pytest.mark.parametrize("kind", [FrozenSettings, SimpleNetSettings, ReContrastSettings])
def test_presets_are_settings(kind):
    for preset in kind.PRESETS.values():
        assert make_settings(kind, preset) != kind()


@pytest.mark.parametrize(("kind", "settings"), TRAINED)
def test_maps_belong_to_their_images(kind, settings):
    detector, images = finished(kind, settings), mixed_images()
    maps = detector.maps(images)
    assert maps.shape == (19, 48, 48)
    alone = torch.cat([detector.maps(image[None]) for image in images])
    torch.testing.assert_close(maps, alone, rtol=1e-4, atol=1e-5)
    assert len(maps.flatten(1).unique(dim=0)) == 19


class KilledError(Exception):
    pass


class DyingJournal(Journal):
    """The process dies at the end of an epoch, before its checkpoint."""

    def __init__(self, folder, at):
        super().__init__(folder, every=0)
        self.at = at

    def record(self, phase, epoch, **values):
        super().record(phase, epoch, **values)
        if epoch == self.at:
            raise KilledError


@pytest.mark.parametrize(("kind", "settings"), DETECTORS)
def test_killed_in_the_middle_ends_with_equal_weights(kind, settings, tmp_path):
    last = 0 if kind is Frozen else 2
    with pytest.raises(KilledError):
        trained(kind, settings, journal=DyingJournal(tmp_path / "run", last))
    journal = Journal(tmp_path / "run", every=0)
    assert len(journal.rows) == last  # the last epoch was lost
    continued = trained(kind, settings, journal=journal)
    assert equal_states(continued, finished(kind, settings))
    again = Journal(tmp_path / "run", every=0)
    assert equal_states(continued, trained(kind, settings, journal=again))  # nothing was left to do
    assert again.rows == journal.rows


def scores_of_both(detector):
    return [detector.score(toy_images(12, bright, seed=1)).double() for bright in (False, True)]


def gap(detector):
    """Difference of the mean scores, in standard deviations within a kind."""
    normal, anomalous = scores_of_both(detector)
    spread = torch.cat([normal - normal.mean(), anomalous - anomalous.mean()]).std()
    return float((anomalous.mean() - normal.mean()) / spread)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SimpleNet, replace(SIMPLENET, n_epochs=30, dsc_lr=3e-3)),
        (ReContrast, replace(RECONTRAST, n_iterations=14)),
    ],
)
def test_generated_anomalies_set_real_ones_apart(kind, settings):
    with_kka = trained(kind, settings)
    normal, anomalous = scores_of_both(with_kka)
    assert auroc(np.r_[np.zeros(12), np.ones(12)], torch.cat([normal, anomalous]).numpy()) > 0.9
    assert gap(with_kka) > 1.2 * gap(trained(kind, settings, toy_train_set(n_anomalies=0)))


@pytest.mark.parametrize(("kind", "settings"), DETECTORS[2:])
def test_frozen_features_tell_normals_from_anomalies_by_the_sign(kind, settings):
    normal, anomalous = scores_of_both(finished(kind, settings))
    assert normal.mean() < 0 < anomalous.mean()
    assert auroc(np.r_[np.zeros(12), np.ones(12)], torch.cat([normal, anomalous]).numpy()) > 0.98
    normal, anomalous = scores_of_both(trained(kind, settings, toy_train_set(n_anomalies=0)))
    assert 0 < normal.max() < anomalous.min()


@pytest.mark.parametrize(("kind", "settings"), TRAINED)
def test_curves_and_losses_are_recorded(kind, settings):
    journal, seen = Journal(), []
    detector = kind(replace(settings, test_every=2))

    def evaluate(score):
        seen.append(score(toy_images(2, False)))
        return 0.5

    detector.fit(toy_train_set(), journal, evaluate)
    losses = journal.series("train", "loss")
    assert len(losses) == 4
    assert journal.series("train", "test_auc") == [0.5] * len(seen) == [0.5, 0.5]
    assert equal_states(detector, finished(kind, settings))  # looking at the test set changes nothing


@pytest.mark.parametrize(("kind", "settings"), DETECTORS)
@pytest.mark.parametrize(("n_normal", "n_anomalies"), [(1, 0), (1, 4), (0, 4)])
def test_fewer_than_two_normals_are_refused(kind, settings, n_normal, n_anomalies):
    with pytest.raises(UserError, match=f"at least 2 normal images, there are {n_normal}"):
        kind(settings).fit(toy_train_set(n_normal, n_anomalies))


@pytest.mark.parametrize(("kind", "settings"), DETECTORS)
def test_images_of_another_size_are_refused(kind, settings):
    with pytest.raises(UserError, match=r"\(N, 3, 48, 48\)"):
        kind(settings).fit(toy_train_set(side=40))


@pytest.mark.parametrize(("kind", "settings"), TRAINED)
def test_infinite_loss_stops_the_run(kind, settings):
    rates = {"dsc_lr": 1e30} if kind is SimpleNet else {"lr": 1e30}
    with pytest.raises(TrainingError, match=f"lower --{next(iter(rates))}"):
        trained(kind, replace(settings, **rates))


@pytest.mark.parametrize(("kind", "settings"), TRAINED)
def test_bfloat16_trains(kind, settings):
    detector = trained(kind, replace(settings, precision="bfloat16"))
    assert detector.score(toy_images(2, True)).dtype == torch.float32
    assert not equal_states(detector, finished(kind, settings))


@pytest.mark.parametrize(
    ("kind", "settings", "change"),
    [
        (SimpleNet, SIMPLENET, {"dsc_lr": 0.0}), (SimpleNet, SIMPLENET, {"patchsize": 2}),
        (SimpleNet, SIMPLENET, {"kka_weight": 1.5}), (SimpleNet, SIMPLENET, {"kka_top": 0.0}),
        (SimpleNet, SIMPLENET, {"n_epochs": -1}), (ReContrast, RECONTRAST, {"batch_size": 1}),
        (ReContrast, RECONTRAST, {"decoder_blocks": (1, 1)}), (ReContrast, RECONTRAST, {"width": 0.0}),
        (ReContrast, RECONTRAST, {"layers": ("features.5",)}), (ReContrast, RECONTRAST, {"n_iterations": -1}),
        (Frozen, LOGISTIC, {"n_neighbors": 0}), (Frozen, LOGISTIC, {"image_size": 0}),
    ],
)  # fmt: skip
def test_settings_out_of_range_name_the_flag(kind, settings, change):
    with pytest.raises(UserError, match=f"--{next(iter(change))}"):
        kind(replace(settings, **change))
