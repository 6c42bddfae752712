"""How published tools bring pictures to the size of a feature network. Their scores differ by it, so each has a name.

| name | of | what |
| --- | --- | --- |
| tensorflow | torch-fidelity, torchmetrics, 1d-tokenizer, ADM | TensorFlow 1's bilinear: no half-pixel centre |
| torch | pytorch-fid, LlamaGen, SEED-Voken | bilinear, align_corners False, no antialias |
| clean | clean-fid | Pillow's bicubic with antialias, in float32, clipped to 0..255, not rounded |
| bicubic | DINOv2 and CLIP as dgm-eval and Hessel feed them | bicubic with antialias |

All take (B, C, H, W) with values of 0..255, uint8 or float, and give float32 (B, C, h, w).
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vistok.errors import InputError, UnknownNameError, nearest
from vistok.layout import Size


def tensorflow(pixels: Tensor, size: Size) -> Tensor:
    """Bilinear as TensorFlow 1 without `half_pixel_centers`: output i reads at i * in / out."""
    pixels = pixels.float()
    for axis, wanted in ((2, size[0]), (3, size[1])):
        here = pixels.shape[axis]
        place = torch.arange(wanted, dtype=torch.float32, device=pixels.device) * (here / wanted)
        low = place.floor().long().clamp(max=here - 1)
        share = (place - low).view(-1, 1) if axis == 2 else place - low
        first, second = pixels.index_select(axis, low), pixels.index_select(axis, (low + 1).clamp(max=here - 1))
        pixels = first + (second - first) * share
    return pixels


def torch_bilinear(pixels: Tensor, size: Size) -> Tensor:
    """Bilinear between pixel centres, without antialias."""
    return F.interpolate(pixels.float(), size, mode="bilinear", align_corners=False)


def clean(pixels: Tensor, size: Size) -> Tensor:
    """Pillow's bicubic in float32, channel by channel, clipped to 0..255 and not rounded. On the CPU."""
    planes = pixels.float().cpu().flatten(0, 1).numpy()
    resized = [
        np.asarray(Image.fromarray(plane).resize((size[1], size[0]), Image.Resampling.BICUBIC)) for plane in planes
    ]
    found = torch.from_numpy(np.stack(resized)) if resized else torch.empty(0, *size)
    return found.clamp_(0, 255).unflatten(0, pixels.shape[:2]).to(pixels.device)


def bicubic(pixels: Tensor, size: Size) -> Tensor:
    """Bicubic with antialias, not clipped."""
    return F.interpolate(pixels.float(), size, mode="bicubic", align_corners=False, antialias=True)


RESIZES: dict[str, Callable[[Tensor, Size], Tensor]] = {
    "tensorflow": tensorflow,
    "torch": torch_bilinear,
    "clean": clean,
    "bicubic": bicubic,
}


def resize(pixels: Tensor, size: Size, name: str) -> Tensor:
    """Pixels (B, C, H, W) of 0..255 to (B, C, h, w), float32, in a named way.

    Raises UnknownNameError for another name, InputError for another shape.
    """
    if name not in RESIZES:
        raise UnknownNameError(f"no resize {name!r}{nearest(name, list(RESIZES)) or f'; there are {list(RESIZES)}'}")
    if pixels.ndim != 4:
        raise InputError(f"pixels of shape {tuple(pixels.shape)}; expected (B, C, H, W)")
    return RESIZES[name](pixels, size)
