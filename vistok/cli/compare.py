"""`vistok compare`: tokenizers and codecs side by side on one's own pictures, as a page."""

from pathlib import Path
from typing import Annotated

import typer

from vistok.cli.terminal import console, emit_json, output


def command(
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help="Default: the shipped one.")] = None,
    data: Annotated[str, typer.Option("--data", help="Pictures: a folder, parquet, shards, a datasets id.")] = "",
    report: Annotated[Path, typer.Option("-o", "--output", help="The page; .json and .md are beside it.")] = Path(
        "report.html"
    ),
    size: Annotated[int, typer.Option(min=0, help="Side of the centre crop; 0: whole pictures.")] = 256,
    limit: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 24,
    show: Annotated[int, typer.Option(min=1, help="How many of them are in the page, worst first.")] = 8,
    codecs: Annotated[
        str | None, typer.Option(help="jpeg,webp,avif,jxl; 'none'. Default: what Pillow can write.")
    ] = None,
    max_memory: Annotated[
        float | None, typer.Option(min=0, help="MB; what needs more is not in the Pareto set.")
    ] = None,
    max_seconds: Annotated[float | None, typer.Option(min=0, help="Per picture, there and back; the same.")] = None,
    commercial_ok: Annotated[bool, typer.Option(help="Only weights whose licence allows commercial use.")] = False,
    text: Annotated[
        str | None,
        typer.Option(help="How much of text survives: 'sample', words written here, or a folder in TokBench's layout."),
    ] = None,
    faces: Annotated[str | None, typer.Option(help="How much of faces survives: the same, with faces.")] = None,
    reader: Annotated[str, typer.Option(help="Reads words: rapidocr, or package.module:function.")] = "rapidocr",
    embedder: Annotated[str | None, typer.Option(help="Knows faces: package.module:function.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every tokenizer's process.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The numbers on stdout too.")] = False,
) -> None:
    """Which one for my pictures: rate-distortion curves, pictures with zoom and error maps, speed, memory, Pareto set.

    Every tokenizer runs in a process of its own; what is done is kept, and the same command goes on.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from vistok.errors import InputError
    from vistok.evaluation.compare import Limits, compare
    from vistok.evaluation.fidelity import Fidelity
    from vistok.evaluation.report import markdown

    if not data:
        raise InputError("name the pictures to compare on with --data")
    chosen = (
        None if codecs is None else [name.strip() for name in codecs.split(",") if name.strip() not in ("", "none")]
    )
    limits = Limits(max_memory, None if max_seconds is None else 1000 * max_seconds, commercial_ok)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    tasks: dict[str, object] = {}
    with Progress(*columns, TimeRemainingColumn(), console=console(), transient=True) as bars:

        def advance(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, total=total)  # type: ignore[arg-type]

        found = compare(
            models or [None],
            data,
            report,
            size=size,
            limit=limit,
            show=show,
            codecs=chosen,
            limits=limits,
            fidelity=Fidelity(text, faces, reader, embedder),
            threads=threads,
            progress=advance,
        )
    if as_json:
        emit_json(found)
    else:
        output().print(markdown(found), markup=False)
    console().print(f"written: {report}", markup=False)
