"""Eq. (6): which generated anomalies are hard, that is, closer to the centre than the farthest normal."""

import numpy as np
from numpy.typing import ArrayLike

from kka.errors import UserError


def hardness_threshold(normal_scores: ArrayLike, quantile: float = 1.0, margin: float = 0.0) -> float:
    """The score below which an anomaly is hard: the farthest normal's, or a quantile's, plus a margin.

    Args:
        normal_scores: (N,) scores of normal images, N >= 1.
        quantile: in (0, 1]; 1 is the maximum of Eq. (6).
        margin: `drange` of the official code.
    """
    if not 0 < quantile <= 1:
        raise UserError(f"--threshold_quantile must lie in (0, 1], it is {quantile}")
    return float(np.quantile(np.asarray(normal_scores, dtype=float), quantile)) + margin


def hard_anomalies(scores: ArrayLike, threshold: ArrayLike, inclusive: bool = False) -> np.ndarray:
    """Eq. (6). (N,) scores of anomalies, one threshold or (N,) -> (N,) bool; strict unless `inclusive`."""
    scores, threshold = np.asarray(scores, dtype=float), np.asarray(threshold, dtype=float)
    return scores <= threshold if inclusive else scores < threshold


def easy_anomalies(scores: ArrayLike, hard: np.ndarray, top_k: int | None = None) -> np.ndarray:
    """Positions of the easy anomalies: all that are not hard, or the `top_k` highest scores (official)."""
    if top_k is None:
        return np.flatnonzero(~hard)
    return np.argsort(-np.asarray(scores, dtype=float), kind="stable")[:top_k]
