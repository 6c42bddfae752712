"""Bernoulli diffusion: marginals by simulation, the exact posterior, and an oracle that returns the data."""

import pytest
import torch

from vistok.errors import ConfigError, InputError
from vistok.sampling.bernoulli import bernoulli_schedule

KINDS = ("linear", "cos", "sigmoid")


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends(kind):
    schedule = bernoulli_schedule(12, kind)
    assert float(schedule.kept[0]) == 1
    assert float(schedule.kept[-1]) == pytest.approx(0, abs=1e-6)
    assert bool((schedule.kept.diff() < 0).all())
    torch.testing.assert_close(schedule.step.cumprod(0), schedule.kept, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_one_by_one_are_the_marginal(kind):
    schedule, rng = bernoulli_schedule(8, kind), torch.Generator().manual_seed(0)
    x = torch.ones(100_000)
    for t in range(1, 6):
        kept = torch.rand(x.shape, generator=rng) < schedule.step[t]
        x = torch.where(kept, x, (torch.rand(x.shape, generator=rng) < 0.5).float())
    assert float(x.mean()) == pytest.approx(float(schedule.marginal(torch.ones(1, 1), 5)), abs=5e-3)


@pytest.mark.parametrize(("t", "earlier"), [(5, 4), (8, 3), (6, 0), (1, 0)])
def test_the_posterior_is_bayes_rule(t, earlier):
    schedule, p = bernoulli_schedule(8, "cos"), 0.3
    beta = schedule.step[earlier + 1 : t + 1].prod()
    forward = torch.tensor([[beta + (1 - beta) / 2, (1 - beta) / 2], [(1 - beta) / 2, beta + (1 - beta) / 2]])
    prior = torch.tensor(
        [1 - schedule.marginal(torch.tensor([p]), earlier), schedule.marginal(torch.tensor([p]), earlier)]
    )
    for x in (0, 1):
        joint = prior * forward[:, x]
        found = schedule.posterior(torch.tensor([p]), torch.tensor([float(x)]), t, earlier)
        torch.testing.assert_close(found[0], joint[1] / joint.sum())


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_with_an_oracle_sampling_returns_the_data(steps):
    schedule, rng = bernoulli_schedule(16), torch.Generator().manual_seed(0)
    data = (torch.rand(4, 9, 5, generator=rng) < 0.5).float()
    x = (torch.rand(data.shape, generator=rng) < 0.5).float()
    visited = schedule.timesteps(steps)
    for t, earlier in zip(visited, [*visited[1:], 0], strict=True):
        x = (torch.rand(data.shape, generator=rng) < schedule.posterior(data, x, t, earlier)).float()
    assert torch.equal(x, data)


def test_one_step_back_for_each_item():
    schedule = bernoulli_schedule(8)
    p, x, t = torch.rand(3, 4), (torch.rand(3, 4) < 0.5).float(), torch.tensor([2, 8, 5])
    each = torch.stack([schedule.posterior(p[i], x[i], int(t[i]), int(t[i]) - 1) for i in range(3)])
    torch.testing.assert_close(schedule.step_back(p, x, t), each)


def test_visited_steps():
    schedule = bernoulli_schedule(64)
    assert schedule.timesteps(64) == list(range(64, 0, -1))
    for count in range(2, 65):
        visited = schedule.timesteps(count)
        assert visited[0] == 64
        assert visited[-1] == 1
        assert len(set(visited)) == count
    with pytest.raises(InputError, match="1 to 64"):
        schedule.timesteps(65)
    with pytest.raises(InputError, match="earlier"):
        schedule.posterior(torch.ones(1), torch.ones(1), 3, 3)
    with pytest.raises(ConfigError, match="cosine"):
        bernoulli_schedule(4, "cosine")
