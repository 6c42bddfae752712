"""`vistok convert`: an authors' checkpoint to a model folder, or a model folder back to the authors' names."""

from pathlib import Path
from typing import Annotated

import typer

from vistok.cli.terminal import console, emit_json, refuse_existing
from vistok.errors import InputError


def command(
    file: Annotated[Path, typer.Argument(help="The authors' checkpoint; with --to authors, a model folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The model folder, or the authors' file, to write.")],
    system: Annotated[str, typer.Option("--system", help="Slug of the system, as in `vistok systems`.")] = "",
    config: Annotated[
        Path | None, typer.Option("--config", help="The authors' YAML or JSON; without it, shapes tell the variant.")
    ] = None,
    to: Annotated[str, typer.Option("--to", help="'vistok' reads the authors' file, 'authors' writes it.")] = "vistok",
    key: Annotated[str | None, typer.Option("--key", help="Entry of the file that holds the weights.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what exists.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Convert NaN and infinite weights too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """The authors' checkpoint as a model folder that `vistok.load` reads, and back."""
    from vistok import checkpoints

    if to not in ("vistok", "authors"):
        raise InputError(f"--to {to}; expected 'vistok' or 'authors'")
    refuse_existing(output, overwrite)
    if to == "authors":
        done = checkpoints.export_file(file, output, system or None, overwrite=overwrite)
        told = f"{done['name']} in the authors' names: {done['tensors']} tensors in {done['file']}"
    else:
        if not system:
            raise InputError("which system is it? pass --system SLUG (`vistok systems` shows them)")
        done = checkpoints.convert_file(file, system, output, config=config, overwrite=overwrite, force=force, key=key)
        known = " or ".join(done["variants"]) or f"{system}, of a size that is not published"
        told = f"recognised {known}: {done['parameters']:,} numbers in {done['tensors']} tensors, in {done['folder']}"
    if as_json:
        emit_json(done)
    else:
        console().print(told, markup=False)
