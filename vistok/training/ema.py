"""The exponential moving average of a model's weights: what is validated, sampled from and left behind."""

import copy
from typing import Any

import torch
from torch import nn


class Ema:
    """A second model whose parameters follow the first: w <- d w + (1 - d) v, d = min(decay, (1 + t) / (10 + t)).

    The early, smaller decay keeps the random start from lingering. Buffers (codebook statistics) are copied, not
    averaged, when the average is asked for.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averaged = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Follow `model` after step `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = zip(self.averaged.parameters(), model.parameters(), strict=True)
        floating = [(ours, theirs) for ours, theirs in pairs if ours.is_floating_point()]
        torch._foreach_lerp_([ours for ours, _ in floating], [theirs for _, theirs in floating], 1 - decay)

    @torch.no_grad()
    def current(self, model: nn.Module) -> Any:
        """The averaged model, with the buffers that `model` has now."""
        for ours, theirs in zip(self.averaged.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
        return self.averaged
