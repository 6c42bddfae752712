"""Compressed files: one picture in as few bytes as its codes take, with a header of at most 12 bytes and a checksum.

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

The padding or the tiles follow from the size and the model. Token files (`Tokens.save`) carry names, layouts and
batches, and are for storing; these are for few bytes.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistok import bits
from vistok.errors import FormatError, InputError, MismatchError
from vistok.layout import Canvas, Size, TokenSpec
from vistok.pixels import OnSize, plan, to_pixels
from vistok.prior import Coder, UniformCoder
from vistok.tokenizer import Tokenizer
from vistok.tokens import Tokens

MAGIC = 0xF6
VERSION = 1
CHECKSUM = 4
TAG = 3
_ESCAPE = 7


@dataclass(frozen=True)
class Header:
    """What a compressed file says about itself: the picture's (height, width), the model's tag."""

    size: Size
    model: str  # the first hexadecimal digits of the fingerprint of the weights
    left_out: int  # of the model's prefixes, longest first; 0: all tokens are there
    keep: bool
    bytes: int  # length of the header

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise MismatchError unless `tokenizer` is the model that wrote the file."""
        if not tokenizer.fingerprint.startswith(self.model):
            raise MismatchError(
                f"this file was compressed by a model whose weights are {self.model}..., not by this "
                f"{tokenizer.name!r} ({tokenizer.fingerprint[: 2 * TAG]}...); pass the model that wrote it"
            )


# -- pictures --------------------------------------------------------------------------------------------------------


def compress(tokenizer: Tokenizer, image: Any, *, length: int | None = None, bpp: float | None = None) -> bytes:
    """One picture, as `Tokenizer.encode` takes it, to a compressed file.

    `length`: only so many tokens, one of the prefixes that decode. `bpp`: the longest prefix with which the whole file,
    header and checksum included, takes at most so many bits per pixel of the picture. Neither: all tokens.

    Raises InputError for a batch, a tokenizer with continuous tokens, a prefix that does not decode, or a budget that
    is too small even for the shortest.
    """
    if length is not None and bpp is not None:
        raise InputError("give length or bpp, not both")
    if any(not segment.codebooks for segment in tokenizer.spec.segments):
        raise InputError(f"{tokenizer.name} has continuous tokens; only codes can be compressed")
    pixels = to_pixels(image, tokenizer.input_channels)
    if len(pixels) != 1:
        raise InputError(f"{len(pixels)} pictures; a compressed file holds one, so call compress once for each")
    tokens = tokenizer.encode(pixels, on_size=_on_size(tokenizer, (pixels.shape[2], pixels.shape[3])))
    if bpp is not None:
        return _within(tokenizer, tokens, bpp)
    return pack(tokenizer, tokens if length is None else tokens.prefix(length))


def decompress(tokenizer: Tokenizer, data: bytes) -> Tensor:
    """A compressed file to pixels: uint8 (1, 3, H, W), of the size that went in.

    Raises FormatError for a file that is damaged, cut short, too long or of a newer version, MismatchError for one of
    another model.
    """
    return tokenizer.decode(unpack(tokenizer, data), dtype=torch.uint8)


def _within(tokenizer: Tokenizer, tokens: Tokens, bpp: float) -> bytes:
    """The file of the longest prefix within a budget of bits per pixel, by bisection: files grow with the prefix."""
    height, width = tokens.canvas[0].size
    budget = int(bpp * height * width / 8)
    prefixes = _spec(tokenizer, tokens.canvas[0]).prefixes
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
            f"{bpp} bits per pixel are {budget} bytes here; the shortest file of {tokenizer.name} takes "
            f"{len(smallest)} bytes, {8 * len(smallest) / (height * width):.4f} bits per pixel"
        )
    return best


# -- tokens ----------------------------------------------------------------------------------------------------------


def pack(tokenizer: Tokenizer, tokens: Tokens) -> bytes:
    """The tokens of one picture, or a prefix of them that decodes, to a compressed file.

    Raises MismatchError for tokens of another model, InputError for what a compressed file does not hold.
    """
    if tokens.codes is None or len(tokens) != 1 or not tokens.canvas:
        raise InputError("a compressed file holds the codes of one picture, with its canvas")
    tokenizer._check_source(tokens)
    canvas = tokens.canvas[0]
    if canvas != _canvas(tokenizer, canvas.size):
        raise InputError("a compressed file holds pictures that were padded (or tiled, where too large to pad)")
    spec = _spec(tokenizer, canvas)
    spec.check_prefix(tokens.length)
    tokenizer._check_codes(tokens)
    codes = tokens.codes.cpu()
    if tokens.keep is None:
        if any(tokens._unsent(column, first, last) for sizes, first, last in tokens._columns() for column, _ in sizes):
            raise InputError("some codes are missing (-1); a compressed file holds them all")
        payload = _coder(tokenizer).encode(codes, spec)
    else:
        keep = tokens.keep[0].cpu().numpy()
        payload = bits.pack(keep, 1) + UniformCoder(keep).encode(codes, spec)
    left_out = len(spec.prefixes) - 1 - spec.prefixes.index(tokens.length)
    head = bytes([MAGIC, VERSION | min(left_out, _ESCAPE) << 4 | (tokens.keep is not None) << 7])
    head += bytes.fromhex(tokenizer.fingerprint[: 2 * TAG]) + _number(canvas.size[0] - 1) + _number(canvas.size[1] - 1)
    head += _number(left_out) if left_out >= _ESCAPE else b""
    body = head + bytes([len(payload) & 0xFF]) + payload
    return body + zlib.crc32(body).to_bytes(CHECKSUM, "little")


def unpack(tokenizer: Tokenizer, data: bytes) -> Tokens:
    """Inverse of `pack`: Tokens of one item. Join several of one layout with `Tokens.cat` to decode them as a batch.

    Raises as `decompress`.
    """
    header = peek(data)
    header.check(tokenizer)
    canvas = _canvas(tokenizer, header.size)
    spec = _spec(tokenizer, canvas)
    if header.left_out >= len(spec.prefixes):
        raise FormatError(
            f"the compressed file leaves out {header.left_out} prefixes, {tokenizer.name} has {len(spec.prefixes)}"
        )
    length = spec.prefixes[len(spec.prefixes) - 1 - header.left_out]
    payload = data[header.bytes : -CHECKSUM]
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


def _canvas(tokenizer: Tokenizer, size: Size) -> Canvas:
    return plan(size, tokenizer.spec.sizes, _on_size(tokenizer, size))


def _spec(tokenizer: Tokenizer, canvas: Canvas) -> TokenSpec:
    return tokenizer.spec.at(canvas.tile, canvas.tiles)


# -- headers ---------------------------------------------------------------------------------------------------------


def peek(data: bytes) -> Header:
    """Read the header and check the whole file, without a model. Raises FormatError that says what is wrong with it."""
    if not data:
        raise FormatError("the compressed file is empty (0 bytes)")
    if data[0] != MAGIC:
        raise FormatError(f"this is not a compressed file of vistok's (its first byte is not {MAGIC:#x})")
    if len(data) < _SMALLEST:
        raise FormatError(f"the compressed file is cut short: {len(data)} bytes")
    version = data[1] & 0x0F
    if version > VERSION:
        raise FormatError(f"the compressed file is of version {version}, this vistok reads up to {VERSION}: upgrade it")
    header, length = _parse(data)
    if zlib.crc32(data[:-CHECKSUM]) == int.from_bytes(data[-CHECKSUM:], "little") and version:
        return header
    if (len(data) - CHECKSUM - header.bytes) & 0xFF == length:
        raise FormatError("the compressed file is damaged: its checksum does not match")
    whole = _whole_file_in(data, header.bytes + length)
    if whole:
        raise FormatError(f"the compressed file is followed by {len(data) - whole} other bytes; cut them off")
    raise FormatError(f"the compressed file is cut short: it has {len(data)} bytes and its end is missing")


def _parse(data: bytes) -> tuple[Header, int]:
    """The header, and the length of the payload modulo 256."""
    place = 2 + TAG
    sides = []
    for _ in range(2):
        side, place = _read_number(data, place)
        sides.append(side + 1)
    left_out = data[1] >> 4 & _ESCAPE
    if left_out == _ESCAPE:
        left_out, place = _read_number(data, place)
    if place >= len(data):
        raise FormatError("the compressed file is damaged: its header does not end")
    tag = data[2 : 2 + TAG].hex()
    return Header((sides[0], sides[1]), tag, left_out, bool(data[1] >> 7), place + 1), data[place]


def _whole_file_in(data: bytes, first: int) -> int:
    """Length of the whole file that `data` begins with, or 0: its payload ends at `first` or some times 256 later."""
    check, done = 0, 0
    for end in range(first, len(data) - CHECKSUM, 256):
        check, done = zlib.crc32(data[done:end], check), end
        if check == int.from_bytes(data[end : end + CHECKSUM], "little"):
            return end + CHECKSUM
    return 0


def _number(value: int) -> bytes:
    """A number below 2^28, 7 bits a byte, low ones first, the top bit set on all but the last."""
    if value >> 28:
        raise InputError(f"{value} is more than a compressed file's header can hold, 2^28")
    out = bytearray()
    while value >> 7:
        out.append(0x80 | value & 0x7F)
        value >>= 7
    return bytes([*out, value])


def _read_number(data: bytes, place: int) -> tuple[int, int]:
    """The number at `place`, and the place after it."""
    value = 0
    for count in range(4):
        if place + count >= len(data):
            break
        value |= (data[place + count] & 0x7F) << 7 * count
        if data[place + count] < 0x80:
            return value, place + count + 1
    raise FormatError("the compressed file is damaged: a number in its header does not end")


_SMALLEST = 2 + TAG + 2 + 1 + CHECKSUM
