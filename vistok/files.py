"""Writing files so that a reader sees the old one or the new one and never half of either."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from vistok.errors import OutputError


def write_atomically(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Write `path` through a temporary file beside it, flushed to disk, then renamed over it.

    `content` is the bytes, or a function that writes the file whose path it is given. Parent folders are made.
    Raises OutputError, with the temporary file removed, when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        if isinstance(content, bytes):
            with os.fdopen(handle, "wb") as file:
                file.write(content)
        else:
            os.close(handle)
            content(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
