"""Items of a source in order, read and decoded ahead of their use, in bounded memory.

Threads do it, and where a job turns out to be long and its pictures small, processes for them (`data.decoding`).
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from queue import Full, Queue, SimpleQueue
from typing import Any, TypeVar

import numpy as np

from vistok.data.decoding import SMALL, Decoded, DecodingProcesses
from vistok.data.items import Item, Source
from vistok.errors import VistokError

AHEAD_ITEMS = 512
AHEAD_BYTES = 512 * 2**20
PROCESSES_FROM = 4096  # items; shorter jobs are over before a process has begun
_RUN = 16  # items that one task decodes one after the other: tiny pictures cost less than handing over a task
_WHILE_STARTING = 128
_PROCESS_RUN = 64  # the same where a process decodes them

Value = TypeVar("Value")


def ahead(values: Iterable[Value], count: int = 1) -> Generator[Value, None, None]:
    """The same values, made by a thread up to `count` of them ahead of their use: windows of a clip, say.

    What making them raises is raised here, in its place.
    """
    ready: Queue[tuple[bool, Any]] = Queue(count)
    stop = threading.Event()

    def put(is_value: bool, entry: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put((is_value, entry), timeout=0.05)
                return True
            except Full:
                continue
        return False

    def make() -> None:
        try:
            for value in values:
                if not put(True, value):
                    return
            put(False, None)
        except BaseException as error:
            put(False, error)

    thread = threading.Thread(target=make, name="vistok-ahead", daemon=True)
    thread.start()
    try:
        while True:
            is_value, entry = ready.get()
            if is_value:
                yield entry
            elif entry is None:
                return
            else:
                raise entry
    finally:
        stop.set()
        thread.join()


def decode_ahead(
    source: Source,
    indices: Iterable[int],
    prepare: Callable[[Item], np.ndarray],
    workers: int | None = None,
    budget: int = AHEAD_BYTES,
    expected: int = 0,
) -> Generator[Decoded, None, None]:
    """Items in order, read and decoded by `workers` threads ahead of their use.

    At most `budget` bytes of decoded pixels wait, and one picture more: sizes are read from the headers first, and a
    thread whose picture does not fit waits until it is that picture's turn. Small pictures that processes decode
    (where PROCESSES_FROM are `expected`, the first ones are small, and `source` and `prepare` pickle) are bounded by
    AHEAD_ITEMS.
    """
    space = _Space(budget)
    cores = os.cpu_count() or 1
    processes = min(8, max(1, cores - 1)) if workers is None else max(workers, 1)
    workers = min(8, cores + 1) if workers is None else max(workers, 1)
    helpers: DecodingProcesses | None = None
    small = 0  # pictures in a row

    def decode(turn: int, index: int) -> tuple[Decoded, int]:
        item, taken = Item(f"item {index}", lambda: b""), 0
        try:
            item = source[index]
            height, width = item.size
            taken = space.take(turn, height * width * 4)
            return Decoded(index, item, prepare(item)), taken
        except VistokError as error:
            return Decoded(index, item, error=str(error)), taken

    def decode_run(turns: list[tuple[int, int]], out: "SimpleQueue[tuple[Decoded, int] | BaseException]") -> None:
        ready = helpers if helpers and helpers.ready else None
        done = ready.decode([index for _, index in turns]) if ready else [None] * len(turns)
        for (turn, index), there in zip(turns, done, strict=True):
            if space.closed:
                return
            try:
                out.put((there, 0) if there else decode(turn, index))
            except BaseException as error:  # a bug: the consumer raises it
                out.put(error)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="vistok-decode")
    waiting: deque[tuple[int, SimpleQueue[tuple[Decoded, int] | BaseException]]] = deque()
    ahead = 0
    turns = enumerate(indices)
    try:
        while True:
            run = _PROCESS_RUN if helpers and helpers.ready else _RUN
            run = max(1, min(run, AHEAD_ITEMS // (2 * workers)))
            # what threads decode while processes start takes the lock from the model: no more of it than needed
            limit = AHEAD_ITEMS if helpers is None or helpers.ready else min(AHEAD_ITEMS, _WHILE_STARTING)
            while ahead + run <= max(limit, run) and (batch := list(islice(turns, run))):
                out: SimpleQueue[tuple[Decoded, int] | BaseException] = SimpleQueue()
                pool.submit(decode_run, batch, out)
                waiting.append((len(batch), out))
                ahead += len(batch)
            if not waiting:
                return
            count, out = waiting.popleft()
            for _ in range(count):
                result = out.get()
                if isinstance(result, BaseException):
                    raise result
                space.give_back(result[1])
                if helpers is None and (pixels := result[0].pixels) is not None:
                    small = small + 1 if pixels.shape[0] * pixels.shape[1] <= SMALL else 0
                    if small == _RUN and expected >= PROCESSES_FROM:
                        helpers = DecodingProcesses(source, prepare, processes)
                yield result[0]
            ahead -= count
    finally:
        space.close()
        if helpers:
            helpers.close()
        pool.shutdown(wait=True, cancel_futures=True)


class _Space:
    """Bytes that decoded pictures may take; who comes when it is full waits, but whose turn it is never does."""

    def __init__(self, budget: int) -> None:
        self._budget, self._used, self._turn = budget, 0, 0
        self._change = threading.Condition()
        self.closed = False

    def take(self, turn: int, size: int) -> int:
        with self._change:
            if self._used + size > self._budget:
                self._change.wait_for(lambda: self._used + size <= self._budget or turn <= self._turn or self.closed)
            self._used += size
        return size

    def give_back(self, size: int) -> None:
        with self._change:
            self._used -= size
            self._turn += 1
            self._change.notify_all()

    def close(self) -> None:
        """Nobody will consume any more: let everyone through to their end."""
        with self._change:
            self.closed = True
            self._change.notify_all()
