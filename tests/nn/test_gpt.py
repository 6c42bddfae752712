"""The GPT trunk: a cached step gives what the whole sequence gives, and the condition's score is zero."""

import torch

from vistok.nn.gpt import GPT, GPTSize, prefixed_rotation

SIZE = GPTSize(width=32, depth=2, heads=4, hidden=48, dropout=0.0)


def test_steps_with_a_cache_are_the_whole_sequence():
    torch.manual_seed(0)
    trunk, x = GPT(SIZE).eval(), torch.randn(2, 9, 32)
    rotation = prefixed_rotation(1, 2, 4, SIZE.head)
    whole = trunk(x, rotation)
    past = trunk.cache(2, 9)
    parts = [trunk(x[:, :4], rotation[0:4], past=past)]
    parts += [trunk(x[:, n : n + 1], rotation[n : n + 1], past=past) for n in range(4, 9)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_the_condition_turns_to_nothing():
    rotation = prefixed_rotation(3, 2, 2, 8)
    turned = rotation(torch.ones(1, 1, 7, 8))
    assert not turned[:, :, :3].any()
    assert turned[:, :, 3:].any(-1).all()


def test_hidden_width_is_rounded_up():
    assert GPTSize(1024, 24, 16).swiglu == 2816
    assert GPTSize(1280, 36, 20).swiglu == 3584
