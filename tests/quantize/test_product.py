"""Quantizers side by side: parts stay apart, and the disentanglement is the squared cosine."""

import pytest
import torch

from vistok.errors import ConfigError
from vistok.quantize import FSQ, VectorQuantizer
from vistok.quantize.product import ProductQuantizer, squared_cosine


def build(**options):
    torch.manual_seed(0)
    parts = {name: VectorQuantizer(4, 16, metric="cosine") for name in "abc"}
    return ProductQuantizer(parts, **options)


def test_parts_are_looked_up_alone():
    product, z = build(), torch.randn(2, 5, 12)
    out = product(z)
    for index, (name, part) in enumerate(product.parts.items()):
        alone = part(z[..., 4 * index : 4 * index + 4])
        assert torch.equal(out.codes[..., index], alone.codes)
        assert torch.equal(product.part(name, out.vectors), alone.vectors)
        assert torch.equal(out.losses[f"commitment:{name}"], alone.losses["commitment"])


def test_disentanglement_is_the_mean_squared_cosine_of_pairs():
    product, z = build(disentangle=0.1), torch.randn(2, 5, 12)
    out = product(z)
    a, b, c = product.decode(out.codes).split(4, -1)
    pairs = [(x * y).sum(-1).square().mean() for x, y in ((a, b), (a, c), (b, c))]
    torch.testing.assert_close(out.losses["disentanglement"], 0.1 * torch.stack(pairs).mean())
    torch.testing.assert_close(squared_cosine([a, a]), torch.tensor(1.0))


def test_disentanglement_moves_codes_apart():
    product = build(disentangle=1.0)
    z = torch.randn(1, 40, 4).repeat(1, 1, 3)
    optimizer = torch.optim.Adam(product.parameters(), 1e-2)
    first = float(product(z).losses["disentanglement"])
    codes = product.encode(z)
    for _ in range(60):
        term = squared_cosine(list(product.decode(codes).split(4, -1)))
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
    assert float(term) < 0.5 * first


def test_what_does_not_fit():
    with pytest.raises(ConfigError, match="one width"):
        ProductQuantizer({"a": VectorQuantizer(4, 8), "b": VectorQuantizer(5, 8)}, disentangle=0.1)
    with pytest.raises(ConfigError, match="one code"):
        ProductQuantizer({"a": FSQ((4, 4), num_codebooks=2), "b": FSQ((4, 4))})
