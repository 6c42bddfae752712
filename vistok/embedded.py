"""Files of an embedded stream: one picture, of whose file every part from the beginning decodes.

    | bits     | what                                                                                              |
    | -------- | ------------------------------------------------------------------------------------------------- |
    | 8        | 0xF6                                                                                              |
    | 4        | whole segments in the stream; 0: it goes on as far as its bytes, at most to the last segment      |
    | 4        | 4, the version                                                                                    |
    | 6 to 39  | whether the picture is square; its height - 1 and, unless it is, its width - 1: 4 bits for the     |
    |          | number of binary digits less one, then those below the top one (or the only one)                  |
    | 12 to 19 | checksum of the bits before and of the fingerprint of the model's weights, to the end of a byte   |
    | ...      | the stream                                                                                        |
    | 16 or 32 | checksum of everything before, of what the decoder ends with, and of the fingerprint: 32 bits     |
    |          | where the file has 4,096 bytes or more                                                            |

A square picture of 256 pixels has 7 bytes beside its stream. No length and no number of symbols is in it: a reader
takes the symbols that are the same whatever bytes might follow the stream's, and the writer knows which these are. So
every beginning of a stream is a stream, and a file that was cut loses no more than its last 2 or 4 bytes, which would
have been the checksum.

The last checksum tells a file with a changed byte, one of another model, and one on a machine whose integers differ: of
such files one in 65,536 would pass, from 4,096 bytes on one in 4 billion. In a file that was cut, 12 bits or more guard
the header, and the checksums inside the stream the rest.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vistok.errors import FormatError, InputError
from vistok.header import LONG, Header, stream_check_bytes, stream_header
from vistok.layout import Canvas, Size
from vistok.pixels import as_uint8, fit, restore


@dataclass(frozen=True)
class Encoded:
    """A stream: its bytes, its number of whole segments (0: as far as the bytes go), and what a reader makes of it."""

    data: bytes
    segments: int
    state: Any


class EmbeddedStream(Protocol):
    """What a tokenizer's `stream` does, where it has one. A state, of its own type, is what is known of a picture."""

    def encode(
        self, pixels: Tensor, *, segments: int | None = None, budget: int | None = None, enough: Any = None
    ) -> Encoded:
        """Pixels (1, C, H, W) of a legal size to a stream of so many segments, or as much as `budget` bytes hold.

        `enough(state, bytes)` is asked after every segment, and ends the stream where it is true.
        """

    def encode_codes(self, codes: Tensor, size: Size) -> Encoded:
        """Codes (1, n, C) of whole segments, in the same way."""

    def decode(self, data: bytes, segments: int, size: Size) -> Any:
        """A stream, or the beginning of one, to a state: as much as the bytes settle, whatever may follow them."""

    def check(self, state: Any) -> int:
        """32 bits of a checksum over a state."""

    def pixels(self, state: Any, dtype: torch.dtype) -> Tensor:
        """A state to pixels (1, C, H, W)."""

    def codes(self, state: Any) -> Tensor:
        """A state to codes, long (1, n, C), -1 where a code is not known."""


def file_of(tokenizer: Any, canvas: Canvas, encoded: Encoded) -> bytes:
    """The file that holds a stream."""
    body = stream_header(tokenizer.fingerprint, canvas.size, encoded.segments) + encoded.data
    return body + _check(tokenizer, body, encoded.state, len(body) + stream_check_bytes(len(body) + 2))


def read(tokenizer: Any, data: bytes, header: Header, canvas: Canvas, partial: bool) -> tuple[Any, bool]:
    """The state that a file, or with `partial` the beginning of one, holds, and whether it is whole.

    Raises MismatchError for a file of another model, FormatError unless the file is whole or `partial`.
    """
    header.check(tokenizer)
    if header.segments is None or getattr(tokenizer, "stream", None) is None:
        raise FormatError(f"{tokenizer.name} does not read compressed files of this kind")
    end = max(header.bytes, len(data) - stream_check_bytes(len(data)))
    state = tokenizer.stream.decode(data[header.bytes : end], header.segments, canvas.coded)
    whole = _check(tokenizer, data[:end], state, len(data)) == data[end:]
    if not whole and not partial:
        raise FormatError(
            "the compressed file is damaged or cut short, or this machine computes the model's integers in another way "
            "than the writer's: its checksum does not match. If it was cut on purpose, its beginning still decodes: "
            "--partial, or partial=True"
        )
    return state, whole


def compress_stream(
    tokenizer: Any, pixels: Tensor, canvas: Canvas, segments: int | None, budget: int | None, psnr: float | None
) -> bytes:
    """The file of pixels (1, C, H, W): of whole segments, of at most `budget` bytes in all, or of at least `psnr` dB.

    Raises InputError for a budget that is too small or a PSNR that is not reached.
    """
    stream, fitted = tokenizer.stream, fit(pixels, canvas)
    if psnr is not None:
        return file_of(tokenizer, canvas, _reaching(tokenizer, pixels, canvas, psnr))
    if budget is None:
        return file_of(tokenizer, canvas, stream.encode(fitted, segments=segments))
    head = len(stream_header(tokenizer.fingerprint, canvas.size, 0))
    room = (budget - 4 if budget >= LONG + 2 else min(budget, LONG - 1) - 2) - head
    if room < 1:
        raise InputError(
            f"the budget is {budget} bytes here; the shortest file of {tokenizer.name} takes {head + 3} bytes"
        )
    return file_of(tokenizer, canvas, stream.encode(fitted, budget=room))


def _reaching(tokenizer: Any, pixels: Tensor, canvas: Canvas, target: float) -> Encoded:
    """The shortest stream, within a percent, whose picture has a PSNR of `target` dB."""
    stream, fitted, wanted = tokenizer.stream, fit(pixels, canvas), as_uint8(pixels).cpu()

    def quality(state: Any) -> float:
        return psnr_of(restore(stream.pixels(state, torch.uint8), canvas).cpu(), wanted)

    known: list[tuple[int, float]] = [(0, 0.0)]

    def enough(state: Any, size: int) -> bool:
        known.append((size, quality(state)))
        return known[-1][1] >= target

    best = stream.encode(fitted, enough=enough)
    low, worse = known[-1] if known[-1][1] < target else known[-2]
    high, better = len(best.data), quality(best.state)
    if better < target:
        raise InputError(f"{tokenizer.name} reaches {better:.2f} dB on this picture, {target} dB were asked for")
    while high - low > max(2, high // 100):
        share = min(max((target - worse) / max(better - worse, 1e-6), 0.1), 0.9)
        middle = low + min(max(1, round((high - low) * share)), high - low - 1)
        part = stream.encode(fitted, budget=middle)
        value = quality(part.state)
        if value >= target:
            best, high, better = part, middle, value
        else:
            low, worse = middle, value
    return best


def psnr_of(pixels: Tensor, wanted: Tensor) -> float:
    """PSNR in dB of uint8 pictures, in rows: no float copy of the whole."""
    total = sum(
        int((ours.int() - theirs.int()).square_().sum())
        for ours, theirs in zip(pixels.split(64, 2), wanted.split(64, 2), strict=True)
    )
    return 10 * math.log10(255**2 * pixels.numel() / max(total, 1))


def _check(tokenizer: Any, body: bytes, state: Any, length: int) -> bytes:
    """The checksum at the end of a file of `length` bytes in all."""
    size = stream_check_bytes(length)
    state_and_model = f"{tokenizer.stream.check(state)} {tokenizer.fingerprint}".encode()
    return zlib.crc32(state_and_model, zlib.crc32(body)).to_bytes(4, "little")[:size]
