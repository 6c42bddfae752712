"""KID: the squared maximum mean discrepancy of features, unbiased, over random subsets (arXiv:1801.01401).

    m rows of each set -> mean of k(x, x') and k(y, y') off the diagonal - 2 mean of k(x, y) -> mean over the subsets

The kernel is the polynomial (x.y / W + 1)^3; papers' tools differ in how they draw subsets: `VARIANTS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vistok.errors import InputError, UnknownNameError, nearest

Kernel = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Subsets:
    """How subsets are drawn: `number` of `size` rows, at most as many as there are where `clip`; which set is first."""

    number: int = 100
    size: int = 1000
    seed: int = 2020
    second_first: bool = False
    clip: bool = False


VARIANTS = {"torch-fidelity": Subsets(), "clean-fid": Subsets(second_first=True, clip=True)}


def polynomial(a: Tensor, b: Tensor) -> Tensor:
    """(a.b / W + 1)^3, (n, W) and (m, W) to (n, m)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def gaussian_kernel(width: float) -> Kernel:
    """exp(-|a - b|^2 / (2 width^2))."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        distance = torch.addmm(b.square().sum(1)[None], a, b.T, alpha=-2) + a.square().sum(1)[:, None]
        return distance.clamp_min_(0).mul_(-1 / (2 * width**2)).exp_()

    return kernel


def kernel_distance(
    generated: Tensor, real: Tensor, variant: str | Subsets = "torch-fidelity", kernel: Kernel = polynomial
) -> tuple[float, float]:
    """KID's mean and population deviation over the subsets, of features (n, W) and (m, W). Unbiased: may be below 0.

    Raises InputError for shapes that do not fit or sets smaller than a subset, UnknownNameError for an unknown variant.
    """
    if isinstance(variant, str) and variant not in VARIANTS:
        raise UnknownNameError(
            f"no KID {variant!r}{nearest(variant, list(VARIANTS)) or f'; there are {list(VARIANTS)}'}"
        )
    subsets = VARIANTS[variant] if isinstance(variant, str) else variant
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise InputError(f"features of {tuple(generated.shape)} and {tuple(real.shape)}; expected (n, W) and (m, W)")
    smaller = min(len(generated), len(real))
    size = min(subsets.size, smaller) if subsets.clip else subsets.size
    if size < 2 or size > smaller:
        raise InputError(f"subsets of {size} from {smaller} rows; give more images, or Subsets(size=..) of at least 2")
    first, second = (generated, real) if not subsets.second_first else (real, generated)
    rng = np.random.RandomState(subsets.seed)
    found = []
    for _ in range(subsets.number):
        rows = [
            torch.from_numpy(rng.choice(len(part), size, replace=False)).to(part.device) for part in (first, second)
        ]
        found.append(_discrepancy(first[rows[0]].double(), second[rows[1]].double(), kernel))
    values = torch.stack(found)
    return float(values.mean()), float(values.std(correction=0))


def _discrepancy(a: Tensor, b: Tensor, kernel: Kernel) -> Tensor:
    """The unbiased estimate of the squared discrepancy of two sets of one size."""
    count = len(a)
    within = sum((matrix.sum() - matrix.trace()) / (count * (count - 1)) for matrix in (kernel(a, a), kernel(b, b)))
    return within - 2 * kernel(a, b).mean()
