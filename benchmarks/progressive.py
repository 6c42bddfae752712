"""vistok-progressive's files: seconds and memory beside WebP and AVIF, and that quality rises with every kilobyte.

    python benchmarks/progressive.py [-m MODEL] --photographs FOLDER [--threads 2] [--crops 8]

Writes results/progressive.json and progressive.md. Speed: a photograph at 768 x 512 and one scaled to 12 megapixels, at
several rates, each contestant in a process of its own (see `compress.py`). Rising: files of 256 px centre crops, cut at
every 128th byte; a fall is how far the PSNR of a cut lies below the best of all shorter ones.
"""

import argparse
import json
import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compress import child, run
from race import machine

import vistok
from vistok.compressed import compress, decompress, peek
from vistok.data.sources import open_source
from vistok.evaluation.protocols import evaluation_crop
from vistok.metrics.psnr import psnr

RESULTS = Path(__file__).parent / "results" / "progressive.json"
SIZES = ((768, 512), (4000, 3000))
RATES = (0.1, 0.4)
CUT, KILOBYTE = 128, 1024
LARGEST = 1.0  # bits per pixel of the files that are cut


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of every size, rate and contestant; the best of `--repeats` runs, and the most memory of all."""
    words = {"model": options.model, "rates": RATES, "threads": options.threads}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for width, height in SIZES:
            picture = Path(folder) / f"{width}.png"
            run(["--scale", str(picture), "--size", str(width), str(height), "--picture", str(first(options))])
            for rate in RATES:
                ours = [child(argparse.Namespace(**words), picture, "vistok", round(1000 * rate))]
                rows = [ours]
                for kind in ("WEBP", "AVIF"):
                    search = ["--search", kind, "--setting", str(ours[0]["bytes"]), "--picture", str(picture)]
                    rows.append([child(argparse.Namespace(**words), picture, kind, int(run(search)))])
                for _ in range(options.repeats - 1):
                    rows[0].append(child(argparse.Namespace(**words), picture, "vistok", round(1000 * rate)))
                for runs in rows:
                    best = dict(runs[0], size=[width, height], rate=rate, runs=len(runs))
                    for key in ("to_file_s", "back_s", "to_file_cpu_s", "back_cpu_s"):
                        best[key] = min(row[key] for row in runs)
                    best["memory_mb"] = max(row["memory_mb"] for row in runs)
                    found.append(best)
                    print(json.dumps(best), flush=True)
    return found


def first(options: argparse.Namespace) -> Path:
    """The first photograph of the folder."""
    source = open_source(options.photographs)
    return Path(options.photographs) / next(iter(source)).id


def rising(options: argparse.Namespace) -> dict[str, Any]:
    """What every further byte of a file does to PSNR."""
    torch.set_num_threads(1)
    tokenizer: Any = vistok.load(options.model)
    falls, gains, within, cuts = [], [], [], 0
    for item in open_source(options.photographs).first(options.crops):
        pixels = torch.from_numpy(evaluation_crop(item.image, 256).copy()).permute(2, 0, 1)[None]
        data = compress(tokenizer, pixels, bpp=LARGEST)
        ends = [*range(peek(data).bytes + CUT, len(data), CUT), len(data)]
        quality = [float(psnr(decompress(tokenizer, data[:end], partial=True), pixels)[0]) for end in ends]
        best = np.maximum.accumulate(quality)
        falls.append(float((best - quality).max()))
        step = KILOBYTE // CUT
        within.append(max(before - after for before, after in zip(quality[:-step], quality[step:], strict=True)))
        gains += [after - before for before, after in pairwise(quality[::step])]
        cuts += len(ends)
        print(f"{item.id}: {len(data)} bytes, worst fall {falls[-1]:.3f} dB", flush=True)
    return {
        "photographs": len(falls),
        "cuts": cuts,
        "worst_fall_db": max(falls),
        "worst_change_over_a_kilobyte_db": -max(within),
        "mean_gain_per_kilobyte_db": float(np.mean(gains)),
    }


def table(result: dict[str, Any]) -> str:
    """Both parts as Markdown."""
    lines = ["| picture | coder | bytes | bits/pixel | PSNR, dB | to file, s | back, s | memory, MB |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in result["speed"]:
        width, height = row["size"]
        name = f"**{row['name'].split()[0]}**" if row["name"].startswith("vistok") else row["name"]
        lines.append(
            f"| {width} x {height} | {name} | {row['bytes']:,} | {row['bpp']:.3f} | {row['psnr']:.2f} "
            f"| {row['to_file_s']:.2f} | {row['back_s']:.2f} | {row['memory_mb']:.0f} |"
        )
    found = result["rising"]
    lines += [
        "",
        f"{found['photographs']} photographs at 256 px, {found['cuts']:,} cuts of their files: the worst fall of PSNR "
        f"below that of any shorter cut is {found['worst_fall_db']:.3f} dB; a further kilobyte changes it by "
        f"{found['mean_gain_per_kilobyte_db']:+.2f} dB on average, and by "
        f"{found['worst_change_over_a_kilobyte_db']:+.3f} dB at the worst.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run both parts, or one of them, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="vistok-progressive", help="name or folder")
    parser.add_argument("--photographs", required=True, help="a folder of them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="runs of ours, of which the fastest counts")
    parser.add_argument("--crops", type=int, default=8)
    parser.add_argument("--part", choices=("speed", "rising"), help="only this one; the other stays as it is on file")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.part and options.out.exists() else {}
    if options.part != "rising":
        load = os.getloadavg()[0]
        result |= {"machine": machine(), "threads": options.threads, "load_before": load, "speed": speed(options)}
    if options.part != "speed":
        result["rising"] = rising(options)
    result["model"], result["weights"] = options.model, vistok.load(options.model).fingerprint
    result["command"] = f"python benchmarks/progressive.py --photographs {Path(options.photographs).name}"
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if {"speed", "rising"} <= result.keys():
        options.out.with_suffix(".md").write_text(table(result))
        print(table(result))


if __name__ == "__main__":
    main()
