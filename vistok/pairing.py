"""A generator with the tokenizer that decodes what it makes: `load_generator`, `save_pair`.

    gen = load_generator("DIR")                   # or a name; nothing is the small one that ships
    pictures = gen.tokenizer.decode(gen.generate("dog", count=16, seed=0), dtype=torch.uint8)

A generator knows its tokenizer by name and hash of weights, not by place. The place is, in this order: what the caller
says; DIR/tokenizer, a model folder inside the generator's; RUN/stages and the recipe of the run whose model it is; what
the catalogue names beside the generator. Whatever is found has to agree with the hash.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistok import catalogue
from vistok.catalogue import DEFAULT_GENERATOR
from vistok.errors import InputError, MismatchError, UnknownNameError
from vistok.folder import CONFIG
from vistok.generator import Generator
from vistok.loading import SHIPPED, load
from vistok.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

TOKENIZER = "tokenizer"  # the folder, inside a generator's


def load_generator(
    name: str | Path | None = None,
    *,
    tokenizer: "str | Path | Tokenizer | None" = None,
    device: "torch.device | str | None" = None,
    dtype: "torch.dtype | None" = None,
) -> Generator:
    """A generator, in eval mode, with its tokenizer attached.

    `name`: nothing (the one that ships), whatever `vistok.load` takes, or a run's folder. `tokenizer`: the one to
    attach, or its name or folder, where it cannot be found or another place of the same weights is meant.

    Raises what `vistok.load` raises; InputError for a model of another role; UnknownNameError where no tokenizer is
    found, MismatchError where it is not the one that the generator was made for.
    """
    place = _place(DEFAULT_GENERATOR if name is None else str(name))
    generator = load(place, device=device, dtype=dtype)
    if not isinstance(generator, Generator):
        raise InputError(f"{generator.name} is a {generator.role}, not a generator{_generators(generator.system)}")
    found = tokenizer if isinstance(tokenizer, Tokenizer) else load(tokenizer or _find_tokenizer(generator, place))
    if not isinstance(found, Tokenizer):
        raise InputError(f"{found.name} is a {found.role}; a generator's tokens are decoded by a tokenizer")
    generator.attach(found.to(device=device, dtype=dtype).eval())
    return generator


def save_pair(generator: Generator, folder: str | Path) -> None:
    """Write a generator and, inside it, its tokenizer: a folder that generates pictures on its own.

    Raises InputError where no tokenizer is attached.
    """
    if generator.tokenizer is None:
        raise InputError(f"{generator.name} has no tokenizer to save: attach(tokenizer) first")
    generator.tokenizer.save(Path(folder) / TOKENIZER)
    generator.save(folder)


def _place(name: str) -> str:
    """A run's folder is its model's."""
    path = Path(name)
    return str(path / "model") if (path / "recipe.yaml").is_file() and (path / "model").is_dir() else name


def _find_tokenizer(generator: Generator, place: str) -> str:
    made_for = generator.source
    beside = list(_beside(place))
    for folder in beside:
        if made_for is None or _fingerprint(folder) == made_for.weights:
            return str(folder)
    named = _named(generator, place)
    if named is not None:
        return named
    who = f"{made_for.name!r} (weights {made_for.weights[:8]})" if made_for else "a tokenizer of its layout"
    if beside:
        others = ", ".join(str(folder) for folder in beside)
        raise MismatchError(f"{generator.name} was made for {who}, which none of {others} is; name its tokenizer")
    raise UnknownNameError(
        f"{generator.name} makes tokens for {who}, which is not beside it: name that tokenizer (--tokenizer, or "
        "load_generator(.., tokenizer=)), by the folder or the name that vistok.load takes"
    )


def _beside(place: str) -> Iterator[Path]:
    """Folders that may hold the tokenizer of the generator at `place`."""
    listed = next((variant for variant in catalogue.variants() if variant.name == place), None)
    packaged = [SHIPPED / file.package for file in listed.weights if file.package] if listed else []
    folder = Path(place) if Path(place).is_dir() else next(iter(packaged), None)
    if folder is None:
        return
    if (folder / TOKENIZER / CONFIG).is_file():
        yield folder / TOKENIZER
    stages = folder.resolve().parent / "stages"
    if stages.is_dir():
        yield from sorted(stage for stage in stages.iterdir() if _role(stage) == "tokenizer")


def _named(generator: Generator, place: str) -> str | None:
    """The name or folder of the tokenizer, as a run's recipe or the catalogue has it."""
    recipe = Path(place).resolve().parent / "recipe.yaml"
    if recipe.is_file():
        import yaml

        told = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("model", {}).get("tokenizer")
        if told:
            return str(told)
    for name in (place, generator.name):
        listed = next((variant for variant in catalogue.variants() if variant.name == name), None)
        if listed is not None and listed.tokenizer is not None:
            return listed.tokenizer
    made_for = generator.source
    known = made_for is not None and any(one.name == made_for.name and one.weights for one in catalogue.variants())
    return made_for.name if known and made_for is not None else None


def _plain(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return plain if isinstance(plain, dict) else {}


def _fingerprint(folder: Path) -> str | None:
    return _plain(folder).get("fingerprint")


def _role(folder: Path) -> str | None:
    return _plain(folder).get("role")


def _generators(system: str) -> str:
    known = [one.name for one in catalogue.variants() if one.system == system and one.role == "generator"]
    return f"; {system} has {', '.join(known[:4])}" if known else ""
