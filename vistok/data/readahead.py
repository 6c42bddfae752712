"""Items of a source in order, read and decoded by threads ahead of their use, in bounded memory."""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from vistok.data.sources import Item, Source
from vistok.errors import VistokError

AHEAD_ITEMS = 512
AHEAD_BYTES = 512 * 2**20


@dataclass
class Decoded:
    """An item and its pixels, or why there are none."""

    index: int
    item: Item
    pixels: Tensor | None = None
    error: str | None = None


def decode_ahead(
    source: Source,
    indices: Iterable[int],
    prepare: Callable[[Item], Tensor],
    workers: int | None = None,
    budget: int = AHEAD_BYTES,
) -> Generator[Decoded, None, None]:
    """Items in order, read and decoded by threads ahead of their use.

    At most `budget` bytes of decoded pixels wait, and one picture more: sizes are read from the headers first, and a
    thread whose picture does not fit waits until it is that picture's turn.
    """
    space = _Space(budget)
    workers = min(8, (os.cpu_count() or 1) + 1) if workers is None else max(workers, 1)

    def decode(turn: int, index: int) -> tuple[Decoded, int]:
        item = Item(f"item {index}", lambda: b"")
        try:
            item = source[index]
            height, width = item.size
            taken = space.take(turn, height * width * 4)
        except VistokError as error:
            return Decoded(index, item, error=str(error)), 0
        try:
            return Decoded(index, item, pixels=prepare(item)), taken
        except VistokError as error:
            return Decoded(index, item, error=str(error)), taken

    pool = ThreadPoolExecutor(workers, thread_name_prefix="vistok-decode")
    waiting: deque[Future[tuple[Decoded, int]]] = deque()
    turns = enumerate(indices)
    try:
        while True:
            while len(waiting) < AHEAD_ITEMS and (turn := next(turns, None)) is not None:
                waiting.append(pool.submit(decode, *turn))
            if not waiting:
                return
            decoded, taken = waiting.popleft().result()
            space.give_back(taken)
            yield decoded
    finally:
        space.open()
        pool.shutdown(wait=True, cancel_futures=True)


class _Space:
    """Bytes that decoded pictures may take; who comes when it is full waits, but whose turn it is never does."""

    def __init__(self, budget: int) -> None:
        self._budget, self._used, self._turn = budget, 0, 0
        self._change = threading.Condition()

    def take(self, turn: int, size: int) -> int:
        with self._change:
            self._change.wait_for(lambda: self._used + size <= self._budget or turn <= self._turn)
            self._used += size
        return size

    def give_back(self, size: int) -> None:
        with self._change:
            self._used -= size
            self._turn += 1
            self._change.notify_all()

    def open(self) -> None:
        """Let everyone through: nobody will consume any more."""
        with self._change:
            self._budget = 2**62
            self._change.notify_all()
