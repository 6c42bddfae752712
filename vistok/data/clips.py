"""Clips as a source, and batches of them for training: batch(step) is a pure function of source, seed and step.

    place p = step * batch_size + j  ->  epoch p // len(source), clip permutation(seed + epoch)[p % len(source)]
    first frame, crop and flip       ->  RandomState((seed, step, j))

A clip that is damaged, or shorter than the frames that are asked for, is replaced by the next of the permutation.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vistok.data.images import is_video_name
from vistok.data.items import Item, Source
from vistok.data.loader import PixelLoader, window
from vistok.data.video import Clip, open_clip
from vistok.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from vistok.tokenizer import Tokenizer

CACHE_BYTES = 512 * 2**20  # of decoded clips that are kept


class ClipItem(Item):
    """A clip of a source. `clip` opens it, `frames` decodes it; it is no picture, so `image` says so."""

    def __init__(self, id: str, path: Path, label: int | None = None, max_pixels: int | None = None) -> None:
        super().__init__(id, lambda: path, label, max_pixels=max_pixels)
        self.path = path

    @property
    def clip(self) -> Clip:
        """Opened, to be read window by window. Raises a VistokError for what is no clip."""
        return open_clip(self.path, max_pixels=self._max_pixels)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as it is shown."""
        return self.clip.size

    @property
    def image(self) -> "Image.Image":
        """Raises InputError: a clip has many pictures."""
        raise InputError(f"{self.id} is a clip, where pictures are wanted")

    def decoded_to(self, shorter: int) -> "Image.Image":
        """Raises InputError, as `image`."""
        return self.image

    def frames(self) -> np.ndarray:
        """All of it, uint8 (T, H, W, 3). Raises a VistokError for what is no clip."""
        return np.stack([frame.permute(1, 2, 0).numpy() for frame in self.clip.frames()])

    @property
    def middle(self) -> "Image.Image":
        """The picture in the middle."""
        from PIL import Image

        frames = self.frames()
        return Image.fromarray(frames[len(frames) // 2])


class ClipSource(Source):
    """Clip files below a folder in sorted order; ids are their paths within it, first subfolders are classes."""

    kind = "clips"

    def __init__(self, root: Path, files: Sequence[str], max_pixels: int | None = None) -> None:
        self.name = root.name or str(root)
        self._root, self._files, self._max_pixels = root, list(files), max_pixels
        if not self._files:
            raise InputError(f"{root} holds no clips; expected .mp4, .mov, .mkv, .webm or .avi files")
        if all("/" in file for file in self._files):
            self.classes = tuple(sorted({file.split("/", 1)[0] for file in self._files}))
            self.labelled = True
        self._label = {name: label for label, name in enumerate(self.classes)}

    @classmethod
    def below(cls, root: str | Path, max_pixels: int | None = None) -> "ClipSource":
        """All clips below a folder. Raises InputError where there are none."""
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"{root} is no folder of clips")
        files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if is_video_name(path))
        return cls(root, files, max_pixels)

    def __len__(self) -> int:
        return len(self._files)

    def item(self, index: int) -> ClipItem:
        file = self._files[index]
        label = self._label[file.split("/", 1)[0]] if self.labelled else None
        return ClipItem(file, self._root / file, label, self._max_pixels)

    def _contents(self) -> Iterator[str]:
        for file in self._files:
            try:
                yield f"{file} {(self._root / file).stat().st_size}"
            except OSError:
                yield f"{file} unreadable"


def check_takes_clips(tokenizer: "Tokenizer", name: str) -> None:
    """Raise InputError where `name` holds clips and the tokenizer takes none."""
    if tokenizer.spec.clips is None:
        raise InputError(
            f"{name} needs a tokenizer of clips, and {tokenizer.name} is one of {tokenizer.spec.modality}s: load one "
            "(`vistok list 'omnitokenizer*'`), or write the frames as pictures first (ffmpeg -i clip.mp4 %05d.png)"
        )


class ClipLoader(PixelLoader):
    """Batches of square crops of `frames` consecutive frames: "pixels" (b, 3, frames, size, size).

    The window is the same in all frames of a clip. Further arguments are those of `PixelLoader`.
    """

    def __init__(self, source: Source, *, frames: int, **options: Any) -> None:
        super().__init__(source, **options)
        if frames < 1:
            raise InputError(f"frames={frames}; expected at least 1")
        self.shape = (3, frames, self.size, self.size)
        self.frames = frames
        self._decoded: OrderedDict[str, np.ndarray] = OrderedDict()
        self._reading = threading.Lock()

    def _cut(self, item: Item, draws: np.ndarray) -> np.ndarray:
        from PIL import Image

        if not isinstance(item, ClipItem):
            raise InputError(f"{item.id} is a picture, where clips are wanted")
        clip = self._frames_of(item)
        if len(clip) < self.frames:
            raise InputError(f"{item.id} has {len(clip)} frames, fewer than {self.frames}")
        area, across, down, mirror, quarter = (float(draw) for draw in draws)
        # the first frame from digits of the same draws that the place of the crop does not see
        first = int((across * 65_536 % 1) * (len(clip) - self.frames + 1))
        share = 1.0
        if self.crop == "center":
            across = down = 0.5
        elif self.scale is not None:
            share = math.sqrt(self.scale[0] + (self.scale[1] - self.scale[0]) * area)
        pictures = (Image.fromarray(frame) for frame in clip[first : first + self.frames])
        cut = np.stack([window(picture, self.size, share, across, down) for picture in pictures])
        cut = cut[:, :, ::-1] if self.flip and mirror < 0.5 else cut
        cut = np.rot90(cut, int(quarter * 4), (1, 2)) if self.turn else cut
        return cut.transpose(1, 2, 3, 0)  # (size, size, 3, frames): colour third, as of a picture

    def _frames_of(self, item: ClipItem) -> np.ndarray:
        """Decoded frames, from the cache where it has them: decoding from the start costs more than the crops."""
        with self._reading:
            if item.id in self._decoded:
                self._decoded.move_to_end(item.id)
                return self._decoded[item.id]
        found = item.frames()
        with self._reading:
            self._decoded[item.id] = found
            while len(self._decoded) > 1 and sum(clip.nbytes for clip in self._decoded.values()) > CACHE_BYTES:
                self._decoded.popitem(last=False)
        return found


class Alternating:
    """Batches of two loaders in turn: `first` at even steps, `second` at odd ones, each counting its own."""

    def __init__(self, first: PixelLoader, second: PixelLoader) -> None:
        self.loaders = first, second

    @property
    def bad(self) -> dict[str, str]:
        """What could not be read, and why."""
        return self.loaders[0].bad | self.loaders[1].bad

    def batch(self, step: int) -> dict[str, Any]:
        """Batch number `step`."""
        return self.loaders[step % 2].batch(step // 2)

    def batches(self, start_step: int = 0) -> Iterator[dict[str, Any]]:
        """Batches from `start_step` on, without end, decoded ahead."""
        streams = [loader.batches((start_step + 1 - which) // 2) for which, loader in enumerate(self.loaders)]
        try:
            step = start_step
            while True:
                yield next(streams[step % 2])
                step += 1
        finally:
            for stream in streams:
                stream.close()  # type: ignore[attr-defined]
