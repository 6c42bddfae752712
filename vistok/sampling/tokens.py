"""From logits to codes: temperature, top-k, top-p, classifier-free guidance, and the draw itself.

    logits (.., K) -> / temperature -> top-k -> top-p -> softmax -> cumulative sum -> the code where it passes u

`u` is one uniform number per code, drawn beforehand from the item's seed (`noise.uniforms`): a code depends on its
logits and on its own number alone. Sources: top-p arXiv:1904.09751; guidance arXiv:2207.12598, on logits as in LlamaGen
(2406.06525).
"""

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from vistok.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn.

    guidance     s of u + s (c - u), c with and u without the condition; 1 is none and costs no second branch
    temperature  divides the logits; 0 takes the likeliest code
    top_k        draw among the k likeliest codes, 0 for all
    top_p        draw among the likeliest codes that together have this probability, 1 for all

    Raises InputError for values out of range.
    """

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (isfinite(self.guidance) and self.guidance >= 0):
            raise InputError(f"guidance={self.guidance}; expected a finite number of at least 0, 1 for none")
        if not (isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(
                f"temperature={self.temperature}; expected a finite number of at least 0, 0 for the likeliest code"
            )
        if self.top_k < 0 or int(self.top_k) != self.top_k:
            raise InputError(f"top_k={self.top_k}; expected a whole number, 0 for all codes")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}; expected a number above 0 and at most 1")

    @property
    def guided(self) -> bool:
        """Whether a branch without the condition has to be computed."""
        return self.guidance != 1.0


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Codes (..,), long, of `logits` (.., K) and one number in [0, 1) for each, `uniform` (..,)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    edges = probabilities(logits, sampling).cumsum(-1)
    # a number just below 1 must not round up to the sum, where only codes of no probability are left
    target = uniform.to(edges)[..., None] * (1 - 1e-6) * edges[..., -1:]
    return torch.searchsorted(edges, target, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What a code is drawn with, (.., K): softmax of logits / temperature over what top-k and top-p leave."""
    scaled = logits.float() / max(sampling.temperature, 1e-5)
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = scaled.topk(sampling.top_k, -1, sorted=False).values.amin(-1, keepdim=True)
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = scaled.sort(-1, descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p > sampling.top_p  # the code that crosses the line stays
        scaled = scaled.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), -torch.inf)
    return scaled.softmax(-1)


def guide(outputs: Tensor, scale: float | Tensor) -> Tensor:
    """Guided outputs (B, ..) of a doubled batch (2 B, ..): first half with the condition, second half without.

    `scale` is one number, or a tensor that broadcasts to (B, ..).
    """
    conditional, unconditional = outputs.chunk(2)
    return unconditional + scale * (conditional - unconditional)
