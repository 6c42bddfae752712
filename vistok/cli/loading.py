"""What `-m` and IMAGE arguments mean, the same in every command."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vistok.errors import InputError

if TYPE_CHECKING:
    from vistok.tokenizer import Tokenizer


def load_tokenizer(name: str | None, device: str | None = None) -> "Tokenizer":
    """The tokenizer behind `-m` (the one that ships if None), on the accelerator of this machine unless told where.

    Raises InputError for a model of another role or a device that is not there, and whatever `vistok.load` raises.
    """
    import torch

    import vistok
    from vistok.tokenizer import Tokenizer

    model = vistok.load(name)
    if not isinstance(model, Tokenizer):
        raise InputError(f"{model.name} is a {model.role}; this command takes a tokenizer")
    try:
        return model.to(torch.device(device or best_device()))
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises any of them
        raise InputError(f"cannot use the device {device!r}: {str(error).splitlines()[0]}") from error


def best_device() -> str:
    """The accelerator of this machine, or the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"


def expand(arguments: Sequence[str]) -> list[str]:
    """Files behind paths, folders (all pictures and clips below, sorted) and wildcards; a path that is not there stays
    as it is.

    Raises InputError for a folder without pictures and clips, or a wildcard that matches nothing.
    """
    from vistok.data.images import is_video_name
    from vistok.data.sources import FolderSource, open_source

    found: list[str] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            clips = sorted(str(file) for file in path.rglob("*") if is_video_name(file) and file.is_file())
            try:
                source = open_source(path)
            except InputError:
                if not clips:
                    raise
            else:
                if source.kind == "clips":
                    found += clips
                    continue
                if not isinstance(source, FolderSource):
                    raise InputError(f"{argument} holds {source.kind} files; `vistok encode` reads these")
                found += [str(path / item.id) for item in source]
            found += clips
        elif not path.exists() and any(letter in argument for letter in "*?["):
            matches = sorted(match for match in glob.glob(argument, recursive=True) if Path(match).is_file())
            if not matches:
                raise InputError(f"nothing matches {argument}")
            found += matches
        else:
            found.append(argument)
    return list(dict.fromkeys(found))
