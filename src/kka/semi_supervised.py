"""Who is labelled what: the semi-supervised settings of KKA and of Deep SAD (Ruff et al., 2020)."""

from dataclasses import dataclass

import numpy as np

from kka.errors import UserError


@dataclass(frozen=True)
class Counts:
    """How many images a ratio setting takes, and as what."""

    known_normal: int
    """semi target +1"""
    unlabelled_normal: int
    """semi target 0"""
    unlabelled_outlier: int
    """anomalies treated as normal: semi target 0"""
    known_outlier: int
    """semi target -1"""


def solve_counts(
    n_normal: int, ratio_known_normal: float, ratio_known_outlier: float, ratio_pollution: float
) -> Counts:
    """The counts of the official `create_semisupervised_setting`: solve four equations, cut off decimals.

    Raises UserError naming the flag for a ratio outside [0, 1) or ratios that leave no room for normals.
    """
    kn, ko, p = ratio_known_normal, ratio_known_outlier, ratio_pollution
    for name, value in (("known_normal", kn), ("known_outlier", ko), ("pollution", p)):
        if not 0 <= value < 1:
            raise UserError(f"--ratio_{name} must lie in [0, 1), it is {value}")
    if kn + ko >= 1:
        raise UserError(f"--ratio_known_normal {kn} and --ratio_known_outlier {ko} must sum to less than 1")
    equations = np.array(
        [[1, 1, 0, 0], [1 - kn, -kn, -kn, -kn], [-ko, -ko, -ko, 1 - ko], [0, -p, 1 - p, 0]], dtype=float
    )
    # Solvable with counts of at least 0 whenever the checks above hold.
    solution = np.linalg.solve(equations, np.array([n_normal, 0, 0, 0], dtype=float))
    known_normal, unlabelled_normal, unlabelled_outlier, known_outlier = (int(x) for x in solution)
    return Counts(known_normal, unlabelled_normal, unlabelled_outlier, known_outlier)


def paper_setting(n_normal: int, n_anomalies: int) -> tuple[np.ndarray, np.ndarray]:
    """Every normal unlabelled, every anomaly labelled. Returns (indices, semi targets), normals first."""
    semi_targets = np.r_[np.zeros(n_normal, dtype=np.int64), np.full(n_anomalies, -1, dtype=np.int64)]
    return np.arange(n_normal + n_anomalies), semi_targets


def ratio_setting(
    counts: Counts, n_normal: int, n_anomalies: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The official setting: some normals labelled, some anomalies labelled, some as pollution.

    Unlike the official code, which draws them independently, no anomaly is both labelled and pollution.

    Returns (indices, semi targets); indices below `n_normal` are normals, the others anomalies.
    Raises UserError if there are too few anomalies.
    """
    needed = counts.unlabelled_outlier + counts.known_outlier
    if needed > n_anomalies:
        raise UserError(
            f"the ratios ask for {counts.known_outlier} labelled and {counts.unlabelled_outlier} unlabelled "
            f"anomalies, the anomaly folder has {n_anomalies}; add images or lower --ratio_known_outlier "
            "or --ratio_pollution"
        )
    normals = rng.permutation(n_normal)[: counts.known_normal + counts.unlabelled_normal]
    outliers = n_normal + rng.permutation(n_anomalies)[:needed]
    repeats = (counts.known_normal, counts.unlabelled_normal, counts.unlabelled_outlier, counts.known_outlier)
    return np.r_[normals, outliers], np.repeat(np.array([1, 0, 0, -1]), repeats)
