"""`vistok compress`: one picture or clip to a small file that `vistok decompress` turns back, on any machine."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.catalogue import DEFAULT_COMPRESSOR
from vistok.cli.terminal import console, emit_json, refuse_existing
from vistok.errors import InputError
from vistok.files import write_atomically

if TYPE_CHECKING:
    from vistok.tokenizer import Tokenizer


def command(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture (EXIF rotation is applied) or a clip.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The compressed file.")],
    model: Annotated[
        str, typer.Option("-m", "--model", help="Name or folder; left out, the one that ships for this.")
    ] = DEFAULT_COMPRESSOR,
    length: Annotated[int | None, typer.Option("--length", min=1, help="Only the first K tokens.")] = None,
    bpp: Annotated[float | None, typer.Option("--bpp", help="At most this many bits per pixel.")] = None,
    size: Annotated[int | None, typer.Option("--bytes", min=1, help="At most this many bytes.")] = None,
    psnr: Annotated[float | None, typer.Option("--psnr", help="As few bytes as reach this many dB.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps, ... A GPU if there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Compress a picture, or a clip with a model of clips, window by window.

    The same model decompresses it; --length, --bpp, --bytes or --psnr sets quality or bytes (of clips over all frames).
    """
    targets = {"--length": length, "--bpp": bpp, "--bytes": size, "--psnr": psnr}
    given = [name for name, value in targets.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"give {' or '.join(given)}, not {'both' if len(given) == 2 else 'all'}")
    for name, value in (("--bpp", bpp), ("--psnr", psnr)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} {value}; expected a number above 0")
    refuse_existing(output, overwrite)

    from vistok.data.images import is_video_name, read_image

    picture: Any = None
    if not is_video_name(image):
        picture = read_image(image)  # before anything heavy: most mistakes are in the paths

    from vistok.cli.loading import load_tokenizer

    if picture is None:
        from vistok.data.video import open_clip

        open_clip(image)
    tokenizer = load_tokenizer(model, device)

    from vistok.compressed import compress, peek

    if picture is not None:
        data = compress(tokenizer, picture, length=length, bpp=bpp, bytes=size, psnr=psnr)
    else:
        data = _clip(tokenizer, image, length=length, bpp=bpp, bytes=size, psnr=psnr)
    write_atomically(output, data)
    header = peek(data)
    rate = 8 * len(data) / (math.prod(header.size) * (header.frames or 1))
    facts: dict[str, Any] = {
        "input": str(image),
        "output": str(output),
        "model": tokenizer.name,
        "size": list(header.size),
    }
    told = f"{output}: {len(data):,} bytes, {rate:.4f} bits per pixel"
    if header.frames is not None:
        facts |= {"frames": header.frames, "rate": header.rate}
        told += f", {header.frames} frames"
    if as_json:
        emit_json(facts | {"bytes": len(data), "bpp": rate})
    else:
        console().print(told, markup=False)


def _clip(tokenizer: "Tokenizer", file: Path, **targets: Any) -> bytes:
    """A clip's compressed file."""
    from vistok.compressed_clips import compress_clip
    from vistok.data.clips import check_takes_clips
    from vistok.data.video import open_clip

    check_takes_clips(tokenizer, str(file))
    clip = open_clip(file)
    return compress_clip(tokenizer, clip.windows, rate=clip.rate, **targets)
