"""Clips in and out through PyAV: frames as uint8, the frame rate kept, one window in memory at a time.

    clip = open_clip("clip.mp4")                          size, rate
    tokens = tok.encode_windows(clip.windows(tok.spec.window), rate=clip.rate)
    write_clip("out.mp4", tok.decode_windows(tokens, dtype=torch.uint8), rate=clip.rate)

Frames come in the order they are shown, upright. A clip that is cut short or damaged is refused, not shortened.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vistok.data.images import pixel_limit
from vistok.errors import FormatError, InputError, MissingExtraError, OutputError
from vistok.files import write_atomically
from vistok.pixels import as_uint8

if TYPE_CHECKING:
    from PIL import Image

WRITTEN = (".mp4", ".m4v", ".mov")
QUALITY = 12  # x264's constant rate factor: what is lost here is far below what any tokenizer loses
FALLBACK_RATE = 25.0
MISSING = 3  # frames that may be missing of what a file's header tells, which is rounded


@dataclass(frozen=True)
class Clip:
    """An opened clip: size (height, width) as shown, rate in frames per second; frames are read when asked for."""

    path: str
    size: tuple[int, int]
    rate: float

    def frames(self) -> Iterator[Tensor]:
        """Every frame, uint8 (3, H, W). Raises FormatError where the clip is damaged or its frames change size."""
        count, end = 0, 0.0
        with _opened(self.path) as container:
            told = _told_seconds(container)
            try:
                for frame in container.decode(video=0):
                    end = (frame.time or 0.0) + 1 / self.rate
                    array = _upright(frame)
                    if array.shape[:2] != self.size:
                        raise FormatError(f"{self.path}: frame {count} has another size than {self.size}")
                    count += 1
                    yield torch.from_numpy(array).permute(2, 0, 1)
            except _av().error.FFmpegError as error:
                raise FormatError(f"{self.path} is cut short or damaged after {count} frames: {error}") from error
        if not count:
            raise FormatError(f"{self.path} has no frames")
        if told is not None and end < told - MISSING / self.rate:
            raise FormatError(f"{self.path} is cut short: {count} frames, {end:.2f} of {told:.2f} seconds")

    def windows(self, window: int, cut: "Callable[[Image.Image], np.ndarray] | None" = None) -> Iterator[Tensor]:
        """Frames (1, 3, t, H, W), uint8, `window` at a time, the last ones fewer.

        `cut` makes uint8 (h, w, 3) of each frame: a crop, say.
        """
        held: list[Tensor] = []
        for frame in self.frames():
            held.append(frame if cut is None else _cut(frame, cut))
            if len(held) == window:
                yield torch.stack(held, 1)[None]
                held = []
        if held:
            yield torch.stack(held, 1)[None]


def open_clip(path: str | os.PathLike, *, max_pixels: int | None = None) -> Clip:
    """A clip whose size and rate are known; its frames are decoded when asked for.

    Raises InputError for a file that is not there or frames of more than `max_pixels` pixels (as for pictures),
    FormatError for what is no clip or has no picture in it.
    """
    name = str(path)
    if not Path(path).is_file():
        raise InputError(f"{name} does not exist or is no file")
    limit = pixel_limit(max_pixels)
    with _opened(name) as container:
        if not container.streams.video:
            raise FormatError(f"{name} has no video stream")
        stream = container.streams.video[0]
        if stream.width * stream.height > limit:
            raise InputError(
                f"{name} has frames of {stream.width}x{stream.height}, above the limit of {limit:,} pixels"
            )
        rate = stream.average_rate or stream.guessed_rate
        try:
            first = next(container.decode(video=0), None)
        except _av().error.FFmpegError as error:
            raise FormatError(f"{name} is damaged: {error}") from error
        if first is None:
            raise FormatError(f"{name} has no frames")
        height, width = _upright(first).shape[:2]
    return Clip(name, (height, width), float(rate) if rate else FALLBACK_RATE)


def read_clip(path: str | os.PathLike, *, frames: int | None = None) -> tuple[Tensor, float]:
    """A whole clip, uint8 (1, 3, T, H, W), perhaps only its first `frames`, and its rate. Errors as `open_clip`."""
    clip = open_clip(path)
    held = []
    for frame in clip.frames():
        held.append(frame)
        if len(held) == frames:
            break
    return torch.stack(held, 1)[None], clip.rate


def write_clip(path: str | os.PathLike, windows: Iterable[Tensor], *, rate: float | None) -> int:
    """Write frames (1, 3, t, H, W), uint8 or float in [0, 1], in parts as they come, as an H.264 .mp4 of their size.

    Odd sizes are kept (4:4:4 then). At once or not at all. Returns the number of frames. Raises OutputError.
    """
    path, written = Path(path), 0
    if path.suffix.lower() not in WRITTEN:
        raise InputError(f"{path}: clips are written as .mp4, .m4v or .mov")

    def write(temporary: Path) -> None:
        nonlocal written
        container = stream = None
        try:
            for window in windows:
                frames = as_uint8(window)[0].permute(1, 2, 3, 0).cpu().numpy()
                if container is None or stream is None:
                    container = _av().open(str(temporary), "w", format="mp4")
                    stream = container.add_stream(
                        "libx264", rate=Fraction(rate or FALLBACK_RATE).limit_denominator(100_000)
                    )
                    stream.height, stream.width = frames.shape[1:3]
                    odd = stream.height % 2 or stream.width % 2
                    stream.pix_fmt = "yuv444p" if odd else "yuv420p"
                    stream.options = {"crf": str(QUALITY)}
                for array in frames:
                    picture = _av().VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
                    container.mux(stream.encode(picture))
                    written += 1
            if container is None or stream is None:
                raise InputError(f"no frames to write to {path}")
            container.mux(stream.encode(None))
        except _av().error.FFmpegError as error:
            raise OutputError(f"cannot write {path}: {error}") from error
        finally:
            if container is not None:
                container.close()

    write_atomically(path, write)
    return written


def _cut(frame: Tensor, cut: "Callable[[Image.Image], np.ndarray]") -> Tensor:
    from PIL import Image

    picture = Image.fromarray(frame.permute(1, 2, 0).numpy())
    return torch.from_numpy(np.array(cut(picture))).permute(2, 0, 1)


def _upright(frame: Any) -> np.ndarray:
    """RGB (H, W, 3) of a decoded frame, turned as its display matrix says."""
    array = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(array, turns)) if turns else array


def _told_seconds(container: Any) -> float | None:
    """How long the frames last, of files that end early without an error: Matroska and AVI. None of all others."""
    stream, kind = container.streams.video[0], container.format.name
    if "avi" in kind and stream.frames and stream.average_rate:
        return stream.frames / float(stream.average_rate)
    if "matroska" not in kind:
        return None
    tag = stream.metadata.get("DURATION", "")
    if tag.count(":") == 2:
        with suppress(ValueError):
            hours, minutes, seconds = (float(part) for part in tag.split(":"))
            return 3600 * hours + 60 * minutes + seconds
    alone = len(container.streams) == 1 and container.duration
    return container.duration / 1e6 if alone else None


def _opened(name: str) -> Any:
    try:
        return _av().open(name)
    except _av().error.FFmpegError as error:
        raise FormatError(f"{name} is no clip that can be read here, or its beginning is damaged: {error}") from error


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("clips need PyAV: pip install vistok[data]") from error
    return av
