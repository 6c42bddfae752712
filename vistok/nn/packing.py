"""Linear maps of few rows on a CPU, from weights laid out for them once.

    with packed(trunk, head):             every nn.Linear in them, for as long as the block lasts
        for position in ...: model(x)       x (16, W) or (16, 1, W)

A generator that goes one position at a time multiplies a handful of rows by every weight, again and again. The general
matrix product lays the weights out anew in each call, which costs more than the product; oneDNN keeps them laid out.
That is a second copy of the weights, freed at the end of the block. Results agree up to rounding.

Elsewhere (other devices, dtypes, gradients, builds without oneDNN) the block changes nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

# The number of rows that oneDNN is told when it chooses the layout. Told the true number (2 to 32), it takes one that
# is slower: by 1 to 6 % in float32, by 3 to 37 % in bfloat16 (maps of 768 to 4096 on a Xeon with AMX, one thread).
ROWS = {torch.float32: 64, torch.bfloat16: 1}


@contextmanager
def packed(*modules: nn.Module) -> Iterator[None]:
    """Inside, the linear maps of the modules read packed weights. For inference with few rows, any number of steps."""
    parts = [part for module in modules for part in module.modules()] if _available() else []
    changed: list[nn.Linear] = [part for part in parts if _packable(part)]  # type: ignore[misc]
    try:
        for linear in changed:
            weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS[linear.weight.dtype])
            linear.forward = partial(_linear, weight, linear.bias)  # type: ignore[method-assign]
        yield
    finally:
        for linear in changed:
            linear.__dict__.pop("forward", None)


def _packable(part: nn.Module) -> bool:
    """Plain linear maps alone: what stands in for one (a low-rank update, a quantized map) keeps its own way."""
    return (
        type(part) is nn.Linear
        and part.weight.device.type == "cpu"
        and part.weight.dtype in ROWS
        and "forward" not in part.__dict__
    )


def _available() -> bool:
    return (
        not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
