"""`vistok compress`: one picture to a small file that `vistok decompress` turns back into pixels, on any machine."""

import math
from pathlib import Path
from typing import Annotated

import typer

from vistok.cli.terminal import console, emit_json, refuse_existing
from vistok.errors import InputError
from vistok.files import write_atomically


def command(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture; EXIF rotation is applied.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The compressed file.")],
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="Name or folder; the shipped one if left out.")
    ] = None,
    length: Annotated[int | None, typer.Option("--length", min=1, help="Only the first K tokens.")] = None,
    bpp: Annotated[float | None, typer.Option("--bpp", help="At most this many bits per pixel.")] = None,
    size: Annotated[int | None, typer.Option("--bytes", min=1, help="At most this many bytes.")] = None,
    psnr: Annotated[float | None, typer.Option("--psnr", help="As few bytes as reach this many dB.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps, ... A GPU if there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Compress a picture. The same model decompresses it; --length, --bpp, --bytes or --psnr sets quality or bytes."""
    targets = {"--length": length, "--bpp": bpp, "--bytes": size, "--psnr": psnr}
    given = [name for name, value in targets.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"give {' or '.join(given)}, not {'both' if len(given) == 2 else 'all'}")
    for name, value in (("--bpp", bpp), ("--psnr", psnr)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} {value}; expected a number above 0")
    refuse_existing(output, overwrite)

    from vistok.data.images import read_image

    picture = read_image(image)  # before anything heavy: most mistakes are in the paths

    from vistok.cli.loading import load_tokenizer

    tokenizer = load_tokenizer(model, device)

    from vistok.compressed import compress

    data = compress(tokenizer, picture, length=length, bpp=bpp, bytes=size, psnr=psnr)
    write_atomically(output, data)
    width, height = picture.size
    rate = 8 * len(data) / (width * height)
    if as_json:
        facts = {"input": str(image), "output": str(output), "model": tokenizer.name, "size": [height, width]}
        emit_json(facts | {"bytes": len(data), "bpp": rate})
    else:
        console().print(f"{output}: {len(data):,} bytes, {rate:.4f} bits per pixel", markup=False)
