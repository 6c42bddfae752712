"""PyTorch's own checkpoint files, read without ever running what they hold.

A pickle is a program. `torch.load(weights_only=True)` runs the few instructions that rebuild tensors and refuses all
others; there is no way around that here, and no advice to look for one. What training frameworks commonly leave beside
the weights (Lightning's callbacks, an argument namespace) is replaced by inert stand-ins, so that such files load.
"""

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from vistok.errors import FormatError


class _Inert:
    """Stands in for objects that training frameworks leave in checkpoints; it holds nothing and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Names found beside the weights in Lightning's and LlamaGen's files. Their own classes are never looked up.
_STAND_INS: list[Any] = [
    (_Inert, name)
    for name in (
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
        "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
        "pytorch_lightning.utilities.parsing.AttributeDict",
    )
] + [argparse.Namespace]


def read_pickle(path: Path) -> Any:
    """What a `.pt`, `.ckpt` or `.bin` file holds: tensors and plain values. Zip files are mapped, not read.

    Raises FormatError for damage, and for a file that asks for anything beyond tensors; nothing of it has run then.
    """
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:  # torch does not look at the checksums of its own archives
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise FormatError(f"{path} is damaged at {damaged}: its checksum does not match; get the file again")
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)|callable (\S+)|class (\S+)", str(error))
        if wanted is None:
            raise FormatError(f"{path} is damaged or not a PyTorch checkpoint: {_reason(error)}") from error
        raise FormatError(
            f"{path} is refused: it asks for {next(filter(None, wanted.groups()))}, and a file that holds more than "
            "tensors could run any code. If you trust it, save its state dict alone, as safetensors, elsewhere"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, AttributeError, IndexError) as error:
        raise FormatError(f"{path} is damaged or not a PyTorch checkpoint: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What torch has to say, without its advice to load the file unsafely."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    return text.splitlines()[0][:200]
