"""Tokens: slicing, joining, bits, and the token file with every kind of damage."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok import bits
from vistok.errors import FormatError, InputError, MismatchError
from vistok.layout import Canvas, Segment
from vistok.tokens import Source, Tokens

SAMPLES = Path(__file__).parent / "samples"
SEGMENTS = (Segment("holistic", (3,), (17,)), Segment("patches", (2, 4), (1000, 5)))


def example(items: int = 2, **fields) -> Tokens:
    rng = torch.Generator().manual_seed(7)
    codes = torch.full((items, 11, 2), -1)
    codes[:, :3, 0] = torch.randint(17, (items, 3), generator=rng)
    codes[:, 3:, 0] = torch.randint(1000, (items, 8), generator=rng)
    codes[:, 3:, 1] = torch.randint(5, (items, 8), generator=rng)
    canvas = tuple(Canvas((30 + k, 40), padding=(0, 0, 0, 2 - k)) for k in range(items))
    return Tokens(SEGMENTS, codes, canvas=canvas, source=Source("toy", "ab" * 16), **fields)


def test_segments_by_name():
    tokens = example()
    assert tokens["holistic"].shape == (2, 3, 1)
    assert tokens["patches"].shape == (2, 2, 4, 2)
    with pytest.raises(InputError, match="'holistic', 'patches'"):
        tokens["grid"]
    with pytest.raises(InputError, match="prefix of 5"):
        tokens.prefix(5)["patches"]


def test_bits_count_what_the_file_packs():
    tokens = example()
    assert tokens.bits().tolist() == [3 * 5 + 8 * 13] * 2
    assert tokens.prefix(3).bits().tolist() == [15, 15]


@pytest.mark.parametrize("length", [1, 3, 7, 11])
def test_file_round_trip(length, tmp_path):
    tokens = example().prefix(length)
    tokens.save(tmp_path / "a.vtok")
    again = Tokens.load(tmp_path / "a.vtok")
    assert again.equal(tokens)
    assert again.source == tokens.source
    assert not list(tmp_path.glob(".*"))


def test_round_trip_with_keep_unsent_codes_and_vectors():
    keep = torch.tensor([[True] * 5 + [False] * 6, [False, True] * 5 + [True]])
    tokens = example(keep=keep)
    tokens.codes[0, 4, 1] = -1
    again = Tokens.from_bytes(tokens.to_bytes())
    assert again.equal(tokens)
    assert tokens.lengths.tolist() == [5, 6]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        soft = Tokens((Segment("grid", (2, 2), dim=3),), vectors=torch.randn(2, 4, 3).to(dtype))
        back = Tokens.from_bytes(soft.to_bytes())
        assert back.equal(soft)
        assert soft.bits().tolist() == [12 * 8 * dtype.itemsize] * 2


def test_absent_positions_cost_one_bit_and_do_not_count():
    keep = torch.tensor([[True] + [False] * 10, [False] * 11])
    tokens = example(keep=keep)
    assert tokens.bits().tolist() == [11 + 5, 11]
    whole = example(keep=torch.ones(2, 11, dtype=torch.bool))
    assert len(tokens.to_bytes()) < len(whole.to_bytes()) - 20
    again = Tokens.from_bytes(tokens.to_bytes())
    assert torch.equal(again.codes[0, 0], tokens.codes[0, 0])
    assert (again.codes[~keep] == -1).all()
    other = example(keep=keep)
    other.codes[~keep] = 3
    assert other.equal(tokens)
    assert other.to_bytes() == tokens.to_bytes()
    soft = Tokens((Segment("grid", (2, 2), dim=3),), vectors=torch.rand(2, 4, 3), keep=keep[:, :4])
    assert Tokens.from_bytes(soft.to_bytes()).equal(soft)
    assert example().to_bytes()[4] == 1  # without a mask older versions still read it
    assert tokens.to_bytes()[4] == 2


@pytest.mark.parametrize("version", [1, 2])
def test_kept_tokens_of_every_version_are_read(version):
    tokens = Tokens.load(SAMPLES / f"kept-v{version}.vtok")
    assert tokens.lengths.tolist() == [3, 6, 9]
    assert tokens.codes[tokens.keep].tolist() == [
        33,
        63,
        79,
        66,
        99,
        78,
        76,
        94,
        33,
        26,
        91,
        54,
        24,
        41,
        69,
        69,
        49,
        80,
    ]
    assert tokens.canvas == (Canvas((32, 32)),) * 3


def test_a_prefix_of_each_items_own_length():
    tokens = example(3)
    mixed = tokens.prefix([2, 7, 4])
    assert mixed.length == 7
    assert mixed.lengths.tolist() == [2, 7, 4]
    assert torch.equal(mixed.codes, tokens.codes[:, :7])
    assert torch.equal(mixed.prefix([1, 7, 7]).keep, mixed.keep & tokens.prefix([1, 7, 7]).keep)
    assert tokens.prefix(torch.tensor([2, 2, 2])).lengths.tolist() == [2, 2, 2]
    for lengths in ([1, 2], [0, 1, 2], [1, 2, 12], [1.0, 2.0, 3.0]):
        with pytest.raises(InputError):
            tokens.prefix(lengths)


def test_every_bit_flip_cut_and_tail_is_noticed():
    data = example().to_bytes()
    for position in range(len(data)):
        with pytest.raises(FormatError):
            Tokens.from_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
    for cut in (0, 3, 10, len(data) // 2, len(data) - 1):
        with pytest.raises(FormatError):
            Tokens.from_bytes(data[:cut])
    with pytest.raises(FormatError, match="other bytes"):
        Tokens.from_bytes(data + b"x")


def test_newer_version_says_upgrade():
    data = bytearray(example().to_bytes())
    data[4] = 99
    with pytest.raises(FormatError, match="upgrade"):
        Tokens.from_bytes(bytes(data))


def test_slices_and_cat():
    tokens = example(4)
    assert Tokens.cat([tokens[:1], tokens[1:3], tokens[3]]).equal(tokens)
    assert tokens[[2, 0]].canvas == (tokens.canvas[2], tokens.canvas[0])
    assert [len(item) for item in tokens] == [1] * 4
    with pytest.raises(MismatchError, match="length"):
        Tokens.cat([tokens, tokens.prefix(3)])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.data())
def test_bit_packing_round_trip(width, data):
    import numpy as np

    values = np.array(data.draw(st.lists(st.integers(0, 2**width - 1), max_size=50)), dtype=np.int64)
    packed = bits.pack(values, width)
    assert len(packed) == bits.packed_size(len(values), width)
    assert bits.unpack(packed, len(values), width).tolist() == values.tolist()
