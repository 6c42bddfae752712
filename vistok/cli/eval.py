"""`vistok eval`: a tokenizer's reconstructions of a data set, measured at every prefix length."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.terminal import console, emit_json, output

if TYPE_CHECKING:
    from vistok.evaluation.reconstruction import Reconstruction


def command(
    data: Annotated[str, typer.Option("--data", help="Folder, parquet, shards, or a datasets id.")],
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="Name or folder; the shipped one if left out.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=0, help="Side of the centre crop; 0: whole pictures. Default: 256, or the model's own."),
    ] = None,
    length: Annotated[int | None, typer.Option("--length", min=1, help="Only the first K tokens.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first pictures.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Measure a tokenizer on pictures: PSNR, SSIM, MS-SSIM, bits per pixel, codebook usage and perplexity, images/s.

    One row per prefix length of an ordered tokenizer. Unreadable pictures are skipped and counted.
    """
    from vistok.cli.encode import bar
    from vistok.cli.loading import load_tokenizer
    from vistok.data.sources import open_source
    from vistok.evaluation.reconstruction import evaluate

    source = open_source(data)
    source = source.first(limit) if limit else source
    tokenizer = load_tokenizer(model)
    with bar("eval", len(source)) as advance:
        found = evaluate(tokenizer, source, size=size, length=length, progress=advance)
    if as_json:
        emit_json(found.plain())
        return
    _show(found)


def _show(found: "Reconstruction") -> None:
    from rich.table import Table

    told = found.protocol
    output().print(f"[bold]{found.model}[/bold] on {found.images} pictures of {found.data}", soft_wrap=True)
    output().print(f"{told['crop']}; resized: {told['resize']}; {told['rounding']}", soft_wrap=True)
    output().print(f"PSNR {told['psnr']}; SSIM {told['ssim']}; MS-SSIM {told['ms_ssim']}", soft_wrap=True)
    output().print(f"bits: {told['bits']}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("tokens", "bits/pixel", "PSNR dB", "+-", "SSIM", "MS-SSIM", "decode images/s"):
        table.add_column(column, justify="right")
    for row in found.prefixes:
        table.add_row(
            f"{row.tokens:g}" if row.tokens.is_integer() else f"{row.tokens:.1f}",
            f"{row.bits_per_pixel:.4f}",
            f"{row.psnr:.2f}",
            f"{row.psnr_deviation:.2f}",
            f"{row.ssim:.4f}",
            _number(row.ms_ssim, ".4f"),
            f"{row.decode_images_per_second:.3g}",
        )
    output().print(table)
    if found.codebooks:
        books = Table(box=None, pad_edge=False)
        for column in ("segment", "code", "codebook", "used", "perplexity", "bits/code", "codes counted"):
            books.add_column(column, justify="left" if column == "segment" else "right")
        for book in found.codebooks:
            books.add_row(
                book.segment,
                str(book.column),
                f"{book.size:,}",
                _number(book.usage, ".1%"),
                _number(book.perplexity, ",.1f"),
                _number(book.entropy, ".2f"),
                f"{book.counted:,}",
            )
        output().print(books)
    speed, both = found.encode_images_per_second, found.images_per_second
    output().print(f"encode {speed:.3g} images/s, encode and decode {both:.3g} images/s")
    if found.skipped:
        first = next(iter(found.skipped.values()))
        console().print(f"unreadable and skipped: {len(found.skipped)}, such as {first}", markup=False)


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
