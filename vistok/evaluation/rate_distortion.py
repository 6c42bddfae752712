"""Rate against distortion: a tokenizer's prefixes beside JPEG, WebP and AVIF at equal bytes.

    picture --encode--> Tokens --prefix(k)--> bytes of the packed codes, the compressed file, PSNR, SSIM, CPU time
       \\---------------> codec, best quality within the same bytes --> PSNR, SSIM, CPU time

The budget of every codec is what the prefix's codes take, packed, for that very picture. A codec's file is counted
whole; the tokenizer's rows say both what its codes take and what its compressed file takes, header and all.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from vistok.compressed import pack
from vistok.errors import InputError
from vistok.evaluation.codecs import Ladder, available
from vistok.evaluation.reconstruction import fitting, prefix_lengths
from vistok.metrics.psnr import psnr
from vistok.metrics.ssim import ssim
from vistok.metrics.stream import Mean
from vistok.tokenizer import Tokenizer


@dataclass(frozen=True)
class RatePoint:
    """Means over the pictures for one coder at one rate.

    coder: "tokens", or a codec's name. tokens: the prefix whose bytes are the budget. bpp: bits per pixel in the end.
    file_bpp: of the compressed file (`vistok compress`), header and all; None for codecs.
    encode_ms, decode_ms: CPU milliseconds per picture. scaled: share of pictures that a codec coded smaller than they
    are. too_large: pictures for which even the codec's smallest file is over the budget (that file is counted here).
    wins: share of pictures on which the tokens have the higher PSNR.
    """

    coder: str
    tokens: int
    bpp: float
    psnr: float
    ssim: float
    encode_ms: float
    decode_ms: float
    pictures: int
    file_bpp: float | None = None
    scaled: float = 0.0
    too_large: int = 0
    wins: float | None = None

    def plain(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def rate_distortion(
    tokenizer: Tokenizer,
    images: Iterable[Tensor],
    *,
    codecs: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[RatePoint]:
    """The table: for each prefix length a row of the tokenizer and one of each codec at the same bytes.

    images: uint8 (1, 3, H, W) each, of one size where `lengths` is given. codecs: all that this Pillow has by default.
    lengths: all prefixes by default (`prefix_lengths`). progress: called with the number of pictures done.
    Raises InputError where there are no pictures, or the tokenizer's tokens are continuous.
    """
    names = list(available() if codecs is None else codecs)
    sums: dict[tuple[int, str], _Sums] = {}
    count = 0
    for count, pixels in enumerate(images, 1):
        _add_picture(sums, tokenizer, pixels, names, lengths, warm=count > 1)
        if progress is not None:
            progress(count)
    if not count:
        raise InputError("no pictures to compare on")
    return [total.point(coder) for (_, coder), total in sorted(sums.items(), key=lambda entry: entry[0][0])]


class _Sums:
    """What is known of one coder at one prefix so far."""

    def __init__(self) -> None:
        names = ("tokens", "bpp", "file_bpp", "psnr", "ssim", "encode", "decode", "scaled", "wins", "too_large")
        self.means = {name: Mean() for name in names}

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.means[name].update(torch.tensor(value, dtype=torch.float64))

    def point(self, coder: str) -> RatePoint:
        mean = {name: stream.mean for name, stream in self.means.items()}
        pictures = self.means["psnr"].count
        return RatePoint(
            coder=coder,
            tokens=round(mean["tokens"] or 0),
            bpp=mean["bpp"] or 0.0,
            psnr=mean["psnr"] or 0.0,
            ssim=mean["ssim"] or 0.0,
            encode_ms=1000 * (mean["encode"] or 0.0),
            decode_ms=1000 * (mean["decode"] or 0.0),
            pictures=pictures,
            file_bpp=mean["file_bpp"],
            scaled=mean["scaled"] or 0.0,
            too_large=round((mean["too_large"] or 0.0) * pictures),
            wins=mean["wins"],
        )


def _add_picture(
    sums: dict[tuple[int, str], _Sums],
    tokenizer: Tokenizer,
    pixels: Tensor,
    codecs: list[str],
    lengths: Sequence[int] | None,
    warm: bool,
) -> None:
    area = prod(pixels.shape[2:])
    on_size = fitting(tokenizer.spec, (pixels.shape[2], pixels.shape[3]))
    if not warm:
        tokenizer.decode(tokenizer.encode(pixels, on_size=on_size))
    begun = time.process_time()
    tokens = tokenizer.encode(pixels, on_size=on_size)
    encode = time.process_time() - begun
    ladders = {name: Ladder(pixels, name) for name in codecs}
    canvas = tokens.canvas[0]
    chosen = lengths or prefix_lengths(tokenizer.spec.of(canvas))
    for place, length in enumerate(chosen):
        shorter = tokens if length == tokens.length else tokens.prefix(length)
        begun = time.process_time()
        rebuilt = tokenizer.decode(shorter, dtype=torch.uint8)
        decode = time.process_time() - begun
        rebuilt, bits = rebuilt.cpu(), int(shorter.bits()[0])
        quality = float(psnr(rebuilt, pixels)[0])
        ours = sums.setdefault((place, "tokens"), _Sums())
        ours.add(tokens=length, bpp=bits / area, psnr=quality, ssim=float(ssim(rebuilt, pixels)[0]))
        ours.add(encode=encode, decode=decode)
        ours.add(file_bpp=8 * len(pack(tokenizer, shorter)) / area)
        for name, ladder in ladders.items():
            coded = ladder.best(ceil(bits / 8))
            sums.setdefault((place, name), _Sums()).add(
                tokens=length,
                bpp=8 * coded.bytes / area,
                psnr=coded.psnr,
                ssim=float(ssim(coded.pixels, pixels)[0]),
                encode=coded.encode_seconds,
                decode=coded.decode_seconds,
                scaled=coded.scale > 1,
                too_large=not coded.fits,
                wins=quality > coded.psnr,
            )
