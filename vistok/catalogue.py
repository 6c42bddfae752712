"""The catalogue: every system and every variant as data, read without torch.

One YAML file per system in `vistok/systems/`: its role, paper and licences, and its variants with the files that
hold their weights. `vistok list` and `vistok.list_models` read this alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vistok.config import from_plain
from vistok.errors import UnknownNameError, nearest

FOLDER = Path(__file__).parent / "systems"
DEFAULT_MODEL = "strata"
DEFAULT_COMPRESSOR = "strata"  # of `vistok compress`
DEFAULT_GENERATOR = "llamagen-cifar10"


@dataclass(frozen=True)
class Licences:
    """SPDX names, or words where there is none; `unknown` where the authors say nothing."""

    code: str = "unknown"
    weights: str = "unknown"
    data: str = "unknown"

    @property
    def commercial(self) -> bool:
        """Whether code and weights may be used commercially. The training data's licence is shown, not judged."""
        return self.code in PERMISSIVE and self.weights in PERMISSIVE


@dataclass(frozen=True)
class WeightFile:
    """Where a checkpoint is: a file of a Hub repository at a pinned revision, or a folder inside this package."""

    repo: str | None = None
    file: str | None = None
    revision: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    package: str | None = None  # a folder under vistok/weights/
    url: str | None = None  # the authors' page to get `file` from by hand, where it is not on the Hub
    key: str | None = (
        None  # the entry of the checkpoint's dict that holds the state dict, where it is not the usual one
    )


@dataclass(frozen=True)
class Variant:
    """One entry: a published (or shipped) checkpoint, or a size that is only trained from scratch."""

    name: str
    system: str
    role: str
    summary: str = ""
    size: int | None = None  # pixels, the side that it is published for
    tokens: int | None = None
    parameters: float | None = None  # millions
    tokenizer: str | None = None  # of a generator: the variant that decodes what it makes
    weights: tuple[WeightFile, ...] = ()
    licences: Licences = Licences()


@dataclass(frozen=True)
class Entry:
    """A system: its slug, roles, title and paper, and its variants."""

    system: str
    roles: tuple[str, ...]
    title: str
    paper: str
    variants: tuple[Variant, ...]


# Licences under which code and weights may be used commercially without asking.
PERMISSIVE = frozenset({"Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "CC-BY-4.0", "CC0-1.0", "ISC"})


@cache
def entries() -> dict[str, Entry]:
    """Every system by slug, sorted."""
    return {path.stem: _read(path) for path in sorted(FOLDER.glob("*.yaml"))}


def variants() -> Iterator[Variant]:
    """Every variant of every system."""
    for entry in entries().values():
        yield from entry.variants


def find(name: str) -> Variant:
    """The variant called `name`. Raises UnknownNameError that names the nearest ones."""
    for variant in variants():
        if variant.name == name:
            return variant
    hint = nearest(name, [variant.name for variant in variants()])
    raise UnknownNameError(f"no model {name!r} in the catalogue{hint or '; vistok list shows them all'}")


def list_models(pattern: str = "*", *, commercial_ok: bool = False) -> list[str]:
    """Names of the models that match a shell pattern (`titok-*`); `commercial_ok`: free for commercial use."""
    return [variant.name for variant in select(pattern, commercial_ok)]


def select(pattern: str = "*", commercial_ok: bool = False) -> list[Variant]:
    """The variants behind `list_models`."""
    return [
        variant
        for variant in variants()
        if fnmatch(variant.name, pattern) and (variant.licences.commercial or not commercial_ok)
    ]


def _read(path: Path) -> Entry:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    plain: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    roles = tuple(plain["roles"])
    licences = plain.get("licences", {})
    listed = []
    for name, fields in plain["variants"].items():
        fields = dict(fields or {})
        fields["licences"] = {**licences, **fields.get("licences", {})}
        fields["weights"] = fields.get("weights", [])
        listed.append(
            from_plain(Variant, {"name": name, "system": path.stem, "role": roles[0], **fields}, f"{path.name}: {name}")
        )
    return Entry(path.stem, roles, plain["title"], plain["paper"], tuple(listed))
