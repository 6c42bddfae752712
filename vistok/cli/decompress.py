"""`vistok decompress`: a compressed file back to a picture of the size that went in."""

from pathlib import Path
from typing import Annotated

import typer

from vistok.cli.terminal import console, emit_json
from vistok.errors import InputError


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `vistok compress` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture; its ending names the format.")],
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="The model that compressed it; the shipped one if left out.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps, ... A GPU if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Decompress a file to a picture. A picture that is there already is replaced."""
    from vistok.data.images import FORMATS, MAX_PIXELS_VARIABLE, pixel_limit, write_image

    if output.suffix.lower() not in FORMATS:
        raise InputError(f"{output}: no image format ends in {output.suffix!r}; expected .png, .jpg, .webp, ...")
    if output.exists() and file.exists() and output.samefile(file):
        raise InputError(f"{output} is the compressed file itself")
    data = file.read_bytes()

    from vistok.cli.loading import load_tokenizer
    from vistok.compressed import decompress, peek

    height, width = peek(data).size  # before a model is loaded; a file of some bytes may claim any size
    if height * width > pixel_limit():
        raise InputError(
            f"{file} holds a picture of {width}x{height}, above the limit of {pixel_limit():,} pixels; "
            f"if you trust it, raise the limit with {MAX_PIXELS_VARIABLE}"
        )
    tokenizer = load_tokenizer(model, device)
    pixels = decompress(tokenizer, data)
    write_image(output, pixels)
    if as_json:
        facts = {"input": str(file), "output": str(output), "model": tokenizer.name}
        emit_json(facts | {"bytes": len(data), "size": [height, width]})
    else:
        console().print(f"{output}: {width}x{height}", markup=False)
