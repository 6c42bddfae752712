"""The bytes of vistok-progressive's streams: a range coder that may end after any byte.

    writer   symbols under weights --range coder--> bytes, cut at the budget --> the symbols that these bytes settle
    reader   bytes, then zeros | bytes, then ones --two range decoders--> the symbols on which they agree

A symbol is settled where it is the same whatever bytes follow. Both sides find the same ones: the writer remembers its
last few calls, and when the budget is used up it reads them back and forgets what the bytes do not hold.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from vistok.errors import MismatchError

MEMORY = 64  # bytes before the end whose calls a writer remembers
FILLED = 64  # bytes beyond the end that a decoder may look at


class EndError(Exception):
    """The stream ends here: all that was asked for has been coded, or the bytes are used up."""


@dataclass
class Call:
    """One call of the coder: where it began, under which model, of which coefficients in which plane."""

    start: Any
    weights: np.ndarray | int  # rows for symbols; the number of values of a checksum
    plane: int
    at: Tensor | None = None
    column: Tensor | None = None


class RangeModels:
    """The models of symbols; `constriction` is imported where a stream is coded."""

    def __init__(self) -> None:
        from constriction import stream

        self.coder = stream.queue
        self._uniform, self._categorical = stream.model.Uniform, stream.model.Categorical(perfect=False)

    def write(self, encoder: Any, values: np.ndarray, weights: np.ndarray | int) -> None:
        """Encode values under rows of weights, or one value of so many."""
        if isinstance(weights, int):
            encoder.encode(values, self._uniform(weights))
        elif len(values):
            encoder.encode(values, self._categorical, weights)

    def decoders(self, data: bytes) -> list[Any]:
        """Two decoders: as if only zeros followed, and only ones."""
        found = []
        for filling in (b"\x00", b"\xff"):
            words = np.frombuffer(data + filling * (-len(data) % 4 + FILLED), dtype=">u4").astype(np.uint32)
            found.append(self.coder.RangeDecoder(words))
        return found

    def settled(self, decoders: list[Any], weights: np.ndarray | int) -> np.ndarray:
        """The next symbols, as many as the decoders agree on; the decoders go on behind them, where that is all."""
        first, second = (self._read(place, decoders, weights) for place in (0, 1))
        count = min(len(first), len(second))
        differs = (first[:count] != second[:count]).nonzero()[0]
        return first[: differs[0]] if len(differs) else first[:count]

    def _read(self, place: int, decoders: list[Any], weights: np.ndarray | int) -> np.ndarray:
        """Symbols of one decoder; fewer where its bytes, made up, are none that an encoder writes."""
        trial = decoders[place].clone()
        try:
            if isinstance(weights, int):
                symbols = trial.decode(self._uniform(weights), 1)
            else:
                symbols = trial.decode(self._categorical, weights)
        except (AssertionError, ValueError):
            if isinstance(weights, int) or len(weights) < 2:
                return np.zeros(0, dtype=np.int32)
            half = len(weights) // 2
            begun = self._read(place, decoders, weights[:half])
            if len(begun) < half:
                return begun
            return np.concatenate([begun, self._read(place, decoders, weights[half:])])
        decoders[place] = trial
        return symbols


class StreamWriter(RangeModels):
    """Codes the indices of a picture, int32 (h w, C) at the step of plane `planes - 1`, up to a budget.

    With a `budget`, `bytes()` has so many, or less where all planes take less.
    """

    def __init__(self, target: Tensor, planes: int, budget: int | None = None) -> None:
        super().__init__()
        self._encoder = self.coder.RangeEncoder()
        self._target, self.budget = target, budget
        self._shift = planes - 1
        self._calls: list[Call] = []

    def code(self, planes: Any, weights: np.ndarray, at: Tensor, column: Tensor, fresh: bool) -> np.ndarray:
        """Write one symbol per row of weights; returns them."""
        index = self._target[at, column].numpy()
        here = np.abs(index) >> self._shift
        values = np.where(fresh & (index < 0), 2 * here, here if fresh else here & 1).astype(np.int32)
        weights = np.ascontiguousarray(weights, dtype=np.float32)
        if self.budget is not None:
            self._remember(Call(self._encoder.pos(), weights, planes.plane, at, column))
        self.write(self._encoder, values, weights)
        return values

    def ends(self) -> bool:
        """Whether the budget is used up."""
        return self.budget is not None and 4 * self._encoder.pos()[0] >= self.budget

    def check(self, planes: Any, value: int, size: int) -> None:
        """Write a checksum, an integer below `size`."""
        values = np.array([value], dtype=np.int32)
        if self.budget is not None:
            self._remember(Call(self._encoder.pos(), size, planes.plane))
        self.write(self._encoder, values, size)

    def next_plane(self) -> None:
        """Go on to half of the step."""
        self._shift -= 1

    def size(self) -> int:
        """Bytes so far, or a few more."""
        return 4 * self._encoder.num_words()

    def bytes(self, planes: Any) -> bytes:
        """Everything written, or what the budget holds of it; `planes` forgets what these bytes do not settle."""
        data = finished(self._encoder)
        if self.budget is None or len(data) <= self.budget:
            return data
        data = data[: self.budget]
        for call in reversed(self._calls):
            decoders = self.decoders(data)
            settled = np.zeros(0, dtype=np.int32)
            if 4 * call.start[0] <= len(data):
                for decoder in decoders:
                    decoder.seek(*call.start)
                settled = self.settled(decoders, call.weights)
            if call.at is not None and call.column is not None and len(settled) < len(call.at):
                while planes.plane > call.plane:
                    planes.previous_plane()
                planes.forget(call.at[len(settled) :], call.column[len(settled) :])
            if len(settled):
                break
        return data

    def _remember(self, call: Call) -> None:
        self._calls.append(call)
        while len(self._calls) > 1 and 4 * self._calls[1].start[0] + MEMORY < 4 * call.start[0]:
            self._calls.pop(0)


def finished(encoder: Any) -> bytes:
    """The bytes of a range encoder, as few as settle every symbol whatever follows them."""
    from constriction import stream

    words, (lower, span) = encoder.pos()
    while lower + span > 1 << 64:  # a carry into the words that are out is still open: one symbol more closes it
        encoder = encoder.clone()
        encoder.encode(np.zeros(1, dtype=np.int32), stream.model.Uniform(256))
        words, (lower, span) = encoder.pos()
    data = encoder.get_compressed().astype(">u4").tobytes()
    for size in range(9):
        step = 1 << 64 - 8 * size
        value = -(-lower // step) * step
        if value + step <= lower + span:
            break
    return data[: 4 * words] + value.to_bytes(9, "big")[1 : 1 + size]


class StreamReader(RangeModels):
    """Reads what a `StreamWriter` wrote, as many symbols as the bytes settle."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._decoders = self.decoders(data)

    def code(self, planes: Any, weights: np.ndarray, at: Tensor, column: Tensor, fresh: bool) -> np.ndarray:
        """The symbols under rows of weights, as many as there are."""
        return self.settled(self._decoders, np.ascontiguousarray(weights, dtype=np.float32))

    def ends(self) -> bool:
        """Never before a symbol is missing."""
        return False

    def check(self, planes: Any, value: int, size: int) -> None:
        """Compare a checksum. Raises MismatchError; EndError where the bytes end within it."""
        there = self.settled(self._decoders, size)
        if not len(there):
            raise EndError
        if int(there[0]) != value:
            raise MismatchError(
                "the compressed file does not decode to what was compressed: its checksum of the coefficients differs. "
                "The file was changed, or this machine computes the model's integers in another way than the writer's"
            )

    def next_plane(self) -> None:
        """Nothing: a reader need not know where it is."""
