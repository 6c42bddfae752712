"""`vistok decode`: a token store to image files or clips named by their ids. Run again, it keeps what is whole."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vistok.cli.terminal import console, emit_json


def command(
    store: Annotated[Path, typer.Argument(help="A token store, as `vistok encode` writes them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures or clips.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The tokenizer that made the store. Default: the one that ships."),
    ] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Decode only this many leading tokens.")] = None,
    suffix: Annotated[
        str | None, typer.Option("--format", help="png, jpg, webp, ... Default: png, of clips mp4.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures of 256 px at a time; larger ones in fewer.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... Default: a GPU if there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Decode a token store to pictures or clips, of the size (and frame count and rate) that went in.

    Killed at any moment and run again, it writes only what is missing.
    """
    from vistok.data.store import TokenStore

    tokens = TokenStore(store)  # before anything heavy: most mistakes are in the paths

    from vistok.cli.encode import bar
    from vistok.cli.loading import load_tokenizer
    from vistok.scale.decode import decode_store

    tokenizer = load_tokenizer(model, device)
    with bar("decode", len(tokens)) as advance:
        report = decode_store(
            tokens,
            tokenizer,
            output,
            length=length,
            suffix=None if suffix is None else "." + suffix.lstrip("."),
            batch_size=batch_size,
            overwrite=overwrite,
            progress=lambda done, total: advance(done),
        )
    if as_json:
        emit_json({"store": str(store), "output": str(output), "tokenizer": tokenizer.name, **asdict(report)})
    else:
        kind = "clips" if tokens.manifest.source["kind"] == "clips" else "pictures"
        kept = f"; {report.kept} were there already" if report.kept else ""
        console().print(f"{output}: {report.written} {kind} written{kept}")
