"""Streaming mean and covariance: of batches, of parts, of data far from zero."""

import numpy as np
import pytest
import torch

from vistok.errors import InputError
from vistok.metrics.frechet import frechet_distance
from vistok.metrics.moments import Moments, gaussian


def rows(n, width=6, offset=0.0, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + offset


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_batches_give_what_numpy_gives(offset):
    features = rows(500, offset=offset)
    moments = Moments()
    for part in features.split(37):
        moments.update(part)
    found = moments.gaussian()
    np.testing.assert_allclose(found.mean, features.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.double().numpy().T), rtol=1e-9, atol=1e-12)
    assert found.count == 500


def test_parts_of_several_processes_merge():
    features = rows(301, offset=5.0)
    parts = [Moments() for _ in range(4)]
    for part, mine in zip(parts[:3], features.split(101), strict=True):
        part.update(mine)
    merged = parts[3] + parts[0] + (parts[1] + parts[2])
    whole = gaussian(features)
    torch.testing.assert_close(merged.gaussian().mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.gaussian().covariance, whole.covariance, rtol=1e-10, atol=1e-12)
    assert parts[0].count == 101, "merging must not change its parts"


def test_statistics_give_the_distance_of_their_features():
    a, b, few = rows(300), 1.5 * rows(200, seed=1) + 0.3, rows(5, seed=2)
    for first, second in ((a, b), (few, b), (a, few), (few, rows(4, seed=3))):
        wanted = frechet_distance(first, second)
        for left in (first, gaussian(first)):
            for right in (second, gaussian(second)):
                assert frechet_distance(left, right) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_bad_features():
    moments = Moments()
    with pytest.raises(InputError, match="at least two"):
        moments.gaussian()
    moments.update(rows(3))
    with pytest.raises(InputError, match="wide"):
        moments.update(rows(3, width=7))
    with pytest.raises(InputError, match="finite"):
        moments.update(torch.full((2, 6), torch.nan))
    with pytest.raises(InputError, match="expected"):
        moments.update(torch.zeros(3))
