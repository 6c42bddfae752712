"""Decoding in processes of their own: tiny pictures cost more Python than decoding, and Python's lock is one.

    this process                               decoding process (imports no torch)
    errand: source, prepare  ── stdin ──────>  unpickled once
    indices of a run         ── stdin ──────>  source[i], prepare(item)
    Decoded, in order        <─────── stdout ─ facts (pickle) and all pixels of the run as one buffer

The processes are plain children that talk through pipes: nothing is forked, `__main__` is not imported again, and a
parent that dies, however it dies, closes the pipe and so ends them. What a process cannot do (a picture that is not
small, an error that is no VistokError, its own death) it leaves to the caller, which decodes that item itself.
"""

import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import IO, Any

import numpy as np

from vistok.data.items import Item, Source
from vistok.errors import VistokError

SMALL = 128 * 128  # pixels; above it Pillow, which works without the lock, does most of the work, and threads do well
ERRAND_BYTES = 128 * 2**20  # a source that is larger as a pickle stays where it is
DEATHS = 8  # after which no process is started again
_FRAME = struct.Struct("<QQ")  # bytes of facts, bytes of pixels


@dataclass
class Decoded:
    """An item and its pixels, uint8 (H, W, C), or why there are none."""

    index: int
    item: Item
    pixels: np.ndarray | None = None
    error: str | None = None


@dataclass(frozen=True)
class CutOut:
    """An item's pixels, uint8 (H, W, C): whole, or its middle square scaled to the side `crop`."""

    crop: int | None = None
    channels: int = 3

    def __call__(self, item: Item) -> np.ndarray:
        from vistok.data.loader import center_crop

        image = item.image
        pixels = center_crop(image, self.crop) if self.crop else np.asarray(image)
        return pixels if self.channels == 3 else pixels[..., :1]  # a mask: any channel of what was grey


class DecodingProcesses:
    """`count` processes that decode items of `source`; they are started at once, and used as soon as they are ready."""

    def __init__(self, source: Source, prepare: Callable[[Item], np.ndarray], count: int) -> None:
        self.ready = False  # whether at least one has begun
        self._idle: SimpleQueue[_Process | None] = SimpleQueue()  # None: there will be no more
        self._lock = threading.Lock()
        self._all: list[_Process] = []
        self._deaths, self._closed, self._errand = 0, False, b""
        self._starting = threading.Thread(target=self._start, args=(source, prepare, count), daemon=True)
        self._starting.start()

    def decode(self, indices: Sequence[int]) -> list[Decoded | None]:
        """Decode these; None for each item that is left to the caller. Waits for a free process."""
        left: list[Decoded | None] = [None] * len(indices)
        process = self._idle.get()
        if process is None:
            self._idle.put(None)
            return left
        try:
            done = process.decode(indices)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            self._mourn(process)
            return left
        self._idle.put(process)
        return done

    def close(self) -> None:
        """End them all. Whoever waits for one gets its items back."""
        with self._lock:
            self._closed = True
        for process in list(self._all):
            process.close()
        self._idle.put(None)
        self._starting.join()

    def _start(self, source: Source, prepare: Callable[[Item], np.ndarray], count: int) -> None:
        try:
            self._errand = pickle.dumps((source, prepare), pickle.HIGHEST_PROTOCOL)
        except Exception:  # sources and functions of the user's own that do not pickle: whatever they raise
            return
        if len(self._errand) <= ERRAND_BYTES:
            for _ in range(count):
                self._start_one()

    def _start_one(self) -> None:
        try:
            with self._lock:
                if self._closed:
                    return
                process = _Process()
                self._all.append(process)
            process.begin(self._errand)
        except (OSError, EOFError, ValueError):  # no second interpreter here, or it cannot import the source
            self._idle.put(None)
            return
        self._idle.put(process)
        self.ready = True

    def _mourn(self, process: "_Process") -> None:
        process.close()
        self._deaths += 1
        if self._deaths > DEATHS:
            self._idle.put(None)
        elif not self._closed:
            threading.Thread(target=self._start_one, daemon=True).start()


class _Process:
    """One of them, seen from here."""

    def __init__(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-c", "from vistok.data.decoding import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )

    def begin(self, errand: bytes) -> None:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        _send(self._popen.stdin, errand)
        _receive(self._popen.stdout)

    def decode(self, indices: Sequence[int]) -> list[Decoded | None]:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        _send(self._popen.stdin, pickle.dumps(list(indices)))
        facts, pixels = _receive(self._popen.stdout)
        done: list[Decoded | None] = []
        start = 0
        for index, fact in zip(indices, pickle.loads(facts), strict=True):
            if fact is None:
                done.append(None)
                continue
            name, label, caption, error, shape = fact
            item = Item(name, _gone, label, caption)
            if shape is None:
                done.append(Decoded(index, item, error=error))
            else:
                stop = start + shape[0] * shape[1] * shape[2]
                done.append(Decoded(index, item, pixels[start:stop].reshape(shape)))
                start = stop
        return done

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def serve() -> None:
    """The other side: decode runs of items until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not get between the answers
    with suppress(EOFError, OSError):
        source, prepare = pickle.loads(_receive(requests)[0])
        _decode(source, prepare, 0)  # what is imported on the way is there before anybody waits for it
        _send(answers, b"ready")
        while True:
            facts, pixels = [], []
            for index in pickle.loads(_receive(requests)[0]):
                fact, array = _decode(source, prepare, index)
                facts.append(fact)
                if array is not None:
                    pixels.append(np.ascontiguousarray(array).data.cast("B"))
            _send(answers, pickle.dumps(facts), b"".join(pixels))


def _decode(source: Source, prepare: Callable[[Item], np.ndarray], index: int) -> tuple[Any, np.ndarray | None]:
    item = Item(f"item {index}", _gone)
    try:
        item = source[index]
        height, width = item.size
        if height * width > SMALL:
            return None, None
        pixels = prepare(item)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or not pixels.size:
            return None, None
    except VistokError as error:
        return (item.id, item.label, item.caption, str(error), None), None
    except Exception:  # a bug: let it show in the parent
        return None, None
    return (item.id, item.label, item.caption, None, pixels.shape), pixels


def _gone() -> bytes:
    raise ValueError("this item was decoded in another process")


def _send(pipe: IO[bytes], facts: bytes, pixels: bytes = b"") -> None:
    rest = memoryview(_FRAME.pack(len(facts), len(pixels)) + facts + pixels)
    while rest:
        rest = rest[pipe.write(rest) :]
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[bytes, np.ndarray]:
    facts, pixels = _FRAME.unpack(_exactly(pipe, _FRAME.size).tobytes())
    return _exactly(pipe, facts).tobytes(), _exactly(pipe, pixels)


def _exactly(pipe: Any, count: int) -> np.ndarray:
    whole = np.empty(count, np.uint8)
    rest = memoryview(whole.data)
    while rest:
        read = pipe.readinto(rest)
        if not read:
            raise EOFError
        rest = rest[read:]
    return whole
