"""Losses between masks, by hand."""

import pytest
import torch

from vistok.losses.segmentation import binary_cross_entropy, blur, dice, dilate, edge_weighted_square, edges, erode


def square(low=4, high=10, size=16):
    mask = torch.zeros(1, 1, size, size)
    mask[..., low:high, low:high] = 1
    return mask


def test_growing_and_shrinking():
    assert torch.equal(dilate(square(), 3), square(3, 11))
    assert torch.equal(erode(square(), 5), square(6, 8))
    assert edges(square()).sum() == 8**2 - 4**2


def test_terms_by_hand():
    p, t = torch.tensor([[0.8, 0.2]]), torch.tensor([[1.0, 0.0]])
    assert binary_cross_entropy(p, t).item() == pytest.approx(-torch.tensor(0.8).log().item(), rel=1e-5)
    assert dice(p, t).item() == pytest.approx(1 - 1.6 / 2, rel=1e-4)
    assert binary_cross_entropy(1 - t, t).isfinite()
    assert dice(torch.zeros(2), torch.zeros(2)).item() < 1
    mask = square()
    assert edge_weighted_square(mask + 1, mask, 8.0).item() == pytest.approx(1 + 8 * 48 / 256)


def test_blur_keeps_the_peak_at_one_and_spreads():
    soft = blur(square()[0], 2.0)
    assert soft.max().item() == pytest.approx(1)
    assert soft[0, 0, 0] > 0
    assert torch.allclose(soft, soft.transpose(1, 2), atol=1e-6)
    wide = blur(square()[0], 98.0)  # a kernel far wider than the mask
    assert wide.isfinite().all()
    assert wide.min() > 0.9
