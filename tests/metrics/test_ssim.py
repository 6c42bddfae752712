import numpy as np
import pytest
import torch
from torch import Tensor

from vistok.errors import InputError
from vistok.metrics import ssim as module
from vistok.metrics.ssim import VARIANTS, ssim


def pair(seed: int = 0, height: int = 40, width: int = 33, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """A smooth random picture and a noisy copy, uint8 (2, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    noisy = (smooth + noise * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)
    return (smooth * 255).to(torch.uint8), (noisy * 255).to(torch.uint8)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("skimage-u7-dr1", {"data_range": 255}),
        ("skimage-u7-dr2", {"data_range": 510}),
        ("wang", {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}),
    ],
)
def test_scikit_image_gives_the_same(variant: str, options: dict) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    first, second = pair()
    expected = [
        metrics.structural_similarity(a.numpy(), b.numpy(), channel_axis=0, **options)
        for a, b in zip(first, second, strict=True)
    ]
    np.testing.assert_allclose(ssim(first, second, variant).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("size", [33 * 20, 40 * 33 * 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_of_the_work_change_nothing(variant: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair()
    whole = ssim(first, second, variant)
    monkeypatch.setattr(module, "AT_ONCE", size)
    torch.testing.assert_close(ssim(first, second, variant), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_for_equal_pictures_and_less_the_more_noise(variant: str) -> None:
    first, _ = pair()
    torch.testing.assert_close(ssim(first, first, variant), torch.ones(2, dtype=torch.float64))
    values = [ssim(*pair(noise=noise), variant) for noise in (0.02, 0.1, 0.4)]
    assert (values[0] > values[1]).all()
    assert (values[1] > values[2]).all()


def test_pictures_of_a_batch_do_not_touch() -> None:
    first, second = pair()
    alone = torch.cat([ssim(first[i : i + 1], second[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(ssim(first, second), alone, rtol=1e-12, atol=0)


def test_flat_bright_pictures_keep_their_digits() -> None:
    """Differences of large squares: float32 would lose them."""
    first = torch.full((1, 1, 16, 16), 250, dtype=torch.uint8)
    second = torch.full((1, 1, 16, 16), 252, dtype=torch.uint8)
    x, y, c1 = 250 / 255, 252 / 255, 1e-4
    expected = (2 * x * y + c1) / (x * x + y * y + c1)
    assert ssim(first, second, "wang").item() == pytest.approx(expected, abs=1e-12)


def test_errors() -> None:
    with pytest.raises(InputError, match="did you mean 'wang'"):
        ssim(*pair(), "wan")
    with pytest.raises(InputError, match="at least 7 pixels"):
        ssim(torch.zeros(1, 3, 6, 20), torch.zeros(1, 3, 6, 20))
    with pytest.raises(InputError, match="expected two"):
        ssim(torch.zeros(1, 3, 9, 9), torch.zeros(1, 3, 9, 10))
