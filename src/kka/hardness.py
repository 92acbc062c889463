"""Which of many fresh anomalies come into the training set: rules on scores and features, Eq. (6) first.

Every rule takes what an evaluator says of a pool of anomalies that it has not seen, and gives rows of it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans

from kka.split import hard_anomalies


@dataclass(frozen=True)
class Pool:
    """Fresh anomalies as an evaluator sees them; the first axis is the image."""

    scores: np.ndarray
    """(N,) higher = more anomalous"""
    threshold: float
    """score below which an image is hard, Eq. (6)"""
    features: np.ndarray
    """(N, D) phi(x)"""

    @property
    def hard(self) -> np.ndarray:
        """(N,) bool, Eq. (6)."""
        return hard_anomalies(self.scores, self.threshold)


def some(mask: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Up to n random rows of a mask (N,), in random order."""
    return rng.permutation(np.flatnonzero(mask))[:n]


def lowest(scores: np.ndarray, mask: np.ndarray, n: int) -> np.ndarray:
    """Up to n rows of a mask (N,), those with the lowest scores, lowest first."""
    rows = np.flatnonzero(mask)
    return rows[np.argsort(scores[rows], kind="stable")][:n]


def spread(
    features: np.ndarray, mask: np.ndarray, n: int, n_clusters: int, rng: np.random.Generator
) -> np.ndarray:
    """Up to n rows of a mask (N,), one from each k-means cluster of their features (N, D) in turn."""
    rows = rng.permutation(np.flatnonzero(mask))
    if not len(rows):
        return rows
    means = KMeans(min(n_clusters, len(rows)), n_init=3, random_state=int(rng.integers(2**31)))
    clusters = means.fit_predict(features[rows])
    turns = np.zeros(len(rows), dtype=int)  # how many of its own cluster stand before each row
    for cluster in np.unique(clusters):
        own = clusters == cluster
        turns[own] = np.arange(own.sum())
    return rows[np.argsort(turns, kind="stable")][:n]


Rule = Callable[[Pool, int, int, np.random.Generator], np.ndarray]
"""(pool, number of images, clusters, random numbers) -> rows, at most that many"""

RULES: dict[str, Rule] = {
    "random": lambda pool, n, k, rng: some(np.ones(len(pool.scores), bool), n, rng),
    "hard": lambda pool, n, k, rng: some(pool.hard, n, rng),
    "hardest": lambda pool, n, k, rng: lowest(pool.scores, np.ones(len(pool.scores), bool), n),
    "semi-hard": lambda pool, n, k, rng: lowest(pool.scores, ~pool.hard, n),
    "hard-clusters": lambda pool, n, k, rng: spread(pool.features, pool.hard, n, k, rng),
    "easy": lambda pool, n, k, rng: some(~pool.hard, n, rng),
}


def leaving(easy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N,) bool -> the order in which N anomalies are replaced: easy ones first, each kind at random."""
    order = rng.permutation(len(easy))
    return order[np.argsort(~easy[order], kind="stable")]
