"""`vistok reconstruct`: pictures to tokens and back, one after the other; a bad one does not stop the rest."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.terminal import console, emit_json
from vistok.errors import InputError, OutputError, VistokError

if TYPE_CHECKING:
    from vistok.tokenizer import Tokenizer


def command(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Files, folders or wildcards.")],
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="Name or folder; the shipped one if left out.")
    ] = None,
    length: Annotated[int | None, typer.Option("--length", min=1, help="Only the first K tokens.")] = None,
    on_size: Annotated[str, typer.Option("--on-size", help="Sizes not legal: pad, refuse, resize or tile.")] = "pad",
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the PNG files.")] = Path("reconstructions"),
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps, ... A GPU if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="`results` and `failed` as one object on stdout.")] = False,
) -> None:
    """Encode pictures and decode them again: PNG files of the size that went in, with tokens, bits and PSNR (dB).

    Exit code 1 if any picture could not be done; the others are.
    """
    from vistok.cli.loading import expand, load_tokenizer

    paths = expand(images)
    names = output_names(paths, output)
    tokenizer = load_tokenizer(model, device)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {output}: {error.strerror or error}") from error
    results: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    for path, name in zip(paths, names, strict=True):
        try:
            done = reconstruct(tokenizer, path, name, length, on_size)
        except OutputError:
            raise
        except VistokError as error:
            failed.append({"input": path, "error": str(error)})
            console().print(f"failed: {error}" if path in str(error) else f"failed: {path}: {error}", markup=False)
            continue
        results.append(done)
        if not as_json:
            quality = "" if done["psnr"] is None else f"  {done['psnr']:.2f} dB"
            print(f"{path} -> {name}  {done['tokens']} tokens  {done['bits']} bits  {done['bpp']:.4f} bpp{quality}")
    if as_json:
        emit_json({"model": tokenizer.name, "results": results, "failed": failed})
    if failed:
        raise typer.Exit(1)


def reconstruct(tokenizer: "Tokenizer", path: str, output: Path, length: int | None, on_size: str) -> dict[str, Any]:
    """One picture through the tokenizer into `output`; its entry of `results`."""
    import torch

    from vistok.data.images import read_image, write_image
    from vistok.metrics.psnr import psnr
    from vistok.pixels import from_pil, plan

    pixels = from_pil(read_image(path))
    if length is not None:  # before the work of encoding
        canvas = plan(tuple(pixels.shape[-2:]), tokenizer.spec.sizes, on_size)  # type: ignore[arg-type]
        spec = tokenizer.spec.at(canvas.tile, canvas.tiles)
        if length > spec.length:
            raise InputError(f"{path} has {spec.length} tokens here, fewer than --length {length}")
        spec.check_prefix(length)
    tokens = tokenizer.encode(pixels, on_size=on_size)  # type: ignore[arg-type]
    tokens = tokens if length is None else tokens.prefix(length)
    rebuilt = tokenizer.decode(tokens, dtype=torch.uint8).cpu()
    write_image(output, rebuilt)
    height, width = pixels.shape[-2:]
    bits = int(tokens.bits()[0])
    return {
        "input": path,
        "output": str(output),
        "size": [height, width],
        "tokens": int(tokens.lengths[0]),
        "bits": bits,
        "bpp": bits / (height * width),
        "psnr": float(psnr(rebuilt, pixels)[0]) if rebuilt.shape == pixels.shape else None,
    }


def output_names(inputs: Sequence[str], folder: Path) -> list[Path]:
    """`<stem>.png` for each input, numbered where two would meet, or one would replace an input."""
    taken = {str(Path(path).resolve()).casefold() for path in inputs}
    names = []
    for path in inputs:
        stem, number = Path(path).stem, 1
        name = folder / f"{stem}.png"
        while str(name.resolve()).casefold() in taken:
            number += 1
            name = folder / f"{stem}-{number}.png"
        taken.add(str(name.resolve()).casefold())
        names.append(name)
    return names
