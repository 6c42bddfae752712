"""Gaussian diffusion: closed forms of the posterior, exact recovery with the true noise, the bound, fewer steps."""

import math

import pytest
import torch

from vistok.errors import ConfigError, InputError
from vistok.sampling.diffusion import cosine_diffusion


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_cosine_schedule():
    schedule = cosine_diffusion(1000)
    assert len(schedule) == 1000

    def curve(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 10, 500, 900):
        assert float(schedule.kept[t]) == pytest.approx(curve((t + 1) / 1000) / curve(0), rel=1e-9)
    beta = 1 - schedule.kept[-1] / schedule.kept[-2]
    assert float(beta) == pytest.approx(0.999)
    with pytest.raises(ConfigError, match="two steps"):
        cosine_diffusion(1)


def test_the_true_noise_leads_back_to_the_data():
    """A model that knows the data, without fresh noise: the last step gives them, whatever the steps between."""
    schedule, data = cosine_diffusion(1000).respaced(25), draw(6, 3)

    def model(x, steps):
        kept = cosine_diffusion(1000).kept[steps][:, None]
        return ((x - kept.sqrt() * data) / (1 - kept).sqrt()).float(), torch.zeros_like(x)

    found = schedule.sample(model, draw(6, 3, seed=1), lambda index: draw(6, 3, seed=index + 2))
    torch.testing.assert_close(found, data, atol=1e-4, rtol=1e-4)


def test_a_gaussian_is_drawn_as_it_is():
    """Data of mean 2 and deviation 0.5: with the best noise and variance the draws have them."""
    schedule, full = cosine_diffusion(1000).respaced(100), cosine_diffusion(1000)
    mean, deviation = 2.0, 0.5

    def model(x, steps):
        kept = full.kept[steps][:, None].float()
        variance = kept * deviation**2 + 1 - kept
        return (1 - kept).sqrt() * (x - kept.sqrt() * mean) / variance, torch.ones_like(x)

    rng = torch.Generator().manual_seed(0)
    found = schedule.sample(
        model, torch.randn(20_000, 1, generator=rng), lambda index: torch.randn(20_000, 1, generator=rng)
    )
    assert float(found.mean()) == pytest.approx(mean, abs=0.02)
    assert float(found.std()) == pytest.approx(deviation, rel=0.05)
    still = schedule.sample(model, torch.zeros(4, 1), lambda index: torch.randn(4, 1, generator=rng), temperature=0)
    assert float(still.std()) < 1e-5
    with pytest.raises(InputError, match="temperature"):
        schedule.sample(model, torch.zeros(1, 1), lambda index: torch.zeros(1, 1), temperature=-1)


def test_terms_train_the_noise_by_its_error_and_the_variance_by_the_bound():
    schedule, data, noise = cosine_diffusion(100), draw(5, 4), draw(5, 4, seed=1)
    predicted = draw(5, 4, seed=2).requires_grad_()
    v = draw(5, 4, seed=3).requires_grad_()
    t = torch.tensor([0, 1, 30, 60, 99])
    terms = schedule.terms(lambda x, steps: (predicted, v), data, noise, t)
    torch.testing.assert_close(terms.squared_error, (noise - predicted).square().mean(1))
    terms.bound.sum().backward()
    assert predicted.grad is None
    assert (v.grad.abs().sum(1) > 0).all()


def test_the_bound_is_the_divergence_of_two_gaussians():
    schedule, data, noise, t = cosine_diffusion(100), draw(1, 1), draw(1, 1, seed=1), torch.tensor([40])
    predicted, v = draw(1, 1, seed=2), torch.tensor([[0.3]])
    found = schedule.terms(lambda x, steps: (predicted, v), data, noise, t).bound
    kept, before = (float(schedule.kept[i]) for i in (40, 39))
    beta = 1 - kept / before
    x = kept**0.5 * float(data) + (1 - kept) ** 0.5 * float(noise)
    floor = beta * (1 - before) / (1 - kept)

    def mean(start):
        return beta * before**0.5 / (1 - kept) * start + (1 - before) * (1 - beta) ** 0.5 / (1 - kept) * x

    told = (x - (1 - kept) ** 0.5 * float(predicted)) / kept**0.5
    share = (0.3 + 1) / 2
    variance = math.exp(share * math.log(beta) + (1 - share) * math.log(floor))
    distance = (mean(float(data)) - mean(told)) ** 2
    divergence = 0.5 * (math.log(variance / floor) + (floor + distance) / variance - 1)
    assert float(found) == pytest.approx(divergence / math.log(2), rel=1e-4)


@pytest.mark.parametrize("value", [-1.2, -0.4, 0.0, 0.7, 1.3])
def test_at_the_first_step_the_bound_is_the_likelihood_of_a_bin(value):
    """-log2 of the normal's mass in data +- 1/255, open towards the outside beyond 0.999; exact erf within 1e-2."""
    schedule, data, noise = cosine_diffusion(100), torch.tensor([[value]]), torch.tensor([[0.5]])
    v, t = torch.tensor([[1.0]]), torch.tensor([0])
    found = float(schedule.terms(lambda x, steps: (noise + 0.1, v), data, noise, t).bound)
    kept = float(schedule.kept[0])
    x = kept**0.5 * value + (1 - kept) ** 0.5 * 0.5
    mean = (x - (1 - kept) ** 0.5 * 0.6) / kept**0.5  # at step 0 the posterior's mean is the predicted data
    deviation = (1 - kept) ** 0.5

    def below(edge):
        return 0.5 * (1 + math.erf((edge - mean) / deviation / 2**0.5))

    low = 0.0 if value < -0.999 else below(value - 1 / 255)
    high = 1.0 if value > 0.999 else below(value + 1 / 255)
    assert found == pytest.approx(-math.log2(high - low), abs=1e-2)


def test_kept_steps_are_rounded_and_both_ends_stay():
    schedule = cosine_diffusion(1000)
    assert schedule.respaced(10).steps.tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    found = schedule.respaced(100)
    assert found.steps.tolist() == [round(index * 999 / 99) for index in range(100)]
    assert found.kept.tolist() == schedule.kept[found.steps].tolist()
    assert schedule.respaced(1).steps.tolist() == [0]
    for wrong in (0, 1001, 2.5, True):
        with pytest.raises(InputError, match="diffusion steps"):
            schedule.respaced(wrong)
