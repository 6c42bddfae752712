import pytest
import torch

from vistok.errors import InputError
from vistok.layout import Segment
from vistok.metrics.codes import CodeStatistics
from vistok.tokens import Tokens

COARSE, FINE = Segment("coarse", (2,), (4,)), Segment("fine", (2, 2), (4, 8))


def tokens(codes: list, keep: list | None = None, segments: tuple = (COARSE, FINE)) -> Tokens:
    return Tokens(segments, torch.tensor(codes), keep=None if keep is None else torch.tensor(keep))


def test_per_segment_and_column_over_batches() -> None:
    statistics = CodeStatistics()
    fine = [[0, 7], [1, 7], [2, 7], [3, 7]]
    statistics.update(tokens([[[0, -1], [1, -1], *fine]]))
    statistics.update(tokens([[[0, -1], [1, -1], *fine], [[1, -1], [0, -1], *fine]]))
    coarse, first, second = statistics.rows()
    assert (coarse.segment, coarse.column, coarse.size, coarse.counted) == ("coarse", 0, 4, 6)
    assert coarse.usage == 0.5
    assert coarse.perplexity == pytest.approx(2)
    assert coarse.entropy == pytest.approx(1)
    assert (first.column, first.counted, first.usage, first.perplexity) == (0, 12, 1.0, pytest.approx(4))
    assert (second.column, second.size, second.usage, second.perplexity) == (1, 8, 1 / 8, pytest.approx(1))


def test_prefixes_and_absent_positions_count_what_is_there() -> None:
    statistics = CodeStatistics()
    one = Segment("sequence", (4,), (16,))
    statistics.update(tokens([[3, 5, 7, 9]], [[True, False, True, False]], (one,)))
    statistics.update(tokens([[3, 5, 7, 9]], segments=(one,)).prefix(1))
    (row,) = statistics.rows()
    assert row.counted == 3
    assert row.usage == 2 / 16


def test_layouts_of_several_sizes_share_their_codebooks() -> None:
    statistics = CodeStatistics()
    statistics.update(tokens([[0, 1]], segments=(Segment("grid", (1, 2), (4,)),)))
    statistics.update(tokens([[0, 1, 2]], segments=(Segment("grid", (1, 3), (4,)),)))
    (row,) = statistics.rows()
    assert (row.counted, row.usage) == (5, 0.75)


def test_implicit_codebooks_too_large_to_count_say_so() -> None:
    statistics = CodeStatistics()
    statistics.update(tokens([[5, 6]], segments=(Segment("bits", (2,), (1 << 30,)),)))
    (row,) = statistics.rows()
    assert (row.usage, row.perplexity, row.size) == (None, None, 1 << 30)


def test_a_column_that_never_occurs() -> None:
    statistics = CodeStatistics()
    statistics.update(tokens([[[1, -1]]], segments=(Segment("pair", (1,), (4, 8)),)))
    first, second = statistics.rows()
    assert (first.usage, first.perplexity, first.entropy) == (0.25, pytest.approx(1), pytest.approx(0))
    assert (second.counted, second.usage, second.perplexity) == (0, 0.0, None)


def test_continuous_tokens_have_no_codes() -> None:
    statistics = CodeStatistics()
    statistics.update(Tokens((Segment("grid", (2,), dim=3),), vectors=torch.zeros(1, 2, 3)))
    with pytest.raises(InputError, match="no codes"):
        statistics.rows()
