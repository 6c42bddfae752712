"""Windows tile a map once, and a convolution computed through them equals the whole."""

import torch

from vistok.nn.windows import coarsened, scaled, windows


def test_inner_parts_tile_the_map_once():
    seen = torch.zeros(13, 7, dtype=torch.long)
    for window in windows((13, 7), side=4, margin=2):
        seen[window.inner] += 1
        outer = torch.empty(13, 7)[window.outer]
        assert outer[window.cut].shape == seen[window.inner].shape
    assert (seen == 1).all()


def test_convolution_through_windows_equals_the_whole():
    rng = torch.Generator().manual_seed(1)
    image = torch.rand(1, 1, 24, 40, generator=rng)
    kernel = torch.rand(1, 1, 5, 5, generator=rng)
    whole = torch.nn.functional.conv2d(image, kernel, padding=2)
    out = torch.empty_like(whole)
    for outer, inner, cut in windows((24, 40), side=8, margin=2):
        part = torch.nn.functional.conv2d(image[(..., *outer)], kernel, padding=2)
        out[(..., *inner)] = part[(..., *cut)]
    torch.testing.assert_close(out, whole)


def test_scales():
    part = (slice(2, 6), slice(0, 8))
    assert scaled(part, 16) == (slice(32, 96), slice(0, 128))
    assert coarsened(part, 2) == (slice(1, 3), slice(0, 4))
