"""Which positions are generated when, in masked autoregression: a random order, few at first and many at last.

    masked (B, N), scores (B, N) in [0, 1) --> S times: bool (B, N), the masked positions with the largest scores,
                                               so many that floor(cos(pi/2 (i + 1) / S) M) of an item's M are left

Sources: MAR (arXiv:2406.11838); the cosine is MaskGIT's (2202.04200).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vistok.errors import InputError
from vistok.sampling.masking import masking_ratio


class Turn(NamedTuple):
    """One step: which positions are drawn, bool (B, N), what was masked before, and how many are left, long (B,)."""

    drawn: Tensor
    masked: Tensor
    left: Tensor


def random_order(masked: Tensor, scores: Tensor, steps: int) -> Iterator[Turn]:
    """The steps of each item in which something is drawn, of at most `steps`; the last draws all that is left.

    Before the last, at least one position more is drawn and at least one left. Raises InputError for steps below 1.
    """
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise InputError(f"steps={steps}; expected a whole number of at least 1")
    rank = torch.where(masked, scores, torch.inf).sort(dim=1, stable=True).indices.argsort(1)
    unknown = masked.sum(1)
    for step in range(steps):
        left = torch.zeros_like(unknown)
        if step + 1 < steps:
            share = masking_ratio(torch.tensor((step + 1) / steps, dtype=torch.float64), "cosine").item()
            remaining = masked.sum(1)
            left = (share * unknown).floor().long().minimum(remaining - 1).clamp_min(1).minimum(remaining)
        drawn = masked & (rank >= left[:, None])
        if bool(drawn.any()):
            yield Turn(drawn, masked, left)
        masked = masked & ~drawn
