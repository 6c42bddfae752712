"""Schedules at their ends and middles, and the two kinds of training mask."""

import pytest
import torch

from vistok.errors import ConfigError
from vistok.sampling.masking import SCHEDULES, bernoulli_masks, counted_masks, mask_exactly, masking_ratio


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("schedule", "middle"),
    [("arccos", 2 / 3), ("cosine", 0.5**0.5), ("linear", 0.5), ("square", 0.75), ("root", 0.2929)],
)
def test_schedules(schedule, middle):
    ratio = masking_ratio(torch.tensor([0.0, 0.5, 1.0]), schedule)
    torch.testing.assert_close(ratio, torch.tensor([1.0, middle, 1e-6]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_fall(schedule):
    assert bool((masking_ratio(torch.linspace(0, 1, 33), schedule).diff() < 0).all())


def test_an_unknown_schedule_is_named():
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        masking_ratio(torch.zeros(1), "cosin")


def test_bernoulli_masks_have_the_schedules_mean_and_their_own_ratio_per_item():
    masks = bernoulli_masks((4000, 16, 2), "arccos", rng())
    # the mean of arccos(r) / (pi/2) over r ~ U(0, 1) is 2 / pi
    assert abs(masks.float().mean().item() - 2 / torch.pi) < 0.01
    assert masks.float().mean((1, 2)).std() > 0.2
    assert not torch.equal(masks[..., 0], masks[..., 1])


def test_counted_masks_have_exactly_their_share():
    masks = counted_masks((500, 8, 2), "arccos", rng())
    ratio = masking_ratio(torch.rand(500, generator=rng()), "arccos")
    assert torch.equal(masks.flatten(1).sum(1), (16 * ratio).round().clamp_min(1).long())
    assert mask_exactly(torch.rand(3, 10, generator=rng()), torch.zeros(3)).sum(1).tolist() == [1, 1, 1]
