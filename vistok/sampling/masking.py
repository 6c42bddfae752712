"""Masking schedules, and the masks that masked token models train with.

    progress r in [0, 1] --schedule--> share of the tokens that is masked, 1 at r = 0, about 0 at r = 1

A generator walks the schedule in equal steps of r; training draws r anew for every item. Sources: MaskGIT
(arXiv:2202.04200) for the schedules, MaskBit (2409.16211) and TiTok (2406.07550) for arccos and the two kinds of mask.
"""

from typing import Literal

import torch
from torch import Tensor

from vistok.errors import ConfigError, nearest

Schedule = Literal["arccos", "cosine", "linear", "square", "root"]
SCHEDULES = ("arccos", "cosine", "linear", "square", "root")
LEAST = 1e-6  # no schedule goes below


def masking_ratio(progress: Tensor, schedule: Schedule = "arccos") -> Tensor:
    """The share that is masked at `progress` r (..), in [1e-6, 1], in the precision of `progress`.

    arccos acos(r) / (pi/2)   cosine cos(pi/2 r)   linear 1 - r   square 1 - r^2   root 1 - sqrt(r)

    Raises ConfigError for another schedule.
    """
    if schedule == "arccos":
        ratio = torch.acos(progress) / (torch.pi * 0.5)
    elif schedule == "cosine":
        ratio = torch.cos(progress * torch.pi * 0.5)
    elif schedule == "linear":
        ratio = 1 - progress
    elif schedule == "square":
        ratio = 1 - progress**2
    elif schedule == "root":
        ratio = 1 - progress**0.5
    else:
        raise ConfigError(
            f"masking schedule {schedule!r}; expected one of {', '.join(SCHEDULES)}"
            f"{nearest(str(schedule), list(SCHEDULES))}"
        )
    return ratio.clamp(LEAST, 1)


def bernoulli_masks(shape: torch.Size | tuple[int, ...], schedule: Schedule, rng: torch.Generator) -> Tensor:
    """Training masks, bool `shape` (B, ..), on rng's device: r ~ U(0, 1) for each item, then every code by itself."""
    ratio = masking_ratio(torch.rand(shape[0], generator=rng, device=rng.device), schedule)
    draws = torch.rand(tuple(shape), generator=rng, device=rng.device)
    return draws < ratio.reshape(-1, *[1] * (len(shape) - 1))


def counted_masks(shape: torch.Size | tuple[int, ...], schedule: Schedule, rng: torch.Generator) -> Tensor:
    """Training masks, bool `shape` (B, ..), on rng's device: r ~ U(0, 1) for each item, then exactly that share of its
    codes, rounded, at least one, anywhere."""
    ratio = masking_ratio(torch.rand(shape[0], generator=rng, device=rng.device), schedule)
    return mask_exactly(torch.rand(tuple(shape), generator=rng, device=rng.device), ratio)


def mask_exactly(scores: Tensor, ratio: Tensor) -> Tensor:
    """Bool like `scores` (B, ..): True for the round(ratio N) smallest of an item, at least one; `ratio` (B,)."""
    flat = scores.flatten(1)
    count = (flat.shape[1] * ratio).round().clamp_min(1)
    rank = flat.argsort(dim=1, stable=True).argsort(1)
    return (rank < count[:, None]).view_as(scores)
