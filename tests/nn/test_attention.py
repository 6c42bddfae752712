"""Attention against its definition written out, and the short cuts against the long way."""

import pytest
import torch

from vistok.errors import InputError
from vistok.nn.attention import CrossAttention, KeyValues, SelfAttention, attend
from vistok.nn.positions import rotation_1d


def by_definition(q, k, v, mask=None):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_attend_is_softmax_of_scaled_products():
    q, k, v = draw(2, 3, 5, 8), draw(2, 3, 7, 8, seed=1), draw(2, 3, 7, 8, seed=2)
    mask = draw(2, 1, 5, 7, seed=3) > -1
    mask[..., 0] = True
    torch.testing.assert_close(attend(q, k, v), by_definition(q, k, v))
    torch.testing.assert_close(attend(q, k, v, mask=mask), by_definition(q, k, v, mask))


@pytest.mark.parametrize("queries", [6, 2, 1])
def test_causal_attention_lines_up_the_ends(queries):
    """New queries see every earlier key: what a cache of keys needs."""
    q, k, v = draw(1, 2, 6, 4), draw(1, 2, 6, 4, seed=1), draw(1, 2, 6, 4, seed=2)
    whole = by_definition(q, k, v, torch.ones(6, 6, dtype=torch.bool).tril())
    torch.testing.assert_close(attend(q[:, :, -queries:], k, v, causal=True), whole[:, -queries:])


def test_causal_attention_refuses_what_has_no_meaning():
    q = draw(1, 1, 3, 4)
    with pytest.raises(ValueError, match="3 queries to 2 keys"):
        attend(q, q[:, :, :2], q[:, :, :2], causal=True)
    with pytest.raises(ValueError, match="mask"):
        attend(q, q, q, causal=True, mask=torch.ones(3, 3, dtype=torch.bool))


def test_self_attention_equals_torch_multihead_attention():
    torch.manual_seed(0)
    ours, theirs = SelfAttention(24, 4), torch.nn.MultiheadAttention(24, 4, batch_first=True)
    torch.nn.init.normal_(theirs.in_proj_bias)
    with torch.no_grad():
        ours.qkv.weight.copy_(theirs.in_proj_weight)
        ours.qkv.bias.copy_(theirs.in_proj_bias)
        ours.out.load_state_dict(theirs.out_proj.state_dict())
    x = draw(2, 9, 24)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


@pytest.mark.parametrize("qk_norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("bias", [True, False])
def test_only_some_positions(qk_norm, bias):
    torch.manual_seed(0)
    attention = SelfAttention(16, 2, bias=bias, qk_norm=qk_norm)
    x, rotation = draw(2, 6, 16), rotation_1d(6, 8)
    some = slice(2, 5)
    torch.testing.assert_close(attention(x, rotation=rotation, only=some), attention(x, rotation=rotation)[:, some])


def test_qk_norm_makes_scores_independent_of_the_scale_of_queries_and_keys():
    torch.manual_seed(0)
    attention = SelfAttention(16, 2, bias=False, qk_norm="rms")
    x = draw(1, 5, 16)
    before = attention(x)
    with torch.no_grad():
        attention.qkv.weight[:32] *= 50
    torch.testing.assert_close(attention(x), before, rtol=1e-3, atol=1e-4)


def test_cross_attention_reads_the_context_alone():
    torch.manual_seed(0)
    attention = CrossAttention(16, 2, context_width=10, qk_norm="layer")
    x, context = draw(2, 3, 16), draw(2, 7, 10, seed=1)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[:, 4:] = False
    out = attention(x, context, mask=mask)
    assert out.shape == (2, 3, 16)
    torch.testing.assert_close(out, attention(x, context[:, :4]))
    rotated = attention(x, context, rotation=rotation_1d(3, 8), context_rotation=rotation_1d(7, 8))
    assert not torch.allclose(rotated, attention(x, context))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="3 heads"):
        SelfAttention(16, 3)
    with pytest.raises(ValueError, match="qk_norm"):
        SelfAttention(16, 2, qk_norm="batch")


def test_steps_with_a_past_are_the_whole_sequence():
    torch.manual_seed(0)
    attention, x = SelfAttention(8, 2, qk_norm="layer").eval(), draw(2, 6, 8)
    past = KeyValues(2, 2, 6, 4, dtype=torch.float32, device="cpu")
    parts = [attention(part, causal=True, past=past) for part in (x[:, :3], x[:, 3:4], x[:, 4:])]
    torch.testing.assert_close(torch.cat(parts, 1), attention(x, causal=True))
    with pytest.raises(InputError, match="7 positions where 6 were planned"):
        attention(x[:, :1], causal=True, past=past)
    past.clear()
    torch.testing.assert_close(attention(x[:, :3], causal=True, past=past), parts[0])


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    attention, x = SelfAttention(8, 2, dropout=0.5), draw(2, 6, 8)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))
