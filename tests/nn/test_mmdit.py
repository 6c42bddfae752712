"""Joint blocks: two streams attend together, the last one leaves the text; parity holds their numbers."""

import torch

from tests.golden import draw_weights
from vistok.nn.attention import attend
from vistok.nn.mmdit import JointBlock, ModulatedNorm


def inputs():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 8, generator=rng), torch.randn(2, 3, 8, generator=rng), torch.randn(2, 8, generator=rng)


def test_fresh_blocks_change_nothing():
    x, text, condition = inputs()
    out, told = JointBlock(8, 2)(x, text, condition)
    assert torch.equal(out, x)
    assert torch.equal(told, text)
    assert torch.equal(ModulatedNorm(8)(x, condition), torch.nn.functional.layer_norm(x, (8,), eps=1e-6))


def test_each_stream_sees_the_other():
    x, text, condition = inputs()
    block = JointBlock(8, 2)
    draw_weights(block)
    out, told = block(x, text, condition)
    other, other_told = block(x, text.flip(-1), condition)
    assert not torch.allclose(out, other)
    assert not torch.allclose(block(x.flip(-1), text, condition)[1], told)
    assert other_told.shape == text.shape


def test_the_order_of_the_text_does_not_matter_to_the_picture():
    x, text, condition = inputs()
    block = JointBlock(8, 2)
    draw_weights(block)
    torch.testing.assert_close(block(x, text.flip(1), condition)[0], block(x, text, condition)[0])


def test_the_last_block_needs_no_queries_of_the_text():
    x, text, condition = inputs()
    block = JointBlock(8, 2, last=True)
    draw_weights(block)
    out, told = block(x, text, condition)
    assert told is None
    block.text_qkv.weight.data[:8] += 1
    assert torch.equal(block(x, text, condition)[0], out)
    names = {name for name, _ in block.named_parameters()}
    assert not any(name.startswith(("text_out", "text_mlp")) for name in names)
    assert attend(x[:, None], x[:, None], x[:, None]).shape == x.shape
