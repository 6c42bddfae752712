"""VTBench's protocol (arXiv:2505.13439): its preprocessing, and its metrics as released and as they should be.

    picture --Preprocess--> tensor --model--> tensor --to_picture--> 8 bits --stretched to 256--> PSNR, SSIM, ..

The released script has three slips, kept here under their own names so that its numbers can be had, each with a twin:
PSNR is one error over the whole set with an inferred range (`vtbench_psnr`; `psnr` is the mean per picture), SSIM takes
its range from each batch (`vtbench_ssim`), and LPIPS gets [0, 1] where it expects [-1, 1] (`Lpips(signed=False)`). Its
WER counts characters (`vistok.metrics.text`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log10

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vistok.metrics.ssim import VARIANTS, SsimVariant, check, similarity

SIDE = 256  # at which the released script compares


@dataclass(frozen=True)
class Preprocess:
    """How a picture goes to a model.

    target       a square's side, (width, height), or a negative number for the picture's own size
    lock_ratio   keep the ratio of the sides, else stretch
    center_crop  fill the target and cut the middle out; with `padding` instead, fit into it on black
    standardize  [-1, 1], else [0, 1]
    """

    target: int | tuple[int, int] = 512
    lock_ratio: bool = True
    center_crop: bool = True
    padding: bool = False
    standardize: bool = True

    def __call__(self, image: Image.Image) -> Tensor:
        """A picture to float32 (3, H, W)."""
        image = image.convert("RGB")
        values = torch.from_numpy(np.asarray(self._sized(image)).copy()).permute(2, 0, 1).float() / 255
        return values * 2 - 1 if self.standardize else values

    def _sized(self, image: Image.Image) -> Image.Image:
        if isinstance(self.target, tuple):
            width, height = self.target
        else:
            width, height = image.size if self.target < 0 else (self.target, self.target)
        if not self.lock_ratio:
            return image.resize((width, height), Image.Resampling.LANCZOS)
        ratios = width / image.width, height / image.height
        scale = max(ratios) if self.center_crop else min(ratios) if self.padding else 1.0
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        if self.center_crop:
            left, top = (image.width - width) // 2, (image.height - height) // 2
            return image.crop((left, top, left + width, top + height))
        if self.padding:
            canvas = Image.new("RGB", (width, height))
            canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
            return canvas
        return image

    def to_picture(self, pixels: Tensor) -> Image.Image:
        """Float (3, H, W) back to a picture: clamped, and cut off to 8 bits."""
        unit = (pixels.clamp(-1, 1) + 1) / 2 if self.standardize else pixels.clamp(0, 1)
        return Image.fromarray((unit * 255).permute(1, 2, 0).to(torch.uint8).numpy())


def stretched(image: Image.Image, side: int = SIDE) -> Tensor:
    """A picture stretched to a square, bilinear with antialias on 8 bits: float32 (3, side, side) in [0, 1]."""
    resized = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255


class SetPsnr:
    """`vtbench_psnr`: one squared error over the whole set, and the range that its originals happen to have."""

    def __init__(self) -> None:
        self._error, self._count, self._low, self._high = 0.0, 0, 0.0, 0.0

    def update(self, rebuilt: Tensor, original: Tensor) -> None:
        """Add pictures (B, 3, H, W) in [0, 1]."""
        self._error += float((rebuilt.double() - original.double()).square().sum())
        self._count += original.numel()
        self._low, self._high = min(self._low, float(original.min())), max(self._high, float(original.max()))

    @property
    def value(self) -> float:
        """In dB."""
        return 10 * log10((self._high - self._low) ** 2 * self._count / self._error) if self._error else float("inf")


def vtbench_ssim(batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean over pictures of torchmetrics' SSIM with the range of each batch (rebuilt, original): depends on batches."""
    values: list[Tensor] = []
    base = VARIANTS["torchmetrics"]
    for rebuilt, original in batches:
        spread = max(float(part.max() - part.min()) for part in (rebuilt, original))
        variant = SsimVariant(base.window, base.size, base.sigma, base.border, base.sample, spread, base.clamp)
        check(rebuilt, original, base.size // 2 + 1)
        values.append(similarity(rebuilt, original, variant)[0].mean(1))
    return float(torch.cat(values).mean())


# What each family of models is fed with in the paper.
FAMILIES: dict[str, Preprocess] = {
    "512": Preprocess(512),  # Anole, Chameleon, LlamaGen f16
    "256": Preprocess(256),  # LlamaGen f8, FlowMo, Open-MAGVIT2
    "256-unit": Preprocess(256, standardize=False),  # MaskBit, BSQ-ViT, TiTok
    "384-letterbox": Preprocess(384, center_crop=False, padding=True),  # Janus-Pro
    "1024-letterbox": Preprocess(1024, center_crop=False, padding=True),  # SD3.5, FLUX and other VAEs
}


def batched(pictures: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Pictures of one size, stacked in batches of these sizes."""
    stacked = torch.stack(list(pictures))
    return list(stacked.split(list(sizes)))
