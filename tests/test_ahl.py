"""AHL: parity with the official code, tasks, adaptation, psi, features on disk."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_arrays import tensors
from toy_tensors import toy_images, toy_train_set

from kka.detectors.ahl import AHL, AHLSettings, Collaboration
from kka.detectors.ahl_steps import (
    Batch,
    Psi,
    adapt,
    batch_loss,
    generalisation_errors,
    importance_weights,
    official_errors,
    query_gradient,
)
from kka.detectors.ahl_tasks import bank_labels, cluster_normals, make_tasks
from kka.detectors.deviation import MARGIN, DevNetHeads, DRAHeads, find_groups
from kka.errors import UserError
from kka.journal import Journal
from kka.metrics import auroc

TINY = AHLSettings(
    backbone="squeezenet1_1", backbone_init="random", image_size=64, base_epochs=2, n_epochs=3,
    steps_per_epoch=4, batch_size=9, fine_tune=False, lr=1e-2, views=2, n_references=2, inner_steps=2,
    query_batches=2, n_clusters=2, memory=1,
)  # fmt: skip
STEP = 0.0002  # the official code's inner learning rate


def by_formula(shapes):
    """The weights of tests/golden (section 3 of its README, variant parameter list)."""
    made, mask = [], np.uint64(0xFFFFFFFF)
    for p, shape in enumerate(shapes):
        i = np.arange(int(np.prod(shape)), dtype=np.uint64)
        u = ((i + 1) * np.uint64(2654435761) + np.uint64((p + 1) * 2654404711)) & mask
        u = ((u ^ (u >> np.uint64(15))) * np.uint64(2246822519)) & mask
        u = ((u ^ (u >> np.uint64(13))) * np.uint64(3266489917)) & mask
        h = (u ^ (u >> np.uint64(16))).astype(np.float64) / 2**32
        scale = np.sqrt(24 / np.prod(shape[1:])) if len(shape) > 1 else 0.2
        made.append(torch.from_numpy(((h - 0.5) * scale).astype(np.float32).reshape(shape)))
    return made


OFFICIAL_ORDER = (
    "normality.fc1.weight", "normality.fc1.bias", "normality.fc2.weight", "normality.fc2.bias",
    "seen.scoring.weight", "seen.scoring.bias", "pseudo.scoring.weight", "pseudo.scoring.bias",
    "residual.scoring.weight", "residual.scoring.bias", "residual.conv.0.weight", "residual.conv.0.bias",
    "residual.conv.1.weight", "residual.conv.1.bias",
)  # fmt: skip


def batch_of(expected, labels, draws, references=()):
    features = [expected[f"input_feature_maps_scale{k}"] for k in range(2)]
    return Batch(features, references, labels, draws)


@pytest.mark.parametrize("norm", ["norm_weight_0_as_official_init", "norm_weight_1"])
def test_inner_step_of_dra_equals_official_code(norm):
    expected = tensors("ahl/dra_inner_step")
    heads = DRAHeads(512, 0.1, stride=3, fixed_norm=True, absolute=False)
    shapes = dict(heads.named_parameters())
    start = dict(zip(OFFICIAL_ORDER, by_formula([shapes[key].shape for key in OFFICIAL_ORDER]), strict=True))
    start["residual.conv.1.weight"] = torch.full((512,), float(norm == "norm_weight_1"))
    start["residual.conv.1.bias"] = torch.zeros(512)
    start = {key: value.requires_grad_() for key, value in start.items()}
    references = [expected[f"input_reference_maps_scale{k}"].mean(0) for k in range(2)]
    labels = expected["input_label_0_normal_1_seen_2_pseudo"]
    batch = batch_of(expected, labels, expected["input_reference_scores"], references)
    near = {"rtol": 1e-3, "atol": 1e-5}

    loss = batch_loss(heads, start, batch)
    torch.testing.assert_close(loss, expected[f"output_{norm}_loss"].reshape(()), **near)
    gradients = torch.autograd.grad(loss, list(start.values()), materialize_grads=True)
    for k, gradient in enumerate(gradients):
        wanted = expected.get(f"output_{norm}_gradient_var{k}")
        if wanted is None:
            wanted = expected[f"output_{norm}_gradient_var{k}_first_filter"]
            gradient = gradient[0]
        torch.testing.assert_close(gradient, wanted.reshape(gradient.shape), **near)
    adapted = adapt(heads, start, [batch], STEP, second_order=True)
    for k, key in enumerate(OFFICIAL_ORDER):
        if f"output_{norm}_adapted_var{k}" in expected:
            wanted = expected[f"output_{norm}_adapted_var{k}"].reshape(adapted[key].shape)
            torch.testing.assert_close(adapted[key], wanted, **near)
    after = batch_loss(heads, adapted, batch)
    torch.testing.assert_close(after, expected[f"output_{norm}_loss_after_inner_step"].reshape(()), **near)
    scores = torch.func.functional_call(heads, adapted, (batch.features, references))
    name = f"output_{norm}_combined_score_of_all_samples_after_inner_step"
    torch.testing.assert_close(heads.combine(scores), expected[name], **near)


def devnet_start():
    weights = tensors("ahl/weights_plain_net")
    values = (weights["vars.0"], weights["vars.1"])
    names = ("head.scoring.weight", "head.scoring.bias")
    return {name: value.requires_grad_() for name, value in zip(names, values, strict=True)}


def constant(labels, draws):
    """What the official loss of DevNet adds for images that are left out: their score is replaced by 1."""
    total = 0.0
    for left_out, row in zip((1, 2), draws, strict=True):
        total += (labels == left_out).float().mean() * (MARGIN - (1 - row.mean()) / row.std())
    return total


def test_inner_step_of_devnet_and_its_second_order_gradient_equal_official_code():
    expected, heads, start = tensors("ahl/devnet_inner_step"), DevNetHeads(512, 0.1), devnet_start()
    labels = expected["input_label_0_normal_1_seen_2_pseudo"]
    batch = batch_of(expected, labels, expected["input_reference_scores"])
    near = {"rtol": 1e-3, "atol": 1e-6}
    loss = batch_loss(heads, start, batch)
    more = constant(labels, batch.draws)
    wanted = expected["output_loss_sum_of_seen_and_pseudo_terms"].reshape(())
    torch.testing.assert_close(loss + more, wanted, **near)
    adapted = adapt(heads, start, [batch], STEP, second_order=True)
    after, gradients = query_gradient(heads, start, adapted, [batch], 1)
    assert after + more.item() == pytest.approx(expected["output_loss_after_inner_step"].item(), rel=1e-3)
    for name, gradient in zip(("weight", "bias"), gradients, strict=True):
        torch.testing.assert_close(
            adapted[f"head.scoring.{name}"], expected[f"output_adapted_{name}"], **near
        )
        wanted = expected[f"output_gradient_of_loss_after_inner_step_wrt_starting_{name}"]
        torch.testing.assert_close(gradient, wanted, **near)


def test_psi_equals_official_code():
    expected, psi = tensors("ahl/psi"), Psi(6, 9, 5).eval()
    psi.load_state_dict({**tensors("ahl/weights_psi"), "history": torch.zeros(9, 5, 6)})
    state = (expected["input_initial_hidden_state"], expected["input_initial_cell_state"])
    predicted = psi(expected["input_score_history_sample_x_epoch_x_task"], state)
    near = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(predicted, expected["output_predicted_scores"], **near)
    loss = torch.nn.functional.mse_loss(predicted, expected["input_next_scores"])
    loss.backward()
    torch.testing.assert_close(loss, expected["output_mse_loss"].reshape(()), **near)
    torch.testing.assert_close(psi.fc.weight.grad, expected["output_gradient_fc_weight"], **near)
    gradient = expected["output_gradient_lstm_weight_ih_l0"]
    torch.testing.assert_close(psi.lstm.weight_ih_l0.grad, gradient, **near)


def test_official_importance_weights_equal_official_code():
    expected = tensors("ahl/importance_weights")
    scores = expected["input_predicted_scores_queryset_x_sample_x_task"]
    labels = expected["input_label_queryset_x_sample_0_normal_1_seen_2_pseudo"]
    errors = official_errors(list(scores), list(labels))
    torch.testing.assert_close(-errors, expected["output_minus_error_of_each_task"], rtol=1e-4, atol=1e-6)
    weights = importance_weights(errors)
    wanted = expected["output_importance_weight_of_each_task"]
    torch.testing.assert_close(weights, wanted, rtol=1e-4, atol=1e-6)
    factor = expected["output_loss_factor_half_plus_half_weight"]
    torch.testing.assert_close(0.5 + 0.5 * weights, factor, rtol=1e-4, atol=1e-6)


def test_errors_of_the_paper_leave_out_own_normals_and_double_unseen_anomalies():
    scores = torch.tensor([[9.0], [2.0], [3.0], [5.0]])  # own normal, other normal, own and other anomaly
    anomalous = torch.tensor([0, 0, 1, 1])
    support = torch.tensor([True, False, True, False])
    expected = (0.5 * 4 + 0.5 * 4 + 1.0 * 16) / 3
    assert generalisation_errors(scores, anomalous, [support]).item() == pytest.approx(expected)


def test_tasks_have_the_true_members_of_clusters():
    expected = tensors("ahl/clusters_and_tasks")
    features = expected["input_normal_features_in_listing_order"].numpy()
    clusters = np.array(cluster_normals(features, 3, 42))
    official = expected["output_official_kmeans_label_of_each_normal"].numpy()
    assert len({*zip(clusters.tolist(), official.tolist(), strict=True)}) == 3  # the same, numbered anew
    groups = find_groups(toy_train_set(30, 4), False)
    tasks = make_tasks(clusters.tolist(), groups, 3, True, True, seed=0)
    found = {(tuple(task.support.normals.tolist()), tuple(task.query.normals.tolist())) for task in tasks}
    members = expected["output_true_cluster_members_task_x_support0_query1_x_normal"]
    official_tasks = {
        tuple(tuple(torch.nonzero(side == 1).squeeze(1).tolist()) for side in task) for task in members
    }
    assert found == official_tasks


@pytest.mark.parametrize("disjoint", [True, False])
@pytest.mark.parametrize("different", [True, False])
def test_halves_of_seen_anomalies_and_kinds_of_pseudo_anomalies(disjoint, different):
    groups = find_groups(toy_train_set(12, 6), False)
    tasks = make_tasks([0, 1, 2] * 4, groups, 3, disjoint, different, seed=3)
    assert len(tasks) == 6
    labels = bank_labels(groups, 3)
    assert len(labels) == 18 + 36
    for task in tasks:
        support, query = set(task.support.seen.tolist()), set(task.query.seen.tolist())
        assert len(support) == 3
        assert query == (set(range(12, 18)) - support if disjoint else set(range(12, 18)))
        kinds = [int((part.pseudo[0] - 18) // 12) for part in (task.support, task.query)]
        assert (kinds[0] != kinds[1]) == different
        for part in (task.support, task.query):
            assert torch.equal((part.pseudo - 18) % 12, part.normals)
            assert (labels[part.pseudo] == 2).all()
            assert (labels[part.seen] == 1).all()


def test_a_single_seen_anomaly_is_in_both_and_none_in_neither():
    for n in (0, 1):
        task = make_tasks([0] * 3 + [1] * 3, find_groups(toy_train_set(6, n), False), 3, True, True, 0)[0]
        assert len(task.support.seen) == len(task.query.seen) == n
        stream = torch.Generator().manual_seed(0)
        assert all(len(rows) == (9 if n else 8) for rows in task.support.batches(9, 3, stream))


def test_generated_anomalies_can_be_a_kind_of_pseudo_anomalies():
    groups = find_groups(toy_train_set(6, 4), generated_are_pseudo=True)
    tasks = [make_tasks([0, 1] * 3, groups, 1, True, True, seed)[0] for seed in range(8)]
    drawn = [part.pseudo for task in tasks for part in (task.support, task.query)]
    assert all(((rows >= 6) & (rows < 10)).all() or (rows >= 10).all() for rows in drawn)
    assert sum(bool((rows < 10).all()) for rows in drawn) == 8  # one side of each task


def test_clusters_that_are_too_small_are_left_out_or_refused():
    features = np.array([0.0] * 5 + [1.0] * 4 + [9.0])[:, None] + 1e-3 * np.arange(10)[:, None]
    clusters = cluster_normals(features, 3, 0)
    assert clusters[-1] == -1
    assert len(set(clusters)) == 3
    with pytest.raises(UserError, match="there are only 10 normal images"):
        cluster_normals(features, 11, 0)
    with pytest.raises(UserError, match="clusters of 9, 1"):
        cluster_normals(np.array([0.0] * 9 + [9.0])[:, None], 2, 0)


def test_later_steps_of_adaptation_pass_the_gradient_on():
    expected, heads, start = tensors("ahl/devnet_inner_step"), DevNetHeads(512, 0.1), devnet_start()
    labels = expected["input_label_0_normal_1_seen_2_pseudo"]
    batch = batch_of(expected, labels, expected["input_reference_scores"])
    adapted = adapt(heads, start, [batch] * 4, 0.1, second_order=False)
    _, gradients = query_gradient(heads, start, adapted, [batch], 1)
    leaves = {name: value.detach().requires_grad_() for name, value in adapted.items()}
    at_the_end = torch.autograd.grad(batch_loss(heads, leaves, batch), list(leaves.values()))
    torch.testing.assert_close(gradients, list(at_the_end))
    assert batch_loss(heads, adapted, batch) < batch_loss(heads, start, batch)


def two_kinds(side=64):
    """12 dark normals, half of them without red, and 5 bright anomalies."""
    train = toy_train_set(12, 5, side=side)
    train.resized[:6, 0] = 0
    return train


@pytest.mark.parametrize("changes", [{"n_clusters": 13}, {}])
def test_too_few_normals_are_told_before_the_base_model_is_trained(changes, tmp_path):
    journal = Journal(tmp_path)
    with pytest.raises(UserError, match=r"only (12|5) normal images"):
        AHL(replace(TINY, **changes)).fit(two_kinds() if changes else toy_train_set(5, 5, side=64), journal)
    assert not journal.rows


@pytest.mark.parametrize("base_model", ["dra", "devnet"])
@pytest.mark.parametrize("heads", ["base", "new"])
@pytest.mark.parametrize("importance", ["paper", "code"])
def test_known_anomalies_are_told_from_normals(base_model, heads, importance, tmp_path):
    how = {"base_model": base_model, "heads": heads, "importance": importance}
    settings = replace(TINY, **how, image_size=96, ahl_lr=5e-3, n_epochs=8)
    detector, journal = AHL(settings), Journal(tmp_path)
    detector.fit(two_kinds(96), journal)
    images = torch.cat([toy_images(8, bright, 96, seed=3) for bright in (False, True)])
    scores = detector.score(images)
    assert auroc([0] * 8 + [1] * 8, scores) > 0.9
    assert not (tmp_path / "features").exists()
    assert [row["phase"] for row in journal.rows] == ["base"] * 2 + ["train"] * 8
    again = AHL(settings, seed=1)
    again.load_state_dict(detector.state_dict())
    assert torch.equal(again.score(images), scores)


def test_new_heads_start_as_in_the_official_code():
    detector = AHL(replace(TINY, base_model="devnet", heads="new"))
    detector._renew_heads()
    official = tensors("ahl/weights_plain_net")
    start = dict(detector.base.model.heads.named_parameters())
    assert torch.equal(start["head.scoring.bias"], official["vars.1"])  # 0
    spread = float(official["vars.0"].std())
    assert float(start["head.scoring.weight"].detach().std()) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("last", [0, 1])
def test_interrupted_learning_continues_to_the_same_scores(last, tmp_path, monkeypatch):
    train, images = two_kinds(), toy_images(4, True, 64, seed=3)
    settings = replace(TINY, base_epochs=1)
    whole = AHL(settings)
    whole.fit(train)
    run_epoch = Collaboration.run_epoch

    def stopping(self, bank, epoch):
        if epoch > last:
            raise KeyboardInterrupt
        return run_epoch(self, bank, epoch)

    monkeypatch.setattr(Collaboration, "run_epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        AHL(settings).fit(train, Journal(tmp_path, every=0))
    monkeypatch.setattr(Collaboration, "run_epoch", run_epoch)
    resumed = AHL(settings)
    resumed.fit(train, Journal(tmp_path, every=0))
    assert torch.equal(resumed.score(images), whole.score(images))


def test_weights_are_equal_until_psi_has_learnt(tmp_path):
    detector = AHL(replace(TINY, n_epochs=0))
    train = toy_train_set(12, 5, side=64)
    groups = find_groups(train, False)
    tasks = make_tasks([0, 1] * 6, groups, 3, True, True, seed=0)
    learning = Collaboration(detector.settings, detector.base, tasks, bank_labels(groups, 3), seed=0)
    bank = detector._fill_bank(train, groups, None)
    for epoch in range(3):
        weights = learning.weights(epoch)
        assert sum(weights) == pytest.approx(1)
        assert (weights == [0.5, 0.5]) == (epoch <= 1)
        learning.run_epoch(bank, epoch)
    before = learning.psi.history.clone()
    learning.run_epoch(bank, 3)
    assert not torch.equal(learning.psi.history, before)


def test_psi_stays_on_the_cpu_where_its_dropout_follows_the_seed():
    detector = AHL(TINY, device="meta")  # any device but the CPU
    groups = find_groups(toy_train_set(12, 5, side=64), False)
    tasks = make_tasks([0, 1] * 6, groups, 3, True, True, seed=0)
    learning = Collaboration(detector.settings, detector.base, tasks, bank_labels(groups, 3), seed=0)
    assert {tensor.device.type for tensor in learning.psi.state_dict().values()} == {"cpu"}
    assert {tensor.device.type for tensor in learning.heads.parameters()} == {"meta"}


SENSELESS = [
    ({"n_clusters": 1}, "--n_clusters must be at least 2"),
    ({"inner_steps": 0}, "--inner_steps must be above 0"),
    ({"base_epochs": -1}, "--base_epochs must not be negative"),
    ({"pseudo": ("blur",)}, "--pseudo blur"),
]


@pytest.mark.parametrize(("changes", "message"), SENSELESS)
def test_settings_that_make_no_sense_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        AHL(replace(TINY, **changes))
