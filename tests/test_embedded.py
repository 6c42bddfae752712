"""Files of embedded streams: headers of every size, checksums, and who wrote a file, with a model of a few lines."""

import zlib
from types import SimpleNamespace

import pytest
import torch

from vistok import embedded
from vistok.compressed import peek
from vistok.embedded import Encoded
from vistok.errors import FormatError, InputError, MismatchError
from vistok.header import LONG, stream_check_bytes, stream_header
from vistok.layout import Canvas

SIZES = [(1, 1), (1, 2), (2, 1), (3, 3), (16, 17), (256, 256), (255, 257), (512, 768), (3000, 4000), (65536, 65535)]


class Bytes:
    """A stream that says its own bytes: the state is what was read."""

    def encode(self, pixels: torch.Tensor, *, segments=None, budget=None, enough=None) -> Encoded:
        data = pixels.mul(255).to(torch.uint8).flatten().numpy().tobytes()[:budget]
        return Encoded(data, segments or 0, data)

    def decode(self, data: bytes, segments: int, size: tuple[int, int]) -> bytes:
        return data

    def check(self, state: bytes) -> int:
        return zlib.crc32(state[::-1])


def model(fingerprint: str = "0123456789abcdef" * 2) -> SimpleNamespace:
    return SimpleNamespace(name="bytes", fingerprint=fingerprint, stream=Bytes())


def test_headers_of_every_size() -> None:
    for size in SIZES:
        for segments in (0, 3, 15):
            raw = stream_header(model().fingerprint, size, segments)
            header = peek(raw + b"stream")
            assert (header.size, header.segments, header.bytes) == (size, segments, len(raw))
            header.check(model())
            for end in range(2, len(raw)):
                with pytest.raises(FormatError, match="not even its header"):
                    peek(raw[:end])
    assert len(stream_header(model().fingerprint, (256, 256), 0)) == 5
    assert len(stream_header(model().fingerprint, (512, 768), 0)) == 7
    for size, segments in (((65537, 1), 0), ((8, 8), 16)):
        with pytest.raises(InputError, match="65,536"):
            stream_header(model().fingerprint, size, segments)


def test_another_model_and_a_damaged_header_are_told() -> None:
    raw = stream_header(model().fingerprint, (256, 256), 0)
    missed = 0
    for other in range(2000):
        missed += peek(raw).made_by(f"{other:032x}")
    assert missed <= 4  # 12 bits: one of 4096
    for bit in range(16, 40):
        changed = bytearray(raw + bytes(8))
        changed[bit // 8] ^= 128 >> bit % 8
        with pytest.raises(MismatchError, match="first bytes are damaged"):
            peek(bytes(changed)).check(model())


def test_budgets_are_whole_files() -> None:
    pixels, canvas = torch.rand(1, 3, 64, 64), Canvas((64, 64))
    for budget in (10, 100, LONG - 2, LONG - 1, LONG, LONG + 1, LONG + 2, LONG + 50):
        data = embedded.compress_stream(model(), pixels, canvas, None, budget, None)
        assert len(data) <= budget
        assert len(data) >= budget - (2 if LONG <= budget < LONG + 2 else 0)
        state, whole = embedded.read(model(), data, peek(data), canvas, partial=False)
        assert whole
        assert state == Bytes().encode(pixels).data[: len(state)]
        assert len(state) == len(data) - peek(data).bytes - stream_check_bytes(len(data))
    with pytest.raises(InputError, match="shortest file of bytes takes 8 bytes"):
        embedded.compress_stream(model(), pixels, canvas, None, 7, None)
    assert len(embedded.compress_stream(model(), pixels, canvas, None, 8, None)) == 8


@pytest.mark.parametrize("budget", [300, 5000])
def test_every_change_and_every_cut_is_noticed(budget: int) -> None:
    pixels, canvas = torch.rand(1, 3, 64, 64), Canvas((64, 64))
    data = embedded.compress_stream(model(), pixels, canvas, None, budget, None)
    header = peek(data)
    for place in range(header.bytes, len(data), 1 + len(data) // 300):
        for changed in (data[:place] + bytes([data[place] ^ 32]) + data[place + 1 :], data[:place]):
            with pytest.raises(FormatError, match="--partial"):
                embedded.read(model(), changed, header, canvas, partial=False)
            state, whole = embedded.read(model(), changed, header, canvas, partial=True)
            assert not whole
            assert len(state) == max(0, len(changed) - header.bytes - stream_check_bytes(len(changed)))
    with pytest.raises(MismatchError):
        embedded.read(model("f" * 32), data, header, canvas, partial=False)


def test_a_decoder_that_ends_elsewhere_is_noticed() -> None:
    """What a machine with other integers does: the bytes are right, what they decode to is not."""
    pixels, canvas = torch.rand(1, 3, 16, 16), Canvas((16, 16))
    data = embedded.compress_stream(model(), pixels, canvas, None, 200, None)
    other = model()
    other.stream.decode = lambda data, segments, size: data[:-1] + b"?"
    with pytest.raises(FormatError, match="another way"):
        embedded.read(other, data, peek(data), canvas, partial=False)


def test_the_layout_that_was_never_published_is_refused() -> None:
    with pytest.raises(FormatError, match="never published"):
        peek(b"\xf6\x02" + bytes(40))
