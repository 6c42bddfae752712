"""Rounding after training: levels of a normal, ties, ranges, and channels with a mean and variance of their own."""

import pytest
import torch

from vistok.errors import ConfigError, InputError
from vistok.quantize.normal import NormalLevels, NormalQuantizer, normal_levels


def test_levels_are_means_of_a_normal_between_its_quantiles():
    levels, boundaries = normal_levels(8)
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x[x.abs() < 3]
    inside = torch.bucketize(x, boundaries[1:-1].double())
    share = torch.bincount(inside, minlength=8) / len(x)
    torch.testing.assert_close(share, torch.full((8,), 1 / 8, dtype=share.dtype), atol=3e-3, rtol=0)
    means = torch.stack([x[inside == code].mean() for code in range(8)])
    torch.testing.assert_close(levels.double(), means, atol=1e-2, rtol=0)
    assert torch.equal(levels, -levels.flip(0))


def test_codes_are_the_nearest_levels():
    rounding = NormalLevels(bits=4)
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 2
    values = rounding.decode(torch.arange(16))
    assert torch.equal(rounding.encode(x), (x[:, None] - values).abs().argmin(1))
    assert torch.equal(rounding.encode(values), torch.arange(16))
    assert int(rounding.encode(torch.tensor(0.0))) == 7  # halfway: the lower one
    assert rounding.encode(torch.tensor([-99.0, 99.0])).tolist() == [0, 15]


@pytest.mark.parametrize(("bits", "error"), [(2, 0.16), (4, 0.01), (6, 0.0007)])
def test_relative_error_on_a_unit_normal(bits, error):
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    rounding = NormalLevels(bits)
    found = (rounding.decode(rounding.encode(x)) - x).square().mean() / x.square().mean()
    assert found == pytest.approx(error, rel=0.35)


def test_channels_are_standardised_first():
    torch.manual_seed(0)
    quantizer = NormalQuantizer(3, momentum=0.5)
    scale, shift = torch.tensor([0.2, 1.0, 30.0]), torch.tensor([1.0, 0.0, -50.0])
    for _ in range(20):
        quantizer.observe(torch.randn(4, 200, 3) * scale + shift)
    torch.testing.assert_close(quantizer.running_var.sqrt(), scale, rtol=0.1, atol=0)
    z = torch.randn(2, 50, 3) * scale + shift
    out = quantizer(z)
    assert out.codes.shape == (2, 50, 3)
    assert ((out.vectors - z) / scale).square().mean() < 0.003
    assert torch.equal(quantizer.decode(quantizer.encode(z)), out.vectors)


def test_one_dimension_has_one_code():
    quantizer = NormalQuantizer(1)
    z = torch.randn(2, 5, 1)
    assert quantizer.encode(z).shape == (2, 5)
    assert quantizer.decode(quantizer.encode(z)).shape == z.shape


def test_gradient_passes_straight_through():
    z = torch.randn(1, 4, 2, requires_grad=True)
    (NormalQuantizer(2)(z).vectors * torch.arange(8.0).view(1, 4, 2)).sum().backward()
    assert torch.equal(z.grad, torch.arange(8.0).view(1, 4, 2))


def test_what_does_not_fit():
    with pytest.raises(ConfigError, match="low < high"):
        NormalLevels(low=1, high=-1)
    with pytest.raises(ConfigError, match="16 bits"):
        NormalLevels(bits=20)
    with pytest.raises(InputError, match="NaN"):
        NormalQuantizer(2).encode(torch.full((1, 1, 2), torch.nan))


def test_half_precision_leaves_the_levels_alone():
    quantizer, z = NormalQuantizer(3), torch.randn(2, 50, 3)
    codes = quantizer.encode(z)
    assert torch.equal(quantizer.to(torch.bfloat16).encode(z), codes)
    assert quantizer.decode(codes).dtype == torch.bfloat16
