"""The Frechet distance between two sets of features, each taken as a Gaussian (arXiv:1706.08500).

d = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), in float64, on whatever features it is given.
"""

import torch
from torch import Tensor

from vistok.errors import InputError


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Distance of features (n, W) and (m, W). Raises InputError for other shapes or fewer than two rows."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise InputError(f"features of shape {tuple(a.shape)} and {tuple(b.shape)}; expected (n, W) and (m, W)")
    means, roots = [], []
    for features in (a.double(), b.double()):
        centred = features - features.mean(0)
        means.append(features.mean(0))
        roots.append(centred / (len(features) - 1) ** 0.5)
    # tr (C_a C_b)^(1/2) is the sum of the singular values of X_a X_b^T, with C = X^T X: no root of a matrix is taken
    first, second = (root if len(root) <= root.shape[1] else torch.linalg.qr(root).R for root in roots)
    shared = torch.linalg.svdvals(first @ second.T).sum()
    spread = sum(root.square().sum() for root in roots)
    return float((means[0] - means[1]).square().sum() + spread - 2 * shared)
