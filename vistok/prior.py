"""How likely each code is, given those already known: an integer network, and the entropy coder that it drives.

    known codes around a position  --embedding, one small matrix per place, sum, ReLU-->  h  (H,)
    h  --matrix, softmax-->  group of the code  --the group's matrix, softmax-->  member of the group

Known are: in the same segment the codes to the left, above left, above and above right; in the segment before, the
one at the same place and its four neighbours; in earlier segments, the one at the same place. Positions with
x + 2 y = t depend only on smaller t, so each such line is one array call, never a loop over tokens.

Weights, activations and probabilities are all integers (integer networks: Balle, Johnston and Minnen, ICLR 2019), and
every sum stays below 2^24, where float32 arithmetic is exact in any order. So a file written on one machine decodes on
another, whatever their threads and libraries. The range coder is constriction's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vistok.bits import width
from vistok.errors import ConfigError, FormatError
from vistok.layout import Segment, TokenSpec

EMBEDDING, MIXING, HIDDEN, OUTPUT = 32, 64, 32, 32  # one is this many, in each of the integer tables
LOGIT = HIDDEN * OUTPUT  # steps of a logit per nat
NEVER = -(1 << 15)  # the bias of what does not occur
STEPS = 64  # steps of the table of exponentials per nat
TOP = 1 << 15  # the weight of the likeliest code; 256 of them still sum to less than 2^24
SAME = ((0, -1), (-1, -1), (-1, 0), (-1, 1))  # (rows, columns) to the known places of the same segment
BEFORE = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))  # and of the segment before


class Coder(Protocol):
    """Codes (1, n) of a tokenizer, in the order of its tokens, to bytes and back, exactly."""

    def encode(self, codes: Tensor, spec: TokenSpec) -> bytes:
        """Bytes that hold the codes of a prefix."""

    def decode(self, data: bytes, spec: TokenSpec, length: int) -> Tensor:
        """The codes of a prefix of `length` tokens."""


class UniformCoder:
    """Every code equally likely: what any tokenizer without a prior gets, within a word of plain bit packing.

    `keep`: bool (n,), the positions that are coded, where only some are there; the others hold -1 when read.
    """

    def __init__(self, keep: np.ndarray | None = None) -> None:
        self.keep = keep

    def encode(self, codes: Tensor, spec: TokenSpec) -> bytes:
        """Codes (1, n) or (1, n, C) to bytes, segment by segment and column by column."""
        writer = Writer()
        values = codes[0].cpu().numpy().reshape(codes.shape[1], -1)
        for positions, column, size in self._columns(spec, len(values)):
            writer.uniform(values[positions, column], size)
        return writer.bytes()

    def decode(self, data: bytes, spec: TokenSpec, length: int) -> Tensor:
        """Inverse of `encode`: long (1, length) or (1, length, C)."""
        reader = Reader(data)
        columns = max(len(segment.codebooks) for segment in spec.segments)
        codes = np.full((length, columns), -1, dtype=np.int64)
        for positions, column, size in self._columns(spec, length):
            codes[positions, column] = reader.uniform(len(positions), size)
        return torch.from_numpy(codes if columns > 1 else codes[:, 0])[None]

    def _columns(self, spec: TokenSpec, length: int) -> Iterator[tuple[np.ndarray, int, int]]:
        """(positions, column, codebook size) of everything within a prefix, in coding order."""
        start = 0
        for segment in spec.segments:
            positions = np.arange(start, min(start + segment.count, length))
            positions = positions if self.keep is None else positions[self.keep[positions]]
            for column, size in enumerate(segment.codebooks if len(positions) else ()):
                yield positions, column, size
            start += segment.count


# -- the prior -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """One known code that a segment looks at: which segment it is in, and where, in that segment's own rows."""

    segment: int
    rows: int
    columns: int


class CodePrior(nn.Module):
    """Conditional probabilities of the codes of a layout of grids, coarse to fine; uniform until it is fitted.

    `segments`: one layout of the tokenizer, at any size: the grids' number and codebooks count, not their sizes. Each
    has one codebook and one or two axes. `hidden` is H. Raises ConfigError for segments of another kind.
    """

    def __init__(self, segments: Sequence[Segment], hidden: int = 32) -> None:
        super().__init__()
        for segment in segments:
            if len(segment.codebooks) != 1 or len(segment.shape) > 2 or not 2 <= segment.codebooks[0] <= 1 << 15:
                raise ConfigError(f"segment {segment.name!r} is not a grid of single codes out of 2 to 32768")
        if not 1 <= hidden <= 32:
            raise ConfigError(f"hidden={hidden}; expected 1 to 32, so that sums stay exact in float32")
        self.sizes = tuple(segment.codebooks[0] for segment in segments)
        self.hidden = hidden
        self.places = [_places(index) for index in range(len(segments))]
        for index, size in enumerate(self.sizes):
            if len(self.places[index]) * hidden * 127**2 >= 1 << 24:
                raise ConfigError(f"{len(segments)} segments are too many for sums that stay exact in float32")
            groups, members = _split(size)
            filled = torch.arange(groups * members).view(groups, members) < size  # the last group may have fewer
            tables = {
                "order": torch.arange(groups * members).clamp_max(size - 1).to(torch.int16),
                "embedding": torch.zeros(size + 1, hidden, dtype=torch.int8),
                "mixing": torch.zeros(len(self.places[index]), hidden, hidden, dtype=torch.int8),
                "bias": torch.zeros(4, hidden, dtype=torch.int16),
                "group": torch.zeros(groups, hidden, dtype=torch.int8),
                "group_bias": (LOGIT * (filled.sum(1) / members).log()).clamp_min(NEVER).round().to(torch.int16),
                "member": torch.zeros(groups, members, hidden, dtype=torch.int8),
                "member_bias": torch.where(filled, 0, NEVER).to(torch.int16),
            }
            for name, table in tables.items():
                self.register_buffer(f"{name}{index}", table)

    # -- codes to bytes and back -------------------------------------------------------------------------------------

    def encode(self, codes: Tensor, spec: TokenSpec) -> bytes:
        """Codes (1, n) of a prefix of whole segments to bytes."""
        writer = Writer()
        grids: list[np.ndarray] = []
        for index, grid in enumerate(_grids(codes, spec)):
            tables = self._tables(index)
            ranks = np.empty(self.sizes[index], dtype=np.int64)
            ranks[tables["order"][::-1]] = np.arange(len(tables["order"]))[::-1]  # padding repeats the last code
            framed = _frame(grid, self.sizes[index])
            known = self._known(index, grids, grid.shape)
            items, rows, columns = _wavefront(grid.shape)
            state = self._state(tables, known, framed, items, rows, columns)
            groups, members = np.divmod(ranks[grid[items, rows, columns]], tables["member"].shape[1])
            stops = _stops(grid.shape)
            for chunk in _chunks(stops):  # bounds the memory of the probabilities
                first, last = chunk[0], chunk[-1]
                likely = _weights(state[first:last] @ tables["group"].T + tables["group_bias"])
                within = self._within(tables, state[first:last], groups[first:last])
                for start, stop in pairwise(chunk):
                    writer.weighted(groups[start:stop], likely[start - first : stop - first])
                    writer.weighted(members[start:stop], within[start - first : stop - first])
            grids.append(grid)
        return writer.bytes()

    def decode(self, data: bytes, spec: TokenSpec, length: int) -> Tensor:
        """Inverse of `encode`: long (1, length). Bytes that `encode` did not write give some codes or a FormatError."""
        reader = Reader(data)
        tiles = spec.pieces
        grids: list[np.ndarray] = []
        taken = 0
        for index, segment in enumerate(spec.single):
            if taken >= length:
                break
            taken += segment.count * tiles
            shape = (tiles, *((1,) * (2 - len(segment.shape))), *segment.shape)
            tables = self._tables(index)
            framed = _frame(np.zeros(shape, dtype=np.int64), self.sizes[index])
            known = self._known(index, grids, shape)
            items, rows, columns = _wavefront(shape)
            stops = _stops(shape)
            for start, stop in pairwise(stops):
                item, row, column = items[start:stop], rows[start:stop], columns[start:stop]
                state = self._state(tables, known, framed, item, row, column)
                groups = reader.weighted(_weights(state @ tables["group"].T + tables["group_bias"]))
                members = reader.weighted(self._within(tables, state, groups))
                framed[item, row + 1, column + 1] = tables["order"][groups * tables["member"].shape[1] + members]
            grids.append(framed[:, 1:, 1:-1])
        parts = [np.moveaxis(grid.reshape(tiles, -1), 0, 1).reshape(-1) for grid in grids]
        return torch.from_numpy(np.concatenate(parts))[None]

    def _tables(self, index: int) -> dict[str, np.ndarray]:
        """The segment's tables: `order` as integers, the others as float32 that hold integers."""
        names = ("order", "embedding", "mixing", "bias", "group", "group_bias", "member", "member_bias")
        arrays = {name: getattr(self, f"{name}{index}").cpu().numpy() for name in names}
        return {name: array.astype(np.int64 if name == "order" else np.float32) for name, array in arrays.items()}

    def _known(self, index: int, grids: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """What the earlier segments and the position's parity add to the hidden sum: float32 (B, h, w, H)."""
        tables = self._tables(index)
        parity = 2 * (np.arange(shape[1]) % 2)[:, None] + np.arange(shape[2]) % 2
        total = np.broadcast_to(tables["bias"][parity], (*shape, self.hidden)).copy()
        for place, mixing in zip(self.places[index], tables["mixing"], strict=True):
            if place.segment == index:
                continue
            mixed = getattr(self, f"embedding{place.segment}").cpu().numpy().astype(np.float32) @ mixing
            total += mixed[look(grids[place.segment], self.sizes[place.segment], place, shape)]
        return total

    def _state(self, tables: dict[str, np.ndarray], known: np.ndarray, framed: np.ndarray, *at: np.ndarray) -> Any:
        """Hidden activations at positions (items, rows, columns): float32 integers 0..255, (n, H)."""
        item, row, column = at
        total = known[item, row, column]
        for (down, right), mixing in zip(SAME, tables["mixing"], strict=False):
            codes = framed[item, row + 1 + down, column + 1 + right]
            total += tables["embedding"][codes] @ mixing
        return np.clip(np.floor(total / (EMBEDDING * MIXING // HIDDEN)), 0, 255)

    @staticmethod
    def _within(tables: dict[str, np.ndarray], state: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Weights of the members of each position's group."""
        logits = (tables["member"][groups] @ state[:, :, None])[..., 0]
        return _weights(logits + tables["member_bias"][groups])


def _places(index: int) -> list[_Place]:
    """What segment `index` looks at, in the order of its mixing matrices."""
    same = [_Place(index, *offset) for offset in SAME]
    before = [_Place(index - 1, *offset) for offset in BEFORE] if index else []
    return same + before + [_Place(earlier, 0, 0) for earlier in range(index - 1)]


def _split(size: int) -> tuple[int, int]:
    """Groups, and members of each, that hold `size` codes."""
    groups = 1 << (width(size) + 1) // 2
    return groups, -(-size // groups)


def _grids(codes: Tensor, spec: TokenSpec) -> Iterator[np.ndarray]:
    """Codes (1, n) as one (tiles, h, w) array per segment of the prefix."""
    values = codes[0].cpu().numpy()
    tiles, start = spec.pieces, 0
    for segment in spec.single:
        stop = start + segment.count * tiles
        if start >= len(values):
            return
        apart = np.moveaxis(values[start:stop].reshape(segment.count, tiles), 1, 0)
        yield apart.reshape(tiles, *((1,) * (2 - len(segment.shape))), *segment.shape)
        start = stop


def _frame(grid: np.ndarray, outside: int) -> np.ndarray:
    """(B, h, w) with a row above and a column on either side that hold `outside`."""
    return np.pad(grid, ((0, 0), (1, 0), (1, 1)), constant_values=outside)


def look(grid: np.ndarray, outside: int, place: _Place, shape: tuple[int, ...]) -> np.ndarray:
    """The codes of `grid` at a place as seen from every position of a grid of `shape` (B, h, w)."""
    rows = np.arange(shape[1]) * grid.shape[1] // shape[1] + place.rows
    columns = np.arange(shape[2]) * grid.shape[2] // shape[2] + place.columns
    padded = np.pad(grid, ((0, 0), (1, 1), (1, 1)), constant_values=outside)
    return padded[:, rows[:, None] + 1, columns + 1]


def _wavefront(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items, rows and columns of all positions of (B, h, w), line by line in the order of coding."""
    items, rows, columns = (axis.ravel() for axis in np.indices(shape))
    order = np.argsort(columns + 2 * rows, kind="stable")
    return items[order], rows[order], columns[order]


def _stops(shape: tuple[int, ...]) -> list[int]:
    """Where each line of the wavefront begins, and where the last one ends."""
    rows, columns = np.indices(shape[1:])
    counts = np.bincount((columns + 2 * rows).ravel()) * shape[0]
    return [0, *np.cumsum(counts[counts > 0]).tolist()]


def _chunks(stops: list[int], size: int = 8192) -> Iterator[list[int]]:
    """`stops` in runs that overlap by one and span about `size` positions."""
    run = [stops[0]]
    for stop in stops[1:]:
        run.append(stop)
        if stop - run[0] >= size:
            yield run
            run = [stop]
    if len(run) > 1:
        yield run


def _exponentials() -> np.ndarray:
    """TOP exp(-k / STEPS) for k = 0, 1, ..., in integer arithmetic alone, down to 1."""
    value, table = TOP << 40, []
    while value >> 40 > 1:
        table.append(value >> 40)
        value = value * 1057095000 >> 30  # times exp(-1 / STEPS)
    return np.array([*table, 1], dtype=np.float32)


EXPONENTIALS = _exponentials()


def _weights(logits: np.ndarray) -> np.ndarray:
    """Integer weights 1..TOP, as float32, of integer logits in steps of 1 / LOGIT nat: a softmax not yet normalised."""
    below = (logits.max(1, keepdims=True) - logits).astype(np.int32) // (LOGIT // STEPS)
    return EXPONENTIALS[np.minimum(below, len(EXPONENTIALS) - 1)]


# -- the range coder -------------------------------------------------------------------------------------------------


class Writer:
    """Symbols to bytes through constriction's range coder."""

    def __init__(self) -> None:
        from constriction import stream

        self._encoder = stream.queue.RangeEncoder()
        self._uniform, self._categorical = stream.model.Uniform, stream.model.Categorical(perfect=False)

    def uniform(self, values: np.ndarray, size: int) -> None:
        """Integers below `size`, equally likely."""
        if size > LARGEST:
            self.uniform(values // LARGEST, -(-size // LARGEST))
            self.uniform(values % LARGEST, LARGEST)
        elif size > 1:
            self._encoder.encode(np.ascontiguousarray(values, dtype=np.int32), self._uniform(size))

    def weighted(self, values: np.ndarray, weights: np.ndarray) -> None:
        """Integers (n,), each below the width of weights (n, K): positive integers as float32 that sum to < 2^24."""
        if weights.shape[1] > 1:
            self._encoder.encode(np.ascontiguousarray(values, dtype=np.int32), self._categorical, weights)

    def bytes(self) -> bytes:
        """Everything written so far, in as few bytes as tell it apart: the reader supplies zeros after the end.

        The coder's state says that any number in [lower, lower + span) may follow the words that are out; the roundest
        one is taken. Where a carry into those words is still open, the coder's own choice stays.
        """
        words, (lower, span) = self._encoder.pos()
        data = self._encoder.get_compressed().astype(">u4").tobytes()
        if lower + span > 1 << 64:
            return data
        for size in range(9):
            step = 1 << 64 - 8 * size
            value = -(-lower // step) * step
            if value < lower + span:
                break
        return data[: 4 * words] + value.to_bytes(9, "big")[1 : 1 + size]


class Reader:
    """Inverse of `Writer`: the same calls give the symbols back."""

    def __init__(self, data: bytes) -> None:
        from constriction import stream

        padded = data + bytes(-len(data) % 4 + 8)
        self._decoder = stream.queue.RangeDecoder(np.frombuffer(padded, dtype=">u4").astype(np.uint32))
        self._uniform, self._categorical = stream.model.Uniform, stream.model.Categorical(perfect=False)

    def uniform(self, count: int, size: int) -> np.ndarray:
        """`count` integers below `size`."""
        if size > LARGEST:
            return self.uniform(count, -(-size // LARGEST)) * LARGEST + self.uniform(count, LARGEST)
        if size == 1:
            return np.zeros(count, dtype=np.int64)
        return self._read(self._uniform(size), count).astype(np.int64)

    def weighted(self, weights: np.ndarray) -> np.ndarray:
        """One integer per row of weights (n, K)."""
        if weights.shape[1] == 1:
            return np.zeros(len(weights), dtype=np.int64)
        return self._read(self._categorical, weights).astype(np.int64)

    def _read(self, *arguments: Any) -> np.ndarray:
        try:
            return self._decoder.decode(*arguments)
        except (AssertionError, ValueError) as error:
            raise FormatError("the compressed codes are damaged: they do not decode") from error


LARGEST = 1 << 16  # alphabet that is coded in one step; larger ones in several
