"""Key manifests of full-size published models: every key consumed with its shape, nothing of ours left unset.

A manifest maps the authors' key to its shape. Models and weights are built on the meta device, which holds no numbers.
"""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from vistok.keys import KeyTable
from vistok.registry import find_system

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "parity"


def shapes(slug: str, name: str) -> dict[str, torch.Tensor]:
    """The manifest `keys-<name>.json[.gz]` of a system, as tensors without numbers. Skips where it is absent."""
    for path in (SHARED / slug / f"keys-{name}.json", SHARED / slug / f"keys-{name}.json.gz"):
        if path.exists():
            text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            return {key: torch.empty(shape, device="meta") for key, shape in json.loads(text).items()}
    if os.environ.get("VISTOK_REQUIRE_PARITY") == "1":
        pytest.fail(f"no manifest keys-{name} in {SHARED / slug}, and VISTOK_REQUIRE_PARITY=1 requires it")
    pytest.skip(f"no manifest keys-{name} in {SHARED / slug}")


def names(slug: str, prefix: str = "") -> list[str]:
    """Names of all manifests of a system that begin with `prefix`."""
    return sorted(path.name[5:].split(".json")[0] for path in (SHARED / slug).glob(f"keys-{prefix}*.json*"))


def check(slug: str, variant: str, state: dict[str, torch.Tensor], role: str | None = None) -> Any:
    """Hold the model `variant` to the authors' state dict, there and back. Returns the model, on the meta device."""
    system = find_system(slug, role)
    config = system.variants[variant]
    with torch.device("meta"):
        model = system.model(config, name=variant)
    table = system.keys if isinstance(system.keys, KeyTable) else system.keys(config)
    with torch.device("meta"):
        ours = table.to_ours(state)
        back = table.to_theirs(model.state_dict())
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in ours.items()} == wanted
    assert {key: tuple(value.shape) for key, value in back.items()} == {
        key: tuple(value.shape) for key, value in state.items()
    }
    return model
