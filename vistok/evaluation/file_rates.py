"""Compressed files at given rates: a tokenizer's beside JPEG, WebP, AVIF and JPEG XL, and BD-rate between them.

    picture --compress(bpp)--> file <= budget --decompress--> PSNR, MS-SSIM
       \\-----> codec, best quality within the same budget --> PSNR, MS-SSIM

Every file is counted whole, with its headers. BD-rate (Bjontegaard 2001) is the mean difference of log rate at equal
PSNR over the range of PSNR that both reach, here between straight lines through the points, per picture.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.compressed import compress, decompress
from vistok.errors import InputError
from vistok.evaluation.codecs import Ladder
from vistok.metrics.ms_ssim import ms_ssim
from vistok.metrics.psnr import psnr
from vistok.tokenizer import Tokenizer

RATES = (0.05, 0.1, 0.15, 0.25, 0.4)


@dataclass(frozen=True)
class File:
    """One picture in one coder's file for one budget. fits: False where even the smallest file is over the budget."""

    coder: str
    picture: int
    rate: float
    bpp: float
    psnr: float
    ms_ssim: float
    fits: bool = True
    scaled: bool = False

    def plain(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def measure_files(
    images: Iterable[Tensor],
    tokenizer: Tokenizer | None,
    codecs: Sequence[str],
    rates: Sequence[float] = RATES,
    progress: Callable[[int], None] | None = None,
) -> list[File]:
    """Files of every coder for every picture, uint8 (1, 3, H, W), sides of at least 161 pixels, at every rate.

    rates: bits per pixel. Raises InputError where there are no pictures, as `Ladder` and `compress` do.
    """
    found: list[File] = []
    for picture, pixels in enumerate(images):
        found += _measure_picture(picture, pixels, tokenizer, codecs, rates)
        if progress is not None:
            progress(picture + 1)
    if not found:
        raise InputError("no pictures to compare on")
    return found


def _measure_picture(
    picture: int, pixels: Tensor, tokenizer: Tokenizer | None, codecs: Sequence[str], rates: Sequence[float]
) -> Iterator[File]:
    area = prod(pixels.shape[2:])

    def file(coder: str, rate: float, size: int, rebuilt: Tensor, *flags: bool) -> File:
        quality, similarity = float(psnr(rebuilt, pixels)[0]), float(ms_ssim(rebuilt, pixels)[0])
        return File(coder, picture, rate, 8 * size / area, quality, similarity, *flags)

    for rate in rates if tokenizer is not None else ():
        assert tokenizer is not None
        data = compress(tokenizer, pixels, bpp=rate)
        yield file("vistok", rate, len(data), decompress(tokenizer, data).cpu())
    for codec in codecs:
        ladder = Ladder(pixels, codec)
        for rate in rates:
            coded = ladder.best(int(rate * area / 8))
            yield file(codec, rate, coded.bytes, coded.pixels, coded.fits, coded.scale > 1)


def means(files: Sequence[File]) -> list[dict[str, Any]]:
    """Means over the pictures, a row per coder and rate, in order of first appearance."""
    groups: dict[tuple[str, float], list[File]] = {}
    for file in files:
        groups.setdefault((file.coder, file.rate), []).append(file)
    return [
        {
            "coder": coder,
            "rate": rate,
            "bpp": float(np.mean([file.bpp for file in group])),
            "psnr": float(np.mean([file.psnr for file in group])),
            "ms_ssim": float(np.mean([file.ms_ssim for file in group])),
            "over_budget": sum(not file.fits for file in group),
            "scaled": float(np.mean([file.scaled for file in group])),
            "pictures": len(group),
        }
        for (coder, rate), group in groups.items()
    ]


def bd_rate(files: Sequence[File], coder: str, anchor: str) -> float | None:
    """Percent of bytes that `coder` needs more (negative: fewer) than `anchor` for equal PSNR, mean over pictures.

    Pictures where their ranges of PSNR do not overlap are left out; None where that is all of them.
    """
    found = []
    for picture in sorted({file.picture for file in files}):
        curves = []
        for name in (coder, anchor):
            points = {file.psnr: np.log(file.bpp) for file in files if (file.coder, file.picture) == (name, picture)}
            quality = np.array(sorted(points))
            curves.append((quality, np.array([points[value] for value in quality])))
        (ours, _), (theirs, _) = curves
        if not len(ours) or not len(theirs):
            continue
        low, high = max(ours[0], theirs[0]), min(ours[-1], theirs[-1])
        if high - low < 1e-6:
            continue
        grid = np.linspace(low, high, 200)
        first, second = (np.interp(grid, quality, rate) for quality, rate in curves)
        found.append(float(np.mean(first - second)))
    return 100 * (float(np.exp(np.mean(found))) - 1) if found else None


def as_pixels(picture: Any) -> Tensor:
    """A PIL image as uint8 (1, 3, H, W), at its full size."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]
