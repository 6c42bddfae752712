import pytest
import torch

from vistok.errors import ConfigError
from vistok.quantize import LFQ, EntropyTerm


@pytest.mark.parametrize("order", ["msb", "lsb"])
def test_encode_inverts_decode(order: str) -> None:
    quantizer = LFQ((3, 5), bit_order=order, scale=0.5)  # type: ignore[arg-type]
    codes = torch.cartesian_prod(torch.arange(8), torch.arange(32))[None]
    vectors = quantizer.decode(codes)
    assert torch.equal(vectors.abs(), torch.full_like(vectors, 0.5))
    assert torch.equal(quantizer.encode(vectors), codes)


def test_bit_order_and_the_sign_of_zero() -> None:
    z = torch.tensor([[[1.0, -1.0, 0.0], [-1.0, -1.0, 1.0]]])
    assert LFQ(3, bit_order="msb").encode(z).tolist() == [[4, 1]]
    assert LFQ(3, bit_order="lsb").encode(z).tolist() == [[1, 4]]


def test_straight_through_and_commitment() -> None:
    quantizer = LFQ(4, commitment=0.5, entropy=None)
    z = torch.randn(2, 3, 4, requires_grad=True)
    out = quantizer(z)
    assert set(out.losses) == {"commitment"}
    out.vectors.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))
    torch.testing.assert_close(out.losses["commitment"], 0.5 * (z - z.sign()).square().mean())


def test_entropy_term_spreads_the_codes() -> None:
    """Minimising the term alone: sure bits, all codes used."""
    torch.manual_seed(0)
    quantizer = LFQ(4, commitment=0.0, entropy=EntropyTerm(weight=1.0, temperature=1.0))
    z = torch.nn.Parameter(torch.randn(1, 256, 4) * 0.1 + 0.3)
    optimizer = torch.optim.Adam([z], lr=0.05)
    before = quantizer(z).stats
    for _ in range(200):
        optimizer.zero_grad()
        quantizer(z).losses["entropy"].backward()
        optimizer.step()
    after = quantizer(z).stats
    assert after["sample_entropy"] < 0.3 * before["sample_entropy"]
    assert after["batch_entropy"] > before["batch_entropy"] - 0.2
    quantizer.usage.reset()
    quantizer(z)
    assert quantizer.usage.used()[0] == 1.0


def test_long_codes() -> None:
    quantizer = LFQ(40, entropy=None)
    codes = torch.tensor([[0, 2**40 - 1, 123456789012]])
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)
    with pytest.raises(ConfigError, match="groups"):
        LFQ(63)
    with pytest.raises(ConfigError, match="over bits"):
        LFQ(40)(torch.randn(1, 2, 40))
