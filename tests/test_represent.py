"""Eq. (1)-(2) by hand."""

import numpy as np
import pytest
from scipy.spatial import distance

from kka.errors import UserError
from kka.represent import mahalanobis, select_representatives


def blobs(sizes, dims=5, seed=0):
    rng = np.random.default_rng(seed)
    centres = 50 * rng.standard_normal((len(sizes), dims))
    return np.concatenate([c + rng.standard_normal((n, dims)) for c, n in zip(centres, sizes, strict=True)])


def test_mahalanobis_equals_scipy():
    rng = np.random.default_rng(0)
    features, mean = rng.standard_normal((6, 4)), rng.standard_normal(4)
    root = rng.standard_normal((4, 4))
    covariance = root @ root.T + np.eye(4)
    expected = [distance.mahalanobis(z, mean, np.linalg.inv(covariance)) ** 2 for z in features]
    np.testing.assert_allclose(mahalanobis(features, mean, covariance), expected)


def test_one_central_image_for_each_cluster_the_largest_first():
    features = blobs([30, 10, 20])
    chosen = select_representatives(features, 3)
    assert [np.searchsorted([30, 40, 60], i, side="right") for i in chosen] == [0, 2, 1]
    for i, (first, last) in zip(chosen, ((0, 30), (40, 60), (30, 40)), strict=True):
        own = features[first:last]
        radii = np.linalg.norm(own - own.mean(0), axis=1)
        assert radii[i - first] <= np.quantile(radii, 0.35)


def test_more_dimensions_than_images_and_identical_images():
    assert len(select_representatives(blobs([3, 2], dims=64), 2)) == 2
    assert select_representatives(np.ones((5, 8)), 1) in ([0], [1], [2], [3], [4])


def test_same_seed_same_choice():
    features = blobs([40], seed=3)
    assert select_representatives(features, 4, seed=1) == select_representatives(features, 4, seed=1)


@pytest.mark.parametrize("n_clusters", [0, 6])
def test_number_of_clusters_out_of_range_is_refused(n_clusters):
    with pytest.raises(UserError, match="n_clusters"):
        select_representatives(blobs([5]), n_clusters)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="finite"):
        select_representatives(np.full((3, 2), np.nan), 1)
