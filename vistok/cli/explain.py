"""`vistok explain`: why two measured numbers differ."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vistok.cli.terminal import emit_json, output

if TYPE_CHECKING:
    from vistok.evaluation.explain import Explanation, Rung


def command(
    first: Annotated[Path, typer.Argument(help="A JSON file of `vistok eval --json`.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    data: Annotated[
        str | None, typer.Option("--data", help="Measure here what each term of the protocols is worth.")
    ] = None,
    model: Annotated[str | None, typer.Option("-m", "--model", help="The tokenizer to measure it with.")] = None,
    size: Annotated[int | None, typer.Option(min=0, help="Side of the crop, as of `vistok eval`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Say term by term why the numbers of two result files differ: metric variant, extractor, crop, resize, rounding,
    pictures, model, settings, environment.

    With --data, the second file's protocol is reached from the first one's term by term, and measured after each.
    """
    from dataclasses import asdict

    from vistok.evaluation.explain import explain, ladder, named_protocol
    from vistok.evaluation.receipt import read

    a, b = read(first), read(second)
    found = explain(a, b)
    rungs = []
    if data is not None:
        from vistok.cli.loading import load_tokenizer
        from vistok.errors import InputError

        protocols = named_protocol(a), named_protocol(b)
        if protocols[0] is None or protocols[1] is None:
            raise InputError("a file follows a protocol without a name here; --data needs two that `vistok eval` knows")
        rungs = ladder(load_tokenizer(model), data, protocols[0], protocols[1], size=size)
    if as_json:
        emit_json({"explanations": [asdict(one) for one in found], "ladder": [asdict(rung) for rung in rungs]})
        return
    for one in found:
        _show(one)
    if rungs:
        _show_ladder(rungs)


def _show(found: "Explanation") -> None:
    from rich.table import Table

    told = f"{found.first.value:.4f} and {found.second.value:.4f}, {found.gap:+.4f}"
    output().print(f"[bold]{found.first.metric}[/bold] {told}", soft_wrap=True)
    if not found.terms:
        output().print("  nothing that is written down differs: same protocol, model, settings and environment")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for column in ("", "term", "first", "second", "what is known of it"):
        table.add_column(column, overflow="fold")
    for term in found.terms:
        table.add_row(f"  {term.kind}", term.term, _value(term.first), _value(term.second), term.known)
    output().print(table)
    if not found.comparable:
        output().print("  the protocols differ: this gap says nothing about the models", soft_wrap=True)


def _show_ladder(rungs: "list[Rung]") -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title="the same tokenizer, one term after another", title_justify="left")
    names = list(rungs[0].values)
    for column in ("term", "now", *names):
        table.add_column(column, justify="right" if column in names else "left")
    before = rungs[0].values
    for rung in rungs:
        changes = [f"{rung.values[name]:.4f} ({rung.values[name] - before[name]:+.4f})" for name in names]
        table.add_row(rung.term or "protocol", rung.value, *changes)
        before = rung.values
    output().print(table)


def _value(value: object) -> str:
    return "-" if value is None else str(value)
