"""`vistok decompress`: a compressed file back to a picture of the size that went in."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from vistok.cli.terminal import console, emit_json
from vistok.errors import InputError


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `vistok compress` wrote; - reads stdin.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture; its ending names the format.")],
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="The model that compressed it; the shipped one if left out.")
    ] = None,
    partial: Annotated[bool, typer.Option("--partial", help="The file may be cut: decode what is there.")] = False,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps, ... A GPU if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Decompress a file to a picture. A picture that is there already is replaced."""
    from vistok.data.images import FORMATS, MAX_PIXELS_VARIABLE, pixel_limit, write_image

    if output.suffix.lower() not in FORMATS:
        raise InputError(f"{output}: no image format ends in {output.suffix!r}; expected .png, .jpg, .webp, ...")
    piped = str(file) == "-"
    if not piped and output.exists() and file.exists() and output.samefile(file):
        raise InputError(f"{output} is the compressed file itself")
    data = sys.stdin.buffer.read() if piped else file.read_bytes()

    from vistok.cli.loading import load_tokenizer
    from vistok.compressed import decompress, peek

    header = peek(data, partial=partial)
    height, width = header.size  # before a model is loaded; a file of some bytes may claim any size
    if height * width > pixel_limit():
        raise InputError(
            f"{file} holds a picture of {width}x{height}, above the limit of {pixel_limit():,} pixels; "
            f"if you trust it, raise the limit with {MAX_PIXELS_VARIABLE}"
        )
    tokenizer = load_tokenizer(model, device)
    pixels = decompress(tokenizer, data, partial=partial)
    write_image(output, pixels)
    if as_json:
        facts = {"input": str(file), "output": str(output), "model": tokenizer.name}
        emit_json(facts | {"bytes": len(data), "size": [height, width], "whole": header.whole})
    else:
        console().print(f"{output}: {width}x{height}", markup=False)
