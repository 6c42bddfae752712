"""The headers of compressed files: written and read without a model. The layout is in `vistok.compressed`."""

import zlib
from dataclasses import dataclass
from fractions import Fraction

from vistok.errors import FormatError, InputError, MismatchError
from vistok.layout import Size
from vistok.tokenizer import Tokenizer

MAGIC = 0xF6
VERSION = 1  # of files of codes
EMBEDDED = 2  # of files of an embedded stream
CLIP = 3  # of files of a clip's codes
LATEST = CLIP
CHECKSUM = 4
SHORT_CHECKSUM = 2
TAG = 3
ESCAPE = 7


@dataclass(frozen=True)
class Header:
    """What a compressed file says about itself: the picture's (height, width), the model's tag; of a clip the frame
    count and the rate, in frames per second.
    """

    size: Size
    model: str  # the first hexadecimal digits of the fingerprint of the weights
    left_out: int  # of the model's prefixes, longest first; 0: all tokens are there
    keep: bool
    bytes: int  # length of the header
    symbols: int | None = None  # in an embedded stream, None for a file of codes
    whole: bool = True  # False for the beginning of a file
    frames: int | None = None
    rate: float | None = None

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise MismatchError unless `tokenizer` is the model that wrote the file."""
        if not tokenizer.fingerprint.startswith(self.model):
            raise MismatchError(
                f"this file was compressed by a model whose weights are {self.model}..., not by this "
                f"{tokenizer.name!r} ({tokenizer.fingerprint[: 2 * TAG]}...); pass the model that wrote it"
            )


def peek(data: bytes, *, partial: bool = False) -> Header:
    """Read the header and check the whole file, without a model. Raises FormatError that says what is wrong with it.

    `partial`: the beginning of an embedded stream's file will do; its header says that it is not `whole`.
    """
    if not data:
        raise FormatError("the compressed file is empty (0 bytes)")
    if data[0] != MAGIC:
        raise FormatError(f"this is not a compressed file of vistok's (its first byte is not {MAGIC:#x})")
    if len(data) > 1 and data[1] & 0x0F == EMBEDDED:
        return _peek_stream(data, partial)
    if len(data) < _SMALLEST:
        raise FormatError(f"the compressed file is cut short: {len(data)} bytes")
    version = data[1] & 0x0F
    if version > LATEST:
        raise FormatError(f"the compressed file is of version {version}, this vistok reads up to {LATEST}: upgrade it")
    if partial:
        raise FormatError("this file holds no embedded stream: only the whole of it decodes, so partial is of no use")
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
        side, place = read_number(data, place)
        sides.append(side + 1)
    frames = rate = None
    if data[1] & 0x0F == CLIP:
        frames, place = read_number(data, place)
        above, place = read_number(data, place)
        below, place = read_number(data, place)
        frames, rate = frames + 1, above / below if below else None
    left_out = data[1] >> 4 & ESCAPE
    if left_out == ESCAPE:
        left_out, place = read_number(data, place)
    if place >= len(data):
        raise FormatError("the compressed file is damaged: its header does not end")
    tag = data[2 : 2 + TAG].hex()
    header = Header((sides[0], sides[1]), tag, left_out, bool(data[1] >> 7), place + 1, frames=frames, rate=rate)
    return header, data[place]


def _peek_stream(data: bytes, partial: bool) -> Header:
    """`peek` for version 2."""
    if data[1] != EMBEDDED:
        raise FormatError("the compressed file is damaged: its second byte is none that vistok writes")
    place, numbers = 2 + TAG, []
    try:
        for bytes_ in (4, 4, 5):
            value, place = read_number(data, place, bytes_)
            numbers.append(value)
    except FormatError as error:
        raise FormatError(f"the compressed file is cut short: {len(data)} bytes, not even its header") from error
    height, width, symbols = numbers
    end = len(data) - SHORT_CHECKSUM
    whole = end >= place and zlib.crc32(data[:end]) & 0xFFFF == int.from_bytes(data[end:], "little")
    if not whole and not partial:
        raise FormatError(
            "the compressed file is damaged or cut short: its checksum does not match. If it was cut on purpose, its "
            "beginning still decodes: --partial, or partial=True"
        )
    size, tag = (height + 1, width + 1), data[2 : 2 + TAG].hex()
    return Header(size, tag, 0, False, place, symbols, whole)


def _whole_file_in(data: bytes, first: int) -> int:
    """Length of the whole file that `data` begins with, or 0: its payload ends at `first` or some times 256 later."""
    check, done = 0, 0
    for end in range(first, len(data) - CHECKSUM, 256):
        check, done = zlib.crc32(data[done:end], check), end
        if check == int.from_bytes(data[end : end + CHECKSUM], "little"):
            return end + CHECKSUM
    return 0


def clip_numbers(frames: int, rate: float | None) -> bytes:
    """A clip's frame count and rate, as `Header` reads them: the rate as a fraction, 0 / 0 where there is none."""
    share = None if rate is None else Fraction(rate).limit_denominator(100_000)
    above, below = (0, 0) if share is None else (share.numerator, share.denominator)
    return number(frames - 1) + number(above) + number(below)


def number(value: int, most: int = 4) -> bytes:
    """A number of at most so many bytes, 7 bits a byte, low ones first, the top bit set on all but the last."""
    if value >> 7 * most:
        raise InputError(f"{value} is more than a compressed file's header can hold, 2^{7 * most}")
    out = bytearray()
    while value >> 7:
        out.append(0x80 | value & 0x7F)
        value >>= 7
    return bytes([*out, value])


def read_number(data: bytes, place: int, most: int = 4) -> tuple[int, int]:
    """The number at `place`, and the place after it."""
    value = 0
    for count in range(most):
        if place + count >= len(data):
            break
        value |= (data[place + count] & 0x7F) << 7 * count
        if data[place + count] < 0x80:
            return value, place + count + 1
    raise FormatError("the compressed file is damaged: a number in its header does not end")


_SMALLEST = 2 + TAG + 2 + 1 + CHECKSUM
