"""The training loader: batch(step) is a pure function of source, seed and step, so a resumed run sees the same bits.

    place p = step * batch_size + j  ->  epoch p // len(source), item permutation(seed + epoch)[p % len(source)]
    crop and flip of that place      ->  RandomState((seed, step, j))

Batches run across the ends of epochs, so every batch is full. Pictures are decoded in threads (Pillow releases the
GIL) some batches ahead of the model. A picture that cannot be read is replaced by the next of the permutation.
"""

import math
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vistok.data.items import Item, Source
from vistok.data.sources import Where, open_source
from vistok.errors import InputError, VistokError

if TYPE_CHECKING:
    from PIL import Image

AHEAD = 3  # batches in memory beyond the one in use
_CHUNK = 8  # pictures per task: enough to hide a task's cost where pictures are tiny


def allowed_bad(items: int, max_bad: int | None = None) -> int:
    """How many unreadable pictures a job of `items` bears: 1 % or 10, whichever is more, unless `max_bad` says."""
    return max(10, items // 100) if max_bad is None else max_bad


class PixelLoader:
    """Batches of square crops.

    crop: "random" takes a square window at a random place, "center" the middle. The window's side is the picture's
    shorter side, or for random crops a part of it: `scale` = (low, high) bounds the window's area as a share of that
    square. flip: mirror half of the pictures. turn: turn each by a random number of quarter turns. The window is
    resampled (antialiased bicubic) to `size`.
    batch_size is the global batch, of which rank `rank` of `world` gets its share; the global batch is the same for
    every `world`. workers: decoding threads, 0 decodes in the caller.
    max_bad: how many different pictures may be unreadable before InputError (default: 1 % or 10); `bad` lists them.
    """

    def __init__(
        self,
        source: Source | Where,
        *,
        size: int,
        batch_size: int,
        seed: int = 0,
        crop: Literal["random", "center"] = "random",
        flip: bool = True,
        turn: bool = False,
        scale: tuple[float, float] | None = None,
        workers: int | None = None,
        rank: int = 0,
        world: int = 1,
        max_bad: int | None = None,
    ) -> None:
        if crop not in ("random", "center"):
            raise InputError(f"crop={crop!r}; expected 'random' or 'center'")
        if size < 1 or batch_size < 1:
            raise InputError(f"size={size}, batch_size={batch_size}; expected at least 1")
        if batch_size % world or not 0 <= rank < world:
            raise InputError(f"batch_size={batch_size} must divide by world={world}, and rank={rank} lie below it")
        if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
            raise InputError(f"scale={scale}; expected 0 < low <= high <= 1")
        if not 0 <= seed < 2**31:
            raise InputError(f"seed={seed}; expected 0 to 2**31 - 1")
        self.source = open_source(source)
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.shape: tuple[int, ...] = (3, size, size)  # of an item
        self.crop, self.flip, self.turn, self.scale = crop, flip, turn, scale
        self.workers = min(8, os.cpu_count() or 1) if workers is None else workers
        share = batch_size // world
        self._places = range(rank * share, (rank + 1) * share)
        self.max_bad = allowed_bad(len(self.source), max_bad)
        self.bad: dict[str, str] = {}  # id -> why it cannot be read
        self._lock = threading.Lock()
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    @property
    def steps_per_epoch(self) -> float:
        """Batches in one pass over the source; not a whole number, as batches run across epochs."""
        return len(self.source) / self.batch_size

    def batch(self, step: int) -> dict[str, Any]:
        """Batch number `step`: "pixels" float32 (b, 3, size, size) in [0, 1], "id" list of b, and, where the source

        has them, "label" long (b,) (-1 if an item has none) and "caption" list of b ("" if an item has none).
        Raises InputError when too many pictures are unreadable.
        """
        build = _Batch(self, step)
        for first in range(0, len(self._places), _CHUNK):
            build.fill(first)
        return build.result()

    def batches(self, start_step: int = 0) -> Iterator[dict[str, Any]]:
        """Batches `start_step`, `start_step` + 1, ... without end, decoded ahead in threads."""
        if self.workers == 0:
            step = start_step
            while True:
                yield self.batch(step)
                step += 1
        queue: deque[tuple[_Batch, list[Future]]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="vistok-decode")
        try:
            step = start_step
            while True:
                while len(queue) <= AHEAD:
                    build = _Batch(self, step)
                    chunks = range(0, len(self._places), _CHUNK)
                    queue.append((build, [pool.submit(build.fill, first) for first in chunks]))
                    step += 1
                build, filling = queue.popleft()
                for task in filling:
                    task.result()
                yield build.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    # -- one place -----------------------------------------------------------------------------------------------

    def picture(self, step: int, place: int) -> tuple[Item, np.ndarray]:
        """The item at a place of the global batch and its crop, uint8 (size, size, 3), of clips (size, size, 3, T)."""
        position = step * self.batch_size + place
        epoch, start = divmod(position, len(self.source))
        order = self._permutation(epoch)
        draws = np.random.RandomState((self.seed, step, place)).uniform(size=5)
        for offset in range(len(order)):
            item = self.source[int(order[(start + offset) % len(order)])]
            try:
                return item, self._cut(item, draws)
            except VistokError as error:
                self._note_bad(item.id, error)
        raise InputError(f"not one of the {len(order)} pictures of {self.source.name} can be read: {_first(self.bad)}")

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        return np.random.RandomState(self.seed + epoch).permutation(len(self.source))

    def _cut(self, item: Item, draws: np.ndarray) -> np.ndarray:
        area, across, down, mirror, quarter = (float(draw) for draw in draws)
        if self.crop == "center":
            image, share, across, down = item.image, 1.0, 0.5, 0.5
        else:
            low, high = self.scale or (1.0, 1.0)
            share = math.sqrt(low + (high - low) * area)
            image = item.decoded_to(math.ceil(self.size / share))
        cut = window(image, self.size, share, across, down)
        cut = cut[:, ::-1] if self.flip and mirror < 0.5 else cut
        return np.rot90(cut, int(quarter * 4)) if self.turn else cut

    def _note_bad(self, name: str, error: VistokError) -> None:
        with self._lock:
            self.bad.setdefault(name, str(error))
            if len(self.bad) > self.max_bad:
                raise InputError(
                    f"{len(self.bad)} unreadable pictures in {self.source.name}, more than the {self.max_bad} allowed; "
                    f"the first: {_first(self.bad)}"
                ) from error


class _Batch:
    """One batch while threads fill it."""

    def __init__(self, loader: PixelLoader, step: int) -> None:
        self.loader, self.step = loader, step
        count = len(loader._places)
        self.pixels = np.empty((count, *loader.shape), np.float32)
        self.items: list[Item | None] = [None] * count

    def fill(self, first: int) -> None:
        for row in range(first, min(first + _CHUNK, len(self.items))):
            item, cut = self.loader.picture(self.step, self.loader._places[row])
            colour_first = np.moveaxis(cut, (2, *range(3, cut.ndim)), range(cut.ndim - 2))
            np.divide(colour_first, np.float32(255), out=self.pixels[row])
            self.items[row] = item

    def result(self) -> dict[str, Any]:
        import torch

        items = [item for item in self.items if item is not None]
        batch: dict[str, Any] = {"pixels": torch.from_numpy(self.pixels), "id": [item.id for item in items]}
        if self.loader.source.labelled:
            batch["label"] = torch.tensor([-1 if item.label is None else item.label for item in items])
        if self.loader.source.captioned:
            batch["caption"] = [item.caption or "" for item in items]
        return batch


def window(image: "Image.Image", size: int, share: float = 1.0, across: float = 0.5, down: float = 0.5) -> np.ndarray:
    """A square window of an RGB picture resampled to uint8 (size, size, 3).

    Its side is `share` of the shorter side; `across` and `down` in [0, 1] place it, 0.5 in the middle. Where no
    resampling is needed the window falls on whole pixels and they are copied.
    """
    from PIL import Image

    side = min(image.size) * share
    if abs(side - size) < 1:
        side = float(size)
        left = math.floor((image.width - size) * across + 0.5)
        top = math.floor((image.height - size) * down + 0.5)
        cut = image.crop((left, top, left + size, top + size)) if image.size != (size, size) else image
        return np.asarray(cut)
    left_, top_ = (image.width - side) * across, (image.height - side) * down
    box = (left_, top_, left_ + side, top_ + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def center_crop(image: "Image.Image", size: int) -> np.ndarray:
    """The middle square, shorter side to `size`: uint8 (size, size, 3). What evaluations in this field cut out."""
    return window(image, size)


def _first(bad: dict[str, str]) -> str:
    return next(iter(bad.values()))
