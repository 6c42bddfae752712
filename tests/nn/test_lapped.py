"""The lapped transform: orthonormal, invertible, and better than blocks on smooth pictures."""

import torch

from vistok.nn.lapped import BLOCK, LappedTransform, border_filter


def smooth(batch: int, size: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(3)
    coarse = torch.rand(batch, 3, 4, 4, generator=rng)
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)


def test_border_filter_is_orthonormal():
    matrix = border_filter(BLOCK).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(BLOCK, dtype=torch.float64), atol=1e-6, rtol=0)


def test_all_directions_invert_exactly_and_keep_energy():
    transform = LappedTransform(768)
    pixels = torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    transform.fit([pixels])
    latent = transform(pixels)
    assert latent.shape == (2, 768, 3, 5)
    torch.testing.assert_close(transform.inverse(latent), pixels, atol=2e-5, rtol=0)
    torch.testing.assert_close(latent.square().sum(), (pixels - transform.mean).square().sum(), rtol=1e-4, atol=0)


def test_few_directions_hold_smooth_pictures_and_variances_fall():
    transform = LappedTransform(24)
    pixels = smooth(16, 64)
    transform.fit([pixels[:8], pixels[8:]])
    latent = transform(pixels)
    deviation = latent.square().mean((0, 2, 3))
    assert (deviation[:-1] >= deviation[1:] - 1e-6).all()
    error = (transform.inverse(latent) - pixels).square().mean()
    assert error < 0.01 * pixels.var()
