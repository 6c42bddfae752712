import math

import pytest
import torch

from vistok.errors import InputError
from vistok.metrics.psnr import batch_psnr, psnr


def test_known_error() -> None:
    dark = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    bright = dark.clone()
    bright[1] += 10
    found = psnr(dark, bright)
    assert found.dtype == torch.float64
    assert math.isinf(found[0])
    assert found[1].item() == pytest.approx(20 * math.log10(255 / 10))
    assert batch_psnr(dark, bright).item() == pytest.approx(10 * math.log10(255**2 / 50))


def test_floats_are_compared_as_a_file_would_hold_them() -> None:
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    nearly = (pixels * 255).round() / 255
    assert math.isinf(psnr(pixels, nearly)[0])
    assert math.isfinite(batch_psnr(pixels, nearly))


def test_shapes_that_do_not_fit() -> None:
    for measure in (psnr, batch_psnr):
        with pytest.raises(InputError, match="shapes"):
            measure(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5))
