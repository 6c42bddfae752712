import numpy as np
import pytest
import torch
from torch import Tensor

from vistok.errors import InputError
from vistok.metrics.ms_ssim import WEIGHTS, ms_ssim


def pair(height: int, width: int, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(2, 3, 20, 20, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    noisy = (smooth + noise * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)
    return (smooth * 255).to(torch.uint8), (noisy * 255).to(torch.uint8)


def plainly(x: np.ndarray, y: np.ndarray) -> float:
    """The paper's equation on one plane (H, W) in [0, 1], with a two-dimensional window, nothing shared with ours."""
    ndimage = pytest.importorskip("scipy.ndimage")
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    result = 1.0
    for scale, weight in enumerate(WEIGHTS):
        if scale:
            x, y = (ndimage.uniform_filter(z, 2, mode="reflect", origin=-1)[::2, ::2] for z in (x, y))

        def local(z: np.ndarray) -> np.ndarray:
            return ndimage.correlate(z, window)[5:-5, 5:-5]

        mx, my = local(x), local(y)
        contrast = (2 * (local(x * y) - mx * my) + 9e-4) / (local(x * x) - mx * mx + local(y * y) - my * my + 9e-4)
        luminance = (2 * mx * my + 1e-4) / (mx * mx + my * my + 1e-4)
        result *= ((luminance * contrast).mean() if scale == 4 else contrast.mean()) ** weight
    return result


@pytest.mark.parametrize("size", [(176, 192), (181, 207)])
def test_the_papers_equation(size: tuple[int, int]) -> None:
    first, second = pair(*size)
    expected = [
        np.mean([plainly(a / 255, b / 255) for a, b in zip(x, y, strict=True)])
        for x, y in zip(first.double().numpy(), second.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(ms_ssim(first, second).numpy(), expected, rtol=1e-6)


def test_order_and_bounds() -> None:
    first, little = pair(170, 170, 0.05)
    _, much = pair(170, 170, 0.5)
    torch.testing.assert_close(ms_ssim(first, first), torch.ones(2, dtype=torch.float64))
    assert (ms_ssim(first, little) > ms_ssim(first, much)).all()
    opposite = ms_ssim(first, 255 - first)
    assert ((opposite >= 0) & (opposite < 0.5)).all()


def test_pictures_too_small_for_five_scales() -> None:
    small = torch.zeros(1, 3, 160, 300)
    with pytest.raises(InputError, match="at least 161"):
        ms_ssim(small, small)
    assert ms_ssim(torch.zeros(1, 3, 161, 161), torch.zeros(1, 3, 161, 161)).item() == pytest.approx(1)
