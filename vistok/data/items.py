"""Items and sources: one picture with what is known about it, and a sequence of them with random access."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from vistok.data.images import decode_image, open_image
from vistok.errors import InputError
from vistok.layout import Size

if TYPE_CHECKING:
    from PIL import Image

    from vistok.data.remote import AnyPath


class Item:
    """One picture of a source, with what is known about it. Nothing is read before `size` or `image` is asked for.

    id: unique within the source. label: class index. caption: text. Both None where the source has none.
    """

    def __init__(
        self,
        id: str,
        read: Callable[[], "bytes | Path"],
        label: int | None = None,
        caption: str | None = None,
        max_pixels: int | None = None,
    ) -> None:
        self.id, self.label, self.caption = id, label, caption
        self._read, self._max_pixels = read, max_pixels
        self._opened: Image.Image | None = None

    def __repr__(self) -> str:
        return f"Item({self.id!r}, label={self.label}, caption={self.caption!r})"

    def _open(self) -> "Image.Image":
        if self._opened is None:
            self._opened = open_image(self._read(), max_pixels=self._max_pixels, name=self.id)
        return self._opened

    @property
    def size(self) -> Size:
        """(height, width) as stored, before any EXIF rotation. Raises a VistokError for what is not an image."""
        image = self._open()
        return image.height, image.width

    @property
    def image(self) -> "Image.Image":
        """The picture, RGB, upright. Decoded at every call; raises FormatError or InputError when it cannot be."""
        image, self._opened = self._open(), None
        return decode_image(image, self.id)

    def decoded_to(self, shorter: int) -> "Image.Image":
        """Like `image`, but a JPEG may come at 1/2, 1/4 or 1/8 of its size, its shorter side at least `shorter`."""
        image, self._opened = self._open(), None
        if image.format == "JPEG" and min(image.size) > shorter:
            image.draft(None, (shorter, shorter))  # scales within the inverse DCT: several times faster
        return decode_image(image, self.id)


class Source(ABC):
    """A sequence of items. `labelled` and `captioned` say what its items carry; `classes` names the labels if known."""

    kind: str = ""
    name: str = ""
    labelled: bool = False
    captioned: bool = False
    classes: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def item(self, index: int) -> Item:
        """The item at 0 <= index < len(self)."""

    @abstractmethod
    def _contents(self) -> Iterator[str]:
        """Lines that change when the source does: names, sizes, counts; nothing that depends on where it lies."""

    def __getitem__(self, index: int) -> Item:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return self.item(index % len(self))

    def __iter__(self) -> Iterator[Item]:
        return (self.item(index) for index in range(len(self)))

    @cached_property
    def fingerprint(self) -> str:
        """Hash over names, sizes and order (32 hex digits): the same for a copy elsewhere, another after any change."""
        digest = hashlib.sha256(f"{self.kind} {len(self)}\n".encode())
        for line in self._contents():
            digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
        return digest.hexdigest()[:32]

    def __getstate__(self) -> dict:
        """What travels to another process: locks and caches stay behind."""
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_cache")}

    def first(self, count: int) -> "Source":
        """The first `count` items as a source of their own."""
        return self if count >= len(self) else First(self, count)


class First(Source):
    """The first items of another source."""

    def __init__(self, source: Source, count: int) -> None:
        if count < 1:
            raise InputError(f"the first {count} items; expected at least 1")
        self.kind, self.name, self.classes = source.kind, source.name, source.classes
        self.labelled, self.captioned = source.labelled, source.captioned
        self._source, self._count = source, count

    def __len__(self) -> int:
        return self._count

    def item(self, index: int) -> Item:
        return self._source.item(index)

    def _contents(self) -> Iterator[str]:
        yield f"of {self._source.fingerprint}"


def within(path: "AnyPath", root: "AnyPath") -> str:
    """A shard's name for ids: its path below `root`, without its ending."""
    return path.absolute().relative_to(root.absolute()).with_suffix("").as_posix()  # type: ignore[arg-type]
