"""AUROC, AUPR and confidence intervals."""

import math
from collections.abc import Sequence

import numpy as np
import scipy.stats
import sklearn.metrics
from numpy.typing import ArrayLike


def auroc(targets: ArrayLike, scores: ArrayLike) -> float | None:
    """Area under the ROC curve in [0, 1]; None if the test set has one class only.

    Args:
        targets: (N,) 0 normal, 1 anomaly.
        scores: (N,) higher = more anomalous.
    """
    if len(np.unique(targets)) < 2:
        return None
    return float(sklearn.metrics.roc_auc_score(targets, scores))


def aupr(targets: ArrayLike, scores: ArrayLike) -> float | None:
    """Average precision in [0, 1] with anomalies as positives; None if the test set has one class only."""
    if len(np.unique(targets)) < 2:
        return None
    return float(sklearn.metrics.average_precision_score(targets, scores))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float | None]:
    """Mean and half width of Student's t-interval; the half width is None for fewer than two values."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * spread


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample; None for one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def format_interval(values: Sequence[float], scale: float = 100, unit: str = "") -> str:
    """ "mean ± half width (n)" in percent, or the mean alone for one value; the unit is said if given."""
    mean, half = mean_interval(values)
    interval = f" ± {scale * half:.2f}" if half is not None else ""
    return f"{scale * mean:.2f}{interval}{unit} (n = {len(values)})"
