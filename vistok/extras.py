"""Packages that only some features need: imported where they are used, with an error that says how to get them."""

from importlib import import_module
from typing import Any

from vistok.errors import MissingExtraError


def import_extra(module: str, extra: str) -> Any:
    """Import `module`, which belongs to the optional dependencies called `extra`.

    Raises MissingExtraError, with the command that installs it, when it is not there.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise MissingExtraError(f"this needs {package}: pip install 'vistok[{extra}]'") from error
