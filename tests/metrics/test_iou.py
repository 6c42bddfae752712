"""Overlap of masks, boundaries and boxes, against counts made by hand."""

import pytest
import torch

from vistok.data.masks import from_boxes
from vistok.errors import InputError
from vistok.metrics.iou import boundary_iou, box_iou, cumulative_iou, iou

A = torch.tensor([[0, 0, 10, 10], [0, 0, 4, 4], [2, 2, 2, 2]])
B = torch.tensor([[5, 0, 15, 10], [0, 0, 4, 4], [2, 2, 2, 2]])


def test_masks_by_hand():
    a, b = from_boxes(A, (20, 20)), from_boxes(B, (20, 20))
    assert iou(a, b).tolist() == pytest.approx([50 / 150, 1, 1])
    assert cumulative_iou(a, b).item() == pytest.approx((50 + 16) / (150 + 16))
    assert cumulative_iou(a[2:], b[2:]).item() == 1
    assert iou(a * 0.6, b * 0.4).tolist() == [0, 0, 1]
    with pytest.raises(InputError):
        iou(a, b[:, 0])


def test_boxes_by_hand():
    assert box_iou(A, B).tolist() == pytest.approx([50 / 150, 1, 0])


def test_boundaries_see_an_outline_that_areas_hardly_do():
    a = from_boxes(torch.tensor([[10, 10, 90, 90]]), (100, 100))
    b = from_boxes(torch.tensor([[12, 12, 88, 88]]), (100, 100))
    assert iou(a, b).item() > 0.9
    # rings 3 wide: of 80 squares (924) and of 76 squares (876); they share one ring of 76 outside and 74 inside
    assert boundary_iou(a, b).item() == pytest.approx((76**2 - 74**2) / (80**2 - 74**2 + 76**2 - 70**2 - 76**2 + 74**2))
    assert boundary_iou(a, a).item() == 1
