"""Gaussian diffusion in discrete steps, with a learned variance: training terms and the ancestral way back.

    q(x_t | x_0) = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise             t = 0 .. T-1, abar falls to about 0
    a model gives noise and v: log variance of x_{t-1} = f log beta_t + (1 - f) log beta~_t,   f = (v + 1) / 2

Sources: "Improved Denoising Diffusion Probabilistic Models" (arXiv:2102.09672: cosine schedule, learned variance, fewer
steps), with the loss of MAR (2406.11838): the squared error trains the noise, the variational bound the variance alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from math import cos, log, pi
from typing import NamedTuple

import torch
from torch import Tensor

from vistok.errors import ConfigError, InputError

Denoiser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # x (M, ..) and steps (M,) to noise and v, each (M, ..)
_LARGEST_BETA = 0.999
_HALF_BIN = 1 / 255  # half the distance of the levels that the bound at t = 0 speaks of


class Terms(NamedTuple):
    """Training terms of every item (M,): squared error of the noise, and the variational bound in bits."""

    squared_error: Tensor
    bound: Tensor


@dataclass(frozen=True, eq=False)
class Diffusion:
    """A schedule: `kept`, abar of each of its S steps, float64, and `steps`, what the model calls them, long (S,)."""

    kept: Tensor
    steps: Tensor
    _tables: dict[str, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kept = self.kept
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        beta = 1 - kept / before
        variance = beta * (1 - before) / (1 - kept)
        # the posterior of step 0 has none: that of step 1 stands in for it
        floor = torch.cat([variance[1:2], variance[1:]]) if len(variance) > 1 else beta
        tables = {
            "root": kept.sqrt(),
            "rest": (1 - kept).sqrt(),
            "inverse": kept.rsqrt(),
            "excess": (1 / kept - 1).sqrt(),
            "high": beta.log(),
            "low": floor.log(),
            "of_data": beta * before.sqrt() / (1 - kept),
            "of_x": (1 - before) * (1 - beta).sqrt() / (1 - kept),
        }
        object.__setattr__(self, "_tables", {name: table.float() for name, table in tables.items()})

    def __len__(self) -> int:
        return len(self.steps)

    def to(self, device: torch.device | str) -> "Diffusion":
        """The tables on another device."""
        moved = Diffusion(self.kept, self.steps.to(device))
        object.__setattr__(moved, "_tables", {name: table.to(device) for name, table in self._tables.items()})
        return moved

    def noised(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of data and noise (M, ..) at indices t (M,)."""
        return self._at("root", t, data) * data + self._at("rest", t, data) * noise

    def terms(self, model: Denoiser, data: Tensor, noise: Tensor, t: Tensor) -> Terms:
        """Training terms of data (M, ..) with this noise at indices t (M,). The bound trains the variance alone."""
        x = self.noised(data, noise, t)
        predicted, v = model(x, self.steps[t])
        error = (noise - predicted).square().flatten(1).mean(1)
        true_mean = self._mean(data, x, t)
        mean = self._mean(self._data(x, predicted.detach(), t), x, t)
        log_variance = self._log_variance(v, t)
        divergence = _divergence(true_mean, self._at("low", t, data), mean, log_variance)
        first = _discretized(data, mean, log_variance / 2)
        where = (t == 0).reshape(-1, *[1] * (data.ndim - 1))
        bound = torch.where(where, first, divergence).flatten(1).mean(1) / log(2)
        return Terms(error, bound)

    def sample(
        self, model: Denoiser, start: Tensor, noises: Callable[[int], Tensor], temperature: float = 1.0
    ) -> Tensor:
        """Data (M, ..) from pure noise `start` (M, ..), one evaluation of the model for each step, the last one first.

        `noises(i)` gives the fresh noise (M, ..) of the i-th evaluation; the last needs none. `temperature` scales it.
        Raises InputError for a temperature below 0.
        """
        if not temperature >= 0:
            raise InputError(f"temperature={temperature}; expected a number of at least 0")
        x = start
        for done, index in enumerate(range(len(self) - 1, -1, -1)):
            t = torch.full((len(x),), index, dtype=torch.long, device=x.device)
            predicted, v = model(x, self.steps[t])
            mean = self._mean(self._data(x, predicted, t), x, t)
            if index == 0:
                return mean
            deviation = (self._log_variance(v, t) / 2).exp()
            x = mean + temperature * deviation * noises(done)
        return x

    def respaced(self, count: int) -> "Diffusion":
        """The schedule of `count` of these steps, both ends among them. Raises InputError unless 1 to all of them."""
        total = len(self)
        if isinstance(count, bool) or int(count) != count or not 1 <= count <= total:
            raise InputError(f"diffusion steps={count}; expected a whole number of 1 to {total}")
        stride = (total - 1) / (count - 1) if count > 1 else 1.0
        chosen = torch.tensor([round(stride * index) for index in range(count)])
        return Diffusion(self.kept[chosen], self.steps[chosen.to(self.steps.device)]).to(self.steps.device)

    def _data(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self._at("inverse", t, x) * x - self._at("excess", t, x) * noise

    def _mean(self, data: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self._at("of_data", t, x) * data + self._at("of_x", t, x) * x

    def _log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        share = (v + 1) / 2
        return share * self._at("high", t, v) + (1 - share) * self._at("low", t, v)

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        table = self._tables[name][t]
        return table.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def cosine_diffusion(steps: int = 1000) -> Diffusion:
    """The cosine schedule of that many steps. Raises ConfigError below 2."""
    if steps < 2:
        raise ConfigError(f"a diffusion needs at least two steps, got {steps}")
    curve = [cos((index / steps + 0.008) / 1.008 * pi / 2) ** 2 for index in range(steps + 1)]
    ratios = [max(after / before, 1 - _LARGEST_BETA) for before, after in pairwise(curve)]
    return Diffusion(torch.tensor(ratios, dtype=torch.float64).cumprod(0), torch.arange(steps))


def _divergence(mean1: Tensor, log1: Tensor, mean2: Tensor, log2: Tensor) -> Tensor:
    """KL divergence, in nats, of a Gaussian from another, given means and log variances."""
    return 0.5 * (log2 - log1 - 1 + (log1 - log2).exp() + (mean1 - mean2).square() * (-log2).exp())


def _discretized(data: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """-log probability, in nats, of the bin of width 2/255 around `data`; bins beyond +-0.999 have no far end."""
    centred, inverse = data - mean, (-log_deviation).exp()
    above, below = (_normal_cdf(inverse * (centred + side)) for side in (_HALF_BIN, -_HALF_BIN))
    inside = torch.where(data > 0.999, 1 - below, above - below)
    return -torch.where(data < -0.999, above, inside).clamp_min(1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The normal distribution function by its tanh approximation."""
    return 0.5 * (1 + torch.tanh((2 / pi) ** 0.5 * (x + 0.044715 * x**3)))
