"""Bernoulli bits: throws have the encoder's probabilities, evaluation takes the likelier side, gradients pass."""

import pytest
import torch

from vistok.errors import ConfigError, InputError
from vistok.quantize.bernoulli import BernoulliQuantizer


def build(**options):
    torch.manual_seed(0)
    return BernoulliQuantizer(6, 5, **options)


def test_throws_have_the_encoders_probabilities():
    quantizer, z = build().train(), torch.randn(1, 1, 6)
    quantizer.rng = torch.Generator().manual_seed(0)
    p = quantizer.activation(z)[0, 0]
    codes = quantizer(z.expand(1, 20_000, 6)).codes
    torch.testing.assert_close(codes[0].float().mean(0), p.detach(), atol=0.015, rtol=0)


def test_evaluation_takes_the_likelier_side():
    quantizer, z = build().eval(), torch.randn(2, 7, 6)
    out = quantizer(z)
    assert torch.equal(out.codes, (quantizer.activation(z) > 0.5).long())
    assert torch.equal(quantizer.encode(z), out.codes)
    torch.testing.assert_close(quantizer.decode(out.codes), out.codes.float() @ quantizer.embed)
    torch.testing.assert_close(quantizer.decode(out.codes), out.vectors)
    deterministic = build(deterministic=True).train()
    assert torch.equal(deterministic(z).codes, out.codes)


def test_draws_belong_to_the_item():
    quantizer, z = build(), torch.randn(3, 7, 6)
    together = quantizer.encode(z, seed=[4, 5, 6])
    assert torch.equal(together[1:2], quantizer.encode(z[1:2], seed=5))
    assert not torch.equal(together, quantizer.encode(z, seed=[7, 8, 9]))
    with pytest.raises(InputError, match="2 seeds for 3"):
        quantizer.encode(z, seed=[1, 2])


@pytest.mark.parametrize("signed", [False, True])
def test_the_gradient_is_that_of_the_activation(signed):
    quantizer, z = build(signed=signed).train(), torch.randn(1, 3, 6, requires_grad=True)
    out = quantizer(z)
    (gradient,) = torch.autograd.grad(out.vectors.sum(), z)
    (expected,) = torch.autograd.grad(quantizer.vectors(quantizer.activation(z)).sum(), z)
    torch.testing.assert_close(gradient, expected)
    values = 2 * out.codes - 1 if signed else out.codes
    torch.testing.assert_close(out.vectors, quantizer.vectors(values.float()))


def test_the_code_term_falls_as_bits_become_sure():
    quantizer = build(code_weight=1.0)
    unsure, sure = torch.zeros(1, 4, 6), 50 * torch.randn(1, 4, 6)
    assert quantizer(sure).losses["code"] < quantizer(unsure).losses["code"]
    assert "code" not in build()(sure).losses
    assert quantizer(sure).stats["sure"] > quantizer(unsure).stats["sure"]


def test_one_bit_has_one_code():
    quantizer = BernoulliQuantizer(4, 1)
    assert quantizer.encode(torch.randn(2, 3, 4)).shape == (2, 3)
    assert quantizer.decode(torch.ones(2, 3, dtype=torch.long)).shape == (2, 3, 4)


def test_what_does_not_fit():
    with pytest.raises(ConfigError, match="bits"):
        BernoulliQuantizer(4, 0)
    with pytest.raises(InputError, match=r"0\.\.1"):
        build().decode(torch.full((1, 1, 5), 2))
