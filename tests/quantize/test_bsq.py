from math import sqrt

import pytest
import torch

from vistok.quantize import BSQ, EntropyTerm


def test_encode_inverts_decode() -> None:
    quantizer = BSQ(9)
    codes = torch.arange(512)[None]
    vectors = quantizer.decode(codes)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(1, 512))
    assert torch.equal(quantizer.encode(vectors), codes)
    assert torch.equal(quantizer.encode(vectors * 7), codes)  # only the direction counts


@pytest.mark.parametrize("bits", [2, 9, 18])
def test_the_error_is_bounded(bits: int) -> None:
    quantizer = BSQ(bits, entropy=None)
    z = torch.randn(4, 500, bits, generator=torch.Generator().manual_seed(0))
    error = (z / z.norm(dim=-1, keepdim=True) - quantizer(z).vectors).norm(dim=-1)
    assert error.max() <= sqrt(2 - 2 / sqrt(bits)) + 1e-6


def test_groups_have_unit_length_each() -> None:
    quantizer = BSQ((4, 9), entropy_over="bit")
    out = quantizer(torch.randn(2, 5, 13))
    torch.testing.assert_close(out.vectors[..., :4].norm(dim=-1), torch.ones(2, 5))
    torch.testing.assert_close(out.vectors[..., 4:].norm(dim=-1), torch.ones(2, 5))
    assert out.codes.shape == (2, 5, 2)


def test_36_bits_train_without_a_table() -> None:
    quantizer = BSQ((18, 18), entropy=EntropyTerm(temperature=0.05), entropy_over="bit")
    z = torch.randn(2, 50, 36, requires_grad=True)
    out = quantizer(z)
    sum(out.losses.values()).backward()
    assert torch.isfinite(z.grad).all()
    assert out.stats["batch_entropy"] <= 36 * torch.log(torch.tensor(2.0)) + 1e-3
