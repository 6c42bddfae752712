"""Counting operations: two for a multiply-add, attention included."""

import torch
import torch.nn.functional as F
from torch import nn

from vistok.nn.flops import count_flops


def test_a_linear_map_and_a_convolution():
    assert count_flops(nn.Linear(5, 7), torch.rand(3, 5)) == 2 * 3 * 5 * 7
    assert count_flops(nn.Conv2d(3, 4, 2, stride=2), torch.rand(1, 3, 8, 8)) == 2 * 16 * 4 * 3 * 4


def test_fused_attention_with_and_without_a_mask():
    q = torch.rand(2, 3, 10, 4)
    expected = 2 * 2 * (2 * 3) * 10 * 10 * 4
    assert count_flops(F.scaled_dot_product_attention, q, q, q) == expected
    assert count_flops(F.scaled_dot_product_attention, q, q, q, attn_mask=torch.rand(2, 1, 1, 10)) == expected
    assert count_flops(F.scaled_dot_product_attention, q[:, :, :5], q, q) == expected / 2
