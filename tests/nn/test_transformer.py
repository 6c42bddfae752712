"""Blocks: the parts add up as they say, activations are the ones they are named after."""

import pytest
import torch
import torch.nn.functional as F

from vistok.nn.positions import rotation_1d
from vistok.nn.transformer import MLP, AdaBlock, Block, Modulation, PostNormBlock


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
        ("gelu-tanh", lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))),
        ("silu", lambda x: x * x.sigmoid()),
    ],
)
def test_activations(name, function):
    torch.manual_seed(0)
    mlp = MLP(4, 8, activation=name).double()
    x = draw(3, 4).double() * 3
    torch.testing.assert_close(mlp(x), mlp.contract(function(mlp.expand(x))), rtol=1e-9, atol=1e-9)


def test_swiglu_gates_with_the_first_half():
    torch.manual_seed(0)
    mlp, x = MLP(4, 8, out=5, activation="swiglu", bias=False), draw(3, 4)
    gate, value = (x @ mlp.expand.weight.T).split(8, -1)
    torch.testing.assert_close(mlp(x), (F.silu(gate) * value) @ mlp.contract.weight.T)
    with pytest.raises(ValueError, match="activation"):
        MLP(4, 8, activation="relu")


def test_block_adds_attention_then_mlp():
    torch.manual_seed(0)
    block, x = Block(16, 2), draw(2, 5, 16)
    middle = x + block.attention(block.norm1(x))
    torch.testing.assert_close(block(x), middle + block.mlp(block.norm2(middle)))
    torch.testing.assert_close(block(x, only=slice(1, 3)), block(x)[:, 1:3])


def test_causal_block_does_not_look_ahead():
    torch.manual_seed(0)
    block, x = Block(16, 2, qk_norm="rms"), draw(1, 6, 16)
    changed = x.clone()
    changed[:, 4:] += 1
    rotation = rotation_1d(6, 8)
    before, after = block(x, causal=True, rotation=rotation), block(changed, causal=True, rotation=rotation)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 4:], before[:, 4:])


def test_block_with_context():
    torch.manual_seed(0)
    block, x, context = Block(16, 2, context_width=6), draw(2, 5, 16), draw(2, 4, 6, seed=1)
    middle = x + block.attention(block.norm1(x))
    middle = middle + block.cross(block.norm_cross(middle), context)
    torch.testing.assert_close(block(x, context), middle + block.mlp(block.norm2(middle)))
    torch.testing.assert_close(block(x, context, only=slice(2, 4)), block(x, context)[:, 2:4])


def test_adaptive_block_starts_as_the_identity_and_then_listens():
    torch.manual_seed(0)
    block, x, condition = AdaBlock(16, 2, 6), draw(2, 5, 16), draw(2, 6, seed=1)
    torch.testing.assert_close(block(x, condition), x)
    torch.nn.init.normal_(block.modulation.project.weight, std=0.3)
    parts = (F.silu(condition) @ block.modulation.project.weight.T)[:, None].split(16, -1)
    middle = x + parts[2] * block.attention(block.norm1(x) * (1 + parts[1]) + parts[0])
    expected = middle + parts[5] * block.mlp(block.norm2(middle) * (1 + parts[4]) + parts[3])
    torch.testing.assert_close(block(x, condition), expected)


def test_layer_scale_weighs_what_is_added():
    torch.manual_seed(0)
    block, x = Block(8, 2, layer_scale=0.5), draw(2, 3, 8)
    with torch.no_grad():
        block.scale2.fill_(0.25)
    y = x + 0.5 * block.attention(block.norm1(x))
    torch.testing.assert_close(block(x), y + 0.25 * block.mlp(block.norm2(y)))
    assert not any("scale" in key for key in Block(8, 2).state_dict())


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    block, x = Block(8, 2, dropout=0.5), draw(2, 3, 8)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_a_condition_for_every_position():
    torch.manual_seed(0)
    modulation = Modulation(4, 6, 2)
    torch.nn.init.normal_(modulation.project.weight)
    condition = draw(2, 3, 4)
    each = modulation(condition)
    for position in range(3):
        for part, alone in zip(each, modulation(condition[:, position]), strict=True):
            torch.testing.assert_close(part[:, position : position + 1], alone)


def test_a_post_norm_block_normalises_sums():
    torch.manual_seed(0)
    block, x = PostNormBlock(8, 2, hidden=12, dropout=0.5).eval(), draw(2, 5, 8)
    after = block.norm1(x + block.attention(x))
    expected = block.norm2(after + block.mlp(after))
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block(x, only=slice(1, None)), expected[:, 1:])
    torch.testing.assert_close(expected.mean(-1), torch.zeros(2, 5), atol=1e-6, rtol=0)
    assert not torch.equal(block.train()(x), expected)


def test_queries_keys_and_values_may_lack_their_bias():
    block = Block(8, 2, qkv_bias=False)
    assert block.attention.qkv.bias is None
    assert block.attention.out.bias is not None
    assert block.mlp.expand.bias is not None
