"""Authors' checkpoints: read without running their code, recognised, converted, cached.

    FILE --read--> state dict, unwrapped --recognise--> config --key table--> our state dict --> model folder

Safetensors files are read by `vistok.tensorfile`, all others by `torch.load(weights_only=True)`. A pickle that wants
to call anything beyond rebuilding tensors is refused, and there is no way around that.

Published weights are downloaded once through the Hugging Face Hub, checked, converted once, and kept as model folders
in `$VISTOK_CACHE` (default `~/.cache/vistok`).
"""

import ast
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok import hub, tensorfile
from vistok.catalogue import Variant, WeightFile
from vistok.errors import ConfigError, FormatError, InputError, MismatchError, OutputError, VistokError
from vistok.files import write_atomically
from vistok.folder import CONFIG, write_folder
from vistok.keys import Drop, Fuse, KeyTable, Rename, Split, few
from vistok.model import Model
from vistok.pickles import read_pickle
from vistok.registry import System, find_system, roles_of, systems

__all__ = ["Converted", "Drop", "Fuse", "KeyTable", "Rename", "Split", "convert", "load_published", "read"]

WRAPPERS = (
    "ema", "model_ema", "ema_state_dict", "state_dict", "model", "model_state_dict", "module", "params", "trainer",
)  # fmt: skip
SIDE_BY_SIDE = ("vae_local", "var_wo_ddp")  # VAR's trainer keeps the tokenizer beside the generator that reads it
WRAPPED = ("module.", "_orig_mod.")  # put before every key by DistributedDataParallel and torch.compile
PREFIXES = ("model.", "ema_model.", "tokenizer.", "ae.")  # an attribute of whoever trained it, unless part of the name
BESIDE_OTHERS = ("ema_model.", "ae.")  # where other prefixes, of weights or of judges, stand in the same file


# -- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict of a checkpoint file: out of its wrappers, without the prefixes that training put on every key.

    `key` names the entry that holds it, where it is not one of the usual ones (with weights and their moving averages
    both there, the averages are taken). Tensors of a `.pt` file stay mapped from disk until they are used.

    Raises FormatError for damage and for pickles that hold more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path} does not exist" if not path.exists() else f"{path} is a folder, not a checkpoint")
    with open(path, "rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return _without_prefixes(tensorfile.read(path)[0])
    return _without_prefixes(_unwrap(read_pickle(path), path, key))


def _unwrap(plain: Any, path: Path, key: str | None) -> dict[str, Tensor]:
    if key is not None:
        for part in key.split("."):
            if not isinstance(plain, Mapping) or part not in plain:
                raise FormatError(f"{path} has no entry {key!r}; it has {few(_keys(plain), 8)}")
            plain = plain[part]
    while isinstance(plain, Mapping) and not _is_state(plain):
        parts = [plain[name] for name in SIDE_BY_SIDE if isinstance(plain.get(name), Mapping)]
        if parts:
            return {name: value for part in parts for name, value in _without_prefixes(dict(part)).items()}
        inner = next((name for name in WRAPPERS if isinstance(plain.get(name), Mapping) and plain[name]), None)
        if inner is None:
            raise FormatError(f"{path} holds no state dict; its entries are {few(_keys(plain), 8)}")
        plain = plain[inner]
    if not isinstance(plain, Mapping):
        raise FormatError(f"{path} holds a {type(plain).__name__}, not a state dict")
    return {str(name): value for name, value in plain.items() if isinstance(value, Tensor)}


def _is_state(plain: Mapping) -> bool:
    return any(isinstance(value, Tensor) for value in plain.values()) and not any(
        isinstance(plain.get(name), Mapping) for name in WRAPPERS
    )


def _keys(plain: Any) -> list[str]:
    return [str(name) for name in plain] if isinstance(plain, Mapping) else [type(plain).__name__]


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((p for p in WRAPPED if state and all(name.startswith(p) for name in state)), None):
        state = _below(state, prefix)
    return state


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _readings(state: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """The ways to read a state dict: moving averages where they lie among the weights, as it is, below a prefix."""
    if any(name.startswith("model_ema.") for name in state):  # latent-diffusion: its names are ours without dots
        raw = {name: tensor for name, tensor in state.items() if not name.startswith("model_ema.")}
        yield {name: state.get("model_ema." + name.replace(".", ""), tensor) for name, tensor in raw.items()}
    yield state
    for prefix in PREFIXES:
        if prefix in BESIDE_OTHERS or all(name.startswith(prefix) for name in state):
            below = _below(state, prefix)
            if below:
                yield from _readings(below)


# -- converting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Converted:
    """A state dict of our own names, its config, the names of the variants that have this config, and the class."""

    state: dict[str, Tensor]
    config: Any
    variants: tuple[str, ...]
    model: type[Model]


def convert(
    state: Mapping[str, Tensor], slug: str, config: Any = None, *, force: bool = False, role: str | None = None
) -> Converted:
    """An authors' state dict as a model of the system `slug`; without a config it is recognised from the shapes.

    Of a system that is tokenizer and generator both, the state dict says which it is, unless `role` does.

    Raises MismatchError where keys are left over, missing or of another shape, and names the system that the weights
    look like; FormatError for NaN or infinite weights unless `force`.
    """
    system = _system_of_state(state, slug, config, role)
    if system.keys is None:
        raise InputError(f"{slug} has no authors' checkpoints to convert; its models are made by training them here")
    state, found = _read_as(state, system, config)
    config = config or found
    try:
        if config is None:
            if system.recognise:
                system.recognise(state)  # may say why, in a ConfigError
            raise MismatchError(f"this is no {slug} checkpoint (its first keys: {few(list(state))})")
        ours = key_table(system, config).to_ours(state)
        with torch.device("meta"):
            wanted = hub.shapes_of(system.model(config).state_dict())
        hub.check_shapes(hub.shapes_of(ours), wanted, "the file", system.model.__name__)
    except (MismatchError, ConfigError, KeyError, IndexError) as error:
        told = str(error) if isinstance(error, VistokError) else f"this is no {slug} checkpoint"
        raise MismatchError(told + _looks_like(state, slug)) from error
    if not force:
        refuse_infinite(ours)
    variants = tuple(name for name, known in system.variants.items() if known == config)
    return Converted(ours, config, variants, system.model)


def _system_of_state(state: Mapping[str, Tensor], slug: str, config: Any, role: str | None) -> System:
    """The tokenizer or the generator of a system, whichever a state dict (or a config) belongs to."""
    roles = [role] if role else roles_of(slug)
    candidates = [find_system(slug, name) for name in roles] or [find_system(slug)]
    if config is not None:
        return next((system for system in candidates if isinstance(config, system.config)), candidates[0])
    for system in candidates[:-1]:
        reading, found = _read_as(state, system, None)
        if found is not None and not key_table(system, found).left_over(list(reading)):
            return system
    last = _read_as(state, candidates[-1], None)[1] if len(candidates) > 1 else None
    return candidates[-1] if last is not None else candidates[0]


def _read_as(state: Mapping[str, Tensor], system: System, config: Any) -> tuple[Mapping[str, Tensor], Any]:
    """The first reading of a state dict in which no key is foreign to the system, with the config recognised in it."""
    best: tuple[Mapping[str, Tensor], Any] = (state, None)
    for reading in _readings(state):
        found = config or _recognise(reading, system)
        if found is not None and not key_table(system, found).left_over(list(reading)):
            return reading, found
        if found is not None and best[1] is None:
            best = reading, found
    return best


def _recognise(state: Mapping[str, Tensor], system: System) -> Any:
    """The config of a state dict, or None where it is not of this system, in whatever way that was noticed."""
    try:
        return system.recognise(state) if system.recognise else None
    except (VistokError, KeyError, IndexError, ValueError, TypeError, ZeroDivisionError):
        return None


def key_table(system: System, config: Any) -> KeyTable:
    """The key table of a system for models of this config."""
    return system.keys if isinstance(system.keys, KeyTable) else system.keys(config)


def refuse_infinite(state: Mapping[str, Tensor]) -> None:
    """Raise FormatError that names the tensors which hold NaN or infinite numbers, if there are any."""
    bad = []
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = (float(value) for value in torch.aminmax(tensor.detach()))
            if not (-float("inf") < low and high < float("inf")):  # false for NaN too
                bad.append(name)
    if bad:
        raise FormatError(f"NaN or infinite weights in {few(bad)}; --force converts them as they are")


def _looks_like(state: Mapping[str, Tensor], slug: str) -> str:
    """A clause that names the other system, or the other size of this one, that a state dict belongs to."""
    known = [find_system(other, role) for other in systems() for role in roles_of(other)]
    for system in sorted(known, key=lambda one: (one.slug != slug, one.slug)):
        reading, config = _read_as(state, system, None)
        if config is None or key_table(system, config).left_over(list(reading)):
            continue
        names = [name for name, known in system.variants.items() if known == config]
        size = f" ({' or '.join(names)})" if names else ""
        return f"; it looks like {system.slug}{size}"
    readings = list(_readings(state))
    others = [system for system in known if system.slug != slug]
    found = {one.slug for one in others if any(_of_unknown_size(reading, one) for reading in readings)}
    alike = sorted(found)
    return f"; it looks like {' or '.join(alike)}, of a size that is not published" if alike else ""


def _of_unknown_size(state: Mapping[str, Tensor], system: System) -> bool:
    """Whether a system knows these keys for its own but cannot tell the config from their shapes."""
    try:
        if system.recognise:
            system.recognise(state)
    except ConfigError:
        return True
    except (VistokError, KeyError, IndexError, ValueError, TypeError, ZeroDivisionError):
        return False
    return False


def read_config(path: Path, slug: str, state: Mapping[str, Tensor] | None = None) -> Any:
    """A config file, the authors' YAML or JSON or our own config.json, as the config of the system `slug`.

    Where it describes a tokenizer and its generator both, the state dict beside it says which is meant.
    """
    import yaml

    from vistok.config import from_plain

    try:
        plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is neither YAML nor JSON: {str(error).splitlines()[0]}") from error
    if isinstance(plain, dict) and "vistok" in plain and "config" in plain:
        system = find_system(slug, plain.get("role"))
        return from_plain(system.config, plain["config"], f"{path}: config")
    readers = [system for system in (find_system(slug, role) for role in roles_of(slug)) if system.configure]
    if not isinstance(plain, dict) or not readers:
        raise ConfigError(f"{path} is no configuration of {slug}")
    told: Exception | None = None
    found: list[tuple[System, Any]] = []
    for system in readers:
        try:
            found.append((system, system.configure(plain)))
        except (ConfigError, KeyError, TypeError) as error:
            told = told or error
    if found:
        fits = (config for system, config in found if state is not None and _belongs(state, system, config))
        return next(fits, found[0][1])
    if isinstance(told, ConfigError):
        raise told
    raise ConfigError(f"{path} is no complete configuration of {slug}: {told}") from told


def _belongs(state: Mapping[str, Tensor], system: System, config: Any) -> bool:
    reading, _ = _read_as(state, system, config)
    return not key_table(system, config).left_over(list(reading))


def described(path: Path, slug: str) -> Any:
    """The config that a safetensors file carries in its header, as the authors' configuration, or None.

    Values are read as Python literals, nothing is run. For what shapes do not tell (FlexTok's levels and scale).
    """
    if path.suffix != ".safetensors":
        return None
    plain = {}
    for name, text in tensorfile.metadata(path).items():
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            plain[name] = ast.literal_eval(text)
    for system in (find_system(slug, role) for role in roles_of(slug)):
        if system.configure and plain:
            with suppress(ConfigError, KeyError, TypeError):
                return system.configure(plain)
    return None


def convert_file(
    path: Path,
    slug: str,
    folder: Path,
    *,
    config: Path | None = None,
    overwrite: bool = False,
    force: bool = False,
    key: str | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """An authors' checkpoint file to a model folder, which appears whole or not at all. Returns what was recognised.

    Raises OutputError where `folder` exists unless `overwrite`, and what `read` and `convert` raise.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists; --overwrite replaces it")
    find_system(slug)
    state = read(Path(path), key)
    told = read_config(config, slug, state) if config else described(Path(path), slug)
    done = convert(state, slug, told, force=force)
    name = name or (done.variants[0] if len(done.variants) == 1 else slug)
    _write_whole(folder, done, done.model, name)
    return {
        "system": slug,
        "role": done.model.role,
        "name": name,
        "variants": list(done.variants),
        "tensors": len(done.state),
        "parameters": sum(tensor.numel() for tensor in done.state.values()),
        "folder": str(folder),
    }


def _write_whole(folder: Path, done: Converted, model: type[Model], name: str) -> None:
    """Write a model folder beside its place and move it there, so that no reader meets half of one."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        whole = temporary / "model"
        write_folder(whole, done.state, model, done.config, name)
        if folder.exists():
            os.replace(folder, temporary / "old")
        os.replace(whole, folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export_file(folder: Path, path: Path, slug: str | None = None, *, overwrite: bool = False) -> dict[str, Any]:
    """A model folder back to the authors' names: a `.safetensors` file, or a torch file for any other suffix.

    Raises MismatchError where the model is not of the system `slug`, if that is given; OutputError where `path` exists.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; --overwrite replaces it")
    model = hub.load_folder(Path(folder))
    if slug not in (None, model.system):
        raise MismatchError(f"{folder} holds a model of {model.system}, not of {slug}")
    system = find_system(model.system, model.role)
    if system.keys is None:
        raise InputError(f"{model.system} was never published elsewhere: there are no other names to export to")
    theirs = key_table(system, model.config).to_theirs(model.state_dict())

    def write(place: Path) -> None:
        if path.suffix == ".safetensors":
            tensorfile.write(place, theirs)
        else:  # views of one tensor would be saved with the whole of it
            torch.save({name: tensor.contiguous().clone() for name, tensor in theirs.items()}, place)

    write_atomically(path, write)
    return {"system": model.system, "name": model.name, "tensors": len(theirs), "file": str(path)}


# -- published weights -----------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where converted published weights are kept: $VISTOK_CACHE, or ~/.cache/vistok."""
    return Path(os.environ.get("VISTOK_CACHE") or Path.home() / ".cache" / "vistok")


def load_published(variant: Variant) -> Model:
    """The published weights of a catalogued variant: from the cache, else downloaded, checked, converted and cached.

    Raises VistokError, which says what to place where, when a file can neither be found nor downloaded; FormatError
    where size or hash are not those of the catalogue.
    """
    folder = cache_folder() / "models" / variant.name
    if not (folder / CONFIG).exists():
        system = find_system(variant.system, variant.role)
        state: dict[str, Tensor] = {}
        config = system.variants[variant.name]
        for source in variant.weights:
            path = _obtain(variant, source)
            check_file(path, source)
            state |= read(path, source.key)
            told = described(path, variant.system)
            config = told if isinstance(told, system.config) else config
        done = convert(state, variant.system, config, role=variant.role)
        _write_whole(folder, done, done.model, variant.name)
    return hub.load_folder(folder)


def _obtain(variant: Variant, source: WeightFile) -> Path:
    """The local path of a published file: placed by hand, or through the Hub's own cache."""
    assert source.file is not None
    placed = cache_folder() / "files" / variant.name / Path(source.file).name
    if placed.exists():
        return placed
    where = f"place the file at {placed}"
    if source.repo is None:
        raise VistokError(
            f"{source.file} of {variant.name} is not on the Hugging Face Hub: get it from {source.url} and {where}"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source.repo, source.file, revision=source.revision))
    except Exception as error:  # the Hub client raises a family of errors that has changed between its versions
        raise VistokError(
            f"cannot get {source.file} of {source.repo} from the Hugging Face Hub ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}); without a network, {where}"
        ) from error


def check_file(path: Path, source: WeightFile) -> None:
    """Raise FormatError unless a downloaded file has the catalogue's size and SHA-256, where it names them."""
    size = path.stat().st_size
    if source.bytes is not None and size != source.bytes:
        raise FormatError(f"{path} has {size} bytes, published are {source.bytes}: delete it and get it again")
    if source.sha256 is not None:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != source.sha256:
            raise FormatError(
                f"{path} has SHA-256 {found[:12]}.., published is {source.sha256[:12]}..: delete it and get it again"
            )
