"""Names to systems, and fresh models from them: `create`. `vistok.loading` gives them weights.

A system is found by its slug: `one-d-piece` is `vistok/tokenizers/one_d_piece.py`, imported when it is asked for. Such
a file ends with `SYSTEM = System(...)`. Code outside this package adds its own with `register`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistok import catalogue
from vistok.catalogue import DEFAULT_MODEL, list_models
from vistok.errors import ConfigError, UnknownNameError, nearest

if TYPE_CHECKING:
    import torch

    from vistok.model import Model

__all__ = [
    "DEFAULT_MODEL",
    "System",
    "create",
    "find_system",
    "list_models",
    "register",
    "system_of",
    "systems",
]

ROOMS = {"tokenizer": "tokenizers", "generator": "generators", "reducer": "reducers"}


@dataclass(frozen=True)
class System:
    """What a system's file says about itself in code.

    `model` is the class, `config` its config dataclass, `variants` the config of every named size. `keys` maps the
    authors' state dict to ours (a `vistok.keys.KeyTable`, or a function config -> KeyTable), None for systems that were
    never published elsewhere.
    """

    slug: str
    model: "type[Model]"
    config: type
    variants: Mapping[str, Any]
    keys: Any = None
    recognise: Any = field(default=None, repr=False)  # authors' state dict -> config, or None if it is another system's
    configure: Any = field(default=None, repr=False)  # authors' configuration, a mapping -> config


_registered: dict[tuple[str, str], System] = {}


def register(system: System, role: str | None = None) -> System:
    """Make a system of your own loadable by name, as those in the package are. Returns it."""
    _registered[system.slug, role or system.model.role] = system
    return system


def systems(role: str | None = None) -> list[str]:
    """Slugs of every system that has code, sorted; `role` keeps tokenizers, generators or reducers."""
    found = {slug for slug, known_role in _registered if role in (None, known_role)}
    for name, room in ROOMS.items():
        if role in (None, name):
            folder = Path(__file__).parent / room
            found |= {path.stem.replace("_", "-") for path in folder.glob("*.py") if not path.stem.startswith("_")}
    return sorted(found)


def roles_of(slug: str) -> list[str]:
    """The roles in which a system has code, tokenizer first."""
    return [role for role in ROOMS if slug in systems(role)]


def find_system(slug: str, role: str | None = None) -> System:
    """The system called `slug`. Where it is tokenizer and generator both, `role` says which (tokenizer first)."""
    for name in [role] if role else ROOMS:
        if (slug, name) in _registered:
            return _registered[slug, name]
        module = slug.replace("-", "_")
        if (Path(__file__).parent / ROOMS[name] / f"{module}.py").exists():
            return import_module(f"vistok.{ROOMS[name]}.{module}").SYSTEM
    raise UnknownNameError(
        f"no {role or 'system'} {slug!r}{nearest(slug, systems(role)) or '; vistok systems shows them all'}"
    )


def system_of(name: str) -> tuple[System, Any]:
    """The system and the config behind a variant's name. Raises UnknownNameError that names the nearest ones."""
    candidates = [slug for slug in systems() if name == slug or name.startswith(slug + "-")]
    listed = next((variant for variant in catalogue.variants() if variant.name == name), None)
    if listed:
        candidates.append(listed.system)
    for slug in sorted(set(candidates), key=len, reverse=True):
        for role in ROOMS:
            try:
                system = find_system(slug, role)
            except UnknownNameError:
                continue
            if name in system.variants:
                return system, system.variants[name]
    known = [variant.name for variant in catalogue.variants()]
    for system in _registered.values():
        known += system.variants
    raise UnknownNameError(f"no model {name!r}{nearest(name, known) or '; vistok list shows them all'}")


def create(
    name: str, *, device: "torch.device | str | None" = None, dtype: "torch.dtype | None" = None, **changes: Any
) -> Any:
    """A fresh model with random weights, in eval mode. `changes` override fields of the variant's config.

    Raises UnknownNameError for a name that does not exist, ConfigError for a field that does not.
    """
    system, config = system_of(name)
    if changes:
        fields = list(config.__dataclass_fields__)
        for key in changes:
            if key not in fields:
                raise ConfigError(f"{name} has no setting {key!r}{nearest(key, fields) or f'; known: {fields}'}")
        config = replace(config, **changes)
    model = system.model(config, name=name)
    return model.to(device=device, dtype=dtype).eval()
