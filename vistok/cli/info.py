"""`vistok info`: one model, from the catalogue and from its own spec. A published name downloads nothing."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok import catalogue
from vistok.cli.list import describe
from vistok.cli.terminal import emit_json, output
from vistok.errors import UnknownNameError

if TYPE_CHECKING:
    from vistok.layout import TokenSpec
    from vistok.model import Model


def command(
    model: Annotated[str, typer.Argument(help="A name from `vistok list`, a model folder, or a Hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """One model: its layout, legal sizes, prefixes, bits, parameters, weights and licences."""
    facts = collect(model)
    if as_json:
        emit_json(facts)
        return
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        if value not in (None, "", [], {}):
            table.add_row(key, _text(value))
    output().print(table)


def collect(name: str) -> dict[str, Any]:
    """All that is known about a model, as JSON values. Raises UnknownNameError for a name that does not exist."""
    variant = next((variant for variant in catalogue.variants() if variant.name == name), None)
    facts: dict[str, Any] = {}
    if variant:
        entry = catalogue.entries()[variant.system]
        facts = describe(variant) | {"title": entry.title, "paper": entry.paper}
    try:
        model, fingerprint = _build(name)
    except UnknownNameError:
        if variant is None:
            raise
        return facts  # catalogued, its code still to come
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    facts |= {
        "name": model.name,
        "system": model.system,
        "role": model.role,
        "config": asdict(model.config),
        "parameter_count": sum(p.numel() for p in model.parameters()),
        "parameter_counts": counts,
        "fingerprint": fingerprint,
    }
    if model.role == "reducer":
        facts |= {"kind": getattr(model, "kind", None), "places": list(getattr(model, "places", ()))}
    spec: Any = getattr(model, "spec", None)
    return facts | (_spec(spec) if spec is not None else {})


def _build(name: str) -> "tuple[Model, str | None]":
    """The model, and the hash of its weights where they are at hand. Else it has no weights, only shapes."""
    import torch

    import vistok

    shipped = any(file.package for variant in catalogue.select(name) for file in variant.weights)
    if shipped or Path(name).is_dir() or name.count("/") == 1:
        model = vistok.load(name)
        return model, model.fingerprint
    try:
        with torch.device("meta"):
            return vistok.create(name), None
    except (NotImplementedError, RuntimeError):  # a constructor that looks at its own values needs real ones
        return vistok.create(name), None


def _spec(spec: "TokenSpec") -> dict[str, Any]:
    prefixes = spec.prefixes
    return {
        "modality": spec.modality,
        "sizes": spec.sizes.describe(),
        "at": list(spec.size),
        "segments": [asdict(segment) for segment in spec.segments],
        "length": spec.length,
        "prefix_rule": spec.prefix_rule,
        "prefixes": f"every {prefixes.step} up to {spec.length}" if isinstance(prefixes, range) else list(prefixes),
        "bits": spec.bits,
        "bits_per_pixel": spec.bits / (spec.size[0] * spec.size[1]),
        "needs": asdict(spec.needs),
        "output": asdict(spec.output),
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_line(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
        return "\n".join(_line(item) for item in value)
    return _line(value)


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_line(inner)}" for key, inner in value.items() if inner not in (None, "", [], ()))
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "-"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
