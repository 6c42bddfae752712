"""The tokenizer's whole rate-distortion curve beside JPEG, WebP and AVIF at equal bytes.

    python benchmarks/rate_distortion.py --data PHOTOGRAPHS [-m MODEL]

Centre crops of 256 px. Writes results/rate_distortion.json, .md (the table) and .svg (the curves). CPU times are of
one thread; a codec's is that of the chosen setting alone.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from race import machine
from torch import Tensor

import vistok
from vistok.data.sources import open_source
from vistok.errors import VistokError
from vistok.evaluation.charts import Series, line_chart, standalone
from vistok.evaluation.protocols import evaluation_crop
from vistok.evaluation.rate_distortion import RatePoint, rate_distortion

NAMES = {"jpeg": "JPEG", "webp": "WebP", "avif": "AVIF"}
RESULTS = Path(__file__).parent / "results"


def crops(data: str, size: int, limit: int | None, skipped: list[str]) -> Iterator[Tensor]:
    """Centre crops, uint8 (1, 3, size, size); unreadable pictures are named in `skipped`."""
    source = open_source(data)
    for item in source.first(limit) if limit else source:
        try:
            cut = evaluation_crop(item.image, size)
        except VistokError as error:
            skipped.append(str(error))
            continue
        yield torch.from_numpy(cut.copy()).permute(2, 0, 1)[None]


def table(points: list[RatePoint], model: str) -> str:
    """The rows as Markdown, one line per prefix and coder."""
    lines = [
        "| coder | bits/pixel | compressed file | PSNR dB | SSIM | encode ms | decode ms | notes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for point in points:
        ours = point.coder == "tokens"
        name = f"**{model}**, {point.tokens} tokens" if ours else NAMES[point.coder]
        file = f"{point.file_bpp:.4f}" if point.file_bpp is not None else ""
        notes = []
        if point.scaled:
            notes.append(f"scaled down first: {point.scaled:.0%}")
        if point.too_large:
            notes.append(f"over the budget: {point.too_large} of {point.pictures}")
        if point.wins is not None:
            notes.append(f"{model} better on {point.wins:.0%}")
        lines.append(
            f"| {name} | {point.bpp:.4f} | {file} | {point.psnr:.2f} | {point.ssim:.4f} "
            f"| {point.encode_ms:.1f} | {point.decode_ms:.1f} | {'; '.join(notes)} |"
        )
    return "\n".join(lines) + "\n"


def curves(points: list[RatePoint], model: str) -> list[Series]:
    """PSNR over bits per pixel, one line per coder; our compressed files are a line of their own."""
    ours = [point for point in points if point.coder == "tokens"]
    found = [Series(model, [(point.bpp, point.psnr) for point in ours], colour=0)]
    files = [(point.file_bpp, point.psnr) for point in ours if point.file_bpp is not None]
    if files:
        found.append(Series("compressed", files, dashed=True, colour=0))
    for place, (coder, name) in enumerate(NAMES.items(), 1):
        rows = [(point.bpp, point.psnr) for point in points if point.coder == coder]
        found.append(Series(name, sorted(rows), colour=place))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a folder of photographs")
    parser.add_argument("-m", "--model", help="the tokenizer that ships, if left out")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS / "rate_distortion.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    tokenizer: Any = vistok.load(args.model)
    skipped: list[str] = []

    def told(done: int) -> None:
        if done % 10 == 0:
            print(f"{done} pictures", flush=True)

    points = rate_distortion(tokenizer, crops(args.data, args.size, args.limit, skipped), progress=told)
    rows = table(points, tokenizer.name)
    chart = line_chart(curves(points, tokenizer.name), "bits per pixel", "PSNR, dB", log_x=True)
    result = {
        "command": f"python benchmarks/rate_distortion.py --data {Path(args.data).name}"
        + (f" -m {Path(args.model).name}" if args.model else ""),
        "model": tokenizer.name,
        "weights": tokenizer.fingerprint,
        "pictures": points[0].pictures,
        "skipped": skipped,
        "protocol": {
            "crop": f"centre crop of {args.size} px, smaller pictures scaled up first",
            "rounding": "8 bits",
            "ssim": "skimage-u7-dr1",
            "budget": "per picture, the bytes of the prefix's packed codes; codecs' files whole, with headers",
            "cpu": "process time, one thread, milliseconds per picture",
        },
        "machine": machine(),
        "load_before": load,
        "torch": torch.__version__,
        "rows": [point.plain() for point in points],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(rows)
    args.out.with_suffix(".svg").write_text(standalone(chart))
    print(rows)


if __name__ == "__main__":
    main()
