"""Rectified flow: straight lines between data and noise, their training pairs, and Euler's way back.

    x_t = (1 - t) data + t noise,  t in [0, 1]        velocity  noise - data
    from t = 1:  x <- x - v(x, t) / N,  t = 1, (N - 1) / N, .., 1 / N

Sources: arXiv:2209.03003; times of training as in Stable Diffusion 3 (2403.03206, section 3.1).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vistok.errors import ConfigError, InputError

Times = Literal["uniform", "logit-normal", "mode"]


def euler(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Data (B, ..) from `noise` (B, ..) in `steps` evaluations of `velocity(x, t)`, t from 1 down to 1 / steps.

    Raises InputError unless steps is a whole number of at least 1.
    """
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise InputError(f"steps={steps}; expected a whole number of at least 1")
    x = noise
    for step in range(int(steps), 0, -1):
        x = x - velocity(x, step / steps) / steps
    return x


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and the velocity to learn there, both (B, ..), for one t per item (B,)."""
    t = t.to(data.dtype).reshape(-1, *[1] * (data.ndim - 1))
    return torch.lerp(data, noise, t), noise - data


def draw_times(count: int, rng: torch.Generator, kind: Times = "uniform", mode_scale: float = 0.25) -> Tensor:
    """Times of training (count,), float32, on the generator's device.

    "logit-normal": sigmoid of a standard normal. "mode": 1 - u - s (cos^2(pi u / 2) - 1 + u), s = `mode_scale`, which
    for s > 0 prefers the middle. Raises ConfigError for another kind.
    """
    if kind == "logit-normal":
        return torch.randn(count, generator=rng, device=rng.device).sigmoid()
    u = torch.rand(count, generator=rng, device=rng.device)
    if kind == "uniform":
        return u
    if kind == "mode":
        return 1 - u - mode_scale * (torch.cos(torch.pi * u / 2).square() - 1 + u)
    raise ConfigError(f"times {kind!r}; expected 'uniform', 'logit-normal' or 'mode'")
