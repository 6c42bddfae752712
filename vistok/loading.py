"""`vistok.load`: a name, a folder or a Hub id to a model with its weights.

nothing, a shipped name --> vistok/weights/<name>/      a published name --> checkpoints: fetch, check, convert
a folder                --> hub.load_folder             owner/repo       --> hub: fetch, then the same
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistok import catalogue, checkpoints, hub
from vistok.catalogue import DEFAULT_MODEL, Variant
from vistok.errors import UnknownNameError
from vistok.folder import CONFIG, WEIGHTS
from vistok.model import Model
from vistok.registry import create, system_of

if TYPE_CHECKING:
    import torch

    from vistok.header import Header
    from vistok.tokenizer import Tokenizer

SHIPPED = Path(__file__).parent / "weights"


def load(
    name: "str | Path | None" = None,
    *,
    device: "torch.device | str | None" = None,
    dtype: "torch.dtype | None" = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> "Tokenizer | Any":
    """A model with its weights, in eval mode.

    `name`: nothing (the tokenizer that ships), a name from `list_models()`, a folder with `model.safetensors` and
    `config.json`, or a Hub id `owner/repo` (at `revision`; `local_files_only` takes it from the Hub's cache alone).
    Published weights are downloaded once, checked and converted; without a network the error says what to place where.

    Raises UnknownNameError, FormatError (damaged weights), MismatchError (weights of another model).
    """
    model = _load(str(name) if name is not None else DEFAULT_MODEL, revision, local_files_only)
    return model.to(device=device, dtype=dtype).eval()


def packaged_writer(header: "Header") -> str | None:
    """Name of the tokenizer inside this package that wrote a compressed file; None where none did."""
    for variant in catalogue.variants():
        for source in variant.weights if variant.role == "tokenizer" else ():
            if not source.package:
                continue
            config = json.loads((SHIPPED / source.package / CONFIG).read_text(encoding="utf-8"))
            if header.made_by(config["fingerprint"]):
                return variant.name
    return None


def _load(name: str, revision: str | None, local_files_only: bool) -> Model:
    if Path(name).is_dir():
        return hub.load_folder(Path(name))
    listed = next((variant for variant in catalogue.variants() if variant.name == name), None)
    if listed:
        return _load_listed(listed)
    if name.count("/") == 1 and not Path(name).exists() and not name.startswith((".", "~", "/")):
        return hub.load_path_or_hub(name, revision, local_files_only)
    if "/" in name or "\\" in name or Path(name).exists():
        raise UnknownNameError(f"no model folder {name!r}; it should hold {WEIGHTS} and {CONFIG}")
    system_of(name)  # raises with the nearest names if there is no such model at all
    raise UnknownNameError(f"{name!r} has no published weights; vistok.create({name!r}) makes a fresh one to train")


def _load_listed(variant: Variant) -> Model:
    """The weights of a catalogued variant: from inside the package, or from the Hub."""
    for source in variant.weights:
        if source.package:
            return hub.load_folder(SHIPPED / source.package)
    if not variant.weights and variant.role == "reducer":
        model = create(variant.name)
        if not any(True for _ in model.parameters()):  # nothing to load: it is whole as it is
            return model
    if not variant.weights:
        raise UnknownNameError(
            f"{variant.name!r} has no published weights; vistok.create({variant.name!r}) makes a fresh one"
        )
    return checkpoints.load_published(variant)
