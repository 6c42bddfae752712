"""What every command says and how: text for people on stderr, results on stdout, files never lost by accident."""

import json
import math
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistok.errors import OutputError

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console() -> "Console":
    """The rich console on stderr: progress, notes and warnings. stdout is for results alone."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


@cache
def output() -> "Console":
    """The rich console on stdout: the tables that a command was asked for. Into a pipe, no line is folded."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 240)


def emit_json(document: Any) -> None:
    """Print exactly one JSON document on stdout. Infinite and NaN numbers, which JSON lacks, become null."""
    sys.stdout.write(json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def refuse_existing(path: str | Path, overwrite: bool) -> Path:
    """`path`, if it is free to be written: it does not exist, is an empty folder, or `overwrite` was asked for.

    Raises OutputError otherwise. Nothing is removed here.
    """
    path = Path(path)
    if overwrite or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return path
    raise OutputError(f"{path} exists; --overwrite replaces it")
