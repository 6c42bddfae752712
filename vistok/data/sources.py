"""Sources: whatever people keep pictures in, as one sequence of items with random access.

    open_source("photos/")                    a folder, nested, in mixed formats; subfolders are classes
    open_source("train.parquet")              Hugging Face parquet: image {bytes, path}, label, caption or text
    open_source("shards/")                    WebDataset .tar shards with .txt, .json and .cls beside the pictures
    open_source("owner/name:train")           any `datasets` id, with its split

    source[i] -> Item(id, label, caption); item.size reads the header, item.image decodes

Ids are unique and stable: the same files give the same ids and the same order on every machine. Opening decodes
nothing; a picture that cannot be read raises when it is asked for, so that one bad picture does not end a job.
"""

import glob
import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from vistok.data.images import IMAGE_SUFFIXES, decode_image, is_image_name, open_image
from vistok.errors import InputError
from vistok.layout import Size

if TYPE_CHECKING:
    from PIL import Image

Where = str | os.PathLike | Sequence[str | os.PathLike]


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


class FolderSource(Source):
    """Image files below a folder in sorted order; ids are their paths within it.

    Where every picture lies in a subfolder, the first subfolder's name is its class.
    """

    kind = "folder"

    def __init__(self, root: Path, files: Sequence[str], max_pixels: int | None = None) -> None:
        self.name = root.name or str(root)
        self._root, self._files, self._max_pixels = root, list(files), max_pixels
        if all("/" in file for file in self._files):
            self.classes = tuple(sorted({file.split("/", 1)[0] for file in self._files}))
            self.labelled = True
        self._label = {name: label for label, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self._files)

    def item(self, index: int) -> Item:
        file = self._files[index]
        label = self._label[file.split("/", 1)[0]] if self.labelled else None
        return Item(file, lambda: self._root / file, label, max_pixels=self._max_pixels)

    def _contents(self) -> Iterator[str]:
        for file in self._files:
            try:
                yield f"{file} {(self._root / file).stat().st_size}"
            except OSError:
                yield f"{file} unreadable"


def open_source(where: "Where | Source", *, max_pixels: int | None = None) -> Source:
    """Open a folder, an image, parquet files, WebDataset shards, a list of one kind of these, or a `datasets` id.

    `where` may hold wildcards (`shards/*.tar`) or braces (`{000..127}.tar`). A folder with parquet or tar files and
    at most as many images is a dataset of those files. A `datasets` id is `name[:config][:split]`.
    Raises InputError when nothing is there or nothing in it is a picture, FormatError for damaged files.
    """
    if isinstance(where, Source):
        return where
    if not isinstance(where, (str, os.PathLike)):
        return _of_files([Path(path) for path in where], max_pixels)
    text = os.fspath(where)
    path = Path(text).expanduser()
    if path.is_dir():
        return _of_folder(path, max_pixels)
    if path.exists():
        return _of_files([path], max_pixels)
    if any(letter in text for letter in "*?{["):
        return _of_files(_expanded(text), max_pixels)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.+-]+){0,2}", text) and path.suffix.lower() not in _FILE_KINDS:
        from vistok.data.tables import DatasetsSource

        return DatasetsSource.load(text, max_pixels)
    raise InputError(f"{text} does not exist; expected a folder of images, parquet or tar files, or a datasets id")


_FILE_KINDS = {".parquet", ".tar", *IMAGE_SUFFIXES}


def _expanded(pattern: str) -> list[Path]:
    from braceexpand import braceexpand

    paths = [Path(path) for part in braceexpand(pattern) for path in sorted(glob.glob(part, recursive=True))]
    if not paths:
        raise InputError(f"no file matches {pattern}")
    return paths


def _of_folder(root: Path, max_pixels: int | None) -> Source:
    if (root / "state.json").exists() or (root / "dataset_dict.json").exists():
        from vistok.data.tables import DatasetsSource

        return DatasetsSource.load_from_disk(root, max_pixels)
    found = _files_below(root)
    images = [file for file in found if is_image_name(file)]
    for suffix in (".parquet", ".tar"):
        shards = [file for file in found if file.endswith(suffix) and not Path(file).name.startswith((".", "_"))]
        if shards and len(shards) >= len(images):
            return _of_files([root / file for file in shards], max_pixels, root)
    if not images:
        raise InputError(
            f"{root} holds no images ({len(found)} other files); expected files that end in "
            f"{' '.join(IMAGE_SUFFIXES[:6])} ..., parquet files or .tar shards"
        )
    return FolderSource(root, images, max_pixels)


def _of_files(paths: list[Path], max_pixels: int | None, root: Path | None = None) -> Source:
    if not paths:
        raise InputError("no files given; expected images, parquet files or .tar shards")
    kinds = {"image" if path.suffix.lower() in IMAGE_SUFFIXES else path.suffix.lower() for path in paths}
    if len(kinds) > 1:
        raise InputError(f"files of several kinds together ({', '.join(sorted(kinds))}); open one kind at a time")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"{missing[0]} does not exist" + (f" (nor {len(missing) - 1} more)" if missing[1:] else ""))
    root = root or Path(os.path.commonpath([path.parent.absolute() for path in paths]))
    kind = kinds.pop()
    if kind == ".parquet":
        from vistok.data.tables import ParquetSource

        return ParquetSource(paths, root, max_pixels)
    if kind == ".tar":
        from vistok.data.shards import WebDatasetSource

        return WebDatasetSource(paths, root, max_pixels)
    if kind in (".gz", ".tgz", ".zst", ".bz2", ".xz"):
        raise InputError(f"{paths[0]} is compressed: its items cannot be reached one by one; unpack it to .tar first")
    files = [path.absolute().relative_to(root.absolute()).as_posix() for path in paths]
    if len(set(files)) < len(files):
        raise InputError("the same file is given twice")
    return FolderSource(root, files, max_pixels)


def _files_below(root: Path) -> list[str]:
    """Paths of all files below, sorted, links followed but no folder entered twice."""
    found, entered = [], set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            below.clear()
            continue
        entered.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        prefix = Path(folder).relative_to(root)
        found += [(prefix / name).as_posix() for name in names]
    return sorted(found)


def within(path: Path, root: Path) -> str:
    """A shard's name for ids: its path below `root`, without its ending."""
    return path.absolute().relative_to(root.absolute()).with_suffix("").as_posix()
