"""How published evaluation scripts bring a model's output in [-1, 1] to 8 bits, before PSNR and SSIM.

Rounding and truncation differ by up to 0.2 dB on good reconstructions, so a number that is to be compared with a
paper's has to take the paper's way. Our own way (`vistok.pixels.as_uint8`) rounds to the nearest level.
"""

import torch
from torch import Tensor


def llamagen_uint8(pixels: Tensor) -> Tensor:
    """127.5 x + 128, clamped and cut off: LlamaGen, TokenFlow. Float in about [-1, 1] to uint8, same shape."""
    return (127.5 * pixels + 128.0).clamp(0, 255).to(torch.uint8)


def seed_voken_uint8(pixels: Tensor) -> Tensor:
    """(x + 1) / 2 clamped, times 255, cut off: SEED-Voken, which takes the originals through it too.

    An original that came as v / 127.5 - 1 in float32 loses one level at many pixels on the way.
    """
    return (((pixels + 1) / 2).clamp(0, 1) * 255).to(torch.uint8)
