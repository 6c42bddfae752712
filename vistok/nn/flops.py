"""Floating-point operations of a forward pass, counted as it runs: matrix products, convolutions, attention.

A multiplication and an addition are two operations. Many papers count the pair as one: half of what is said here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def count_flops(function: Callable[..., Any], *inputs: Any, **options: Any) -> int:
    """Operations of `function(*inputs, **options)`, which runs once without gradients."""
    attention = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    known: dict[Any, Any] = {attention: _attention} if attention is not None else {}  # PyTorch's counter lacks it
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=known) as counter:
        function(*inputs, **options)
    return counter.get_total_flops()


def _attention(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    return sdpa_flop_count(q, k, v)
