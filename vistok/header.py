"""The headers of compressed files: written and read without a model. The layout is in `vistok.compressed`."""

import zlib
from dataclasses import dataclass
from fractions import Fraction

from vistok.errors import FormatError, InputError, MismatchError
from vistok.layout import Size
from vistok.tokenizer import Tokenizer

MAGIC = 0xF6
VERSION = 1  # of files of codes
UNPUBLISHED = 2  # the first layout of embedded streams
CLIP = 3  # of files of a clip's codes
EMBEDDED = 4  # of files of an embedded stream
LATEST = EMBEDDED
CHECKSUM = 4
TAG = 3
ESCAPE = 7
SHORT_TAG = 12  # bits, and up to 7 more
LONG = 4096  # bytes from which on an embedded stream's file has a checksum of 4 bytes, else of 2


@dataclass(frozen=True)
class Header:
    """What a compressed file says about itself: the picture's (height, width), the model's tag; of a clip the frame
    count and the rate, in frames per second.
    """

    size: Size
    model: str  # the first hexadecimal digits of the fingerprint of the weights; of an embedded stream the header
    left_out: int  # of the model's prefixes, longest first; 0: all tokens are there
    keep: bool
    bytes: int  # length of the header
    segments: int | None = None  # in an embedded stream: whole ones; 0: as far as its bytes go
    frames: int | None = None
    rate: float | None = None

    @property
    def embedded(self) -> bool:
        """Whether this is an embedded stream's file, any part of which decodes."""
        return self.segments is not None

    def made_by(self, fingerprint: str) -> bool:
        """Whether a model with these weights wrote the file."""
        if self.segments is None:
            return fingerprint.startswith(self.model)
        return stream_header(fingerprint, self.size, self.segments).hex() == self.model

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise MismatchError unless `tokenizer` is the model that wrote the file."""
        if self.made_by(tokenizer.fingerprint):
            return
        found = f"{tokenizer.name!r} ({tokenizer.fingerprint[: 2 * TAG]}...)"
        if self.segments is not None:
            raise MismatchError(
                f"this file was not compressed by this {found}, or its first bytes are damaged; "
                "pass the model that wrote it"
            )
        raise MismatchError(
            f"this file was compressed by a model whose weights are {self.model}..., not by this {found}; "
            "pass the model that wrote it"
        )


def peek(data: bytes) -> Header:
    """Read the header and check the whole file, without a model. Raises FormatError that says what is wrong with it.

    Of an embedded stream, only the header is read: what it holds, and whether it is whole, takes the model to know.
    """
    if not data:
        raise FormatError("the compressed file is empty (0 bytes)")
    if data[0] != MAGIC:
        raise FormatError(f"this is not a compressed file of vistok's (its first byte is not {MAGIC:#x})")
    version = data[1] & 0x0F if len(data) > 1 else EMBEDDED
    if version == EMBEDDED:
        return _peek_stream(data)
    if version == UNPUBLISHED:
        raise FormatError("the compressed file is of a layout that was never published: compress the picture anew")
    if len(data) < _SMALLEST:
        raise FormatError(f"the compressed file is cut short: {len(data)} bytes")
    if version > LATEST:
        raise FormatError(f"the compressed file is of version {version}, this vistok reads up to {LATEST}: upgrade it")
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


def stream_header(fingerprint: str, size: Size, segments: int) -> bytes:
    """The header of an embedded stream's file.

    Its last 12 bits or more are a checksum of all others and of the model's fingerprint. Raises InputError for a side
    above 65,536 or a number of whole segments above 15.
    """
    if max(size) > 1 << 16 or not 0 <= segments < 16:
        raise InputError(
            f"{size[1]}x{size[0]} pixels, {segments} segments; a compressed file of this kind holds sides of at most "
            "65,536 and 15 segments"
        )
    bits = f"{MAGIC:08b}{segments:04b}{EMBEDDED:04b}{size[0] == size[1]:b}"
    for side in size[:1] if size[0] == size[1] else size:
        digits = f"{side - 1:b}"
        bits += f"{len(digits) - 1:04b}" + (digits[1:] or digits)
    room = SHORT_TAG + -(len(bits) + SHORT_TAG) % 8
    tag = zlib.crc32(f"{bits} {fingerprint}".encode()) >> 32 - room
    return int(f"{bits}{tag:0{room}b}", 2).to_bytes((len(bits) + room) // 8, "big")


def _peek_stream(data: bytes) -> Header:
    """`peek` for an embedded stream."""
    bits = "".join(f"{byte:08b}" for byte in data[:_LONGEST_STREAM_HEADER])
    square, place, sides = bits[16:17] == "1", 17, []
    for _ in range(1 if square else 2):
        more = int(bits[place : place + 4] or "0", 2)
        digits = bits[place + 4 : place + 4 + max(more, 1)]
        place += 4 + max(more, 1)
        sides.append(int(("1" if more else "") + (digits or "0"), 2) + 1)
    length = (place + SHORT_TAG + 7) // 8
    if len(data) < length:
        raise FormatError(f"the compressed file is cut short: {len(data)} bytes, not even its header")
    return Header((sides[0], sides[-1]), data[:length].hex(), 0, False, length, data[1] >> 4)


def stream_check_bytes(length: int) -> int:
    """Bytes of the checksum that ends an embedded stream's file of `length` bytes in all."""
    return 2 if length < LONG else 4


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
_LONGEST_STREAM_HEADER = 9
