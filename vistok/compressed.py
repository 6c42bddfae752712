"""Compressed files: one picture or clip in as few bytes as its codes take, with a small header and a checksum.

    picture --encode--> codes of a prefix --range coder, driven by the tokenizer's prior--> payload

    | bytes  | what                                                                                             |
    | ------ | ------------------------------------------------------------------------------------------------ |
    | 1      | 0xF6                                                                                             |
    | 1      | version (4 low bits), prefixes left out (3 bits; 7: a number follows the size), keep mask (1 bit) |
    | 3      | the beginning of the fingerprint of the model's weights                                          |
    | 2 to 5 | height - 1, width - 1: 7 bits a byte, low ones first, the top bit set on all but the last byte   |
    | 0 to 2 | how many of the longest prefixes were left out, in the same way, where it is 7 or more           |
    | 1      | length of the payload, modulo 256: tells a file that was cut from one that was changed           |
    | ...    | payload                                                                                          |
    | 4      | CRC-32 of everything before, little-endian                                                       |

A picture's header takes at most 12 bytes. Version 3 is a clip (`compressed_clips`): after the size, in the same way,
come frames - 1 and the rate's numerator and denominator (0 and 0 where it is not known).

The padding, the tiles or the windows follow from the size and the model. Token files (`Tokens.save`) carry names,
layouts and batches, and are for storing; these are for few bytes.

Version 4 is for tokenizers with an embedded stream, of which every part from the beginning decodes
(`vistok.embedded`).
"""

import math
import zlib
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from vistok import bits, embedded
from vistok.errors import FormatError, InputError
from vistok.header import (
    CHECKSUM,
    CLIP,
    ESCAPE,
    MAGIC,
    TAG,
    VERSION,
    Header,
    clip_numbers,
    number,
    peek,
)
from vistok.layout import Canvas, Size, TokenSpec
from vistok.pixels import OnSize, as_uint8, plan, restore, to_pixels
from vistok.prior import Coder, UniformCoder
from vistok.tokenizer import Tokenizer
from vistok.tokens import Tokens

# -- pictures --------------------------------------------------------------------------------------------------------


def compress(
    tokenizer: Tokenizer,
    image: Any,
    *,
    length: int | None = None,
    bpp: float | None = None,
    bytes: int | None = None,
    psnr: float | None = None,
) -> "bytes":
    """One picture, as `Tokenizer.encode` takes it, to a compressed file.

    `length`: only so many tokens, one of the prefixes that decode. `bpp`, `bytes`: the best with which the whole file,
    header and checksum included, takes at most so many bits per pixel of the picture, or bytes. `psnr`: the shortest
    that reaches so many dB. None of these: all tokens.

    Raises InputError for a batch, a tokenizer with continuous tokens, a prefix that does not decode, a budget that
    is too small even for the shortest, or a PSNR that even all tokens do not reach.
    """
    given = [
        name
        for name, value in (("length", length), ("bpp", bpp), ("bytes", bytes), ("psnr", psnr))
        if value is not None
    ]
    if len(given) > 1:
        raise InputError(f"give {' or '.join(given)}, not {'both' if len(given) == 2 else 'all'}")
    if any(not segment.codebooks for segment in tokenizer.spec.segments):
        raise InputError(f"{tokenizer.name} has continuous tokens; only codes can be compressed")
    pixels = to_pixels(image, tokenizer.input_channels)
    if pixels.ndim == 5:
        raise InputError("a clip; vistok.compressed_clips.compress_clip takes it, window by window")
    if len(pixels) != 1:
        raise InputError(f"{len(pixels)} pictures; a compressed file holds one, so call compress once for each")
    size = (pixels.shape[2], pixels.shape[3])
    budget = bytes if bpp is None else int(bpp * size[0] * size[1] / 8)
    if _stream(tokenizer) is not None:
        canvas = _canvas(tokenizer, size)
        spec = _spec(tokenizer, canvas)
        segments = None if length is None else spec.prefixes.index(spec.check_prefix(length)) + 1
        return embedded.compress_stream(tokenizer, pixels, canvas, segments, budget, psnr)
    tokens = tokenizer.encode(pixels, on_size=_on_size(tokenizer, size))
    if budget is not None:
        return _within(tokenizer, tokens, budget)
    if psnr is not None:
        return _reaching(tokenizer, tokens, pixels, psnr)
    return pack(tokenizer, tokens if length is None else tokens.prefix(length))


def decompress(tokenizer: Tokenizer, data: bytes, *, partial: bool = False) -> Tensor:
    """A compressed file to pixels: uint8 (1, 3, H, W), of the size that went in; of a clip all frames, (1, 3, T, H, W).

    `partial`: `data` may be the beginning of a file, cut anywhere behind its header; for embedded streams alone.

    Raises FormatError for a file that is damaged, cut short, too long or of a newer version, MismatchError for one of
    another model, or one that this machine does not decode to what was compressed.
    """
    header = _peek(data, partial)
    if not header.embedded:
        return tokenizer.decode(unpack(tokenizer, data), dtype=torch.uint8)
    return _decompress_stream(tokenizer, data, header, partial)[0]


def decompress_part(tokenizer: Tokenizer, data: bytes) -> tuple[Tensor, bool]:
    """`decompress` of the beginning of a file, and whether it is the whole."""
    return _decompress_stream(tokenizer, data, _peek(data, partial=True), partial=True)


def _decompress_stream(tokenizer: Any, data: bytes, header: Header, partial: bool) -> tuple[Tensor, bool]:
    canvas = _canvas(tokenizer, header.size)
    state, whole = embedded.read(tokenizer, data, header, canvas, partial)
    return restore(tokenizer.stream.pixels(state, torch.uint8), canvas), whole


def _peek(data: bytes, partial: bool) -> Header:
    header = peek(data)
    if partial and not header.embedded:
        raise FormatError("this file holds no embedded stream: only the whole of it decodes, so partial is of no use")
    return header


def _stream(tokenizer: Tokenizer) -> "embedded.EmbeddedStream | None":
    """The tokenizer's embedded stream, where it has one."""
    return getattr(tokenizer, "stream", None)


def _within(tokenizer: Tokenizer, tokens: Tokens, budget: int) -> bytes:
    """The file of the longest prefix within a budget of bytes, by bisection: files grow with the prefix."""
    canvas = tokens.canvas[0]
    area = prod(canvas.size) * (canvas.frames or 1)
    prefixes = _spec(tokenizer, canvas).prefixes
    best, low, high = None, 0, len(prefixes) - 1
    while low <= high:
        middle = (low + high + 1) // 2
        data = pack(tokenizer, tokens.prefix(prefixes[middle]))
        if len(data) <= budget:
            best, low = data, middle + 1
        else:
            smallest, high = data, middle - 1
    if best is None:
        raise InputError(
            f"the budget is {budget} bytes here; the shortest file of {tokenizer.name} takes "
            f"{len(smallest)} bytes, {8 * len(smallest) / area:.4f} bits per pixel"
        )
    return best


def _reaching(tokenizer: Tokenizer, tokens: Tokens, pixels: Tensor, target: float) -> bytes:
    """The file of the shortest prefix whose picture has a PSNR of `target` dB."""
    wanted = as_uint8(pixels).cpu()
    for length in _spec(tokenizer, tokens.canvas[0]).prefixes:
        value = embedded.psnr_of(tokenizer.decode(tokens.prefix(length), dtype=torch.uint8).cpu(), wanted)
        if value >= target:
            return pack(tokenizer, tokens.prefix(length))
    raise InputError(f"{tokenizer.name} reaches {value:.2f} dB on this picture, {target} dB were asked for")


# -- tokens ----------------------------------------------------------------------------------------------------------


def pack(tokenizer: Tokenizer, tokens: Tokens) -> bytes:
    """The tokens of one picture or clip, or a prefix of them that decodes, to a compressed file.

    Raises MismatchError for tokens of another model, InputError for what a compressed file does not hold.
    """
    if tokens.codes is None or len(tokens) != 1 or not tokens.canvas:
        raise InputError("a compressed file holds the codes of one picture or clip, with its canvas")
    tokenizer._check_source(tokens)
    canvas = tokens.canvas[0]
    if canvas != _canvas(tokenizer, canvas.size, canvas.frames, canvas.rate):
        raise InputError(
            "a compressed file holds pictures and clips that were padded (or tiled, where too large to pad)"
        )
    spec = _spec(tokenizer, canvas)
    spec.check_prefix(tokens.length)
    tokenizer._check_codes(tokens)
    codes = tokens.codes.cpu()
    stream = _stream(tokenizer)
    if stream is not None and tokens.keep is not None:
        raise InputError(f"a compressed file of {tokenizer.name} holds all positions; these tokens have a keep mask")
    if tokens.keep is None:
        if any(tokens._unsent(column, first, last) for sizes, first, last in tokens._columns() for column, _ in sizes):
            raise InputError("some codes are missing (-1); a compressed file holds them all")
        if stream is not None:
            return embedded.file_of(tokenizer, canvas, stream.encode_codes(codes, canvas.coded))
        payload = _coder(tokenizer).encode(codes, spec)
    else:
        keep = tokens.keep[0].cpu().numpy()
        payload = bits.pack(keep, 1) + UniformCoder(keep).encode(codes, spec)
    left_out = len(spec.prefixes) - 1 - spec.prefixes.index(tokens.length)
    version = VERSION if canvas.frames is None else CLIP
    head = bytes([MAGIC, version | min(left_out, ESCAPE) << 4 | (tokens.keep is not None) << 7])
    head += bytes.fromhex(tokenizer.fingerprint[: 2 * TAG]) + number(canvas.size[0] - 1) + number(canvas.size[1] - 1)
    head += b"" if canvas.frames is None else clip_numbers(canvas.frames, canvas.rate)
    head += number(left_out) if left_out >= ESCAPE else b""
    body = head + bytes([len(payload) & 0xFF]) + payload
    return body + zlib.crc32(body).to_bytes(CHECKSUM, "little")


def unpack(tokenizer: Tokenizer, data: bytes, *, partial: bool = False) -> Tokens:
    """Inverse of `pack`: Tokens of one item. Join several of one layout with `Tokens.cat` to decode them as a batch.

    Of an embedded stream that ends inside a segment, the codes that are not there are -1. Raises as `decompress`.
    """
    header = _peek(data, partial)
    if header.embedded:
        canvas = _canvas(tokenizer, header.size)
        spec, stream = _spec(tokenizer, canvas), _stream(tokenizer)
        state, _ = embedded.read(tokenizer, data, header, canvas, partial)
        assert stream is not None  # or nothing was read
        return Tokens(spec.segments, stream.codes(state), None, None, (canvas,), tokenizer.source)
    header.check(tokenizer)
    canvas = _canvas(tokenizer, header.size, header.frames, header.rate)
    spec = _spec(tokenizer, canvas)
    if header.left_out >= len(spec.prefixes):
        raise FormatError(
            f"the compressed file leaves out {header.left_out} prefixes, {tokenizer.name} has {len(spec.prefixes)}"
        )
    length = spec.prefixes[len(spec.prefixes) - 1 - header.left_out]
    payload = data[header.bytes : -CHECKSUM]
    _check_room(tokenizer, spec, header, length, len(payload))
    if not header.keep:
        return Tokens(
            spec.segments, _coder(tokenizer).decode(payload, spec, length), None, None, (canvas,), tokenizer.source
        )
    mask = bits.packed_size(length, 1)
    keep = bits.unpack(payload[:mask], length, 1).astype(bool)
    codes = UniformCoder(keep).decode(payload[mask:], spec, length)
    return Tokens(spec.segments, codes, None, torch.from_numpy(keep)[None], (canvas,), tokenizer.source)


def _coder(tokenizer: Tokenizer) -> Coder:
    """The tokenizer's own prior, or the uniform one."""
    return getattr(tokenizer, "prior", None) or UniformCoder()


def _on_size(tokenizer: Tokenizer, size: Size) -> OnSize:
    """ "pad", or "tile" for a picture that is too large to pad: no bit in the file is needed to say which."""
    return "pad" if tokenizer.spec.sizes.padded(size) else "tile"


def _canvas(tokenizer: Tokenizer, size: Size, frames: int | None = None, rate: float | None = None) -> Canvas:
    spec, on_size = tokenizer.spec, _on_size(tokenizer, size)
    return plan(size, spec.sizes, on_size, frames=frames, clips=spec.clips, rate=rate)


def _check_room(tokenizer: Tokenizer, spec: TokenSpec, header: Header, length: int, size: int) -> None:
    """A few bytes may claim any number of frames: raise FormatError before memory is taken for what is not there."""
    if header.frames is None or header.keep or not isinstance(_coder(tokenizer), UniformCoder):
        return
    positions = [segment.count for segment in spec.segments]
    starts = accumulate(positions, initial=0)
    needed = sum(
        max(0, min(count, length - start)) * sum(math.log2(book) for book in segment.codebooks)
        for segment, count, start in zip(spec.segments, positions, starts, strict=False)
    )
    if 8 * size + 64 < needed:
        raise FormatError(f"the compressed file is damaged: {header.frames} frames do not fit into {size} bytes")


def _spec(tokenizer: Tokenizer, canvas: Canvas) -> TokenSpec:
    return tokenizer.spec.of(canvas)
