"""Discriminators by length: which one judges, and by name from a recipe."""

import pytest
import torch

from vistok.errors import ConfigError
from vistok.losses.discriminators import build_discriminator


def test_the_number_of_tokens_chooses():
    several = build_discriminator("by-length", of="patchgan", count=8, span=32, width=4, layers=1)
    for tokens, index in ((0, 0), (31, 0), (32, 0), (64, 1), (255, 6), (256, 7), (368, 7)):
        several.choose(tokens)
        assert several.chosen == index


def test_the_chosen_one_judges():
    torch.manual_seed(0)
    several = build_discriminator("by-length", count=3, span=2, width=4, layers=1).eval()
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    several.choose(6)
    assert torch.equal(several(pixels), several.each[2](pixels))
    assert not torch.equal(several(pixels), several.each[0](pixels))


def test_impossible_numbers_are_refused():
    with pytest.raises(ConfigError, match="count"):
        build_discriminator("by-length", count=0)
