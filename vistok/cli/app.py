"""`vistok app`: a page on this machine to look at tokenizers with."""

from typing import Annotated

import typer

from vistok.cli.terminal import console


def command(
    model: Annotated[
        list[str] | None, typer.Option("-m", "--model", help="Name or folder, several if repeated; default: ours.")
    ] = None,
    generator: Annotated[str | None, typer.Option(help="Name or folder of a generator; default: ours.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it answers.")] = 7860,
    host: Annotated[
        str, typer.Option(help="127.0.0.1 is this machine alone; any other address lets others in.")
    ] = "127.0.0.1",
) -> None:
    """Open a page to drop a photograph in: slide the number of tokens, see reconstruction, difference, bits and token
    map, shuffle tokens or change a single one and see what they carry, generate from a class.

    Needs `pip install 'vistok[app]'`."""
    from vistok.app import serve

    models = model or ["strata"]
    console().print(f"loading {', '.join(models)}; then http://{host}:{port} (Ctrl-C ends it)", markup=False)
    serve(models, port=port, host=host, generator_name=generator)
