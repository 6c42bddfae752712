"""`vistok systems`: every system and what of it is here, computed from the tree, without torch."""

from dataclasses import asdict
from typing import Annotated

import typer

from vistok import inventory
from vistok.cli.terminal import emit_json, output


def command(as_json: Annotated[bool, typer.Option("--json", help="A list of objects on stdout.")] = False) -> None:
    """Every published system: role, paper, and which of code, parity, weights, recipes, reproduction are here."""
    rows = inventory.holdings()
    if as_json:
        emit_json([asdict(row) for row in rows])
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("system", "role", "code", "parity", "weights", "recipes", "reproduction", "paper"):
        table.add_column(title, overflow="fold", no_wrap=title in ("system", "role"))
    for row in rows:
        table.add_row(
            row.system,
            ", ".join(row.roles),
            "yes" if set(row.roles) <= set(row.code) else ", ".join(row.code) or "no",
            "-" if row.parity is None else "yes" if row.parity else "no",
            str(row.weights or "no"),
            ", ".join(row.recipes) or "no",
            row.reproduction or "no",
            row.paper,
        )
    output().print(table)
