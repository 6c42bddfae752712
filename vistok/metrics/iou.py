"""Intersection over union of masks, of their boundaries, and of boxes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.errors import InputError


def iou(found: Tensor, target: Tensor) -> Tensor:
    """|A and B| / |A or B| of masks (B, 1, H, W), one value for each; values of at least 0.5 count.

    1 where both are empty. Raises InputError for shapes that differ.
    """
    a, b = _pair(found, target)
    union = (a | b).sum((1, 2, 3))
    return torch.where(union > 0, (a & b).sum((1, 2, 3)) / union.clamp_min(1), 1.0)


def boundary_iou(found: Tensor, target: Tensor, share: float = 0.02) -> Tensor:
    """IoU of the inner boundaries of masks (B, 1, H, W): what lies within `share` of the diagonal of the outline.

    As "Boundary IoU" (arXiv:2103.16562): each mask without its erosion by d = share * diagonal steps of 3 x 3.
    """
    a, b = _pair(found, target)
    steps = max(1, round(share * (a.shape[2] ** 2 + a.shape[3] ** 2) ** 0.5))
    return iou(_boundary(a, steps), _boundary(b, steps))


def cumulative_iou(found: Tensor, target: Tensor) -> Tensor:
    """cIoU, the referring-segmentation literature's: all intersections over all unions, a scalar."""
    a, b = _pair(found, target)
    union = (a | b).sum()
    return (a & b).sum() / union if union > 0 else union.new_ones((), dtype=torch.float32)


def box_iou(found: Tensor, target: Tensor) -> Tensor:
    """IoU (B,) of boxes (B, 4): left, top, right, bottom, the last two exclusive. 0 where both are empty."""
    low, high = torch.maximum(found[:, :2], target[:, :2]), torch.minimum(found[:, 2:], target[:, 2:])
    both = (high - low).clamp_min(0).prod(1)
    areas = sum((boxes[:, 2:] - boxes[:, :2]).clamp_min(0).prod(1) for boxes in (found, target))
    union = areas - both
    return torch.where(union > 0, both / union.clamp_min(1e-9), 0.0)


def _pair(found: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if found.shape != target.shape or found.ndim != 4 or found.shape[1] != 1:
        raise InputError(f"masks of shapes {tuple(found.shape)} and {tuple(target.shape)}; expected both (B, 1, H, W)")
    return found >= 0.5, target >= 0.5


def _boundary(mask: Tensor, steps: int) -> Tensor:
    eroded = mask.float()
    for _ in range(steps):  # outside counts as nothing, so a mask has a boundary at the picture's edge too
        eroded = -F.max_pool2d(F.pad(-eroded, (1, 1, 1, 1)), 3, 1)
    return mask.float() - eroded
