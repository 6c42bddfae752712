"""Large maps window by window: each window is computed with a margin as wide as the receptive field, then cut.

What comes out is what the whole map would give, up to float rounding, in memory that does not grow with the map.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """`outer` is read, `inner` is the part of the map that is kept, `cut` is where `inner` lies within `outer`."""

    outer: tuple[slice, slice]
    inner: tuple[slice, slice]
    cut: tuple[slice, slice]


def windows(size: tuple[int, int], side: int, margin: int) -> Iterator[Window]:
    """Windows of at most `side` positions a side that tile a map of `size`, with `margin` more around each."""
    for top in range(0, size[0], side):
        for left in range(0, size[1], side):
            outer, inner, cut = [], [], []
            for start, length in ((top, size[0]), (left, size[1])):
                stop = min(start + side, length)
                first, last = max(start - margin, 0), min(stop + margin, length)
                outer.append(slice(first, last))
                inner.append(slice(start, stop))
                cut.append(slice(start - first, stop - first))
            yield Window((outer[0], outer[1]), (inner[0], inner[1]), (cut[0], cut[1]))


def scaled(part: tuple[slice, slice], factor: int) -> tuple[slice, slice]:
    """The same part of a map that is `factor` times finer."""
    rows, columns = (slice(axis.start * factor, axis.stop * factor) for axis in part)
    return rows, columns


def coarsened(part: tuple[slice, slice], factor: int) -> tuple[slice, slice]:
    """The same part of a map that is `factor` times coarser; its borders must lie on that map's."""
    rows, columns = (slice(axis.start // factor, axis.stop // factor) for axis in part)
    return rows, columns
