import pytest
import torch

from vistok.errors import ConfigError
from vistok.quantize import FSQ


@pytest.mark.parametrize(
    ("levels", "symmetric"), [((8, 5, 5, 5), False), ((3,), False), ((2, 3, 4, 5), True), ((8, 8, 8, 6, 5), False)]
)
def test_codes_and_grid_points_are_inverse(levels: tuple[int, ...], symmetric: bool) -> None:
    quantizer = FSQ(levels, symmetric=symmetric)
    codes = torch.arange(quantizer.codebooks[0])[None]
    points = quantizer.decode(codes)
    assert torch.equal(points[0], quantizer.table())
    assert torch.equal(quantizer.codes_of(points), codes)
    assert points.abs().max() <= 1
    assert points.unique(dim=1).shape[1] == codes.shape[1]


@pytest.mark.parametrize(("levels", "symmetric"), [((8, 5, 5, 5), False), ((2, 3, 4, 5), True), ((7, 4), True)])
def test_encode_inverts_decode(levels: tuple[int, ...], symmetric: bool) -> None:
    """With bound="clamp" as it is; with "tanh" once the squashing is undone."""
    codes = torch.arange(FSQ(levels, symmetric=symmetric).codebooks[0])[None]
    clamped = FSQ(levels, symmetric=symmetric, bound="clamp")
    assert torch.equal(clamped.encode(clamped.decode(codes)), codes)

    squashed = FSQ(levels, symmetric=symmetric)
    points, sizes = squashed.decode(codes), squashed.levels
    if symmetric:
        z = torch.atanh(points * 0.999)
    else:
        half = (sizes - 1) * 1.001 / 2
        offset = (sizes % 2 == 0) / 2
        z = torch.atanh((points * (sizes // 2) + offset) / half) - torch.atanh(offset / half)
    assert torch.equal(squashed.encode(z), codes)


def test_first_dimension_is_least_significant() -> None:
    points = FSQ((3, 5)).decode(torch.tensor([[0, 1, 3]]))
    assert points.tolist() == [[[-1.0, -1.0], [0.0, -1.0], [-1.0, -0.5]]]


def test_gradient_is_that_of_the_bound() -> None:
    quantizer = FSQ((5, 5))
    z = torch.randn(1, 7, 2, requires_grad=True)
    quantizer(z).vectors.sum().backward()
    torch.testing.assert_close(z.grad, (1 - z.detach().tanh().square()) * 4 * 1.001 / 2 / 2)


def test_every_level_is_reached() -> None:
    quantizer = FSQ((8, 5, 5, 5))
    quantizer(torch.randn(8, 20000, 4, generator=torch.Generator().manual_seed(0)) * 1.2)
    assert quantizer.usage.used()[0] == 1.0


def test_bad_levels() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        FSQ((1, 5))
    with pytest.raises(ConfigError, match="symmetric=True"):
        FSQ((2, 5))
