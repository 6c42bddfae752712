"""Structural similarity (Wang et al. 2004), in the variants whose numbers the field's papers print.

    pixels (B, C, H, W) x 2 --window means, variances, covariance--> map (B, C, h, w) --mean--> (B,)

    S = (2 mx my + C1) / (mx^2 + my^2 + C1)  *  (2 sxy + C2) / (sx^2 + sy^2 + C2)     C1 = (.01 R)^2, C2 = (.03 R)^2

The same two pictures score up to 0.1 apart between variants, so a number is worth something only with its name.
Everything runs in float64, in bands of rows, so that a large photograph needs little memory.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.errors import InputError, nearest
from vistok.pixels import as_float

K1, K2 = 0.01, 0.03
AT_ONCE = 1 << 16  # pixels of a plane at a time: what stays in a core's cache


@dataclass(frozen=True)
class SsimVariant:
    """One implementation's choices.

    window: "uniform" or "gaussian" over `size` pixels a side. border: "valid" leaves out places where the window
    leaves the picture, "reflect" mirrors the picture there. sample: unbiased variances (n / (n - 1)). data_range: R,
    for pixels in [0, 1]. clamp: variances below 0, which rounding leaves behind, become 0.
    """

    window: Literal["uniform", "gaussian"]
    size: int
    sigma: float = 1.5
    border: Literal["valid", "reflect"] = "valid"
    sample: bool = False
    data_range: float = 1.0
    clamp: bool = False


VARIANTS: dict[str, SsimVariant] = {
    "skimage-u7-dr1": SsimVariant("uniform", 7, sample=True),  # scikit-image's default; SEED-Voken
    "skimage-u7-dr2": SsimVariant("uniform", 7, sample=True, data_range=2.0),  # LlamaGen, TokenFlow: values run high
    "wang": SsimVariant("gaussian", 11),  # the paper's own; pytorch_msssim, scikit-image with gaussian_weights
    "torchmetrics": SsimVariant("gaussian", 11, border="reflect", clamp=True),
}
DEFAULT = "skimage-u7-dr1"


def ssim(first: Tensor, second: Tensor, variant: str = DEFAULT) -> Tensor:
    """Mean SSIM per picture over places and channels, float64 (B,), at most 1.

    Takes (B, C, H, W), uint8 or float in [0, 1]; floats are compared as they are, not rounded to 8 bits.
    `variant`: a name in `VARIANTS`. Raises InputError for different shapes, pictures smaller than the window, or an
    unknown variant.
    """
    if variant not in VARIANTS:
        raise InputError(f"no SSIM variant {variant!r}{nearest(variant, list(VARIANTS)) or f'; {list(VARIANTS)}'}")
    chosen = VARIANTS[variant]
    check(first, second, chosen.size if chosen.border == "valid" else chosen.size // 2 + 1)
    return similarity(first, second, chosen)[0].mean(1)


def check(first: Tensor, second: Tensor, smallest: int) -> None:
    """Raise InputError unless both are (B, C, H, W) of one shape with sides of at least `smallest` pixels."""
    if first.shape != second.shape or first.ndim != 4:
        raise InputError(f"pixels of shapes {tuple(first.shape)} and {tuple(second.shape)}; expected two (B, C, H, W)")
    if min(first.shape[2:]) < smallest:
        raise InputError(
            f"pictures of {first.shape[2]}x{first.shape[3]}; expected sides of at least {smallest} pixels here"
        )


def similarity(first: Tensor, second: Tensor, variant: SsimVariant) -> tuple[Tensor, Tensor]:
    """Means over places of the whole index and of its contrast-structure factor alone, float64 (B, C) each."""
    taps, lost = _taps(variant), 2 * (variant.size // 2) * (variant.border == "valid")
    batch, channels, height, width = first.shape
    all_x, all_y = first.flatten(0, 1), second.flatten(0, 1)
    totals = torch.zeros(2, batch * channels, dtype=torch.float64, device=first.device)
    planes = max(1, AT_ONCE // (height * width))
    rows = max(16, AT_ONCE // (planes * width))
    for plane in range(0, batch * channels, planes):
        x, y = all_x[plane : plane + planes], all_y[plane : plane + planes]
        for start in range(0, height - lost, rows):
            stop = min(start + rows, height - lost)
            band_x, band_y = _band(x, start, stop, variant), _band(y, start, stop, variant)
            totals[:, plane : plane + planes] += _sums(band_x, band_y, taps, variant)
    index, contrast = totals.view(2, batch, channels) / ((height - lost) * (width - lost))
    return index, contrast


def _band(pixels: Tensor, start: int, stop: int, variant: SsimVariant) -> Tensor:
    """What the map's rows start..stop look at in planes (P, H, W), float64, mirrored where the variant does."""
    reach = variant.size // 2
    if variant.border == "valid":
        return as_float(pixels[:, start : stop + 2 * reach], torch.float64)
    height = pixels.shape[1]
    rows = torch.arange(start - reach, stop + reach, device=pixels.device).abs()
    rows = torch.where(rows >= height, 2 * (height - 1) - rows, rows)
    band = as_float(pixels.index_select(1, rows), torch.float64)
    return F.pad(band, (reach, reach, 0, 0), mode="reflect")


def _sums(x: Tensor, y: Tensor, taps: tuple[float, ...], variant: SsimVariant) -> Tensor:
    """Sums over a band's places of the index and of its contrast-structure factor: (2, P)."""
    mean_x, mean_y = _filter(x, taps), _filter(y, taps)
    var_x = _filter(x * x, taps).sub_(mean_x * mean_x)
    var_y = _filter(y * y, taps).sub_(mean_y * mean_y)
    cov = _filter(x * y, taps).sub_(mean_x * mean_y)
    if variant.sample:
        unbiased = variant.size**2 / (variant.size**2 - 1)
        var_x, var_y, cov = var_x * unbiased, var_y * unbiased, cov * unbiased
    if variant.clamp:
        var_x, var_y = var_x.clamp_(min=0), var_y.clamp_(min=0)
    c1, c2 = (K1 * variant.data_range) ** 2, (K2 * variant.data_range) ** 2
    contrast = (2 * cov + c2) / (var_x + var_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    return torch.stack([(luminance * contrast).sum((1, 2)), contrast.sum((1, 2))])


def _filter(x: Tensor, taps: tuple[float, ...]) -> Tensor:
    """Separable window, valid: (P, H, W) -> (P, H - n + 1, W - n + 1). Added up tap by tap, in cache."""
    for axis in (1, 2):
        length = x.shape[axis] - len(taps) + 1
        out = x.narrow(axis, 0, length) * taps[0]
        for offset, weight in enumerate(taps[1:], 1):
            out.add_(x.narrow(axis, offset, length), alpha=weight)
        x = out
    return x


@cache
def _taps(variant: SsimVariant) -> tuple[float, ...]:
    if variant.window == "uniform":
        return (1 / variant.size,) * variant.size
    offsets = torch.arange(variant.size, dtype=torch.float64) - variant.size // 2
    weights = torch.exp(-0.5 * (offsets / variant.sigma) ** 2)
    return tuple((weights / weights.sum()).tolist())
