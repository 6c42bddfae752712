"""Compressed files: round trips, budgets, every kind of damage, and a file of each version that keeps decoding."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vistok
from tests import layered, toy  # noqa: F401
from vistok.compressed import compress, decompress, pack, peek, unpack
from vistok.errors import FormatError, InputError, MismatchError
from vistok.layout import Canvas, Segment, Sizes, TokenSpec
from vistok.tokenizer import TokenData
from vistok.tokens import Tokens

SAMPLES = Path(__file__).parent / "samples"


def picture(height: int = 30, width: int = 41) -> torch.Tensor:
    values = np.random.RandomState(3).randint(0, 256, (1, 3, height, width), dtype=np.uint8)
    return torch.from_numpy(values)


@pytest.fixture(scope="module")
def tok():
    return vistok.create("layered")


@pytest.mark.parametrize("name", ["layered", "layered-plain", "toy", "toy-16"])
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (30, 41), (257, 20)])
def test_what_comes_out_is_what_the_tokens_decode_to(name, size):
    model = vistok.create(name)
    image = picture(*size)
    data = compress(model, image)
    tokens = model.encode(image, on_size="tile" if name == "toy-16" and max(size) > 16 else "pad")
    assert unpack(model, data).equal(tokens)
    assert unpack(model, data).source == tokens.source
    pixels = decompress(model, data)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == image.shape
    assert torch.equal(pixels, model.decode(tokens, dtype=torch.uint8))
    header = peek(data)
    assert header.bytes <= 12
    assert header.size == size
    assert header.left_out == 0


def test_without_a_prior_the_payload_is_bit_packing():
    model = vistok.create("layered-plain")
    data = compress(model, picture(128, 128))
    bits = int(unpack(model, data).bits()[0])
    assert len(data) - peek(data).bytes - 4 <= bits / 8 + 2


def test_prefixes_and_budgets(tok):
    image = picture(64, 64)
    whole, first = compress(tok, image), compress(tok, image, length=64)
    assert len(first) < len(whole)
    assert unpack(tok, first).length == 64
    assert peek(first).left_out == 1
    exact = 8 * len(whole) / 64**2
    assert compress(tok, image, bpp=exact) == whole
    assert compress(tok, image, bpp=exact - 0.003) == first
    with pytest.raises(InputError, match=rf"shortest file of layered takes {len(first)} bytes"):
        compress(tok, image, bpp=0.01)
    with pytest.raises(InputError, match="nearest lengths"):
        compress(tok, image, length=65)
    with pytest.raises(InputError, match="not both"):
        compress(tok, image, length=64, bpp=1)
    with pytest.raises(InputError, match="2 pictures"):
        compress(tok, image.repeat(2, 1, 1, 1))


def test_headers_stay_within_12_bytes_up_to_the_largest_pictures(tok):
    for size in ((16384, 16384), (20000, 10000), (65536, 3000)):
        head = _header_of(tok, size)
        assert head <= 12


def _header_of(tok, size):
    from vistok.header import number

    return 2 + 3 + sum(len(number(side - 1)) for side in size) + 1


def test_every_flipped_bit_cut_and_tail_is_noticed(tok):
    data = compress(tok, picture())
    for position in range(len(data)):
        for bit in (0, 4, 7):
            changed = data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]
            with pytest.raises(FormatError):
                peek(changed)
    for cut in range(len(data)):
        with pytest.raises(FormatError, match="empty" if cut == 0 else "cut short|damaged"):
            peek(data[:cut])
    with pytest.raises(FormatError, match="cut short"):
        peek(data[:-1])
    middle = len(data) // 2
    with pytest.raises(FormatError, match="damaged"):
        peek(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    for tail in (b"\0", b"x" * 10, bytes(255)):
        with pytest.raises(FormatError, match=f"followed by {len(tail)} other bytes"):
            decompress(tok, data + tail)
    with pytest.raises(FormatError, match="not a compressed file"):
        decompress(tok, b"\x89PNG" + data)


def test_newer_versions_say_upgrade_and_other_models_say_which(tok):
    data = compress(tok, picture())
    with pytest.raises(FormatError, match=r"version 5.*upgrade"):
        decompress(tok, data[:1] + bytes([data[1] + 4]) + data[2:])
    other = vistok.create("layered-other")  # the same weights but for the prior
    with pytest.raises(MismatchError, match=tok.fingerprint[:6]):
        decompress(other, data)


def test_a_file_that_its_checksum_fits_but_its_model_does_not_is_an_error(tok):
    from vistok.compressed import CHECKSUM, zlib

    data = compress(tok, picture())
    body = bytes([data[0], data[1] | 6 << 4]) + data[2:-CHECKSUM]
    with pytest.raises(FormatError, match="leaves out 6"):
        decompress(tok, body + zlib.crc32(body).to_bytes(4, "little"))


def test_alone_or_in_a_batch(tok):
    images = torch.cat([picture(), picture().flip(-1)])
    together = tok.encode(images)
    alone = [compress(tok, image[None]) for image in images]
    assert [pack(tok, item) for item in together] == alone
    joined = Tokens.cat([unpack(tok, data) for data in alone])
    assert torch.equal(tok.decode(joined, dtype=torch.uint8), torch.cat([decompress(tok, data) for data in alone]))


class Halting(layered.Layered):
    """Keeps some positions only."""

    def tokenize(self, pixels, spec, **options):
        codes = super().tokenize(pixels, spec, **options).codes
        return TokenData(codes=codes, keep=(codes % 3 != 0))

    def detokenize(self, data, spec, **options):
        return super().detokenize(TokenData(codes=data.codes.clamp_min(0)), spec, **options)


def test_masks_travel_along():
    model = Halting(layered.LayeredConfig())
    tokens = model.encode(picture())
    again = unpack(model, pack(model, tokens))
    assert torch.equal(again.keep, tokens.keep)
    assert torch.equal(again.codes[again.keep], tokens.codes[tokens.keep])
    assert len(pack(model, tokens)) < len(compress(vistok.create("layered-plain"), picture()))


def test_any_prefix_of_a_sequence():
    model = vistok.create("layered-plain")
    model.spec = TokenSpec(
        size=(32, 32),
        layout=lambda size: (Segment("latent", (300,), (1000,)),),
        sizes=Sizes(only=((32, 32),)),
        prefix_rule="any",
    )
    rng = torch.Generator().manual_seed(0)
    tokens = Tokens(model.spec.segments, torch.randint(1000, (1, 300), generator=rng), canvas=(Canvas((32, 32)),))
    for length in (1, 100, 293, 294, 300):
        data = pack(model, tokens.prefix(length))
        assert peek(data).bytes <= 12
        assert torch.equal(unpack(model, data).codes, tokens.codes[:, :length])


def test_continuous_and_missing_codes_are_refused(tok):
    tokens = tok.encode(picture())
    tokens.codes[0, 3] = -1
    with pytest.raises(InputError, match="missing"):
        pack(tok, tokens)
    with pytest.raises(InputError, match="padded"):
        pack(tok, tok.encode(picture(), on_size="resize"))
    model = vistok.create("layered-plain")
    model.spec = TokenSpec((8, 8), lambda size: (Segment("a", (2,), dim=3),), Sizes(only=((8, 8),)))
    with pytest.raises(InputError, match="continuous"):
        compress(model, picture(8, 8))


@pytest.mark.parametrize("name", ["layered", "toy"])
def test_files_of_version_1_keep_decoding(name):
    model = vistok.create(name)
    tokens = Tokens.load(SAMPLES / f"{name}-v1.vtok")
    assert tokens.source is not None
    assert tokens.source.weights == model.fingerprint
    data = (SAMPLES / f"{name}-v1.vtk").read_bytes()
    assert unpack(model, data).equal(tokens)
    assert pack(model, tokens) == data


SCRIPT = """
import sys, torch
from tests.test_compressed import picture
from tests import layered
import vistok
from vistok.compressed import compress, unpack
torch.set_num_threads(int(sys.argv[1]))
tok = vistok.create("layered")
image = picture(300, 200)
data = compress(tok, image)
if len(sys.argv) > 2:
    assert unpack(tok, bytes.fromhex(sys.argv[2])).equal(tok.encode(image))
print(data.hex())
"""


def test_the_number_of_threads_changes_no_byte():
    def run(threads: str, *arguments: str) -> str:
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        return subprocess.run(
            [sys.executable, "-c", SCRIPT, threads, *arguments],
            env=os.environ | dict.fromkeys(names, threads),
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    one = run("1")
    assert run("2", one) == one
