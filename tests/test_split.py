"""Eq. (6) and the semi-supervised settings: parity with the official code, and by hand."""

import numpy as np
import pytest
from golden_arrays import golden

from kka.errors import UserError
from kka.semi_supervised import paper_setting, ratio_setting, solve_counts
from kka.split import easy_anomalies, hard_anomalies, hardness_threshold


@pytest.mark.parametrize(("margin", "key"), [(0.0, "0"), (0.5, "0p5")])
def test_hard_equals_official_code(margin, key):
    """The official code judges the whole test list with <= and a margin (drange)."""
    expected = golden("kka/split")
    label, score = expected["input_label"], expected["input_score"].astype(float)
    anomalies = np.flatnonzero(label == 1)
    threshold = hardness_threshold(score[label == 0], margin=margin)
    hard = hard_anomalies(score[anomalies], threshold, inclusive=True)
    positions = expected[f"output_dsamples_drange_{key}_list_positions"]
    assert anomalies[hard].tolist() == positions.tolist()
    rows = expected["input_index"][anomalies[hard]]
    assert rows.tolist() == expected[f"output_dsamples_drange_{key}_rows_index"].tolist()


@pytest.mark.parametrize("top_k", [5, 100])
def test_easy_top_k_equals_official_code(top_k):
    expected = golden("kka/split")
    anomalies = np.flatnonzero(expected["input_label"] == 1)
    scores = expected["input_score"].astype(float)[anomalies]
    easy = easy_anomalies(scores, np.zeros(len(scores), bool), top_k)
    assert anomalies[easy].tolist() == expected[f"output_esamples_num_{top_k}_list_positions"].tolist()


def test_eq_6_is_strict_and_easy_is_the_rest():
    threshold = hardness_threshold([1.0, 2.0, 3.0])
    scores = np.array([2.9, 3.0, 3.1])
    hard = hard_anomalies(scores, threshold)
    assert hard.tolist() == [True, False, False]
    assert hard_anomalies(scores, threshold, inclusive=True).tolist() == [True, True, False]
    assert easy_anomalies(scores, hard).tolist() == [1, 2]


def test_threshold_quantile():
    normals = np.arange(101.0)
    assert hardness_threshold(normals) == 100
    assert hardness_threshold(normals, quantile=0.95) == pytest.approx(95)
    with pytest.raises(UserError, match="quantile"):
        hardness_threshold(normals, quantile=0)


def test_one_threshold_for_each_anomaly():
    assert hard_anomalies([1.0, 1.0], np.array([0.5, 2.0])).tolist() == [False, True]


def test_counts_equal_official_code():
    expected = golden("deep_sad/semi_supervised_counts")
    ratios = expected["input_ratio_known_normal__known_outlier__pollution_in_percent"]
    counts = expected["output_n_known_normal__unlabelled_normal__unlabelled_outlier__known_outlier"]
    for (n_normal, _), percent, official in zip(
        expected["input_n_normal_n_outlier"], ratios, counts, strict=True
    ):
        ours = solve_counts(int(n_normal), *(float(p) / 100 for p in percent))
        assert [*vars(ours).values()] == official.tolist()


def test_settings_equal_official_code_where_that_works():
    """Rows in which the official lists differ in length (and its data set then fails) are refused here."""
    expected = golden("kka/semi_supervised_list_lengths")
    ratios = expected["input_ratio_known_normal__known_outlier__pollution_in_percent"]
    lengths = expected[
        "output_len_idx_list__len_label_list__len_semi_list__n_semi_plus1__n_semi_0__n_semi_minus1"
    ]
    refused = 0
    for (n_normal, n_outlier), percent, official in zip(
        expected["input_n_normal_n_outlier"].tolist(), ratios, lengths.tolist(), strict=True
    ):
        counts = solve_counts(n_normal, *(float(p) / 100 for p in percent))
        rng = np.random.default_rng(0)
        if official[0] != official[2]:
            with pytest.raises(UserError, match="anomaly folder has"):
                ratio_setting(counts, n_normal, n_outlier, rng)
            refused += 1
            continue
        rows, semi = ratio_setting(counts, n_normal, n_outlier, rng)
        assert [len(rows), len(rows), len(semi)] == official[:3]
        assert [int((semi == value).sum()) for value in (1, 0, -1)] == official[3:]
    assert refused == 2


def test_no_anomaly_is_both_labelled_and_pollution():
    counts = solve_counts(100, 0.1, 0.1, 0.1)
    rows, semi = ratio_setting(counts, 100, 50, np.random.default_rng(1))
    assert len(set(rows.tolist())) == len(rows)
    assert set(semi[rows < 100]) == {0, 1}
    assert set(semi[rows >= 100]) == {0, -1}


def test_oxford_defaults_of_the_official_code_label_no_anomaly():
    counts = solve_counts(51, 0.0, 0.01, 0.1)
    assert (counts.unlabelled_outlier, counts.known_outlier) == (5, 0)


def test_paper_labels_every_generated_anomaly():
    rows, semi = paper_setting(3, 2)
    assert rows.tolist() == [0, 1, 2, 3, 4]
    assert semi.tolist() == [0, 0, 0, -1, -1]


@pytest.mark.parametrize(
    ("ratios", "flag"),
    [
        ((-0.1, 0, 0), "known_normal"),
        ((0, 1, 0), "known_outlier"),
        ((0, 0, 1.5), "pollution"),
        ((0.6, 0.4, 0), "sum"),
    ],
)
def test_impossible_ratios_name_the_flag(ratios, flag):
    with pytest.raises(UserError, match=flag):
        solve_counts(100, *ratios)
