"""Bernoulli diffusion: bits that turn into fair coins step by step, and the way back.

    q(x_t = 1 | x_0) = K_t x_0 + (1 - K_t) / 2        K_0 = 1, K_T = 0        one step: keep with beta_t, else a coin
    p(x_s = 1 | x_t, p_0), s < t:   A B / sum    A = marginal of p_0 at s,   B = how likely x_t is from either x_s

Source: "Binary Latent Diffusion" (arXiv:2304.04820, section 3.2 and eq. 11), with the schedules of its code.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vistok.errors import ConfigError, InputError

Schedule = Literal["linear", "cos", "sigmoid"]


@dataclass(frozen=True, eq=False)
class BernoulliSchedule:
    """T steps; tensors of length T + 1, where index 0 changes nothing.

    kept   K_t, what is left of the data after t steps
    step   beta_t, what one step keeps
    """

    kept: Tensor
    step: Tensor

    @property
    def steps(self) -> int:
        """T."""
        return len(self.kept) - 1

    @property
    def coin(self) -> Tensor:
        """(1 - K_t) / 2, the share of ones that coins add."""
        return 0.5 * (1 - self.kept)

    def to(self, device: "torch.device | str") -> "BernoulliSchedule":
        """The tables on another device."""
        return BernoulliSchedule(self.kept.to(device), self.step.to(device))

    def marginal(self, p: Tensor, t: Tensor | int) -> Tensor:
        """P(x_t = 1) of data that are 1 with probability `p` (B, ..); t one step, or one per item (B,)."""
        return self._at(self.kept, t, p) * p + self._at(self.coin, t, p)

    def posterior(self, p: Tensor, x: Tensor, t: int, earlier: int, eps: float = 0.0) -> Tensor:
        """P(x_earlier = 1) of bits `x` (0 or 1) at step t, where the data are 1 with probability `p`.

        Raises InputError unless 0 <= earlier < t <= T.
        """
        if not 0 <= earlier < t <= self.steps:
            raise InputError(f"from step {t} to step {earlier} of {self.steps}; expected 0 <= earlier < t <= T")
        beta = self.step[earlier + 1 : t + 1].prod()
        return _posterior(self.marginal(p, earlier), 1 - self.marginal(p, earlier), beta, x, eps)

    def step_back(self, p: Tensor, x: Tensor, t: Tensor, eps: float = 0.0) -> Tensor:
        """`posterior` of the step before, for one t per item (B,)."""
        kept, coin = self._at(self.kept, t - 1, p), self._at(self.coin, t - 1, p)
        return _posterior(kept * p + coin, kept * (1 - p) + coin, self._at(self.step, t, p), x, eps)

    def timesteps(self, count: int) -> list[int]:
        """At most `count` of the steps 1..T, both ends among them, descending. Raises InputError unless 1..T."""
        if not 1 <= count <= self.steps:
            raise InputError(f"steps={count}; expected 1 to {self.steps}")
        places = torch.linspace(0, 1, count, dtype=torch.float64) * (self.steps - 1)
        return [int(place + 1e-9) + 1 for place in places.flip(0).tolist()] if count > 1 else [self.steps]

    @staticmethod
    def _at(table: Tensor, t: Tensor | int, like: Tensor) -> Tensor:
        found = table.to(like.device)[t]
        return found.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1)) if found.ndim else found.to(like.dtype)


def _posterior(one: Tensor, zero: Tensor, beta: Tensor, x: Tensor, eps: float) -> Tensor:
    coin = 0.5 * (1 - beta)
    one, zero = one * (beta * x + coin), zero * (beta * (1 - x) + coin)
    return one / (one + zero + eps)


def bernoulli_schedule(steps: int, kind: Schedule = "linear") -> BernoulliSchedule:
    """The published schedules: "linear" K_t = 1 - t / T, "cos", "sigmoid". Raises ConfigError for another."""
    if steps < 1:
        raise ConfigError(f"a diffusion needs at least one step, got {steps}")
    t = torch.arange(steps + 1, dtype=torch.float64)
    if kind == "linear":
        kept = 1 - t / steps
    elif kind == "cos":
        kept = 0.5 + 0.5 * torch.cos(torch.pi * t / steps)
    elif kind == "sigmoid":
        reach = torch.tensor(3 / 0.8, dtype=torch.float64)
        last, first = reach.sigmoid(), torch.tensor(0.5, dtype=torch.float64)
        kept = (last - (reach * t / steps).sigmoid()) / (last - first)
    else:
        raise ConfigError(f"schedule {kind!r}; expected 'linear', 'cos' or 'sigmoid'")
    step = torch.cat([torch.ones(1, dtype=torch.float64), kept[1:] / kept[:-1]])
    return BernoulliSchedule(kept.float(), step.float())
