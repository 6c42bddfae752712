"""Tokens changed by hand: whole segments, single tokens, and where a click lands."""

import pytest
import torch

import vistok
from vistok.edits import EDITS, edited, position_at, with_token
from vistok.errors import InputError
from vistok.layout import Canvas, Segment
from vistok.tokens import Tokens


@pytest.fixture(scope="module")
def tokens():
    """Of a picture of 64 x 96 pixels, three grids."""
    torch.manual_seed(0)
    return vistok.create("strata-tiny").encode(torch.rand(1, 3, 64, 96))


def test_edits_stay_within_segments(tokens):
    for edit in EDITS:
        changed = edited(tokens, edit)
        start = 0
        for segment in tokens.segments:
            before, after = (part.codes[0, start : start + segment.count] for part in (tokens, changed))
            start += segment.count
            assert set(after.tolist()) <= set(before.tolist())
            if edit in ("shuffle", "swap halves"):
                assert sorted(after.tolist()) == sorted(before.tolist())
            if edit == "repeat the first":
                assert set(after.tolist()) == {int(before[0])}
            if edit == "mean picture":
                assert len(set(after.tolist())) == 1
    assert torch.equal(edited(tokens, "shuffle", 3).codes, edited(tokens, "shuffle", 3).codes)
    assert isinstance(edited(tokens, "shuffle"), Tokens)


def test_edits_of_tiled_tokens_stay_within_segments_too():
    """Tiles are axes of every segment: what is shuffled is one segment's, however many tiles there are."""
    segments = (Segment("one", (2, 2, 2), (8,)), Segment("other", (3, 2, 2), (8,)))
    codes = torch.cat([torch.arange(8) % 4, 4 + torch.arange(12) % 4])[None]
    tokens = Tokens(segments, codes=codes, canvas=(Canvas((64, 64), tiles=(2, 2)),))
    changed = edited(tokens, "shuffle").codes[0]
    assert sorted(changed[:8].tolist()) == sorted(codes[0, :8].tolist())
    assert not torch.equal(changed, codes[0])


def test_one_token_is_changed_and_nothing_else(tokens):
    sizes = [segment.codebooks[0] for segment in tokens.segments for _ in range(segment.count)]
    last = tokens.length - 1
    for position in (0, last):
        code, size = int(tokens.codes[0, position]), sizes[position]
        drawn = [with_token(tokens, position, "randomise", seed=seed) for seed in range(8)]
        fresh = [int(one.codes[0, position]) for one in drawn]
        assert all(0 <= one < size and one != code for one in fresh)
        assert len(set(fresh)) > 1
        assert int(with_token(tokens, position, "set", value=size - 1).codes[0, position]) == size - 1
        assert int(with_token(tokens, position, "flip a bit", value=1).codes[0, position]) == code ^ 2
        for one in drawn:
            assert (one.codes != tokens.codes).sum() == 1
    for position, action, told in [
        (last + 1, {"action": "set"}, "no token"),
        (0, {"action": "set", "value": sizes[0]}, "no code"),
        (0, {"action": "flip a bit", "value": 40}, "no bit 40"),
        (0, {"action": "set", "column": 1}, "no column 1"),
        (0, {"action": "explode"}, "no action"),
    ]:
        with pytest.raises(InputError, match=told):
            with_token(tokens, position, **action)


def test_bits_and_vectors_are_tokens_too():
    bits = Tokens((Segment("bits", (2, 2), (2,) * 3),), codes=torch.zeros(1, 4, 3).long(), canvas=(Canvas((8, 8)),))
    flipped = with_token(bits, 3, "flip a bit", column=2).codes
    assert flipped[0, 3].tolist() == [0, 0, 1]
    assert flipped.sum() == 1
    vectors = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    smooth = Tokens((Segment("grid", (2, 2), dim=5),), vectors=vectors, canvas=(Canvas((8, 8)),))
    assert with_token(smooth, 1, "set", value=2.5, column=4).vectors[0, 1, 4] == 2.5
    drawn = with_token(smooth, 1, "randomise").vectors
    assert ((drawn != vectors).any(2)[0]).tolist() == [False, True, False, False]
    with pytest.raises(InputError, match="no bits"):
        with_token(smooth, 1, "flip a bit")


def test_where_a_click_on_the_map_lands(tokens):
    segment = tokens.segments[-1]
    start, (rows, columns) = tokens.length - segment.count, segment.shape
    assert position_at(tokens, (64, 96), 0, 0) == start
    assert position_at(tokens, (64, 96), 95.5, 63.5) == tokens.length - 1
    row, column = rows - 1, 1
    x, y = (column + 0.5) * 96 / columns, (row + 0.5) * 64 / rows
    assert position_at(tokens, (64, 96), x, y) == start + row * columns + column
    with pytest.raises(InputError, match="outside"):
        position_at(tokens, (64, 96), 96, 0)
    line = Tokens((Segment("line", (4,), (8,)),), codes=torch.zeros(1, 4).long(), canvas=(Canvas((8, 8)),))
    with pytest.raises(InputError, match="no place"):
        position_at(line, (8, 8), 1, 1)
