"""How gradients pass the rounding: straight through, or rotated (the rotation trick, arXiv:2410.06424).

Both take the latent z and the codebook vector q of each position, both (..., D), and give q in value and a gradient to
z alone.

    straight_through   d out / d z = 1
    rotate             d out / d z = |q| / |z| R,  where R turns z's direction into q's and is held constant
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

Estimator = Literal["straight-through", "rotation"]

_EPS = 1e-6


def estimate(z: Tensor, q: Tensor, estimator: Estimator) -> Tensor:
    """`q` in value, differentiable with respect to `z` the way `estimator` says; exactly `q` where nothing needs it."""
    if estimator == "rotation" and torch.is_grad_enabled() and z.requires_grad:
        return rotate(z, q)
    return straight_through(z, q)


def straight_through(z: Tensor, q: Tensor) -> Tensor:
    """Exactly `q`; its gradient goes to `z` unchanged and to `q` not at all."""
    return _StraightThrough.apply(z, q)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, q: Tensor) -> Tensor:
        return q.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def rotate(z: Tensor, q: Tensor) -> Tensor:
    """`q` up to rounding; the gradient to `z` is turned and scaled as z was to become q.

    out = |q|/|z| (z - 2 (z.w) w + 2 (z.u) v) with u, v the directions of z and q, and w that of u + v; w, u, v and the
    ratio are constants. Lengths below 1e-6 count as 1e-6. In D = 1 there is nothing to turn: use straight_through.
    """
    q = q.detach()
    fixed = z.detach()
    z_length = fixed.norm(dim=-1, keepdim=True).clamp(min=_EPS)
    q_length = q.norm(dim=-1, keepdim=True)
    u = fixed / z_length
    v = q / q_length.clamp(min=_EPS)
    w = normalize(u + v, dim=-1, eps=_EPS)
    along_w = (z * w).sum(-1, keepdim=True)
    along_u = (z * u).sum(-1, keepdim=True)
    return (q_length / z_length) * (z - 2 * along_w * w + 2 * along_u * v)


def round_through(x: Tensor) -> Tensor:
    """Nearest integer (half to even) with the gradient of the identity."""
    return straight_through(x, torch.round(x))


def floor_through(x: Tensor) -> Tensor:
    """Integer below with the gradient of the identity."""
    return straight_through(x, torch.floor(x))
