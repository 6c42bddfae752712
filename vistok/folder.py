"""A model on disk: a folder with `model.safetensors` and `config.json`, here and on the Hugging Face Hub.

config.json: {"vistok": 1, "system": ..., "role": ..., "name": ..., "fingerprint": ..., "checksum": ..., "config": {}}
and of a generator that knows its classes by name, "class_names": [..]

Here are the format and its writing; `vistok.hub` reads it, which takes the registry.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok import tensorfile
from vistok.config import to_plain
from vistok.files import write_atomically

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FOLDER_VERSION = 1


def write_folder(folder: Path, state: dict[str, Any], model: Any, config: Any, name: str) -> None:
    """Write a model folder from a state dict of our own names. `model` is the class, or anything with system and role.

    The weights go first and the config last, so that a folder with a config is whole.
    """
    checksum = ""

    def write(path: Path) -> None:
        nonlocal checksum
        checksum = tensorfile.write(path, state)

    (folder / CONFIG).unlink(missing_ok=True)  # an older one must not stand beside the new weights
    write_atomically(folder / WEIGHTS, write)
    plain = {
        "vistok": FOLDER_VERSION,
        "system": model.system,
        "role": model.role,
        "name": name,
        "fingerprint": hash_state(state),
        "checksum": checksum,
        "config": to_plain(config),
    }
    names = getattr(model, "class_names", ())
    if names:
        plain["class_names"] = list(names)
    write_atomically(folder / CONFIG, (json.dumps(plain, indent=2) + "\n").encode())


def hash_state(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes in sorted order, cut to 32 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()[:32]
