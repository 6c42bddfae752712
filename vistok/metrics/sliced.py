"""MIND: the squared sliced 2-Wasserstein distance of features (arXiv:2605.06797), which needs no Gaussian.

random directions (P, W) of length 1 -> projections of both sets -> sorted -> 3 W * mean of squared differences
"""

import torch
from torch import Tensor

from vistok.errors import InputError


def sliced_distance(a: Tensor, b: Tensor, directions: int = 1000, seed: int = 2020) -> float:
    """MIND of features (n, W) and (m, W); the larger set is cut, at random, to the size of the smaller one.

    Raises InputError for shapes that do not fit.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 1 or directions < 1:
        raise InputError(f"features of shape {tuple(a.shape)} and {tuple(b.shape)}; expected (n, W) and (m, W)")
    rng = torch.Generator().manual_seed(seed)
    smaller = min(len(a), len(b))
    if len(a) != len(b):
        rows = torch.randperm(max(len(a), len(b)), generator=rng)[:smaller]
        a, b = (part[rows.to(part.device)] if len(part) > smaller else part for part in (a, b))
    lines = torch.randn(directions, a.shape[1], generator=rng).to(a.device)
    lines = lines / lines.norm(dim=1, keepdim=True)
    first, second = ((part.float() @ lines.T).sort(0).values for part in (a, b))
    return float(3 * a.shape[1] * (first - second).square().mean(dtype=torch.float64))
