"""`vistok decompress`: a compressed file back to a picture, or a clip, of the size that went in."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vistok.catalogue import DEFAULT_COMPRESSOR
from vistok.cli.terminal import console, emit_json
from vistok.errors import InputError


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `vistok compress` wrote; - reads stdin.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture or clip; its ending names the format.")],
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="The model that wrote it, if it is none of those that ship.")
    ] = None,
    partial: Annotated[bool, typer.Option("--partial", help="The file may be cut: decode what is there.")] = False,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps, ... A GPU if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Decompress a file to a picture or a clip. What is there already is replaced."""
    from vistok.data.images import FORMATS, MAX_PIXELS_VARIABLE, is_video_name, pixel_limit, write_image

    if output.suffix.lower() not in FORMATS and not is_video_name(output):
        raise InputError(
            f"{output}: no image format ends in {output.suffix!r}; expected .png, .jpg, .webp, ..., of clips .mp4"
        )
    piped = str(file) == "-"
    if not piped and output.exists() and file.exists() and output.samefile(file):
        raise InputError(f"{output} is the compressed file itself")
    data = sys.stdin.buffer.read() if piped else file.read_bytes()

    from vistok.cli.loading import load_tokenizer
    from vistok.compressed import decompress, decompress_part, peek

    header = peek(data)
    if (header.frames is not None) != is_video_name(output):
        holds, ending = ("a clip", ".mp4") if header.frames is not None else ("a picture", ".png")
        raise InputError(f"{file} holds {holds}; give {output.with_suffix(ending)} as the output")
    height, width = header.size  # before a model is loaded; a file of some bytes may claim any size
    if height * width > pixel_limit():
        raise InputError(
            f"{file} holds a picture of {width}x{height}, above the limit of {pixel_limit():,} pixels; "
            f"if you trust it, raise the limit with {MAX_PIXELS_VARIABLE}"
        )
    if model is None:
        from vistok.loading import packaged_writer

        model = packaged_writer(header)
    tokenizer = load_tokenizer(model or DEFAULT_COMPRESSOR, device)  # which says so, if it did not write the file
    facts: dict[str, Any] = {"input": str(file), "output": str(output), "model": tokenizer.name}
    told = f"{output}: {width}x{height}"
    whole = True
    if header.frames is None:
        pixels, whole = decompress_part(tokenizer, data) if partial else (decompress(tokenizer, data), True)
        write_image(output, pixels)
    else:
        from vistok.compressed_clips import decompress_windows
        from vistok.data.video import write_clip

        write_clip(output, decompress_windows(tokenizer, data), rate=header.rate)
        facts |= {"frames": header.frames, "rate": header.rate}
        told += f", {header.frames} frames"
    if as_json:
        emit_json(facts | {"bytes": len(data), "size": [height, width], "whole": whole})
    else:
        console().print(told, markup=False)
