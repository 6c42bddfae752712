"""Model folders to models, from a path or from the Hugging Face Hub; `vistok.folder` holds the format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vistok import tensorfile
from vistok.config import from_plain
from vistok.errors import FormatError, MismatchError, VistokError
from vistok.folder import CONFIG, FOLDER_VERSION, WEIGHTS, hash_state
from vistok.keys import few
from vistok.model import Model, without_initial_values
from vistok.registry import find_system

# -- folders ---------------------------------------------------------------------------------------------------------


def load_folder(folder: Path) -> Model:
    """Read a model folder. Raises FormatError for damage, MismatchError when weights and config do not match."""
    plain = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.exists():
        raise FormatError(f"{path} does not exist; a model folder holds {WEIGHTS} and {CONFIG}")
    shapes = {entry.name: entry.shape for entry in tensorfile.entries(path)}
    with without_initial_values():
        model = build(plain, folder / CONFIG)
    ours = model.state_dict()
    check_shapes(shapes, shapes_of(ours), str(path), type(model).__name__)
    if "checksum" in plain:
        known, found = plain["checksum"], tensorfile.read_into(path, ours)
        fingerprint = plain.get("fingerprint")
    else:  # written by another program: the fingerprint itself is checked, or made
        state = tensorfile.read(path)[0]
        fingerprint = found = hash_state(state)
        known = plain.get("fingerprint", fingerprint)
        model.load_state_dict(state)
    if known != found:
        raise FormatError(
            f"{path} does not hold the weights that {CONFIG} describes ({found[:8]}, expected {str(known)[:8]}): "
            "damaged or exchanged; copy the folder again"
        )
    if fingerprint:
        model.remember_fingerprint(fingerprint)
    return model


def build(plain: dict[str, Any], where: str | Path) -> Model:
    """A model with random weights from the contents of a config.json."""
    system = find_system(plain["system"], plain.get("role"))
    config: Any = from_plain(system.config, plain["config"], f"{where}: config")
    model: Any = system.model(config, name=plain.get("name"))
    names = plain.get("class_names", [])
    if names:
        if not isinstance(names, list) or len(names) != getattr(model, "classes", None):
            raise FormatError(f"{where}: class_names should name each of the {getattr(model, 'classes', 0)} classes")
        model.class_names = tuple(map(str, names))
    return model


def fill(model: Model, state: dict[str, Any], where: str) -> None:
    """Put a state dict of our own names into the model; MismatchError names what is missing, left over or misshapen."""
    shapes, ours = (
        {name: tuple(tensor.shape) for name, tensor in part.items()} for part in (state, model.state_dict())
    )
    check_shapes(shapes, ours, where, type(model).__name__)
    model.load_state_dict(state)


def shapes_of(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state dict."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check_shapes(
    found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], where: str, what: str = "model"
) -> None:
    """Raise MismatchError that names what is missing, left over or of another shape in `found`, unless nothing is."""
    missing, left_over = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    wrong = [key for key in sorted(wanted.keys() & found.keys()) if wanted[key] != found[key]]
    told = []
    if missing:
        told.append(f"missing {few(missing)}")
    if left_over:
        told.append(f"left over {few(left_over)}")
    if wrong:
        told.append("of another shape " + few([f"{key} {found[key]} for {wanted[key]}" for key in wrong]))
    if told:
        raise MismatchError(f"{where} is not a checkpoint of this {what}: {'; '.join(told)}")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FormatError(f"{path} does not exist; a model folder holds {WEIGHTS} and {CONFIG}")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(plain, dict) or not {"vistok", "system", "config"} <= plain.keys():
        raise FormatError(f"{path} is not a vistok model config (no 'vistok', 'system' and 'config')")
    if plain["vistok"] > FOLDER_VERSION:
        raise FormatError(
            f"{path} is of version {plain['vistok']}, this vistok reads up to {FOLDER_VERSION}: upgrade vistok"
        )
    return plain


# -- the Hub -----------------------------------------------------------------------------------------------------------


def load_path_or_hub(name: str, revision: str | None = None, local_only: bool = False) -> Model:
    """A model folder by path, or a Hub repository `owner/repo[@revision]` that holds one."""
    if Path(name).is_dir():
        return load_folder(Path(name))
    repo, _, pinned = name.partition("@")
    return load_folder(download_folder(repo, revision or pinned or None, local_only))


def download_folder(repo: str, revision: str | None, local_only: bool = False) -> Path:
    """Bring a Hub model repository's two files into the Hub's cache. Raises VistokError when offline."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=[WEIGHTS, CONFIG], local_files_only=local_only)
        )
    except Exception as error:  # the Hub client raises a family of errors that has changed between its versions
        raise VistokError(
            f"cannot get {repo!r} from the Hugging Face Hub ({type(error).__name__}: {str(error).splitlines()[0]}); "
            f"check the name and the network, or pass the path of a folder with {WEIGHTS} and {CONFIG}"
        ) from error
