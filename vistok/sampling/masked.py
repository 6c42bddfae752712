"""Masked generation: predict every masked code at once, keep the surest, mask the rest again, a few times over.

    codes (B, ..), unknown = mask_id
      |  network(codes, guided)                          logits (B, .., K), or (2 B, .., K) with and without condition
      |  guidance   u + s_i (c - u), s_i from `guidance_start` to `guidance`
      |  softmax    / temperature, which may fall with the steps
      |  draw       a code everywhere, at a temperature of its own
      |  confidence log-probability or logit of the draw, + Gumbel noise x choice_temperature x (1 - p); known: infinite
      |  re-mask    the floor(ratio(p) M) least sure of an item's M unknown codes               p = (i + 1) / steps
      +--<-- next step, until all are known

One sampler for the family; what its members disagree about are the fields of `MaskedSampling`:

                      temperature   draw_temperature   confidence   guidance_curve     schedule   bounded   rule
    MaskGIT           1             -                  probability  (none)             cosine     yes       threshold
    MaskBit           1             -                  probability  power-cosine       arccos     yes       threshold
    TiTok             1, or anneal  choice temperature logit        linear, or p.-c.   arccos     yes       threshold
    ENAT              1             6, not below 1e-3  probability  linear             cosine     no        count
    ELM (MLM)         1             -                  probability  linear, "after"    cosine     yes       threshold
    Phenaki           1             0.9                probability  constant           cosine, rounded      count

**Guidance is always the s of u + s (c - u)**, 1 for none, as everywhere in this library. Papers that write
c + w (c - u) have s = 1 + w. Codes that are given are kept, and the schedule counts the others alone, item by item.
Nothing loops over items or codes. Sources: MaskGIT arXiv:2202.04200, MaskBit 2409.16211, TiTok 2406.07550, ENAT
2411.06959, ELM 2410.16257, Phenaki 2210.02399.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import cos, isfinite, pi
from typing import Literal, Protocol

import torch
from torch import Tensor

from vistok.errors import InputError
from vistok.sampling.masking import SCHEDULES, Schedule, masking_ratio
from vistok.sampling.noise import ItemNoise
from vistok.sampling.tokens import Sampling, draw, guide, probabilities

Network = Callable[[Tensor, bool], Tensor]
"""network(codes, guided) -> logits (B, .., K) with the condition; where `guided`, (2 B, .., K), first half with it and
second half without. `codes` (B, ..) hold mask_id where they are unknown; the network doubles them itself."""


@dataclass(frozen=True)
class MaskedSampling(Sampling):
    """How masked codes are generated; `guidance`, `temperature`, `top_k`, `top_p` as in `Sampling`.

    steps                  how often the network is asked, S
    schedule               share of the unknown codes that stays masked, over the progress p = (i + 1) / S
    choice_temperature     R: Gumbel noise x R x (1 - p) on the confidence; 0 takes the surest
    confidence             "probability": log-probability of the drawn code; "logit": its raw logit
    temperature_annealing  the temperature is multiplied by 0.5 + 0.8 (1 - p); confidence sees it too
    draw_temperature       temperature of the draw alone, x (1 - p); 0 takes the likeliest code; None is 1 at every step
    draw_floor             the draw's temperature does not fall below
    guidance_start         s at the start of the curve; 1 is no guidance, and then no second branch is computed
    guidance_curve         from there to `guidance`: "constant" (there at once), "linear" x, "cosine" (1 - cos pi x^p)/2
    guidance_power         p of the cosine curve; above 1 it starts later
    guidance_after         x = (i + 1) / S in place of i / S
    granularity            "code": each code is masked by itself (MaskBit's groups); "token": all codes of a position
                           (B, N, C) together, by the sum of their confidences
    rule                   "threshold": masked where not above the k-th smallest confidence; "count": exactly k
    bounded                at every step at least one code stays masked and at least one more becomes known
    rounded                k is rounded, not cut to the whole number below
    precision              of the schedule: at a whole number k depends on it

    Raises InputError for values out of range.
    """

    steps: int = 8
    schedule: Schedule = "cosine"
    choice_temperature: float = 4.5
    confidence: Literal["probability", "logit"] = "probability"
    temperature_annealing: bool = False
    draw_temperature: float | None = None
    draw_floor: float = 0.0
    guidance_start: float = 1.0
    guidance_curve: Literal["constant", "linear", "cosine"] = "constant"
    guidance_power: float = 1.0
    guidance_after: bool = False
    granularity: Literal["code", "token"] = "code"
    rule: Literal["threshold", "count"] = "threshold"
    bounded: bool = True
    rounded: bool = False
    precision: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.steps, bool) or int(self.steps) != self.steps or self.steps < 1:
            raise InputError(f"steps={self.steps}; expected a whole number of at least 1")
        for name in ("choice_temperature", "draw_temperature", "draw_floor", "guidance_start", "guidance_power"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value >= 0):
                raise InputError(f"{name}={value}; expected a finite number of at least 0")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r}; expected one of {', '.join(known)}")

    @property
    def guided(self) -> bool:
        """Whether any step needs a branch without the condition."""
        return any(self.guidance_at(step) != 1 for step in range(self.steps))

    def guidance_at(self, step: int) -> float:
        """s of step 0 .. S - 1."""
        x = (step + self.guidance_after) / self.steps
        if self.guidance_curve == "cosine":
            x = (1 - cos(pi * x**self.guidance_power)) / 2
        share = 1.0 if self.guidance_curve == "constant" else x
        return self.guidance_start + (self.guidance - self.guidance_start) * share

    def temperature_at(self, step: int) -> float:
        """What divides the logits, for draw and confidence alike. At 0 the likeliest code is drawn."""
        return self.temperature * (0.5 + 0.8 * self.remaining(step) if self.temperature_annealing else 1.0)

    def draw_temperature_at(self, step: int) -> float:
        """The draw's own temperature."""
        if self.draw_temperature is None:
            return 1.0
        return max(self.draw_temperature * self.remaining(step), self.draw_floor)

    def remaining(self, step: int) -> float:
        """1 - p after this step, 0 after the last."""
        return 1 - (step + 1) / self.steps

    def masked_after(self, step: int, unknown: Tensor, masked: Tensor) -> Tensor:
        """How many codes are masked again after a step, long (B,): of `unknown` at the start, `masked` are now."""
        wide = self.precision == "float64" and unknown.device.type != "mps"
        progress = torch.tensor((step + 1) / self.steps, dtype=torch.float64 if wide else torch.float32)
        count = masking_ratio(progress, self.schedule).to(unknown.device) * unknown
        count = (count.round() if self.rounded else count.floor()).long()
        if self.bounded:
            count = count.minimum(masked - 1).clamp_min(1)
        return count.minimum(masked)


_CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": SCHEDULES,
    "confidence": ("probability", "logit"),
    "guidance_curve": ("constant", "linear", "cosine"),
    "granularity": ("code", "token"),
    "rule": ("threshold", "count"),
    "precision": ("float32", "float64"),
}


class Draws(Protocol):
    """Where a sampler's random numbers come from."""

    def codes(self, step: int, logits: Tensor, sampling: Sampling) -> Tensor:
        """Codes (B, ..) of `logits` (B, .., K) at `sampling`'s temperature, top-k and top-p."""
        ...

    def gumbel(self, step: int, shape: torch.Size) -> Tensor:
        """Standard Gumbel numbers `shape` (B, ..) for the confidence."""
        ...


class SeededDraws:
    """Numbers from each item's own seed: what an item gets depends on neither the batch nor the device."""

    def __init__(self, seeds: Sequence[int], device: "torch.device | str" = "cpu") -> None:
        self._noise = ItemNoise(seeds, device)

    def codes(self, step: int, logits: Tensor, sampling: Sampling) -> Tensor:
        """By the inverse of the cumulative distribution: one uniform number a code."""
        return draw(logits, self._noise.uniforms(*logits.shape[1:-1]), sampling)

    def gumbel(self, step: int, shape: torch.Size) -> Tensor:
        """Standard Gumbel numbers."""
        return gumbel(self._noise.uniforms(*shape[1:]))


@dataclass(frozen=True, eq=False)
class StoredDraws:
    """Numbers that are given: standard Gumbel numbers for the codes (S, B, .., K) and the confidence (S, B, ..).

    A code is then argmax(logits + temperature x Gumbel), which draws from softmax(logits / temperature).
    """

    of_codes: Tensor
    of_confidence: Tensor

    def codes(self, step: int, logits: Tensor, sampling: Sampling) -> Tensor:
        """The largest of logits and noise."""
        if sampling.top_k or sampling.top_p < 1:
            logits = logits.masked_fill(probabilities(logits, sampling) == 0, -torch.inf)
        return (logits + sampling.temperature * self.of_codes[step].to(logits)).argmax(-1)

    def gumbel(self, step: int, shape: torch.Size) -> Tensor:
        """As given."""
        return self.of_confidence[step].reshape(shape)


def gumbel(uniforms: Tensor) -> Tensor:
    """Standard Gumbel numbers of uniform ones in [0, 1); both logarithms' arguments are at least 1e-20."""
    return -(-uniforms.clamp_min(1e-20).log()).clamp_min(1e-20).log()


def sample_masked(network: Network, codes: Tensor, mask_id: int, sampling: MaskedSampling, draws: Draws) -> Tensor:
    """Codes like `codes` (B, N) or (B, N, C), long, with a draw wherever they held `mask_id`; the others are kept.

    The network sees each step's codes, `mask_id` where they are still unknown. What the last step draws is returned
    whole. Raises InputError where the network's logits have another shape.
    """
    wanted = codes == mask_id
    unknown = _masked(codes, mask_id, sampling).flatten(1).sum(1)
    drawn = codes
    for step in range(sampling.steps):
        logits = _logits(network, codes, sampling.guidance_at(step))
        temperature = sampling.temperature_at(step)
        logits = logits / temperature if temperature > 0 else logits
        drawing = replace(_plain(sampling), temperature=sampling.draw_temperature_at(step) if temperature > 0 else 0.0)
        drawn = torch.where(codes == mask_id, draws.codes(step, logits, drawing), codes)
        if step + 1 < sampling.steps:
            sure = _confidence(logits, drawn, sampling)
            noise = sampling.choice_temperature * sampling.remaining(step)
            if noise > 0:
                sure = sure + noise * draws.gumbel(step, sure.shape).to(sure)
            again = _again(sure, _masked(codes, mask_id, sampling), step, unknown, sampling)
            codes = torch.where((again if again.ndim == codes.ndim else again[..., None]) & wanted, mask_id, drawn)
    return drawn


def _plain(sampling: MaskedSampling) -> Sampling:
    return Sampling(top_k=sampling.top_k, top_p=sampling.top_p)


def _masked(codes: Tensor, mask_id: int, sampling: MaskedSampling) -> Tensor:
    masked = codes == mask_id
    return masked.any(-1) if sampling.granularity == "token" and codes.ndim == 3 else masked


def _logits(network: Network, codes: Tensor, guidance: float) -> Tensor:
    guided = guidance != 1
    logits = network(codes, guided).float()
    if logits.shape[:-1] != (len(codes) * (1 + guided), *codes.shape[1:]):
        raise InputError(f"logits {tuple(logits.shape)} for codes {tuple(codes.shape)}, guided={guided}")
    return guide(logits, guidance) if guided else logits


def _confidence(logits: Tensor, drawn: Tensor, sampling: MaskedSampling) -> Tensor:
    # a code that was given may be the network's mask, or none of its codes: it is never chosen by its confidence
    index = drawn.clamp(0, logits.shape[-1] - 1)
    sure = logits.gather(-1, index[..., None])[..., 0]
    if sampling.confidence == "probability":
        sure = sure - logits.logsumexp(-1)
    return sure.sum(-1) if sampling.granularity == "token" and drawn.ndim == 3 else sure


def _again(sure: Tensor, masked: Tensor, step: int, unknown: Tensor, sampling: MaskedSampling) -> Tensor:
    """Which of the `masked` are masked again: those with the least confidence `sure`; all like `masked` (B, ..)."""
    count = sampling.masked_after(step, unknown, masked.flatten(1).sum(1))
    sure = sure.masked_fill(~masked, torch.inf).flatten(1)
    if sampling.rule == "count":
        least = sure.argsort(dim=1, stable=True).argsort(1) < count[:, None]
    else:
        threshold = sure.sort(1).values.gather(1, (count - 1).clamp_min(0)[:, None])
        least = (sure <= threshold) & (count > 0)[:, None]
    return least.view_as(masked) & masked
