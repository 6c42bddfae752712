"""Packed batches: rows and padding are inverse, and a block gives each item what it gives it alone."""

import pytest
import torch

from vistok.errors import InputError
from vistok.nn.attention import SelfAttention
from vistok.nn.ragged import compact, ragged
from vistok.nn.transformer import Block

LENGTHS, LEAD, WIDTH = torch.tensor([3, 0, 5, 1]), 2, 16


def rng():
    return torch.Generator().manual_seed(0)


def test_rows_and_padding_are_inverse():
    layout = ragged(LENGTHS, LEAD)
    padded = torch.randn(4, LEAD + 5, WIDTH, generator=rng())
    rows = layout.rows(padded)
    assert rows.shape == (int(LENGTHS.sum()) + 4 * LEAD, WIDTH)
    there = torch.arange(LEAD + 5) < LEAD + LENGTHS[:, None]
    assert torch.equal(layout.padded(rows), padded * there[..., None])
    assert torch.equal(rows[: layout.leading].unflatten(0, (4, LEAD)), padded[:, :LEAD])
    assert torch.equal(layout.items, torch.repeat_interleave(torch.arange(4), LENGTHS))


@pytest.mark.parametrize("only", [False, True])
def test_a_block_gives_each_item_what_it_gives_it_alone(only):
    torch.manual_seed(0)
    block = Block(WIDTH, 2)
    layout = ragged(LENGTHS, LEAD)
    padded = torch.randn(4, LEAD + 5, WIDTH, generator=rng())
    leading = slice(0, layout.leading) if only else None
    together = block(layout.rows(padded), ragged=layout, only=leading)
    alone = [block(padded[i : i + 1, : LEAD + n])[0] for i, n in enumerate(LENGTHS.tolist())]
    lead = torch.cat([one[:LEAD] for one in alone])
    expected = lead if only else torch.cat([lead, *(one[LEAD:] for one in alone)])
    torch.testing.assert_close(together, expected)


def test_a_bias_makes_one_position_count_for_many():
    torch.manual_seed(0)
    attention = SelfAttention(WIDTH, 2, qk_norm="plain-layer", scale=0.3)
    one, many = torch.randn(1, 3, WIDTH, generator=rng()), 7
    repeated = torch.cat([one[:, :2], one[:, 2:].expand(-1, many, -1)], 1)
    bias = torch.tensor([[0.0, 0.0, torch.tensor(float(many)).log()]])
    layout = ragged(torch.tensor([1]), 2, bias)
    torch.testing.assert_close(attention(one[0], ragged=layout), attention(repeated)[0, :3])


def test_gradients_pass():
    layout = ragged(LENGTHS, LEAD)
    padded = torch.randn(4, LEAD + 5, WIDTH, generator=rng(), requires_grad=True)
    layout.padded(layout.rows(padded)).sum().backward()
    assert padded.grad is not None
    assert padded.grad.sum() == (LENGTHS + LEAD).sum() * WIDTH


def test_compact_moves_what_is_kept_to_the_front():
    keep = torch.tensor([[False, True, False, True], [True, True, True, False], [False] * 4])
    moved, lengths = compact(torch.arange(12).view(3, 4, 1), keep)
    assert lengths.tolist() == [2, 3, 0]
    assert moved[0, :2, 0].tolist() == [1, 3]
    assert moved[1, :, 0].tolist() == [4, 5, 6]
    with pytest.raises(InputError, match="keep is bool"):
        compact(torch.zeros(3, 4, 1), keep[:, :2])
