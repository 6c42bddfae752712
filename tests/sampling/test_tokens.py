"""Draws from logits: their distribution, what top-k and top-p leave, guidance, and independence of the batch."""

import pytest
import torch

from vistok.errors import InputError
from vistok.sampling.noise import ItemNoise, normals, permutations, uniforms
from vistok.sampling.tokens import Sampling, draw, guide, probabilities


def test_draws_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    codes = draw(logits.expand(len(u), 4), u, Sampling(temperature=0.7))
    share = torch.bincount(codes, minlength=4) / len(u)
    torch.testing.assert_close(share, (logits / 0.7).softmax(-1), atol=4e-3, rtol=0)


def test_zero_temperature_takes_the_likeliest():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(logits, torch.rand(5), Sampling(temperature=0)), logits.argmax(-1))


def test_top_k_keeps_k():
    p = probabilities(torch.tensor([3.0, 1.0, 2.0, 0.0]), Sampling(top_k=2))
    assert p.nonzero().flatten().tolist() == [0, 2]


def test_top_p_keeps_the_code_that_crosses_the_line():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert probabilities(logits, Sampling(top_p=0.6)).nonzero().flatten().tolist() == [0, 1]
    assert probabilities(logits, Sampling(top_p=0.01)).nonzero().flatten().tolist() == [0]


def test_a_number_just_below_one_never_takes_a_code_that_was_cut():
    logits = torch.zeros(1, 50_000)
    u = torch.full((1,), 1 - 2**-24)
    assert int(draw(logits, u, Sampling(top_k=0))) < 50_000
    logits[0, :10] = 5
    assert int(draw(logits, u, Sampling(top_k=10))) < 10


def test_guidance_moves_away_from_the_unconditional():
    both = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    assert torch.equal(guide(both, 2.0), torch.tensor([[2.0, 3.0]]))
    assert torch.equal(guide(both, 1.0), both[:1])


def test_noise_belongs_to_the_item():
    alone, together = uniforms([7], (3, 2)), uniforms([1, 7], (3, 2))
    assert torch.equal(alone[0], together[1])
    stream = ItemNoise([7])
    first, second = stream.uniforms(3, 2), stream.uniforms(3, 2)
    assert torch.equal(first, alone)
    assert not torch.equal(second, first)
    assert uniforms([], (3,)).shape == (0, 3)
    orders = permutations([1, 2], 9)
    assert torch.equal(orders.sort(1).values, torch.arange(9).expand(2, 9))
    assert not torch.equal(orders[0], orders[1])
    gaussian = normals([3, 7], (1000,))
    assert torch.equal(gaussian[1], normals([7], (1000,))[0])
    assert abs(float(gaussian.std()) - 1) < 0.1


@pytest.mark.parametrize(
    "wrong", [{"guidance": float("nan")}, {"guidance": -1}, {"temperature": -0.1}, {"top_k": -1}, {"top_p": 0}]
)
def test_values_out_of_range(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)
