"""VAR's blocks: what sees what, the cache against the mask, attention by angle, and the start."""

import math
from dataclasses import replace

import pytest
import torch

from vistok.errors import ConfigError
from vistok.nn.scale_transformer import ScaleTransformer, ScaleTransformerSize, coarser_or_same, level_of

SIZE = ScaleTransformerSize(16, 2, 2)
LENGTHS = (1, 4, 9)


def trunk(**changes):
    torch.manual_seed(0)
    made = ScaleTransformer(replace(SIZE, **changes)).eval()
    for value in made.parameters():
        value.data.normal_(std=0.3)
    return made


def test_a_position_sees_its_scale_and_those_before():
    mask = coarser_or_same(level_of(LENGTHS))
    assert mask.shape == (14, 14)
    assert mask.sum(1).tolist() == [1] + [5] * 4 + [14] * 9


@pytest.mark.parametrize("changes", [{}, {"by_angle": False}, {"shared_condition": True}], ids=str)
@torch.no_grad()
def test_scale_by_scale_with_a_cache_is_one_pass_with_the_mask(changes):
    model = trunk(**changes)
    x, condition = torch.randn(3, 14, 16), torch.randn(3, 16)
    whole = model(x, condition, mask=coarser_or_same(level_of(LENGTHS)))
    past, parts = model.cache(3, 14), x.split(LENGTHS, 1)
    stepwise = torch.cat([model(part, condition, past=past) for part in parts], 1)
    torch.testing.assert_close(stepwise, whole, rtol=1e-4, atol=1e-5)
    without = model(x, condition)
    assert not torch.allclose(without[:, 0], whole[:, 0], atol=1e-3)


@torch.no_grad()
def test_attention_by_angle_does_not_see_lengths_of_queries_and_keys():
    model = trunk()
    attention = model.blocks[0].attention
    attention.qkv.q_bias.zero_()
    x = torch.randn(2, 5, 16)
    before = attention(x)
    attention.qkv.weight[:32] *= 7
    torch.testing.assert_close(attention(x), before, rtol=1e-4, atol=1e-5)
    attention.q_norm.log_length.fill_(9.0)  # beyond the limit, which is log 100
    limited = attention(x)
    attention.q_norm.log_length.fill_(math.log(100))
    torch.testing.assert_close(attention(x), limited)
    assert not torch.allclose(limited, before, atol=1e-3)


def test_keys_have_no_bias():
    model = trunk()
    names = {name for name, _ in model.blocks[0].attention.qkv.named_parameters()}
    assert names == {"weight", "q_bias", "v_bias"}
    out = model.blocks[0].attention.qkv(torch.zeros(1, 16))
    assert torch.equal(out[0, 16:32], torch.zeros(16))
    assert not torch.equal(out[0, :16], torch.zeros(16))


def test_the_start_is_nearly_the_identity_where_gates_are_small():
    torch.manual_seed(0)
    model = ScaleTransformer(SIZE)
    model.initialise(1e-5)
    x, condition = torch.randn(2, 14, 16), torch.randn(2, 16)
    torch.testing.assert_close(model(x, condition), x, rtol=0, atol=1e-3)
    weight = model.blocks[0].mlp.expand.weight
    assert weight.std().item() == pytest.approx((1 / 48) ** 0.5, rel=0.1)
    assert model.blocks[0].mlp.contract.weight.std().item() == pytest.approx((1 / 48) ** 0.5 / 2, rel=0.1)


def test_skipped_branches_in_training_alone():
    model = trunk(drop_path=0.5)
    assert [block.skip for block in model.blocks] == [0.0, 0.5]
    x, condition = torch.randn(64, 3, 16), torch.randn(64, 16)
    whole = model(x, condition)
    assert torch.equal(model(x, condition), whole)
    changed = (model.train()(x, condition) != whole).flatten(1).any(1)
    assert changed.float().mean() > 0.9  # a kept branch counts double
    assert ScaleTransformerSize(depth=24).skip == pytest.approx(0.1)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match="3 heads"):
        ScaleTransformerSize(16, 2, 3)
