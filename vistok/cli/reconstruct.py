"""`vistok reconstruct`: pictures and clips to tokens and back, one by one; a bad one does not stop the rest."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.terminal import console, emit_json
from vistok.errors import InputError, OutputError, VistokError

if TYPE_CHECKING:
    from vistok.layout import Canvas
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
    """Encode pictures and clips and decode them again: PNG and MP4 files of the size that went in, with tokens, bits
    and PSNR (dB). Clips keep their frame count and rate.

    Exit code 1 if any of them could not be done; the others are.
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
            done = (reconstruct_clip if name.suffix == ".mp4" else reconstruct)(tokenizer, path, name, length, on_size)
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
        check_length(path, tokenizer, plan(tuple(pixels.shape[-2:]), tokenizer.spec.sizes, on_size), length)  # type: ignore[arg-type]
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


def reconstruct_clip(
    tokenizer: "Tokenizer", path: str, output: Path, length: int | None, on_size: str
) -> dict[str, Any]:
    """One clip through the tokenizer into `output`, in the memory of a window; its entry of `results`.

    PSNR is the mean over frames; bits per pixel count the pixels of all frames.
    """
    import torch

    from vistok.data.video import open_clip, write_clip
    from vistok.metrics.psnr import psnr

    clip, window = open_clip(path), tokenizer.spec.window
    tokens = tokenizer.encode_windows(clip.windows(window), rate=clip.rate, on_size=on_size)  # type: ignore[arg-type]
    if length is not None:
        check_length(path, tokenizer, tokens.canvas[0], length)
        tokens = tokens.prefix(length)
    qualities: list[torch.Tensor] = []

    def measured() -> Iterator[torch.Tensor]:
        originals = clip.windows(window)
        for rebuilt in tokenizer.decode_windows(tokens, dtype=torch.uint8):
            original = next(originals)
            if original.shape == rebuilt.shape:
                qualities.append(psnr(rebuilt[0].transpose(0, 1).cpu(), original[0].transpose(0, 1)))
            yield rebuilt

    frames = write_clip(output, measured(), rate=clip.rate)
    bits = int(tokens.bits()[0])
    return {
        "input": path,
        "output": str(output),
        "size": list(clip.size),
        "frames": frames,
        "rate": clip.rate,
        "tokens": int(tokens.lengths[0]),
        "bits": bits,
        "bpp": bits / (frames * clip.size[0] * clip.size[1]),
        "psnr": float(torch.cat(qualities).mean()) if qualities else None,
    }


def check_length(path: str, tokenizer: "Tokenizer", canvas: "Canvas", length: int) -> None:
    """Raise InputError unless that many tokens of an item with this canvas decode."""
    spec = tokenizer.spec.of(canvas)
    if length > spec.length:
        raise InputError(f"{path} has {spec.length} tokens here, fewer than --length {length}")
    spec.check_prefix(length)


def output_names(inputs: Sequence[str], folder: Path) -> list[Path]:
    """`<stem>.png`, of clips `<stem>.mp4`, numbered where two would meet, or one would replace an input."""
    from vistok.data.images import is_video_name

    taken = {str(Path(path).resolve()).casefold() for path in inputs}
    names = []
    for path in inputs:
        stem, number = Path(path).stem, 1
        suffix = ".mp4" if is_video_name(path) else ".png"
        name = folder / f"{stem}{suffix}"
        while str(name.resolve()).casefold() in taken:
            number += 1
            name = folder / f"{stem}-{number}{suffix}"
        taken.add(str(name.resolve()).casefold())
        names.append(name)
    return names
