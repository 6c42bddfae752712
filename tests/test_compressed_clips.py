"""Clips as compressed files: round trips, windows, budgets, damage, files that claim more frames than they hold."""

import zlib

import pytest
import torch

import tests.toy  # noqa: F401
import vistok
from tests.test_clips import clip
from vistok.compressed import compress, decompress, pack, unpack
from vistok.compressed_clips import compress_clip, decompress_windows
from vistok.errors import FormatError, InputError, MismatchError
from vistok.header import number, peek


def windows(pixels):
    return lambda count: pixels.split(count, 2)


@pytest.mark.parametrize("name", ["toy-video", "omnitokenizer-tiny"])
@pytest.mark.parametrize("frames", [1, 4, 5, 12])
@pytest.mark.parametrize("rate", [None, 12.0, 30000 / 1001])
def test_what_comes_out_is_what_the_tokens_decode_to(name, frames, rate):
    torch.manual_seed(0)
    tok = vistok.create(name)
    pixels = clip(frames, 16, 24)[..., :13, :22]
    data = compress_clip(tok, windows(pixels), rate=rate)
    header = peek(data)
    assert (header.size, header.frames) == ((13, 22), frames)
    assert header.rate is None if rate is None else header.rate == pytest.approx(rate, abs=1e-6)
    tokens = tok.encode(pixels, rate=header.rate)
    assert unpack(tok, data).equal(tokens)
    wanted = tok.decode(tokens, dtype=torch.uint8)
    assert torch.equal(decompress(tok, data), wanted)
    parts = list(decompress_windows(tok, data))
    assert [part.shape[2] for part in parts] == [min(5, frames - start) for start in range(0, frames, 5)]
    assert torch.equal(torch.cat(parts, 2), wanted)
    assert len(data) <= header.bytes + 4 + int(tokens.bits()[0]) // 8 + 4


def test_budgets():
    tok = vistok.create("toy-video")
    pixels = clip(12)
    whole = compress_clip(tok, windows(pixels))
    assert compress_clip(tok, windows(pixels), bytes=len(whole)) == whole
    assert compress_clip(tok, windows(pixels), bpp=8 * len(whole) / pixels[0, 0].numel()) == whole
    with pytest.raises(InputError, match="bits per pixel"):
        compress_clip(tok, windows(pixels), bytes=len(whole) - 1)
    assert compress_clip(tok, windows(pixels), psnr=2.0) == whole
    with pytest.raises(InputError, match=r"90\.0 dB were asked for"):
        compress_clip(tok, windows(pixels), psnr=90.0)
    with pytest.raises(InputError, match="not both"):
        compress_clip(tok, windows(pixels), psnr=9.0, bytes=9)


def test_what_is_refused():
    tok = vistok.create("toy-video")
    with pytest.raises(InputError, match="compress_clip"):
        compress(tok, clip(5))
    with pytest.raises(InputError, match="needs one of clips"):
        compress_clip(vistok.create("toy"), windows(clip(5)))
    with pytest.raises(InputError, match="no frames"):
        compress_clip(tok, lambda count: [])
    with pytest.raises(InputError, match="continuous"):
        compress_clip(vistok.create("omnitokenizer-tiny-vae"), windows(clip(5)))
    with pytest.raises(FormatError, match="holds a picture"):
        decompress_windows(tok, compress(tok, clip(1)[:, :, 0]))
    data = compress_clip(tok, windows(clip(5)))
    with pytest.raises(MismatchError, match="compressed by a model"):
        decompress_windows(vistok.create("omnitokenizer-tiny"), data)
    with pytest.raises(InputError, match="padded"):
        pack(tok, tok.encode(clip(5)[..., :13, :13], on_size="resize"))


def test_every_flipped_bit_cut_and_tail_is_noticed():
    data = compress_clip(vistok.create("toy-video"), windows(clip(7)), rate=25.0)
    for position in range(len(data)):
        for bit in (0, 3, 7):
            with pytest.raises(FormatError):
                peek(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
    for cut in range(len(data)):
        with pytest.raises(FormatError):
            peek(data[:cut])
    with pytest.raises(FormatError, match="followed by 3 other bytes"):
        peek(data + b"xyz")


def test_a_file_that_claims_more_frames_than_it_holds_takes_no_memory():
    tok = vistok.create("toy-video")
    data = compress_clip(tok, windows(clip(5)))
    place = 2 + 3 + 2  # magic, version, model, two sides of one byte
    assert data[place : place + 1] == number(4)
    body = data[:place] + number(2**27) + data[place + 1 : -4]
    with pytest.raises(FormatError, match="do not fit"):
        unpack(tok, body + zlib.crc32(body).to_bytes(4, "little"))
