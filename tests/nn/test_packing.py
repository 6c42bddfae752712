"""Packed linear maps give the same numbers, inside the block alone, and step aside where they cannot serve."""

import pytest
import torch
from torch import nn

from vistok.nn.packing import packed


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 10, bias=False))


@pytest.mark.parametrize("shape", [(4, 24), (4, 1, 24), (1, 24), (2, 7, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_numbers_for_any_number_of_rows(model, shape, dtype):
    model, x = model.to(dtype), torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        plain = model(x)
        with packed(model):
            assert "forward" in model[0].__dict__
            quick = model(x)
    assert quick.shape == plain.shape
    assert quick.dtype == dtype
    torch.testing.assert_close(quick, plain, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=1e-5)
    assert "forward" not in model[0].__dict__


def test_undone_after_an_error_and_untouched_where_gradients_are_wanted(model):
    x = torch.randn(2, 24)
    with pytest.raises(RuntimeError), torch.no_grad(), packed(model):
        model(torch.randn(2, 3))
    assert "forward" not in model[0].__dict__
    with packed(model):
        model(x).sum().backward()
    assert model[0].weight.grad is not None


def test_what_stands_in_for_a_linear_map_keeps_its_way(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    other = nn.Sequential(Doubled(24, 10), nn.Linear(10, 4).double())
    with torch.no_grad(), packed(other):
        assert "forward" not in other[0].__dict__
        assert "forward" not in other[1].__dict__


def test_weights_that_change_are_read_anew(model):
    x = torch.randn(2, 24)
    with torch.no_grad():
        with packed(model):
            model(x)
        model[0].weight.mul_(2)
        with packed(model):
            torch.testing.assert_close(model(x), model[2](model[1](model[0](x))))
