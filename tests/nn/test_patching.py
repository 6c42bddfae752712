"""Patches and back, and the patch embedding as the convolution that it stands for."""

import pytest
import torch
import torch.nn.functional as F

from vistok.nn.patching import PatchEmbed, patchify, unpatchify


@pytest.mark.parametrize("order", ["cpp", "ppc"])
def test_round_trip(order):
    pixels = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    patches = patchify(pixels, 4, order)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(unpatchify(patches, (2, 3), 4, order), pixels)


def test_orders():
    pixels = torch.arange(2 * 2 * 3).view(1, 3, 2, 2)
    assert patchify(pixels, 2)[0, 0].tolist() == list(range(12))
    assert patchify(pixels, 2, "ppc")[0, 0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


def test_patch_embedding_is_a_strided_convolution():
    torch.manual_seed(0)
    embed, pixels = PatchEmbed(4, 6), torch.randn(2, 3, 8, 12)
    kernel = embed.project.weight.view(6, 3, 4, 4)
    expected = F.conv2d(pixels, kernel, embed.project.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(pixels), expected)


def test_a_picture_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="8x10"):
        patchify(torch.zeros(1, 3, 8, 10), 4)
