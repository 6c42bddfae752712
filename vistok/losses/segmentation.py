"""Losses between masks: cross-entropy, dice, and squared error that counts edges more.

All take probabilities and targets of one shape, in [0, 1], and give a scalar.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def binary_cross_entropy(probability: Tensor, target: Tensor) -> Tensor:
    """Mean over all pixels, of probabilities kept EPS away from 0 and 1."""
    return F.binary_cross_entropy(probability.float().clamp(EPS, 1 - EPS), target.float())


def dice(probability: Tensor, target: Tensor) -> Tensor:
    """1 - 2 |p t| / (|p| + |t|), one ratio over the whole batch, as HiMTok's authors take it."""
    p, t = probability.float().clamp(EPS, 1 - EPS), target.float()
    return 1 - (2 * (p * t).sum() + EPS) / (p.sum() + t.sum() + EPS)


def edge_weighted_square(values: Tensor, mask: Tensor, weight: float) -> Tensor:
    """Mean of (1 + weight * edge) (values - mask)^2, with the edge of `edges`; values (B, C, ...), mask (B, 1, ...)."""
    return ((1 + weight * edges(mask)) * (values.float() - mask.float()).square()).mean()


def edges(mask: Tensor) -> Tensor:
    """Pixels of (B, 1, H, W) whose 3 x 3 neighbourhood holds both values: dilation minus erosion."""
    return dilate(mask, 3) - erode(mask, 3)


def dilate(mask: Tensor, kernel: int) -> Tensor:
    """Largest value of each kernel x kernel neighbourhood, kernel odd; outside the picture counts as nothing."""
    return F.max_pool2d(mask.float(), kernel, 1, kernel // 2)


def erode(mask: Tensor, kernel: int) -> Tensor:
    """Smallest value of each kernel x kernel neighbourhood, kernel odd; outside the picture counts as nothing."""
    return -F.max_pool2d(-mask.float(), kernel, 1, kernel // 2)


def blur(mask: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (B, H, W), kernel 2 ceil(3 sigma) + 1, zero outside, each divided by its largest value."""
    reach = int(-(-3 * sigma // 1))
    offsets = torch.arange(-reach, reach + 1, device=mask.device, dtype=torch.float32)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    x = mask.float()[:, None]
    x = F.conv2d(x, kernel[None, None, :, None], padding=(reach, 0))
    x = F.conv2d(x, kernel[None, None, None, :], padding=(0, reach))[:, 0]
    return x / x.amax((1, 2), keepdim=True).clamp_min(EPS)
