"""The speed board: images, megapixels and tokens a second, and peak memory, by batch, precision and compilation.

    random pictures (B, 3, S, S) -> encode, decode: warm-up, then the median of several runs, with memory sampled

Numbers are checked before they are believed: four times the pixels must take more time than one, and a batch more than
one picture. What fails that says so; a machine that is busy, or a kernel that is still being compiled, is the usual
reason.
"""

import copy
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vistok.environment import environment
from vistok.errors import InputError
from vistok.tokenizer import Tokenizer

STATM = Path("/proc/self/statm")
GROWTH = 1.3  # how much longer four times the pixels, or a batch, have to take at least


@dataclass(frozen=True)
class Speed:
    """One setting of one tokenizer. Rates are of encoding and decoding apart; `memory_mb` is the peak over the weights.

    doubts   what the checks found, in words; empty where they pass
    """

    model: str
    batch: int
    size: int
    dtype: str
    compiled: bool
    encode_images: float
    decode_images: float
    encode_megapixels: float
    decode_megapixels: float
    encode_tokens: float
    decode_tokens: float
    memory_mb: float | None
    doubts: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def speed(
    tokenizer: Tokenizer,
    *,
    size: int | None = None,
    batches: Sequence[int] = (1, 8),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    compiled: Sequence[bool] = (False,),
    repeats: int = 5,
    progress: Callable[[str], None] | None = None,
) -> list[Speed]:
    """A row for every combination. `size`: side of the pictures, the model's own by default.

    Raises InputError for a size that is not legal, or no repeats.
    """
    side = size or min(tokenizer.spec.size)
    tokenizer.spec.at((side, side))
    if repeats < 1 or not batches or min(batches) < 1:
        raise InputError(f"{repeats} repeats of batches {tuple(batches)}; expected at least one of each")
    rows = []
    for dtype in dtypes:
        for compile_it in compiled:
            model = copy.deepcopy(tokenizer).to(dtype)
            if compile_it:
                for part in ("encoder", "decoder"):
                    module = getattr(model, part, None)
                    if isinstance(module, torch.nn.Module):
                        module.compile()
            timed: dict[int, tuple[float, float]] = {}
            for batch in sorted(batches):
                if progress is not None:
                    progress(f"{dtype}, batch {batch}{', compiled' if compile_it else ''}")
                row, times = _row(model, batch, side, compile_it, repeats)
                timed[batch] = times
                doubts = _doubts(model, timed, batch, side, repeats)
                rows.append(Speed(**{**asdict(row), "doubts": doubts}))
    return rows


def board(rows: Sequence[Speed]) -> dict[str, Any]:
    """Rows and the machine, as JSON values."""
    return {"rows": [row.plain() for row in rows], "environment": environment()}


def _row(model: Tokenizer, batch: int, side: int, compiled: bool, repeats: int) -> tuple[Speed, tuple[float, float]]:
    pixels = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(model.device)
    tokens = model.encode(pixels)
    with _Memory(model.device) as memory:
        encode = _time(lambda: model.encode(pixels), repeats, model.device)
        decode = _time(lambda: model.decode(tokens), repeats, model.device)
    pixels_millions = batch * side * side / 1e6
    row = Speed(
        model=model.name,
        batch=batch,
        size=side,
        dtype=str(model.dtype).removeprefix("torch."),
        compiled=compiled,
        encode_images=batch / encode,
        decode_images=batch / decode,
        encode_megapixels=pixels_millions / encode,
        decode_megapixels=pixels_millions / decode,
        encode_tokens=batch * tokens.length / encode,
        decode_tokens=batch * tokens.length / decode,
        memory_mb=memory.peak,
    )
    return row, (encode, decode)


def _doubts(
    model: Tokenizer, timed: dict[int, tuple[float, float]], batch: int, side: int, repeats: int
) -> tuple[str, ...]:
    found = []
    smaller = [other for other in timed if 4 * other <= batch]
    for name, place in (("encoding", 0), ("decoding", 1)):
        if smaller and timed[batch][place] < GROWTH * timed[smaller[-1]][place]:
            found.append(f"{name} {batch} pictures took hardly longer than {smaller[-1]}")
    half = (side // 2, side // 2)
    if batch == min(timed) and model.spec.sizes.legal(half):
        small = torch.rand(batch, 3, *half).to(model.device)
        model.encode(small)
        if timed[batch][0] < GROWTH * _time(lambda: model.encode(small), repeats, model.device):
            found.append("encoding four times the pixels took hardly longer")
    return tuple(found)


def _time(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median seconds, after one run that does not count."""
    spent = []
    for attempt in range(repeats + 1):
        started = time.perf_counter()
        run()
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize()
        if attempt:
            spent.append(time.perf_counter() - started)
    return median(spent)


class _Memory:
    """Peak memory within a block above what was held before, in MB: the GPU's counter, or this process's, sampled."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak = device, None if device.type != "cuda" and not STATM.exists() else 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._before = 0.0

    def __enter__(self) -> "_Memory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 1e6
        elif self.peak is not None:
            self._before = _resident()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated() / 1e6 - self._before

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak or 0.0, _resident() - self._before)


def _resident() -> float:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
