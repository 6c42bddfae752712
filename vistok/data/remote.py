"""Pictures behind URLs: `s3://`, `gs://`, `hf://`, `memory://`, ..., through fsspec, with what sources ask of a path.

    open_source("s3://bucket/photos")       a folder: one listing gives names and sizes, pictures are read whole
    open_source("gs://bucket/{0..9}.tar")   shards: headers once, then each picture by its span of bytes

A remote path answers as `pathlib.Path` does, so that a source does not ask where its files lie. Reading tries again
after errors that may pass. `memory://` files are this process's own; they travel with the path to another process.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from vistok.errors import InputError, MissingExtraError

TRIES = 4
FIRST_WAIT = 0.5  # seconds, doubled after every failure
T = TypeVar("T")


@dataclass(frozen=True)
class Stat:
    """What is known of a remote file."""

    st_size: int


class RemotePath:
    """A file or folder behind a URL. Raises InputError where it cannot be reached, MissingExtraError without driver."""

    def __init__(self, protocol: str, path: str) -> None:
        self.protocol, self.path = protocol, path

    @classmethod
    def of(cls, url: str) -> "RemotePath":
        """From its URL. Raises InputError for a protocol that fsspec does not know."""
        protocol = url.split("://", 1)[0]
        remote = cls(protocol, "")
        return cls(protocol, str(remote.system._strip_protocol(url)).rstrip("/"))

    @property
    def system(self) -> Any:
        """The fsspec file system; one per process, made when asked for."""
        import fsspec

        try:
            return fsspec.filesystem(self.protocol)
        except ImportError as error:
            raise MissingExtraError(f"{self.protocol}:// needs a driver of fsspec's: {error}") from error
        except ValueError as error:
            raise InputError(f"{self.protocol}:// is no protocol that fsspec knows: {error}") from error

    def __reduce__(self) -> Any:
        if self.protocol != "memory":
            return RemotePath, (self.protocol, self.path)
        files = {name: self.system.cat_file(name) for name in self.system.find(self.path)}
        return _with_files, (self.path, files)

    def __str__(self) -> str:
        return f"{self.protocol}://{self.path.lstrip('/')}"

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.protocol, f"{self.path}/{name}")

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self.path)

    @property
    def name(self) -> str:
        return self._pure.name

    @property
    def stem(self) -> str:
        return self._pure.stem

    @property
    def suffix(self) -> str:
        return self._pure.suffix

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.protocol, self.path.rpartition("/")[0])

    def absolute(self) -> "RemotePath":
        return self

    def relative_to(self, root: "RemotePath") -> PurePosixPath:
        return self._pure.relative_to(root._pure)

    def is_dir(self) -> bool:
        return _reached(self, lambda: self.system.isdir(self.path))

    def is_file(self) -> bool:
        return _reached(self, lambda: self.system.isfile(self.path))

    def stat(self) -> Stat:
        return Stat(_reached(self, lambda: self.system.size(self.path)) or 0)

    def open(self, mode: str = "rb") -> IO[bytes]:
        return _reached(self, lambda: self.system.open(self.path, mode))

    def read_bytes(self) -> bytes:
        return _reached(self, lambda: self.system.cat_file(self.path))

    def read_span(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on; fewer where the file ends before."""
        return _reached(self, lambda: self.system.cat_file(self.path, start=start, end=start + size))

    def files_below(self) -> dict[str, int]:
        """Paths of all files below, relative and sorted, with their sizes; hidden folders left out, as locally."""
        found = _reached(self, lambda: self.system.find(self.path, detail=True))
        sizes = {}
        for name, facts in found.items():
            inside = PurePosixPath(name).relative_to(self._pure)
            if not any(part.startswith(".") for part in inside.parts[:-1]):
                sizes[inside.as_posix()] = facts.get("size") or 0
        return dict(sorted(sizes.items()))


AnyPath = Path | RemotePath


def glob_remote(pattern: str) -> list[RemotePath]:
    """All files that a pattern with wildcards matches, sorted."""
    where = RemotePath.of(pattern)
    found = _reached(where, lambda: where.system.glob(where.path))
    return [RemotePath(where.protocol, name) for name in sorted(found)]


def read_span(path: AnyPath, start: int, size: int) -> bytes:
    """A part of a file, here or behind a URL."""
    if isinstance(path, RemotePath):
        return path.read_span(start, size)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def _with_files(path: str, files: dict[str, bytes]) -> RemotePath:
    remote = RemotePath("memory", path)
    for name, content in files.items():
        remote.system.pipe_file(name, content)
    return remote


def _reached(path: RemotePath, ask: Callable[[], T]) -> T:
    """What `ask` gives, asked again after errors that may pass. Raises InputError when it keeps failing."""
    wait = FIRST_WAIT
    for left in reversed(range(TRIES)):
        try:
            return ask()
        except (InputError, MissingExtraError):
            raise
        except FileNotFoundError:
            raise InputError(f"{path} does not exist") from None
        except Exception as error:  # every driver has its own family
            if isinstance(error, (PermissionError, IsADirectoryError, NotImplementedError)) or not left:
                told = (str(error).splitlines() or [""])[0] or type(error).__name__
                raise InputError(f"{path} cannot be read: {told}") from error
        time.sleep(wait)
        wait *= 2
    raise AssertionError("unreachable")
