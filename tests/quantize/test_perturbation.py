"""Perturbation of codes: neighbours in order, shares as promised, and no more work than needed."""

import pytest
import torch

from vistok.errors import InputError
from vistok.quantize import perturbation
from vistok.quantize.perturbation import neighbours, perturb


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_neighbours_are_those_of_the_distances(monkeypatch):
    z, table = drawn(50, 6), drawn(40, 6, seed=1)
    expected = torch.cdist(z, table).topk(7, 1, largest=False).indices
    assert torch.equal(neighbours(z, table, 7), expected)
    monkeypatch.setattr(perturbation, "CELLS", 100)  # two rows at a time
    assert torch.equal(neighbours(z, table, 7), expected)
    assert neighbours(z[:0], table, 3).shape == (0, 3)
    for count in (0, 41):
        with pytest.raises(InputError, match="neighbours"):
            neighbours(z, table, count)


def test_shares_of_changed_tokens():
    z, table = drawn(8, 100, 6), drawn(40, 6, seed=1)
    codes = torch.cdist(z, table).argmin(-1)
    rng = torch.Generator().manual_seed(0)
    chance = torch.rand(8, 100, generator=rng)
    for rate, strength in ((1.0, 5), (0.5, 5), (0.5, 1), (0.0, 5)):
        rank = torch.randint(strength, (8, 100), generator=rng)
        moved = perturb(z, table, codes, rate=rate, strength=strength, chance=chance, rank=rank)
        share = (moved != codes).float().mean().item()
        assert share == pytest.approx(rate * (strength - 1) / strength, abs=0.06)
        near = neighbours(z.flatten(0, 1), table, strength).view(8, 100, -1)
        assert (near == moved[..., None]).any(-1).all()
    with pytest.raises(InputError, match="rate"):
        perturb(z, table, codes, rate=1.5, strength=5, chance=chance, rank=rank)


def test_only_what_changes_is_compared(monkeypatch):
    z, table = drawn(2, 10, 6), drawn(40, 6, seed=1)
    seen = []
    compare = neighbours
    monkeypatch.setattr(perturbation, "neighbours", lambda z, *rest: (seen.append(len(z)), compare(z, *rest))[1])
    chance = torch.ones(2, 10)
    chance[0, :3] = 0.1
    rank = torch.full((2, 10), 2)
    rank[0, 0] = 0
    codes = torch.cdist(z, table).argmin(-1)
    moved = perturb(z, table, codes, rate=0.5, strength=4, chance=chance, rank=rank)
    assert seen == [2]
    assert (moved != codes).sum() == 2
