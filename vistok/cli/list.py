"""`vistok list`: the catalogue as a table or as JSON, without torch."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from vistok import catalogue
from vistok.cli.terminal import console, emit_json, output
from vistok.errors import nearest

DEFAULTS = (catalogue.DEFAULT_MODEL, catalogue.DEFAULT_GENERATOR)


def command(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as 'titok-*'; a plain word is a prefix.")] = "*",
    commercial_ok: Annotated[
        bool, typer.Option("--commercial-ok", help="Only where code and weights may be used commercially.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A list of objects on stdout.")] = False,
) -> None:
    """Models that load by name, with their sizes and licences (the training data's is shown, not judged)."""
    found = catalogue.select(pattern, commercial_ok)
    if not found and not set(pattern) & set("*?["):
        found = catalogue.select(pattern + "*", commercial_ok)
    if as_json:
        emit_json([describe(variant) for variant in found])
        return
    if not found:
        hint = nearest(pattern, [variant.name for variant in catalogue.variants()])
        console().print(f"no model matches {pattern!r}{hint}", markup=False)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "role", "px", "tokens", "M params", "weights", "licences: code", "weights", "data"):
        table.add_column(title, overflow="fold", no_wrap=title in ("name", "role"))
    for variant in found:
        licences = variant.licences
        numbers = ("" if n is None else f"{n:g}" for n in (variant.size, variant.tokens, variant.parameters))
        table.add_row(
            variant.name, variant.role, *numbers, _where(variant), licences.code, licences.weights, licences.data
        )
    output().print(table)


def describe(variant: catalogue.Variant) -> dict[str, Any]:
    """A catalogue entry as JSON values; fields that a weight file does not have are left out."""
    plain = asdict(variant)
    plain["weights"] = [{key: value for key, value in file.items() if value is not None} for file in plain["weights"]]
    return plain | {"commercial_ok": variant.licences.commercial, "default": variant.name in DEFAULTS}


def _where(variant: catalogue.Variant) -> str:
    if not variant.weights:
        return "-"
    if any(file.package for file in variant.weights):
        return "ships"
    return "hub" if all(file.repo for file in variant.weights) else "by hand"  # the authors' own page
