"""Pictures to patches and back.

    (B, C, h p, w p)  <->  (B, h w, p p C)      row-major over the grid

Two orders of the values inside a patch are in use: "c p p", that of a convolution's kernel, and "p p c", that of heads
which predict pixels. `order` names it.
"""

from typing import Literal

from einops import rearrange
from torch import Tensor, nn

from vistok.errors import InputError

Order = Literal["cpp", "ppc"]
_INSIDE = {"cpp": "(c p q)", "ppc": "(p q c)"}


def patchify(pixels: Tensor, patch: int, order: Order = "cpp") -> Tensor:
    """(B, C, H, W) to (B, H W / patch^2, C patch^2). Raises InputError when the patch does not divide the sides."""
    height, width = pixels.shape[-2:]
    if height % patch or width % patch:
        raise InputError(f"patches of {patch} do not divide a picture of {height}x{width}")
    return rearrange(pixels, f"b c (h p) (w q) -> b (h w) {_INSIDE[order]}", p=patch, q=patch)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: int, order: Order = "cpp") -> Tensor:
    """Inverse of `patchify`, for a grid of (rows, columns) patches."""
    return rearrange(patches, f"b (h w) {_INSIDE[order]} -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch, q=patch)


class PatchEmbed(nn.Module):
    """Each patch through one linear map, (B, C, H, W) to (B, N, width): a convolution with kernel and stride `patch`.

    The weight is (width, C patch^2), a convolution's (width, C, patch, patch) laid flat.
    """

    def __init__(self, patch: int, width: int, channels: int = 3, bias: bool = True):
        super().__init__()
        self.patch = patch
        self.project = nn.Linear(channels * patch * patch, width, bias=bias)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.project(patchify(pixels, self.patch))
