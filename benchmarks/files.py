"""Compressed files at given rates beside JPEG, WebP, AVIF and JPEG XL: PSNR, MS-SSIM and BD-rate.

    python benchmarks/files.py --data PHOTOGRAPHS --name kodak [--crop 256] [-m MODEL] [--save-files PATH]

Pictures at their full size, or centre crops. Writes results/files-NAME.json, .md (the tables) and .svg (the curves).
AVIF is at speed 3, JPEG XL at effort 7; all codecs may scale the picture down first where that is better. With
`--save-files` what is known of every single file is kept; `--codecs-from` takes the codecs' part of it from an earlier
run on the same pictures, which saves most of the time.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from race import machine
from torch import Tensor

import vistok
from vistok.data.sources import open_source
from vistok.evaluation.charts import Series, line_chart, standalone
from vistok.evaluation.codecs import writes
from vistok.evaluation.file_rates import RATES, File, as_pixels, bd_rate, means, measure_files
from vistok.evaluation.protocols import evaluation_crop

NAMES = {"vistok": "vistok", "jpeg": "JPEG", "webp": "WebP", "avif-slow": "AVIF", "jxl": "JPEG XL"}
RESULTS = Path(__file__).parent / "results"


def pictures(data: str, crop: int | None, limit: int | None) -> Iterator[Tensor]:
    """uint8 (1, 3, H, W), one by one."""
    source = open_source(data)
    for item in source.first(limit) if limit else source:
        yield as_pixels(item.image) if crop is None else as_pixels_array(evaluation_crop(item.image, crop))


def as_pixels_array(values: Any) -> Tensor:
    """(H, W, 3) -> (1, 3, H, W)."""
    return torch.from_numpy(values.copy()).permute(2, 0, 1)[None]


def tables(files: list[File], model: str) -> str:
    """PSNR and MS-SSIM at every rate, and BD-rate, as Markdown."""
    rows = means(files)
    coders = list(dict.fromkeys(row["coder"] for row in rows))
    lines = []
    for key, title, digits in (("psnr", "PSNR, dB", 2), ("ms_ssim", "MS-SSIM", 4)):
        lines += [f"| {title} at bits/pixel | " + " | ".join(str(rate) for rate in RATES) + " |"]
        lines += ["| --- |" + " ---: |" * len(RATES)]
        for coder in coders:
            cells = []
            for rate in RATES:
                row = next(row for row in rows if (row["coder"], row["rate"]) == (coder, rate))
                over = f" ({row['over_budget']} of {row['pictures']} over)" if row["over_budget"] else ""
                cells.append(f"{row[key]:.{digits}f}{over}")
            name = f"**{model}**" if coder == "vistok" else NAMES[coder]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    others = [coder for coder in coders if coder != "vistok"]
    rates = {NAMES[coder]: bd_rate(files, "vistok", coder) for coder in others}
    told = ", ".join(f"{name} {value:+.1f} %" for name, value in rates.items() if value is not None)
    return "\n".join(lines) + f"\nBD-rate of {model} against: {told}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a folder of photographs")
    parser.add_argument("--name", required=True, help="of the result files")
    parser.add_argument("-m", "--model", help="the tokenizer that ships, if left out; 'none': codecs alone")
    parser.add_argument("--crop", type=int, help="side of centre crops; the whole pictures if left out")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--codecs-from", type=Path, help="files saved by an earlier run on the same pictures")
    parser.add_argument("--save-files", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer: Any = None if args.model == "none" else vistok.load(args.model)
    codecs = [name for name in NAMES if name != "vistok" and writes(name)]
    files: list[File] = []
    if args.codecs_from:
        there = json.loads(args.codecs_from.read_text())
        files = [File(**file) for file in there["files"] if file["coder"] != "vistok"]
        codecs = []

    def told(done: int) -> None:
        print(f"{done} pictures", flush=True)

    files = measure_files(pictures(args.data, args.crop, args.limit), tokenizer, codecs, progress=told) + files
    if len({(file.coder, file.rate): 0 for file in files}) * len({file.picture for file in files}) != len(files):
        raise SystemExit("the codecs' result is of other pictures")
    name = tokenizer.name if tokenizer else "none"
    text = tables(files, name) if tokenizer else ""
    result = {
        "command": f"python benchmarks/files.py --data {Path(args.data).name} --name {args.name}"
        + (f" --crop {args.crop}" if args.crop else ""),
        "model": name,
        "weights": tokenizer.fingerprint if tokenizer else None,
        "machine": machine(),
        "rows": means(files),
        "bd_rate": {c: bd_rate(files, "vistok", c) for c in NAMES if c != "vistok"} if tokenizer else {},
    }
    if args.save_files:
        args.save_files.write_text(json.dumps({"files": [file.plain() for file in files]}) + "\n")
    out = RESULTS / f"files-{args.name}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    if tokenizer:
        out.with_suffix(".md").write_text(text)
        series = [
            Series(NAMES[coder], [(r["bpp"], r["psnr"]) for r in result["rows"] if r["coder"] == coder], colour=place)
            for place, coder in enumerate(NAMES)
            if any(r["coder"] == coder for r in result["rows"])
        ]
        out.with_suffix(".svg").write_text(standalone(line_chart(series, "bits per pixel", "PSNR, dB", log_x=True)))
    print(text)


if __name__ == "__main__":
    main()
