"""AUROC, average precision and intervals by hand, and against scikit-learn and SciPy."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from toy import results

from kka.errors import TrainingError
from kka.metrics import aupr, auroc, format_interval, mean_interval
from kka.results import check_scores

TARGETS, SCORES = [0, 0, 0, 1, 1], [0.1, 0.4, 0.6, 0.5, 0.9]


def test_auroc_is_the_share_of_pairs_in_order():
    assert auroc(TARGETS, SCORES) == pytest.approx(5 / 6)
    assert auroc(TARGETS, [-s for s in SCORES]) == pytest.approx(1 / 6)


def test_ties_count_half():
    assert auroc([0, 1, 1], [1.0, 1.0, 2.0]) == pytest.approx(0.75)
    assert auroc([0, 1], [3.0, 3.0]) == 0.5


def test_average_precision_by_hand():
    # In the order of the scores: anomaly (1/1), normal, anomaly (2/3).
    assert aupr(TARGETS, SCORES) == pytest.approx((1 + 2 / 3) / 2)


def test_equal_to_scikit_learn_on_float32_tensors():
    rng = np.random.default_rng(0)
    targets, scores = rng.integers(0, 2, 200), rng.normal(size=200).astype(np.float32).round(1)
    assert auroc(torch.tensor(targets), torch.tensor(scores)) == sklearn.metrics.roc_auc_score(
        targets, scores
    )
    expected = sklearn.metrics.average_precision_score(targets, scores)
    assert aupr(targets.tolist(), torch.tensor(scores)) == expected


@pytest.mark.parametrize("targets", [[0, 0], [1, 1], []])
@pytest.mark.filterwarnings("error")
def test_one_class_has_no_auc(targets):
    scores = [0.5] * len(targets)
    assert auroc(targets, scores) is None
    assert aupr(targets, scores) is None


def test_interval_by_hand():
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # t of 2 degrees of freedom, s = 1


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_interval_equals_scipy(confidence):
    values = np.random.default_rng(1).normal(size=7)
    mean, half = mean_interval(values, confidence)
    low, high = scipy.stats.t.interval(confidence, 6, values.mean(), scipy.stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_one_value_has_no_interval():
    assert mean_interval([0.5]) == (0.5, None)
    assert mean_interval([0.5, 0.5]) == (0.5, 0.0)


def test_interval_as_text():
    assert format_interval([0.7, 0.8]) == "75.00 ± 63.53 (n = 2)"
    assert format_interval([0.7]) == "70.00 (n = 1)"
    assert format_interval([1.0, 1.0], scale=1) == "1.00 ± 0.00 (n = 2)"


def test_equal_scores_are_a_collapse_up_to_rounding():
    with pytest.raises(TrainingError, match="collapsed"):
        check_scores("deep_sad", torch.full((5,), 0.25), torch.full((2,), 0.25 + 1e-10, dtype=torch.double))
    check_scores("deep_sad", torch.full((5,), 0.25), torch.tensor([0.2501]))
    check_scores("deep_sad", torch.tensor([0.25]), torch.tensor([]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_must_be_finite(value):
    with pytest.raises(TrainingError, match="not finite"):
        check_scores("deep_sad", torch.tensor([0.1, value]), torch.tensor([0.2]))


def test_results_are_the_metrics_of_their_own_scores(finished):
    values = results(finished)
    index, targets, scores = zip(*values["test_scores"], strict=True)
    assert list(index) == list(range(12))
    assert list(targets) == [0] * 4 + [1] * 8
    assert values["test_auc"] == pytest.approx(sklearn.metrics.roc_auc_score(targets, scores))
    assert values["test_aupr"] == pytest.approx(sklearn.metrics.average_precision_score(targets, scores))
