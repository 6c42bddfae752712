"""DiffAugment: the same random changes for real and generated pixels, through which gradients flow.

Translation, colour (brightness, saturation, contrast) and cutout, arXiv:2006.10738, in the form of StyleGAN-T and VAR;
and the blur that fades while a discriminator warms up. Pixels in the discriminator's own range, (B, 3, H, W).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TRANSLATION = 0.125  # share of the side


def diff_augment(
    x: Tensor,
    probability: float = 1.0,
    cutout: float = 0.2,
    *,
    groups: Tensor | None = None,
    draws: Tensor | None = None,
) -> Tensor:
    """`x` changed; each of the three groups acts, for the whole batch, with `probability`.

    groups, draws  the uniform numbers, (3,) and (7, B, 1, 1), drawn from torch's global generator unless given:
                   translation down and right, brightness, saturation, contrast, cutout down and right
    """
    batch, _, height, width = x.shape
    if groups is None:
        groups = torch.rand(3)
    if draws is None:
        draws = torch.rand(7, batch, 1, 1, device=x.device)
    translates, colours, cuts = (groups <= probability).tolist()
    u = draws.to(x.device)
    if translates:
        x = _translate(x, *(_shift(u[i], round(side * TRANSLATION)) for i, side in ((0, height), (1, width))))
    if colours:
        u4 = u[:, :, None].to(x.dtype)
        x = x + (u4[2] - 0.5)
        grey = x.mean(1, keepdim=True)
        x = (x - grey) * (2 * u4[3]) + grey
        mean = x.mean((1, 2, 3), keepdim=True)
        x = (x - mean) * (u4[4] + 0.5) + mean
    if cuts and cutout:
        holes = [_hole(u[i], side, round(side * cutout)) for i, side in ((5, height), (6, width))]
        x = x * ~(holes[0][:, None, :, None] & holes[1][:, None, None, :])
    return x


def _shift(u: Tensor, most: int) -> Tensor:
    """-most .. most, (B, 1, 1)."""
    return (u * (2 * most + 1)).floor().long() - most


def _translate(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Output (y, x) is input (y + down, x + right), zero outside."""
    batch, _, height, width = x.shape
    rows = torch.arange(height, device=x.device) + down.view(batch, 1)
    columns = torch.arange(width, device=x.device) + right.view(batch, 1)
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None, :]
    which = torch.arange(batch, device=x.device)[:, None, None]
    moved = x.permute(0, 2, 3, 1)[which, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]]
    return moved.permute(0, 3, 1, 2) * inside


def _hole(u: Tensor, side: int, cut: int) -> Tensor:
    """(B, side): true where the hole is. At the border it shrinks to what still lies on the picture."""
    first = (u.view(-1, 1) * (side + 1 - cut % 2)).floor().long() - cut // 2
    positions = (first + torch.arange(cut, device=u.device)).clamp(0, side - 1)
    return torch.zeros(len(first), side, dtype=torch.bool, device=u.device).scatter_(1, positions, True)


def fading_blur(x: Tensor, strength: float) -> Tensor:
    """Blur with sigma = strength * sqrt(H / 2) and reflected borders; nothing where its radius is below a pixel.

    The kernel is 2^-(i / sigma)^2 up to i = floor(3 sigma). Strength 1 before a discriminator starts, 0 when it has.
    """
    sigma = strength * (x.shape[-2] / 2) ** 0.5
    radius = min(int(3 * sigma), min(x.shape[-2:]) - 1)
    if radius < 1:
        return x
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    taps = torch.exp2(-((offsets / sigma) ** 2))
    taps = (taps / taps.sum()).expand(x.shape[1], 1, -1)
    x = F.pad(x, (radius, radius, radius, radius), mode="reflect")
    x = F.conv2d(x, taps[:, :, None, :], groups=x.shape[1])
    return F.conv2d(x, taps[:, :, :, None], groups=x.shape[1])
