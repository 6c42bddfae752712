"""`vistok eval`: a tokenizer's reconstructions of pictures or clips, measured at every prefix length."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.terminal import console, emit_json, output

if TYPE_CHECKING:
    from vistok.evaluation.clips import ClipReconstruction
    from vistok.evaluation.reconstruction import Reconstruction
    from vistok.metrics.codes import CodebookUse


def command(
    data: Annotated[
        str, typer.Option("--data", help="Folder of pictures or clips, a clip, parquet, shards, a datasets id.")
    ],
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="Name or folder; the shipped one if left out.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=0, help="Side of the centre crop; 0: whole. Default: 256, or the model's own; of clips 0."),
    ] = None,
    length: Annotated[int | None, typer.Option("--length", min=1, help="Only the first K tokens.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first items.")] = None,
    protocol: Annotated[
        str,
        typer.Option(help="Whose crop, rounding and SSIM: vistok, llamagen, seed-voken, 1d-tokenizer, adm, clean-fid."),
    ] = "vistok",
    metrics: Annotated[
        str | None,
        typer.Option(
            help="More, with commas: fid, sfid, is, kid, precision, recall, .., lpips-vgg, lpips-alex, clip-score; "
            "of clips fvd."
        ),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(help="Features of the distances, such as dinov2-l14. Default: the protocol's. Of fvd a FILE."),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE of a metric's network where it is not to be downloaded: inception, lpips-vgg, .., "
            "clip-score=FOLDER of a CLIP."
        ),
    ] = None,
    stability: Annotated[
        bool, typer.Option("--stability", help="How many codes flip with batch, precision, device and tiling instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Measure a tokenizer on pictures: PSNR, SSIM, MS-SSIM, bits per pixel, codebook usage and perplexity, images/s;
    on clips PSNR and SSIM per frame, bits per pixel, frame and second; on masks IoU too.

    One row per prefix length of an ordered tokenizer. Unreadable pictures and clips are skipped and counted.
    """
    from vistok.cli.encode import bar
    from vistok.cli.loading import load_tokenizer
    from vistok.data.sources import open_source
    from vistok.errors import InputError
    from vistok.evaluation.clips import evaluate_clips
    from vistok.evaluation.reconstruction import evaluate

    source = open_source(data)
    source = source.first(limit) if limit else source
    tokenizer = load_tokenizer(model)
    if stability:
        _stability(tokenizer, source, size, limit, as_json)
        return
    clips = source.kind == "clips"
    if clips and protocol != "vistok":
        raise InputError("--protocol is for pictures; clips are cut and rounded in one way")
    more = _video_judge(metrics, extractor, weights) if clips else _judges(protocol, metrics, extractor, weights)
    measured: Any = evaluate_clips if clips else evaluate
    with bar("eval", len(source)) as advance:
        found: Any = measured(tokenizer, source, size=size, length=length, progress=advance, **more)
    if as_json:
        emit_json(found.plain())
        return
    (_show_clips if clips else _show)(found)
    if found.skipped:
        first = next(iter(found.skipped.values()))
        console().print(f"unreadable and skipped: {len(found.skipped)}, such as {first}", markup=False)


def _stability(tokenizer: Any, source: Any, size: int | None, limit: int | None, as_json: bool) -> None:
    from rich.table import Table

    from vistok.evaluation.stability import stability

    found = stability(tokenizer, source, size=size, limit=limit or 64)
    if as_json:
        emit_json(found.plain())
        return
    output().print(f"[bold]{found.model}[/bold] on {found.pictures} pictures of {found.size} x {found.size}")
    table = Table(box=None, pad_edge=False)
    for column in ("setting", "codes that differ", "pictures with any", "ms a picture"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for row in found.rows:
        table.add_row(row.setting, f"{row.codes:.3%}", f"{row.pictures:.1%}", f"{1000 * row.seconds:.1f}")
    output().print(table)
    told = f"encode(batch_invariant=True) takes {found.invariant_cost:.2f} times the time of the largest batches"
    output().print(told, soft_wrap=True)


def _judges(protocol: str, metrics: str | None, extractor: str | None, weights: list[str] | None) -> dict[str, Any]:
    """The arguments of `evaluate` that say what is measured beside PSNR and SSIM."""
    from vistok.errors import InputError
    from vistok.evaluation.protocols import find_protocol

    rules = find_protocol(protocol)
    files, wanted = _files(weights), _names(metrics)
    if "fvd" in wanted:
        raise InputError("fvd is a distance of clips, and --data holds pictures")
    lpips = [name for name in wanted if name.startswith("lpips")]
    scores = [name for name in wanted if name in ("clip-score", "clip_score")]
    others = [name for name in wanted if name not in lpips + scores]
    found: dict[str, Any] = {"protocol": rules}
    if scores:
        from vistok.metrics.clip_score import DEFAULT, build_clip_score

        found["clip"] = build_clip_score(*files.pop("clip-score", [DEFAULT])[-1:])
    if len(lpips) > 1:
        raise InputError(f"{' and '.join(lpips)}: one LPIPS at a time")
    if lpips:
        from vistok.losses.perceptual import build_perceptual

        found["lpips"] = build_perceptual(lpips[0], weights=files.pop(lpips[0], None))
    if others or extractor:
        from vistok.metrics.extractors import build_extractor

        features = extractor or rules.extractor
        short = features.partition(":")[0]
        chosen = files.pop(features if features in files else short, None)
        found |= {"extractor": build_extractor(features, chosen), "metrics": others or ["fid"]}
    if files:
        raise InputError(f"--weights for {', '.join(files)}, which nothing here uses: say --metrics or --extractor too")
    return found


def _video_judge(metrics: str | None, extractor: str | None, weights: list[str] | None) -> dict[str, Any]:
    """The same of `evaluate_clips`. `extractor` is a name of `VIDEO_EXTRACTORS`, or a file of I3D's weights."""
    from vistok.errors import InputError
    from vistok.metrics.fvd import DEFAULT, VIDEO_EXTRACTORS, build_video_extractor

    wanted, files = _names(metrics), _files(weights)
    unknown = [name for name in wanted if name != "fvd"]
    if unknown:
        raise InputError(f"{', '.join(unknown)}: of clips there are PSNR and SSIM per frame, and fvd")
    if not wanted and not extractor and not files:
        return {}
    named = extractor is None or extractor in VIDEO_EXTRACTORS or extractor.startswith("i3d:")
    chosen = files.pop("i3d", None) if named else [str(extractor)]
    if files:
        raise InputError(f"--weights for {', '.join(files)}, which nothing here uses; clips take i3d=FILE")
    return {"fvd": build_video_extractor((extractor or DEFAULT) if named else DEFAULT, chosen)}


def _names(metrics: str | None) -> list[str]:
    return [name.strip() for name in (metrics or "").split(",") if name.strip()]


def _files(weights: list[str] | None) -> dict[str, list[str]]:
    """Files by the name of what they are for. Raises InputError for one without a name."""
    from vistok.errors import InputError

    found: dict[str, list[str]] = {}
    for one in weights or []:
        name, _, file = one.partition("=")
        if not file:
            raise InputError(f"--weights {one}: expected NAME=FILE, such as inception=pt_inception-2015-12-05.pth")
        found.setdefault(name.strip(), []).append(file.strip())
    return found


def _show(found: "Reconstruction") -> None:
    from rich.table import Table

    told = found.protocol
    output().print(f"[bold]{found.model}[/bold] on {found.images} pictures of {found.data}", soft_wrap=True)
    output().print(f"{told['crop']}; resized: {told['resize']}; {told['rounding']}", soft_wrap=True)
    output().print(f"PSNR {told['psnr']}; SSIM {told['ssim']}; MS-SSIM {told['ms_ssim']}", soft_wrap=True)
    output().print(f"bits: {told['bits']}", soft_wrap=True)
    named = (["lpips"] if "lpips" in told else []) + list(found.features)
    masks = any(row.iou is not None for row in found.prefixes)
    _show_features(found.features)
    for name, value in found.originals.items():
        output().print(f"{name} of the originals: {value:.4g}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in (
        "tokens",
        "bits/pixel",
        "PSNR dB",
        "+-",
        "SSIM",
        "MS-SSIM",
        *named,
        *["IoU"] * masks,
        "decode images/s",
    ):
        table.add_column(column, justify="right")
    for row in found.prefixes:
        table.add_row(
            f"{row.tokens:g}" if row.tokens.is_integer() else f"{row.tokens:.1f}",
            f"{row.bits_per_pixel:.4f}",
            f"{row.psnr:.2f}",
            f"{row.psnr_deviation:.2f}",
            f"{row.ssim:.4f}",
            _number(row.ms_ssim, ".4f"),
            *(_number(row.distances.get(name, getattr(row, name, None)), ".4g") for name in named),
            *[_number(row.iou, ".4f")] * masks,
            f"{row.decode_images_per_second:.3g}",
        )
    output().print(table)
    _show_codebooks(found.codebooks)
    speed, both = found.encode_images_per_second, found.images_per_second
    output().print(f"encode {speed:.3g} images/s, encode and decode {both:.3g} images/s")


def _show_clips(found: "ClipReconstruction") -> None:
    from rich.table import Table

    told, total = found.protocol, f"{found.frames} frames in {found.clips} clips"
    output().print(f"[bold]{found.model}[/bold] on {total} of {found.data}", soft_wrap=True)
    output().print(f"{told['crop']}; windows of {told['windows']}; {told['rounding']}", soft_wrap=True)
    output().print(f"PSNR {told['psnr']}; SSIM {told['ssim']}; bits: {told['bits']}", soft_wrap=True)
    _show_features(found.features)
    table = Table(box=None, pad_edge=False)
    for column in (
        "tokens/frame",
        "bits/pixel",
        "bits/frame",
        "kbit/s",
        "PSNR dB",
        "+-",
        "worst",
        "SSIM",
        *["FVD"] * ("fvd" in found.features),
        "decode frames/s",
    ):
        table.add_column(column, justify="right")
    for row in found.prefixes:
        table.add_row(
            f"{row.tokens_per_frame:.1f}",
            f"{row.bits_per_pixel:.4f}",
            f"{row.bits_per_frame:,.0f}",
            f"{row.bits_per_second / 1000:,.1f}",
            f"{row.psnr:.2f}",
            f"{row.psnr_deviation:.2f}",
            f"{row.psnr_worst:.2f}",
            f"{row.ssim:.4f}",
            *[_number(row.fvd, ".4g")] * ("fvd" in found.features),
            f"{row.decode_frames_per_second:.3g}",
        )
    output().print(table)
    _show_codebooks(found.codebooks)
    output().print(f"encode {found.encode_frames_per_second:.3g} frames/s")


def _show_features(features: dict[str, dict[str, Any]]) -> None:
    for name, told in features.items():
        output().print(f"{name}: {', '.join(f'{key} {value}' for key, value in told.items())}", soft_wrap=True)


def _show_codebooks(codebooks: "list[CodebookUse]") -> None:
    from rich.table import Table

    if codebooks:
        books = Table(box=None, pad_edge=False)
        for column in ("segment", "code", "codebook", "used", "perplexity", "bits/code", "codes counted"):
            books.add_column(column, justify="left" if column == "segment" else "right")
        for book in codebooks:
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


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
