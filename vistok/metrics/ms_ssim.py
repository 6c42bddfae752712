"""Multi-scale structural similarity (Wang, Simoncelli and Bovik 2003, equation 7).

    scale 1  cs --------------- ^ .0448
      | mean of 2 x 2
    scale 2  cs --------------- ^ .2856
      | ...
    scale 5  luminance * cs --- ^ .1333      -> the product

cs is SSIM's contrast-structure factor (Gaussian window of 11, sigma 1.5, places where it fits). Each channel has its
own product and the mean over channels is reported; a negative factor, which has no real power, counts as 0.
"""

import torch.nn.functional as F
from torch import Tensor

from vistok.metrics.ssim import VARIANTS, check, similarity
from vistok.pixels import as_float

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SMALLEST = VARIANTS["wang"].size * 2 ** (len(WEIGHTS) - 1) - 15  # 161: the window still fits at the fifth scale


def ms_ssim(first: Tensor, second: Tensor) -> Tensor:
    """MS-SSIM per picture, float64 (B,), in [0, 1].

    Takes (B, C, H, W), uint8 or float in [0, 1] (not rounded), sides of at least 161 pixels.
    Raises InputError for different shapes or smaller pictures.
    """
    check(first, second, SMALLEST)
    product: Tensor | float = 1.0
    for scale, weight in enumerate(WEIGHTS):
        if scale:
            first, second = _halve(first), _halve(second)
        index, contrast = similarity(first, second, VARIANTS["wang"])
        factor = index if scale == len(WEIGHTS) - 1 else contrast
        product = factor.clamp(min=0) ** weight * product
    assert isinstance(product, Tensor)
    return product.mean(1)


def _halve(pixels: Tensor) -> Tensor:
    """Means of 2 x 2; an odd last row or column is repeated, as the authors' filter does."""
    height, width = pixels.shape[2:]
    pixels = as_float(pixels)
    if height % 2 or width % 2:
        pixels = F.pad(pixels, (0, width % 2, 0, height % 2), mode="replicate")
    return F.avg_pool2d(pixels, 2)
