"""The prior: exact round trips for any layout of grids, integers throughout, and files that follow what it learned."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.layered import draw_tables
from vistok.errors import ConfigError
from vistok.layout import Segment, Sizes, TokenSpec
from vistok.prior import EXPONENTIALS, TOP, CodePrior, UniformCoder, _weights

BOOKS = (6, 40, 33)


def spec(size=(4, 6), tiles=(1, 1), books=BOOKS) -> TokenSpec:
    def layout(size):
        return (
            Segment("coarse", (size[0] // 2, size[1] // 2), (books[0],)),
            *(Segment(f"fine{k}", size, (book,)) for k, book in enumerate(books[1:])),
        )

    return TokenSpec(size=size, layout=layout, sizes=Sizes(multiple=2), prefix_rule="segments", tiles=tiles)


def draw(layout: TokenSpec, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    parts = [torch.randint(s.codebooks[0], (s.count,), generator=rng) for s in layout.segments]
    return torch.cat(parts)[None]


def drawn_prior(layout: TokenSpec, seed: int = 0) -> CodePrior:
    prior = CodePrior(layout.layout(layout.size))
    draw_tables(prior, seed)
    return prior


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3), st.integers(1, 2), st.integers(0, 99))
def test_every_prefix_of_any_size_comes_back(height, width, rows, columns, seed):
    layout = spec((2 * height, 2 * width), (rows, columns))
    codes = draw(layout, seed)
    for coder in (drawn_prior(layout, seed % 3), CodePrior(layout.layout(layout.size)), UniformCoder()):
        for length in layout.prefixes:
            part = codes[:, :length]
            assert torch.equal(coder.decode(coder.encode(part, layout), layout, length), part)


def test_sequences_and_grids_whose_ratio_is_not_whole():
    for shapes in (((5,), (7,)), ((1, 1), (2, 2), (3, 3), (5, 4))):
        layout = TokenSpec(
            size=(8, 8),
            layout=lambda size, shapes=shapes: tuple(Segment(str(k), s, (19,)) for k, s in enumerate(shapes)),
            sizes=Sizes(only=((8, 8),)),
            prefix_rule="segments",
        )
        codes, prior = draw(layout), drawn_prior(layout)
        assert torch.equal(prior.decode(prior.encode(codes, layout), layout, layout.length), codes)


@pytest.mark.parametrize("value", [0, 1, 32])
def test_constant_codes(value):
    layout = spec((16, 16), books=(33, 33, 33))
    codes = torch.full((1, layout.length), value)
    for coder in (drawn_prior(layout), UniformCoder()):
        assert torch.equal(coder.decode(coder.encode(codes, layout), layout, layout.length), codes)


def test_several_codes_a_position_and_large_codebooks_without_a_prior():
    segments = (Segment("a", (3,), (2, 1, 1 << 30)), Segment("b", (2, 2), (5,)))
    layout = TokenSpec(size=(8, 8), layout=lambda size: segments, sizes=Sizes(only=((8, 8),)))
    codes = torch.full((1, 7, 3), -1)
    codes[0, :3] = torch.tensor([[1, 0, (1 << 30) - 1], [0, 0, 0], [1, 0, 123456789]])
    codes[0, 3:, 0] = torch.tensor([4, 0, 2, 1])
    data = UniformCoder().encode(codes, layout)
    assert torch.equal(UniformCoder().decode(data, layout, 7), codes)
    assert len(data) <= -(-(3 * (1 + 30) + 4 * 3) // 8) + 2


def test_before_it_is_fitted_it_is_uniform():
    layout = spec((32, 32), books=(64, 256, 100))
    codes = draw(layout)
    plain = len(UniformCoder().encode(codes, layout))
    assert abs(len(CodePrior(layout.segments).encode(codes, layout)) - plain) < 0.005 * plain


def test_weights_are_integers_whose_sums_float32_holds():
    logits = torch.randint(-(1 << 20), 1 << 20, (50, 256), generator=torch.Generator().manual_seed(0)).numpy()
    weights = _weights(logits.astype(np.float32))
    assert weights.dtype == np.float32
    assert np.array_equal(weights, np.round(weights))
    assert weights.min() >= 1
    assert 256 * TOP < 1 << 24
    wanted = np.maximum(TOP * np.exp(-np.arange(len(EXPONENTIALS)) / 64), 1)
    np.testing.assert_allclose(EXPONENTIALS, wanted, rtol=1e-3, atol=1.01)


def test_what_it_learned_makes_files_small():
    from vistok.training.prior import fit

    rng = torch.Generator().manual_seed(0)
    layout = spec((8, 8), books=(16, 32, 32))

    def picture():  # a slope: each code tells the next ones, in its segment and in the finer ones
        coarse = (torch.arange(4)[:, None] + torch.arange(4) + torch.randint(8, (1,), generator=rng)) % 16
        fine = coarse.repeat_interleave(2, 0).repeat_interleave(2, 1) * 2 + torch.randint(2, (8, 8), generator=rng)
        return [coarse, fine, (fine + 5) % 32]

    prior = CodePrior(layout.segments, hidden=16)
    vectors = [torch.arange(book)[:, None].float() for book in (16, 32, 32)]
    costs = fit(prior, [picture() for _ in range(300)], vectors, epochs=12, batch_size=512)
    assert costs[2] < 1.5
    codes = torch.cat([level.flatten() for level in picture()])[None]
    data = prior.encode(codes, layout)
    assert torch.equal(prior.decode(data, layout, layout.length), codes)
    plain = len(UniformCoder().encode(codes, layout))
    assert len(data) < 0.6 * plain
    told = 16 * costs[0] + 64 * (costs[1] + costs[2])  # what training measured is what files take
    assert 8 * len(data) == pytest.approx(told, rel=0.2, abs=40)


def test_layouts_that_it_does_not_take_are_refused():
    for segment in (Segment("a", (2, 2), (4, 4)), Segment("a", (2, 2), dim=3), Segment("a", (2, 2, 2), (4,))):
        with pytest.raises(ConfigError, match="'a'"):
            CodePrior([segment])
    with pytest.raises(ConfigError, match="hidden"):
        CodePrior([Segment("a", (2,), (4,))], hidden=64)
    with pytest.raises(ConfigError, match="too many"):
        CodePrior([Segment(str(k), (2,), (4,)) for k in range(40)])
