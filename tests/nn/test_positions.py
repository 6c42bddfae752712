"""The law of rotary positions: products depend on differences alone. Fixed tables against their formulas."""

import math

import pytest
import torch

from vistok.nn.positions import rotation_1d, rotation_2d, sincos_1d, sincos_2d


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("halves", [False, True])
def test_rotated_products_depend_on_differences(halves):
    q, k = draw(8), draw(8, seed=1)
    rotation = rotation_1d(20, 8, base=100.0, halves=halves)
    products = rotation(q.expand(1, 1, 20, 8))[0, 0] @ rotation(k.expand(1, 1, 20, 8))[0, 0].T
    for shift in range(-19, 20):
        diagonal = products.diagonal(shift)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert products[0].std() > 0.1


def test_pairs_of_both_conventions():
    x = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 1, 3, 4)
    neighbours, halves = rotation_1d(3, 4)(x)[0, 0, 2], rotation_1d(3, 4, halves=True)(x)[0, 0, 2]
    torch.testing.assert_close(neighbours, torch.tensor([math.cos(2), math.sin(2), 0, 0]))
    torch.testing.assert_close(halves, torch.tensor([math.cos(2), 0, math.sin(2), 0]))


def test_2d_rotation_is_one_rotation_per_axis():
    x = draw(1, 1, 6, 8)
    turned = rotation_2d(2, 3, 8)(x).view(2, 3, 8)
    grid = x.view(2, 3, 8)
    for row in range(2):
        for column in range(3):
            down = rotation_1d(torch.tensor([row]), 4)(grid[row, column, :4].view(1, 1, 1, 4)).flatten()
            across = rotation_1d(torch.tensor([column]), 4)(grid[row, column, 4:].view(1, 1, 1, 4)).flatten()
            torch.testing.assert_close(turned[row, column], torch.cat([down, across]))


def test_rotation_keeps_the_dtype_and_can_be_cut():
    rotation = rotation_1d(5, 4)
    x = draw(1, 1, 5, 4)
    assert rotation(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(rotation[1:3](x[:, :, 1:3]), rotation(x)[:, :, 1:3])


def test_fixed_tables():
    table = sincos_1d(4, 6)
    torch.testing.assert_close(table[3, 1], torch.tensor(math.sin(3 * 10_000 ** (-2 / 6))))
    torch.testing.assert_close(table[3, 4], torch.tensor(math.cos(3 * 10_000 ** (-2 / 6))))
    grid = sincos_2d(2, 3, 8).view(2, 3, 8)
    torch.testing.assert_close(grid[1, 2], torch.cat([sincos_1d(3, 4)[2], sincos_1d(2, 4)[1]]))


def test_widths_that_make_no_pairs_are_refused():
    for build in (
        lambda: rotation_1d(3, 5),
        lambda: rotation_2d(3, 3, 6),
        lambda: sincos_1d(3, 5),
        lambda: sincos_2d(2, 2, 6),
    ):
        with pytest.raises(ValueError, match="width"):
            build()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_of_complex_numbers_turns_as_the_formula_does(dtype):
    rotation = rotation_2d(3, 4, 8)
    store = torch.randn(2, 12, 5, 3 * 8 + 1, generator=torch.Generator().manual_seed(5)).to(dtype)
    for x in (store[..., :8].transpose(1, 2), store[..., 1:9].transpose(1, 2), store[..., 8:24:2].transpose(1, 2)):
        with torch.enable_grad():
            formula = rotation(x)
        with torch.no_grad():
            product = rotation(x)
        assert product.dtype == dtype
        torch.testing.assert_close(product, formula, atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=1e-6)
