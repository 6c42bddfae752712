"""MAR's head: its embedding of time, that it starts silent, and that rows stand for themselves."""

import math

import torch

from tests.golden import draw_weights
from vistok.nn.diffusion_head import DiffusionHead, time_embedding


def test_time_is_cosines_then_sines():
    found = time_embedding(torch.tensor([0, 7]))
    assert torch.equal(found[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    angles = torch.tensor([7 * math.exp(-math.log(10_000) * k / 128) for k in range(128)])
    torch.testing.assert_close(found[1], torch.cat([angles.cos(), angles.sin()]), atol=1e-5, rtol=1e-5)


def test_a_fresh_head_says_nothing_and_every_row_is_on_its_own():
    torch.manual_seed(0)
    head = DiffusionHead(4, 8, 16, 2)
    x, z, t = torch.randn(5, 4), torch.randn(5, 8), torch.tensor([0, 1, 500, 998, 999])
    noise, v = head(x, t, z)
    assert noise.shape == v.shape == (5, 4)
    assert not noise.any()
    draw_weights(head)
    whole = torch.cat(head(x, t, z), 1)
    torch.testing.assert_close(torch.cat(head(x[2:3], t[2:3], z[2:3]), 1), whole[2:3])
    assert not torch.allclose(torch.cat(head(x, t.flip(0), z), 1), whole)
    assert not torch.allclose(torch.cat(head(x, t, z.flip(0)), 1), whole)
