"""--vmap_seeds: seeds trained as one model are the single runs, in numbers, in files and after a kill."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_deep_sad import toy_train_set
from torch import nn
from toy import MAIN, USER_DICT, read_json, refused, results, run_toy, snapshot, toy_flags

from kka.detectors.deep_sad import DeepSAD, DeepSADSettings, make_optimizer
from kka.detectors.deep_sad_together import Training, fit_together
from kka.detectors.side_by_side import Share, side_by_side
from kka.errors import TrainingError, UserError
from kka.journal import Journal, align
from kka.networks.lenet import NETWORKS, Autoencoder

SEEDS = range(3)
FAST = {"n_epochs": 3, "ae_n_epochs": 2, "batch_size": 8, "ae_batch_size": 8, "lr_milestone": (2,)}
EXACT = {"rtol": 1e-9, "atol": 1e-12}  # in float64


def fitted(settings, together, **sizes):
    """Detectors of three seeds, each with a set of its own, and their journals."""
    side = NETWORKS[settings.net_name][0].size
    sets = [toy_train_set(side=side, seed=seed, **sizes) for seed in SEEDS]
    detectors, journals = [DeepSAD(settings, seed) for seed in SEEDS], [Journal() for _ in SEEDS]
    trainings = [
        Training(each, own, journal, lambda score, own=own: float(score(own.images).sum()))
        for each, own, journal in zip(detectors, sets, journals, strict=True)
    ]
    if together:
        fit_together(trainings)
    else:
        for each in trainings:
            each.detector.fit(each.train, each.journal, each.evaluate)
    return detectors, journals


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"net_name": "fmnist_LeNet"},
        {"net_name": "mnist_LeNet", "optimizer_name": "amsgrad", "eta": 2.0},
        {"pretrain": False, "drop_last": True, "center_from": "all"},
        {"official_pretrain": True, "batch_size": 5, "test_every": 2},  # 16 = 3 * 5 + 1
    ],
)
def test_numbers_of_each_seed_are_those_of_its_single_run(changes):
    settings = DeepSADSettings(**{**FAST, **changes})
    (alone, own), (joined, journals) = fitted(settings, False), fitted(settings, True)
    for one, other, journal, beside in zip(alone, joined, own, journals, strict=True):
        for name, weight in one.state_dict().items():
            # single ones, whose gradient is nearly 0, may go the other way: Adam's first step is lr = 1e-4
            assert float((other.state_dict()[name] - weight).double().abs().mean()) < 1e-5, name
        assert len(journal.rows) == len(beside.rows) > 0
        for row, again in zip(journal.rows, beside.rows, strict=True):
            assert again.pop("phase") == row.pop("phase")
            assert again == pytest.approx(row, rel=1e-3)
        for facts in (journal.facts, beside.facts):
            facts.get("ae", {}).pop("test_time", None)
        assert beside.facts.get("ae", {}) == pytest.approx(journal.facts.get("ae", {}), rel=1e-3)


def test_seeds_differ(tmp_path):
    detectors, _ = fitted(DeepSADSettings(**FAST), True)
    weights = [each.model.net.fc1.weight for each in detectors]
    assert not torch.allclose(weights[0], weights[1], atol=1e-3)


@pytest.mark.parametrize("net_name", NETWORKS)
def test_one_step_side_by_side_is_each_step_alone(net_name):
    torch.manual_seed(0)
    models = [Autoencoder(net_name).double() for _ in SEEDS]
    n, c, s = len(models), models[0].encoder.channels, models[0].encoder.size
    joined, images = side_by_side(models), torch.rand(6, n * c, s, s, dtype=torch.float64)
    outputs = joined(images)
    outputs.square().mean((0, 2, 3)).sum().backward()
    for k, model in enumerate(models):
        own = model(images.chunk(n, 1)[k])
        torch.testing.assert_close(outputs.chunk(n, 1)[k], own, **EXACT)
        own.square().mean((0, 2, 3)).sum().backward()
        shares = [weight.grad.chunk(n)[k] for weight in joined.parameters()]
        for share, weight in zip(shares, model.parameters(), strict=True):
            torch.testing.assert_close(share, weight.grad, **EXACT)
        # running statistics, with momentum and the unbiased variance of BatchNorm
        torch.testing.assert_close(Share(joined, k, n).state_dict(), dict(model.state_dict()), **EXACT)


def test_shares_are_states_of_single_models_and_go_back():
    models = [nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3, affine=False)) for _ in SEEDS]
    n, states = len(models), []
    for whole in (side_by_side(models), side_by_side(models[::-1])):
        optimizer = make_optimizer("adam", whole, 0.1, 0.0)
        if not states:
            whole(torch.rand(4, n * 2, 5, 5)).square().sum().backward()
            optimizer.step()
            states = [[Share(part, k, n).state_dict() for part in (whole, optimizer)] for k in range(n)]
            single = make_optimizer("adam", models[1], 0.1, 0.0)
            models[1].load_state_dict(states[1][0])
            single.load_state_dict(states[1][1])
            continue
        for k, own in enumerate(states):
            Share(whole, k, n).load_state_dict(own[0])
            Share(optimizer, k, n).load_state_dict(own[1])
        again = [[Share(part, k, n).state_dict() for part in (whole, optimizer)] for k in range(n)]
        torch.testing.assert_close(again, states, rtol=0, atol=0)


def test_sets_of_different_sizes_are_refused():
    trainings = [
        Training(DeepSAD(DeepSADSettings(**FAST), seed), toy_train_set(n_normal=9 + seed), Journal())
        for seed in SEEDS
    ]
    with pytest.raises(UserError, match=r"\[15, 16, 17\] images; use --runs"):
        fit_together(trainings)


def test_loss_that_is_not_finite_stops():
    with pytest.raises(TrainingError, match="lower --lr"):
        fitted(DeepSADSettings(**{**FAST, "lr": 1e30, "pretrain": False}), True)


def test_journals_continue_where_all_of_them_were(tmp_path):
    """A kill between two checkpoints leaves some ahead; a later one must not lose the common state."""

    def journal(name):
        return Journal(tmp_path / name, every=0)

    def run(name, stop):
        part = {"net": nn.Linear(1, 1)}
        own = journal(name)
        for epoch in own.epochs("train", 9, part):
            own.record("train", epoch, loss=float(epoch))
            if epoch == stop:
                break

    for name, stop in (("a", 3), ("b", 2)):
        (tmp_path / name).mkdir()
        run(name, stop)
    for _ in range(2):
        journals = [journal(name) for name in "ab"]
        align(journals)
        assert [each.series("train", "loss") for each in journals] == [[0.0, 1.0]] * 2
        run("a", 2)  # the next kill, with only a's checkpoint written
    (tmp_path / "c").mkdir()
    journals = [journal(name) for name in "abc"]
    align(journals)
    assert [each.rows for each in journals] == [[]] * 3


def flags(**more):
    return {"n_epochs": 4, "ae_n_epochs": 3, "split": "crossfit", "n_anomalies": 5, "test_every": 2, **more}


@pytest.fixture(scope="module")
def both(toy_set, tmp_path_factory):
    """Folders of the same three seeds, one by one and together."""
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("alone", "together")]
    for folder, more in zip(folders, ({"runs": 3}, {"vmap_seeds": 3}), strict=True):
        outcome = run_toy(toy_set, folder, **flags(**more))
        assert outcome.code == 0, outcome.stderr
    return folders


def test_folders_are_those_of_runs(both):
    alone, together = both
    assert set(snapshot(alone)) == set(snapshot(together))
    assert "seed_2/crossfit_1/metrics.jsonl" in snapshot(together)
    for seed in SEEDS:
        one, other = alone / f"seed_{seed}", together / f"seed_{seed}"
        assert read_json(one / "config.json")["identity"] == read_json(other / "config.json")["identity"]
        assert read_json(other / "config.json")["settings"]["vmap_seeds"] == 1
        first, second = results(one), results(other)
        scores = [[row[2] for row in each.pop("test_scores")] for each in (first, second)]
        assert scores[1] == pytest.approx(scores[0], rel=1e-2)
        assert second == pytest.approx(first, rel=1e-2)
        for name in ("d_samples.json", "e_samples.json"):
            rows = [read_json(folder / name) for folder in (one, other)]
            assert [row[0][0] for row in rows[0]] == [row[0][0] for row in rows[1]]
    assert read_json(together / "summary.json").keys() == read_json(alone / "summary.json").keys()


def test_log_of_a_seed_is_its_own(both):
    log = (both[1] / "seed_1" / "log.txt").read_text()
    assert "seed 1" in log
    assert "seed 0" not in log
    assert log.count("test AUC") == 1


def test_runs_of_the_other_way_are_found_finished(toy_set, both):
    outcome = run_toy(toy_set, both[0], **flags(vmap_seeds=3))
    assert outcome.code == 0
    assert outcome.log.count("is finished") == 3


def test_more_runs_than_seeds_at_once_and_one_lost(toy_set, both, tmp_path):
    folder = shutil.copytree(both[1], tmp_path / "runs")
    before = snapshot(folder / "seed_0")
    shutil.rmtree(folder / "seed_1")
    outcome = run_toy(toy_set, folder, **flags(runs=4, vmap_seeds=2))
    assert outcome.code == 0, outcome.stderr
    assert len(read_json(folder / "summary.json")["seeds"]) == 4
    assert results(folder / "seed_1") == results(run_alone(toy_set, tmp_path))
    after = snapshot(folder / "seed_0")
    assert after == before | {"run.lock": after["run.lock"]}


def run_alone(toy_set, tmp_path):
    outcome = run_toy(toy_set, tmp_path / "alone", seed=1, **flags())
    assert outcome.code == 0, outcome.stderr
    return tmp_path / "alone"


def test_killed_and_started_again_gives_the_same_numbers(toy_set, both, tmp_path):
    more = flags(vmap_seeds=3, checkpoint_every=0, user_dict=json.dumps(USER_DICT))
    folder = tmp_path / "killed"
    for lines, name in ((2, "seed_2"), (2, "seed_1/crossfit_0")):
        process = subprocess.Popen(
            [sys.executable, str(MAIN), *toy_flags(toy_set, folder, **more)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(lambda at=folder / name / "metrics.jsonl", n=lines: n_lines(at) >= n, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    outcome = run_toy(toy_set, folder, **more)
    assert outcome.code == 0, outcome.stderr
    assert "continuing after epoch" in outcome.log
    for seed in SEEDS:
        one, other = both[1] / f"seed_{seed}", folder / f"seed_{seed}"
        assert results(other) == results(one)
        for name in ("metrics.jsonl", "model.safetensors", "d_samples.json", "crossfit_1/metrics.jsonl"):
            assert (other / name).read_bytes() == (one / name).read_bytes()
        assert not list(other.rglob("checkpoint*"))


def n_lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"detector": "frozen"}, "only --detector deep_sad"),
        ({"net_name": "resnet18"}, "not --net_name resnet18"),
        ({"precision": "bfloat16"}, "--precision float32"),
        ({"vmap_seeds": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_trained_together_is_refused(toy_set, tmp_path, more, part):
    words = {"vmap_seeds": 2, **more}
    if "detector" in more:
        small = dict.fromkeys(("n_epochs", "ae_n_epochs", "batch_size", "ae_batch_size"))
        words |= small
    refused(run_toy(toy_set, tmp_path / "run", **words), "--vmap_seeds", part)
    assert not (tmp_path / "run").exists()
