"""Masked autoregression's order: everything is drawn once, the cosine holds, items stand for themselves."""

import math

import pytest
import torch

from vistok.errors import InputError
from vistok.sampling.random_order import random_order


def scores(items, length, seed=0):
    return torch.rand(items, length, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [1, 2, 5, 16, 40])
def test_every_masked_position_is_drawn_once(steps):
    masked = torch.rand(4, 16, generator=torch.Generator().manual_seed(1)) < 0.7
    masked[3] = False
    seen, before = torch.zeros_like(masked, dtype=torch.long), masked
    for turn in random_order(masked, scores(4, 16), steps):
        assert torch.equal(turn.masked, before)
        assert not (turn.drawn & ~before).any()
        seen, before = seen + turn.drawn, before & ~turn.drawn
        assert torch.equal(turn.left, before.sum(1))
    assert torch.equal(seen, masked.long())


def test_the_cosine_says_how_many_are_left():
    left = [int(turn.left[0]) for turn in random_order(torch.ones(1, 100, dtype=torch.bool), scores(1, 100), 8)]
    assert left == [*(math.floor(100 * math.cos(math.pi / 2 * (i + 1) / 8)) for i in range(7)), 0]


def test_the_order_is_that_of_the_scores():
    """The first positions in ascending order of scores stay masked longest, as MAR has it."""
    given = scores(2, 12)
    turns = list(random_order(torch.ones(2, 12, dtype=torch.bool), given, 4))
    for turn in turns:
        for item in range(2):
            kept, drawn = given[item][turn.masked[item] & ~turn.drawn[item]], given[item][turn.drawn[item]]
            assert not len(kept) or kept.max() < drawn.min()


def test_an_item_does_not_depend_on_the_others():
    masked = torch.ones(2, 12, dtype=torch.bool)
    masked[1, ::3] = False
    both = [turn.drawn[:1] for turn in random_order(masked, scores(2, 12), 5)]
    alone = [turn.drawn for turn in random_order(masked[:1], scores(2, 12)[:1], 5)]
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))
    with pytest.raises(InputError, match="steps"):
        list(random_order(masked, scores(2, 12), 0))
