"""`vistok reproduce`: a paper's claim at small scale, run, judged by its rule, and written down."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.terminal import console, emit_json, output

if TYPE_CHECKING:
    from vistok.evaluation.reproduction import Reproduction


def command(
    slug: Annotated[str, typer.Argument(metavar="SLUG", help="The system: titok, vqgan, ...")],
    folder: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where runs and the result go; default reproduce/SLUG.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Folder that holds the data sets (cifar10/...); default $VISTOK_DATA.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=2, help="How many seeds.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan, the rule and the cost.")] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Also put the result beside the reproduction's code, for the docs.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Run a paper's claim at small scale: every arm at equal budget, two seeds or more, a rule that was written before.

    Killed at any moment, the same command goes on. The verdict is "shown" or "not shown".
    """
    from vistok.evaluation.reproduction import find

    found = find(slug)
    if dry_run:
        _show_plan(found, seeds or found.seeds, as_json)
        return

    from vistok.evaluation.reproducing import find_data, reproduce, result_file
    from vistok.files import write_atomically

    folder = folder or Path("reproduce") / slug
    result = reproduce(found, find_data(found, data), folder, seeds=seeds, console=console())
    written = folder / f"{slug}.json"
    if record:
        write_atomically(result_file(slug), written.read_bytes())
        written = result_file(slug)
    if as_json:
        emit_json(json.loads(written.read_text(encoding="utf-8")))
        return
    _show_result(result)
    console().print(f"written: {written}", markup=False)


def _show_plan(found: "Reproduction", seeds: int, as_json: bool) -> None:
    runs = found.runs(seeds)
    minutes = sum(found.arms[arm].minutes for _, arm in runs)
    if as_json:
        emit_json(found.plan() | {"seeds": seeds, "runs": len(runs), "minutes": minutes, "memory": found.memory})
        return
    say = output().print
    say(f"[bold]{found.title}[/bold] ({found.slug})")
    for name, text in (("claim", f"{found.claim} ({found.source})"), ("checked", found.checked)):
        say(f"{name}: {text}", markup=False, soft_wrap=True)
    for name, arm in found.arms.items():
        count, also = sum(name == arm_ for _, arm_ in runs), ", the baseline" if name == found.baseline else ""
        say(
            f"  arm {name}{also}: {arm.what}; {found.steps_of(name)} steps of {found.batch}, {count} seeds",
            markup=False,
            soft_wrap=True,
        )
    say("shown if, for every seed:")
    for condition in found.rule:
        say(f"  {condition.text}: {condition.limits}", markup=False, soft_wrap=True)
    say(f"cost: {len(runs)} runs, about {minutes:.0f} minutes on one core, {found.memory} of memory")


def _show_result(result: dict[str, Any]) -> None:
    from rich.table import Table

    from vistok.evaluation.reproduction import cell

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in result["arms"]:
        table.add_column(name + (" (baseline)" if name == result["baseline"] else ""))
    for metric in result["report"]:
        table.add_row(metric, *(cell(arm, metric, name == result["baseline"]) for name, arm in result["arms"].items()))
    output().print(table)
    for condition in result["rule"]:
        values = ", ".join(f"{value:.4g}" for value in condition["values"])
        mark = "holds" if condition["holds"] else "does not hold"
        output().print(f"{condition['text']}: {values} ({condition['limits']}): {mark}", markup=False, soft_wrap=True)
    output().print(f"[bold]{result['reproduction']}: {result['verdict']}[/bold]")
