"""What a tokenizer's tokens look like: segments, canvases, legal sizes and the spec that ties them together.

    spec.segments  ->  N = sum of the products of their shapes  ->  codes (B, N) or (B, N, C), vectors (B, N, D)

Everything that draws, stores, packs, counts or models tokens works from these records alone and never asks which
system it has. They are plain data: no torch here.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil, prod
from typing import Any, Literal

from vistok.bits import width
from vistok.errors import InputError

Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True)
class Segment:
    """A run of positions with one shape and one alphabet: a grid, a 1D sequence, one of VAR's scales.

    `codebooks` holds the size of the codebook behind each code at a position (one entry for plain VQ, several for
    factorised, residual, per-dimension or bit tokens); `dim` is the width of a continuous token instead.
    """

    name: str
    shape: tuple[int, ...]
    codebooks: tuple[int, ...] = ()
    dim: int | None = None

    def __post_init__(self) -> None:
        if bool(self.codebooks) == bool(self.dim):
            raise InputError(f"segment {self.name!r} needs either codebooks or dim, not both and not neither")

    @property
    def count(self) -> int:
        """Number of positions."""
        return prod(self.shape)

    @property
    def bits(self) -> int:
        """Stored bits per position of a discrete segment: ceil(log2 K) for each of its codes."""
        return sum(width(size) for size in self.codebooks)


@dataclass(frozen=True)
class Canvas:
    """What one item was before encoding, so that decoding gives back exactly that: sizes are (height, width)."""

    size: Size
    resized: Size | None = None  # the size it was scaled to first, if any
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, top, right, bottom, in pixels, after scaling
    tiles: tuple[int, int] = (1, 1)  # rows, columns
    frames: int | None = None  # a clip's frame count and rate (frames per second)
    rate: float | None = None
    window: int | None = None  # frames that the model saw at once; a clip is cut into windows, the last one padded

    @property
    def windows(self) -> int:
        """How many windows the clip was cut into, each encoded alone; 1 for a picture."""
        return 1 if self.frames is None or self.window is None else ceil(self.frames / self.window)

    @property
    def pieces(self) -> int:
        """How many calls of the model this item takes: windows times tiles."""
        return self.windows * prod(self.tiles)

    @property
    def coded(self) -> Size:
        """Size of the whole padded picture that the model saw (all tiles together)."""
        height, width_ = self.resized or self.size
        left, top, right, bottom = self.padding
        return height + top + bottom, width_ + left + right

    @property
    def tile(self) -> Size:
        """Size of one tile, the size that the model was called with."""
        return self.coded[0] // self.tiles[0], self.coded[1] // self.tiles[1]

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON values."""
        plain = {"size": list(self.size)}
        for key, value in asdict(self).items():
            if key != "size" and value != getattr(Canvas, key):
                plain[key] = list(value) if isinstance(value, tuple) else value
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "Canvas":
        """Inverse of `to_json`."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()
        }
        return cls(**fields)


@dataclass(frozen=True)
class Sizes:
    """Legal input sizes, as data. Either a few exact ones (`only`), or every multiple within bounds, perhaps squares
    alone (of models that scale inside).
    """

    only: tuple[Size, ...] = ()
    multiple: int = 1
    minimum: int = 1  # of either side, in pixels
    maximum: int | None = None
    square: bool = False

    def legal(self, size: Size) -> bool:
        """Whether a picture of this size can be encoded as it is."""
        if self.only:
            return size in self.only
        if self.square and size[0] != size[1]:
            return False
        return all(
            side % self.multiple == 0 and side >= self.minimum and (self.maximum is None or side <= self.maximum)
            for side in size
        )

    def padded(self, size: Size) -> Size | None:
        """The smallest legal size that holds `size`, or None if it is too large for all of them."""
        if self.only:
            fits = [legal for legal in self.only if legal[0] >= size[0] and legal[1] >= size[1]]
            return min(fits, key=prod) if fits else None
        size = (max(size),) * 2 if self.square else size
        up = tuple(ceil(max(side, self.minimum) / self.multiple) * self.multiple for side in size)
        return up if self.maximum is None or max(up) <= self.maximum else None  # type: ignore[return-value]

    def nearest(self, size: Size) -> Size:
        """The legal size closest in aspect ratio, then in area: what `on_size="resize"` scales to."""
        if self.only:
            return min(
                self.only,
                key=lambda legal: (abs(_log_aspect(legal) - _log_aspect(size)), abs(prod(legal) - prod(size))),
            )
        size = (round(prod(size) ** 0.5),) * 2 if self.square else size
        shrink = 1.0 if self.maximum is None else min(1.0, self.maximum / max(size))
        low = ceil(self.minimum / self.multiple)
        high = self.maximum // self.multiple if self.maximum else None
        sides = []
        for side in size:
            steps = max(round(side * shrink / self.multiple), low, 1)
            sides.append((min(steps, high) if high else steps) * self.multiple)
        return sides[0], sides[1]

    def tile(self, size: Size) -> Size:
        """The legal tile to cut a picture of this size into: the largest that is not larger than needed."""
        options = self.only
        if self.maximum and not options:
            options = ((self.maximum, self.maximum),)
        if not options:
            return self.padded(size) or size
        return min(options, key=lambda tile: (_padded_area(size, tile), -prod(tile)))

    def describe(self) -> str:
        """The rule in words, for messages."""
        if self.only:
            return " or ".join(f"{height}x{width_}" for height, width_ in self.only)
        upper = f", at most {self.maximum}" if self.maximum else ""
        if self.square:
            return f"squares whose side is a multiple of {self.multiple}, at least {self.minimum}{upper}"
        return f"both sides multiples of {self.multiple}, at least {self.minimum}{upper}"


@dataclass(frozen=True)
class Clips:
    """Legal frame counts of a model that takes clips: first + k * step, at most `maximum`, which is its window."""

    first: int = 1
    step: int = 1
    maximum: int = 1

    def legal(self, frames: int) -> bool:
        """Whether a clip of so many frames can be encoded as it is."""
        return self.first <= frames <= self.maximum and (frames - self.first) % self.step == 0

    def window(self, frames: int) -> int:
        """Frames of the windows that a clip is cut into: the smallest legal count that holds it, or the largest."""
        needed = self.first + ceil(max(0, frames - self.first) / self.step) * self.step
        largest = self.first + (self.maximum - self.first) // self.step * self.step
        return min(needed, largest)

    def describe(self) -> str:
        """The rule in words, for messages."""
        if self.first == self.maximum:
            return f"{self.first} frames"
        return f"{self.first} + k * {self.step} frames, at most {self.maximum}"


def _log_aspect(size: Size) -> float:
    from math import log

    return log(size[0] / size[1])


def _padded_area(size: Size, tile: Size) -> int:
    return ceil(size[0] / tile[0]) * ceil(size[1] / tile[1]) * prod(tile)


PrefixRule = Literal["any", "segments", "none"]


@dataclass(frozen=True)
class Needs:
    """Conditions, by keyword, that `encode` and `decode` cannot do without (`text`, ...)."""

    encode: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()


@dataclass(frozen=True)
class Output:
    """What `decode` gives: its modality, and its size relative to the input (Layton 256 -> 1024 is 4)."""

    modality: str = "image"
    scale: float = 1.0
    channels: int = 3


@dataclass(frozen=True)
class TokenSpec:
    """The layout of a tokenizer's tokens at one input size; `at(size)` gives it at another.

    `layout` is the function from a legal (height, width) to segments; `segments` is its value at `size`. Of a model
    that takes clips (`clips`) it is a function of (height, width) and the number of frames; `frames` None is a picture.
    `prefix_rule`: "any" number of leading tokens decodes, only whole "segments" do, or "none" but all of them.
    """

    size: Size
    layout: Callable[..., tuple[Segment, ...]] = field(compare=False, repr=False)
    sizes: Sizes
    prefix_rule: PrefixRule = "none"
    modality: str = "image"
    needs: Needs = Needs()
    output: Output = Output()
    tiles: tuple[int, int] = (1, 1)
    clips: Clips | None = None
    frames: int | None = None
    windows: int = 1

    @property
    def single(self) -> tuple[Segment, ...]:
        """Segments of one piece: of one tile of one window."""
        return self.layout(self.size) if self.clips is None else self.layout(self.size, self.frames)

    @property
    def pieces(self) -> int:
        """Windows times tiles."""
        return self.windows * prod(self.tiles)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Segments at `size`. Windows and tiles, when there are several, are a segment's last axes:
        (tokens, windows), (tokens, rows, columns) or (tokens, windows, rows, columns).
        """
        apart = (self.windows,) * (self.windows > 1) + self.tiles * (self.tiles != (1, 1))
        if not apart:
            return self.single
        return tuple(replace(segment, shape=segment.shape + apart) for segment in self.single)

    def at(
        self, size: Size, tiles: tuple[int, int] = (1, 1), frames: int | None = None, windows: int = 1
    ) -> "TokenSpec":
        """The spec for a legal input size (of one tile, if there are several) and, of clips, the frames of a window.

        Raises InputError for what is not legal. Models of pictures take clips frame by frame: windows of one frame.
        """
        if not self.sizes.legal(size):
            raise InputError(f"{size[0]}x{size[1]} is not a legal size here; expected {self.sizes.describe()}")
        if frames is not None and not (self.clips or Clips()).legal(frames):
            raise InputError(f"{frames} frames are not legal here; expected {(self.clips or Clips()).describe()}")
        return replace(self, size=size, tiles=tiles, frames=frames if self.clips else None, windows=windows)

    def of(self, canvas: Canvas) -> "TokenSpec":
        """The spec for an item of this canvas. Raises InputError where it is none of this model's."""
        return self.at(canvas.tile, canvas.tiles, canvas.window, canvas.windows)

    @property
    def window(self) -> int:
        """Frames that the model sees at once: clips are cut into windows of so many."""
        return 1 if self.clips is None else self.clips.window(self.clips.maximum)

    @property
    def canvas(self) -> Canvas:
        """What an item of this very layout was, where nothing else is known: a generator's, say."""
        if self.frames is None:
            return Canvas(self.size)
        return Canvas(self.size, frames=self.frames, window=self.frames)

    @property
    def length(self) -> int:
        """N, the number of positions."""
        return sum(segment.count for segment in self.segments)

    @property
    def bits(self) -> int:
        """Stored bits of one item with all its tokens; continuous tokens count 32 bits a dimension."""
        return sum(segment.count * (segment.bits or 32 * (segment.dim or 0)) for segment in self.segments)

    @property
    def prefixes(self) -> Sequence[int]:
        """Prefix lengths that decode, ascending; the last is `length`."""
        if self.prefix_rule == "any":
            return range(self.pieces, self.length + 1, self.pieces)
        if self.prefix_rule == "none":
            return (self.length,)
        ends, total = [], 0
        for segment in self.segments:
            total += segment.count
            ends.append(total)
        return tuple(ends)

    def check_prefix(self, length: int) -> int:
        """`length` if that many leading tokens decode, else an InputError that names the nearest lengths that do."""
        if length in self.prefixes:
            return length
        close = (
            sorted(self.prefixes, key=lambda k: abs(k - length))[:3] if len(self.prefixes) < 10_000 else [self.length]
        )
        raise InputError(
            f"{length} tokens do not decode on their own here; the nearest lengths that do: {sorted(close)}"
        )
