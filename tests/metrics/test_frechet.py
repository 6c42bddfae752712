"""The Frechet distance against its definition and against Gaussians whose distance is known."""

import numpy as np
import pytest
import torch

from vistok.errors import InputError
from vistok.metrics.frechet import frechet_distance


def by_definition(a, b):
    mean = [x.mean(0) for x in (a, b)]
    c, d = (np.cov(x.double().numpy().T) for x in (a, b))
    values = np.linalg.eigvals(c @ d)
    return float((mean[0] - mean[1]).square().sum()) + np.trace(c + d) - 2 * np.sqrt(values.real.clip(0)).sum()


@pytest.mark.parametrize(("n", "m"), [(200, 300), (5, 300), (4, 6)])
def test_it_is_the_definition(n, m):
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(n, 8, generator=rng), 2 * torch.randn(m, 8, generator=rng) + 1
    assert frechet_distance(a, b) == pytest.approx(by_definition(a, b), rel=1e-4, abs=1e-6)


def test_known_distances():
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(20_000, 3, generator=rng)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(12, rel=1e-6)
    assert frechet_distance(a, 3 * a) == pytest.approx(3 * 4, rel=0.05)


def test_shapes():
    with pytest.raises(InputError, match="features"):
        frechet_distance(torch.ones(3, 4), torch.ones(3, 5))
    with pytest.raises(InputError, match="features"):
        frechet_distance(torch.ones(1, 4), torch.ones(3, 4))
