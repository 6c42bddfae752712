"""Sources: whatever people keep pictures in, as one sequence of items with random access.

    open_source("photos/")                    a folder, nested, in mixed formats; subfolders are classes, captions lie
                                              in .txt files beside the pictures or in a table (`data.captions`)
    open_source("train.parquet")              Hugging Face parquet: image {bytes, path}, label, caption or text
    open_source("shards/")                    WebDataset .tar shards with .txt, .json and .cls beside the pictures
    open_source("s3://bucket/photos")         any of these behind a URL that fsspec reaches (`data.remote`)
    open_source("owner/name:train")           any `datasets` id, with its split
    open_source("clips/")                     a folder of clips and no pictures, or one clip

    source[i] -> Item(id, label, caption); item.size reads the header, item.image decodes

Ids are unique and stable: the same files give the same ids and the same order on every machine. Opening decodes
nothing; a picture that cannot be read raises when it is asked for, so that one bad picture does not end a job.
"""

import glob
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vistok.data.captions import Captions
from vistok.data.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_image_name, is_video_name
from vistok.data.items import Item, Source
from vistok.data.remote import AnyPath, RemotePath, glob_remote
from vistok.errors import InputError

if TYPE_CHECKING:
    pass

Where = str | os.PathLike | Sequence[str | os.PathLike]


class FolderSource(Source):
    """Image files below a folder in sorted order; ids are their paths within it.

    Where every picture lies in a subfolder, the first subfolder's name is its class.
    """

    kind = "folder"

    def __init__(
        self,
        root: AnyPath,
        files: Sequence[str],
        max_pixels: int | None = None,
        sizes: Mapping[str, int] | None = None,  # in bytes, where a listing has told them
        captions: Captions | None = None,
    ) -> None:
        self.name = root.name or str(root)
        self._captions = captions or None
        self.captioned = self._captions is not None
        self._sizes = {file: sizes[file] for file in files} if sizes else {}
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
        caption = self._captions.of(file) if self._captions else None
        return Item(file, lambda: self._picture(file), label, caption, self._max_pixels)

    def _picture(self, file: str) -> bytes | Path:
        path = self._root / file
        return path.read_bytes() if isinstance(path, RemotePath) else path

    def _contents(self) -> Iterator[str]:
        for file in self._files:
            try:
                size = self._sizes[file] if self._sizes else (self._root / file).stat().st_size
                yield f"{file} {size}"
            except (OSError, InputError):
                yield f"{file} unreadable"


def open_source(where: "Where | Source", *, max_pixels: int | None = None) -> Source:
    """Open a folder, an image, a clip, parquet files, WebDataset shards, a list of one of these, or a `datasets` id.

    `where` may hold wildcards (`shards/*.tar`) or braces (`{000..127}.tar`). A folder with parquet or tar files and
    at most as many images is a dataset of those files. A `datasets` id is `name[:config][:split]`. A URL
    (`s3://bucket/photos`, `file:///data`) is a folder, a file or a pattern behind a protocol that fsspec knows.
    Raises InputError when nothing is there or nothing in it is a picture, FormatError for damaged files.
    """
    if isinstance(where, Source):
        return where
    if not isinstance(where, (str, os.PathLike)):
        return _of_files([_path(os.fspath(path)) for path in where], max_pixels)
    text = os.fspath(where)
    if "://" in text:
        return _of_url(text, max_pixels)
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
    raise InputError(
        f"{text} does not exist; expected a folder of images or clips, parquet or tar files, or a datasets id"
    )


def _path(text: str) -> AnyPath:
    """Where this lies; `file://` URLs are paths of this machine."""
    if "://" not in text:
        return Path(text)
    remote = RemotePath.of(text)
    return Path(remote.path) if remote.protocol in ("file", "local") else remote


def _of_url(url: str, max_pixels: int | None) -> Source:
    path = _path(url)
    if isinstance(path, Path):
        return open_source(path, max_pixels=max_pixels)
    if any(letter in url for letter in "*?[{"):
        from braceexpand import braceexpand

        paths = [found for part in braceexpand(url) for found in glob_remote(part)]
        if not paths:
            raise InputError(f"no file matches {url}")
        return _of_files(paths, max_pixels)
    if path.is_file():
        return _of_files([path], max_pixels)
    sizes = path.files_below()
    if not sizes:
        raise InputError(f"{url} does not exist or holds no files")
    return _of_listing(path, list(sizes), max_pixels, sizes)


_FILE_KINDS = {".parquet", ".tar", *IMAGE_SUFFIXES, *VIDEO_SUFFIXES}


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
    manifest = root / "manifest.json"
    if manifest.is_file() and '"vistok_store"' in manifest.read_text(encoding="utf-8", errors="replace")[:200]:
        raise InputError(
            f"{root} is a token store: it holds tokens and no pictures. `vistok decode` makes pictures of them, and "
            "generators train on it"
        )
    return _of_listing(root, _files_below(root), max_pixels)


def _of_listing(
    root: AnyPath, found: list[str], max_pixels: int | None, sizes: Mapping[str, int] | None = None
) -> Source:
    images = [file for file in found if is_image_name(file)]
    for suffix in (".parquet", ".tar"):
        shards = [file for file in found if file.endswith(suffix) and not Path(file).name.startswith((".", "_"))]
        if shards and len(shards) >= len(images):
            return _of_files([root / file for file in shards], max_pixels, root)
    if not images and isinstance(root, Path) and any(is_video_name(file) for file in found):
        from vistok.data.clips import ClipSource  # here, because it needs torch, and decoding processes do not

        return ClipSource(root, [file for file in found if is_video_name(file)], max_pixels)
    if not images:
        raise InputError(
            f"{root} holds no images ({len(found)} other files); expected files that end in "
            f"{' '.join(IMAGE_SUFFIXES[:6])} ..., parquet files or .tar shards"
        )
    return FolderSource(root, images, max_pixels, sizes, Captions(root, images, found))


def _of_files(paths: Sequence[AnyPath], max_pixels: int | None, root: AnyPath | None = None) -> Source:
    if not paths:
        raise InputError("no files given; expected images, parquet files or .tar shards")
    kinds = {_kind(path) for path in paths}
    if len(kinds) > 1:
        raise InputError(f"files of several kinds together ({', '.join(sorted(kinds))}); open one kind at a time")
    missing = [path for path in paths if not path.is_file()] if root is None else []
    if missing:
        raise InputError(f"{missing[0]} does not exist" + (f" (nor {len(missing) - 1} more)" if missing[1:] else ""))
    root = root or _common(paths)
    kind = kinds.pop()
    if kind == ".parquet":
        from vistok.data.tables import ParquetSource

        return ParquetSource(paths, root, max_pixels)
    if kind == ".tar":
        from vistok.data.shards import WebDatasetSource

        return WebDatasetSource(paths, root, max_pixels)
    if kind in (".gz", ".tgz", ".zst", ".bz2", ".xz"):
        raise InputError(f"{paths[0]} is compressed: its items cannot be reached one by one; unpack it to .tar first")
    files = [path.absolute().relative_to(root.absolute()).as_posix() for path in paths]  # type: ignore[arg-type]
    if len(set(files)) < len(files):
        raise InputError("the same file is given twice")
    if kind == "clip":
        from vistok.data.clips import ClipSource

        if not isinstance(root, Path):
            raise InputError(f"{paths[0]}: clips are read from this machine's disks; copy them there first")
        return ClipSource(root, files, max_pixels)
    return FolderSource(root, files, max_pixels)


def _kind(path: AnyPath) -> str:
    suffix = path.suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else "clip" if suffix in VIDEO_SUFFIXES else suffix


def _common(paths: Sequence[AnyPath]) -> AnyPath:
    """The folder that all of these lie below."""
    if not any(isinstance(path, RemotePath) for path in paths):
        return Path(os.path.commonpath([path.parent.absolute() for path in paths]))  # type: ignore
    protocols = {path.protocol if isinstance(path, RemotePath) else "file" for path in paths}
    if len(protocols) > 1:
        raise InputError(
            f"files behind several protocols together ({', '.join(sorted(protocols))}); open one at a time"
        )
    return RemotePath(protocols.pop(), posixpath.commonpath([path.parent.path for path in paths]))  # type: ignore


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
