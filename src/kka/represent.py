"""Eq. (1)-(2): normal images that represent their clusters; their captions are the examples for the LLM."""

from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.covariance import ledoit_wolf

from kka.datasets.layout import Images
from kka.errors import UserError
from kka.trained import open_run, views


# Eq. (1)
def mahalanobis(features: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """s = (z - mu)^T Sigma^-1 (z - mu). (N, D), (D,), (D, D) -> (N,)."""
    centred = features - mean
    return np.einsum("nd,nd->n", centred, np.linalg.solve(covariance, centred.T).T)


# Eq. (2)
def select_representatives(
    features: np.ndarray, n_clusters: int, seed: int = 0, flag: str = "--n_clusters"
) -> list[int]:
    """The image of smallest Mahalanobis distance in each k-means cluster.

    The covariance of a cluster is shrunk (Ledoit and Wolf, 2004), as it often has fewer images than
    dimensions. A cluster of one image is represented by it.

    Args:
        features: (N, D) of normal images.
        n_clusters: K, at most N.
        seed: of k-means.
        flag: that gave K, for messages.

    Returns one index per cluster that is not empty, from the largest cluster to the smallest.
    Raises UserError if K is out of range or a feature is not finite.
    """
    if not 1 <= n_clusters <= len(features):
        raise UserError(f"{flag} must lie between 1 and the number of normal images, {len(features)}")
    if not np.isfinite(features).all():
        raise UserError("some features of the normal images are not finite; train the evaluator anew")
    features = np.asarray(features, dtype=np.float64)
    clusters = KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(features)
    numbers, sizes = np.unique(clusters, return_counts=True)
    order = numbers[np.argsort(-sizes, kind="stable")]
    return [_closest(np.flatnonzero(clusters == number), features) for number in order]


def representatives(
    run: Path, normals: Images, n_clusters: int, seed: int = 0, flag: str = "--n_clusters"
) -> list[int]:
    """`select_representatives` on the features of a trained detector. Indices into `normals`."""
    detector = open_run(run, torch.device("cpu"), "--run").detector
    features = detector.embed(views(run, detector, normals, "normal images")).numpy()
    return select_representatives(features, n_clusters, seed, flag)


def _closest(members: np.ndarray, features: np.ndarray) -> int:
    if len(members) < 2:
        return int(members[0])
    own = features[members]
    covariance = ledoit_wolf(own)[0]
    # Identical images have no spread at all.
    covariance += 1e-9 * max(1.0, float(np.trace(covariance))) * np.eye(len(covariance))
    return int(members[np.argmin(mahalanobis(own, own.mean(0), covariance))])
