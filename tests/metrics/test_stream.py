import math

import pytest
import torch

from vistok.metrics.stream import Mean


def test_batches_give_what_all_at_once_would() -> None:
    values = 1e6 + torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stream = Mean()
    for part in values.split([1, 99, 400, 500]):
        stream.update(part)
    assert stream.count == 1000
    assert stream.mean == pytest.approx(values.mean().item(), rel=1e-14)
    assert stream.deviation == pytest.approx(values.std(correction=0).item(), rel=1e-9)


def test_nothing_and_infinity() -> None:
    stream = Mean()
    stream.update(torch.empty(0))
    assert stream.mean is None
    assert stream.deviation is None
    stream.update(torch.tensor([1.0, math.inf]))
    stream.update(torch.tensor([2.0]))
    assert stream.mean == math.inf
