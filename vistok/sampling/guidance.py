"""Guidance: more of what the condition adds, from one evaluation of a doubled batch (with and without condition).

    classifier-free   u + g (c - u)                                                             arXiv:2207.12598
    adaptive projected (APG)   c + (g - 1) (d_orthogonal + eta d_parallel),                     arXiv:2410.02416
                      d = c - u with reverse momentum, its norm limited, split along c

APG keeps large scales from oversaturating.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vistok.errors import InputError, nearest
from vistok.sampling.tokens import guide

Guidance = Literal["apg", "cfg"]


@dataclass
class AdaptiveProjectedGuidance:
    """One trajectory's guidance; it remembers the running difference from step to step.

    scale      g; 1 leaves the conditional output
    momentum   weight of the running difference, negative in the paper
    threshold  largest L2 norm of an item's difference, 0 for no limit
    eta        how much of the part along the conditional output stays
    """

    scale: float
    momentum: float = -0.5
    threshold: float = 2.5
    eta: float = 0.0
    running: Tensor | None = field(default=None, repr=False)

    def __call__(self, outputs: Tensor) -> Tensor:
        """Guided outputs (B, ..) of a doubled batch (2 B, ..), first half with the condition."""
        conditional, unconditional = outputs.chunk(2)
        difference = conditional - unconditional
        if self.running is not None:
            difference = difference + self.momentum * self.running
        self.running = difference
        if self.threshold > 0:
            norm = difference.flatten(1).norm(dim=1).clamp_min(1e-12)
            difference = difference * _as(torch.clamp(self.threshold / norm, max=1), difference)
        parallel = project(difference, conditional)
        orthogonal = difference - parallel
        return conditional + (self.scale - 1) * (orthogonal + self.eta * parallel)


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """u + g (c - u) of a doubled batch (2 B, ..), first half with the condition."""

    scale: float

    def __call__(self, outputs: Tensor) -> Tensor:
        """Guided outputs (B, ..)."""
        return guide(outputs, self.scale)


def make_guidance(kind: str, scale: float) -> AdaptiveProjectedGuidance | ClassifierFreeGuidance:
    """A fresh guidance for one trajectory. Raises InputError for another kind, or a scale that is negative."""
    if not scale >= 0 or scale == float("inf"):
        raise InputError(f"guidance={scale}; expected a finite number of at least 0, 1 for none")
    if kind not in ("apg", "cfg"):
        raise InputError(f"guide={kind!r}; expected 'apg' or 'cfg'{nearest(str(kind), ['apg', 'cfg'])}")
    return AdaptiveProjectedGuidance(scale) if kind == "apg" else ClassifierFreeGuidance(scale)


def project(x: Tensor, onto: Tensor) -> Tensor:
    """The part of each item of `x` (B, ..) along that of `onto` (B, ..), computed in float64 where there is one."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    a, b = x.flatten(1).to(wide), onto.flatten(1).to(wide)
    share = (a * b).sum(1) / b.square().sum(1).clamp_min(1e-24)
    return (_as(share, b) * b).view_as(x).to(x.dtype)


def _as(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))
