"""The small TiTok of two reproductions: 32x32 pictures, 8 x 8 patches, 16 tokens of 512 codes, ViTs of width 64.

TiTok draws its first weights with a deviation of 0.02 at widths of 512 and more. At width 64 that is so little that for
hundreds of steps nothing of the picture reaches the codes; here it is 0.02 sqrt(512 / 64), which a layer passes on as
strongly as the published small model's does.
"""

from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from torch import nn

from vistok.nn.query_vit import ViTSize
from vistok.tokenizers.titok import SMALL, VARIANTS

SIZE = ViTSize(width=64, layers=3, heads=4)
CONFIG = replace(
    VARIANTS["titok-tiny-vq"], encoder=SIZE, decoder=SIZE, tokens=16, token_dim=12, codebook_size=512, normalize=True,
    clustering=True, encoder_patch=4, decoder_patch=4, image_size=32,
)  # fmt: skip
RECIPE: dict[str, Any] = {
    "data": {"size": 32},
    "optimizer": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.99], "weight_decay": 1e-4, "warmup": 50, "final": 0.03},
    "train": {"ema": None},
}


@torch.no_grad()
def scale_to_width(model: nn.Module) -> None:
    """Scale fresh weights of linear maps and convolutions, drawn as at the published small width, to this one."""
    for part in model.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            part.weight.mul_(sqrt(SMALL.width / SIZE.width))
