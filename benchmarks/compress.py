"""A 12-megapixel photograph through `compress` and `decompress`, beside WebP and AVIF at about the same bytes.

    python benchmarks/compress.py [-m MODEL] [--picture PATH] [--threads 1]   writes benchmarks/results/compress.json
    python benchmarks/compress.py -m vistok-progressive --rates 0.1 0.4 --size 768 512 --threads 2 --out PATH

Each contestant runs in a process of its own: seconds from pixels to the file's bytes and back, and the peak of resident
memory over what the imported libraries take: the model and the picture's own pixels count. The picture is, unless
one is named, scikit-image's `coffee` scaled to `--size` with a little noise, so that it has detail at every scale.
The others' quality is searched beforehand, for the bytes nearest to ours; that search is not timed.
"""

import argparse
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RESULTS = Path(__file__).parent / "results" / "compress.json"
SIZE = (4000, 3000)


def main() -> None:
    """Run all contestants in turns and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="name or folder; the shipped one if left out")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, nargs=2, default=SIZE, help="width and height")
    parser.add_argument("--rates", type=float, nargs="*", help="bits per pixel of our files; else two lengths of codes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--scale", help=argparse.SUPPRESS)
    parser.add_argument("--search", help=argparse.SUPPRESS)
    parser.add_argument("--setting", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options)))
        return
    if options.scale:
        picture(options.picture, tuple(options.size)).save(options.scale, compress_level=1)
        return
    if options.search:
        print(quality_for(options.picture, options.search, options.setting))
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "picture.png"
        size = ["--size", *map(str, options.size)]
        run(["--scale", str(source), *size, *(["--picture", str(options.picture)] if options.picture else [])])
        load = os.getloadavg()[0]
        rows = []
        settings = [round(1000 * rate) for rate in options.rates or ()] or [0, 2]  # all tokens, the first two segments
        for setting in settings:
            ours = child(options, source, "vistok", setting)
            rows.append(ours)
            for kind in ("WEBP", "AVIF"):
                search = ["--search", kind, "--setting", str(ours["bytes"]), "--picture", str(source)]
                rows.append(child(options, source, kind, int(run(search))))
        table = {
            "command": f"python benchmarks/compress.py --threads {options.threads}"
            + (f" --rates {' '.join(map(str, options.rates))}" if options.rates else "")
            + (f" --size {options.size[0]} {options.size[1]}" if tuple(options.size) != SIZE else ""),
            "picture": options.picture.name if options.picture else "scikit-image's coffee, scaled, with noise",
            "size": [options.size[1], options.size[0]],
            "threads": options.threads,
            "load_before": load,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "rows": rows,
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{'':14}{'bytes':>10}{'bpp':>8}{'PSNR':>8}{'to file':>10}{'back':>10}{'memory':>10}")
    for row in rows:
        print(
            f"{row['name']:14}{row['bytes']:10,}{row['bpp']:8.4f}{row['psnr']:8.2f}"
            f"{row['to_file_s']:9.2f}s{row['back_s']:9.2f}s{row['memory_mb']:7.0f} MB"
        )


def picture(path: Path | None, size: tuple[int, int]) -> Image.Image:
    """The photograph at a size."""
    if path is None:
        from skimage import data

        small = Image.fromarray(data.coffee())
    else:
        small = Image.open(path).convert("RGB")
        if small.size == tuple(size):
            return small
    scale = max(size[0] / small.width, size[1] / small.height)
    wide = small.resize((round(small.width * scale), round(small.height * scale)), Image.Resampling.BICUBIC)
    noise = np.random.RandomState(0).standard_normal((size[1], size[0], 3)).astype(np.float32) * 2
    return Image.fromarray((np.asarray(wide.crop((0, 0, *size))) + noise).round().clip(0, 255).astype(np.uint8))


def quality_for(source: Path, kind: str, size: int) -> int:
    """Pillow's quality, 0 to 100, whose file is nearest to `size` bytes."""
    image = Image.open(source).convert("RGB")
    sizes: dict[int, int] = {}
    low, high = 0, 100
    while low <= high:
        middle = (low + high) // 2
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=middle)
        sizes[middle] = buffer.tell()
        low, high = (middle + 1, high) if sizes[middle] < size else (low, middle - 1)
    return min(sizes, key=lambda quality: abs(sizes[quality] - size))


def child(options: argparse.Namespace, source: Path, name: str, setting: int) -> dict[str, Any]:
    """One contestant in its own process."""
    words = ["--one", name, "--setting", str(setting), "--picture", str(source), "--threads", str(options.threads)]
    words += ["--rates"] if options.rates else []
    return json.loads(run(words + (["-m", options.model] if options.model else []), options.threads))


def run(words: list[str], threads: int = 1) -> str:
    """This script with other arguments. All heavy work is done so: a process begins with its parent's peak memory."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def one(options: argparse.Namespace) -> dict[str, Any]:
    """Pixels to bytes and back, in this process."""
    if options.one == "vistok":
        import constriction  # noqa: F401  imported before the memory is read, as every library
        import torch

        import vistok
        from vistok.compressed import compress, decompress, pack, unpack

        torch.set_num_threads(options.threads)
        before = peak_bytes()
        tokenizer = vistok.load(options.model)
        stages: dict[str, float] = {}

        def write() -> bytes:
            if options.rates is not None:
                return compress(tokenizer, image, bpp=options.setting / 1000)
            start = time.perf_counter()
            tokens = tokenizer.encode(image)
            if options.setting:
                tokens = tokens.prefix(sum(segment.count for segment in tokens.segments[: options.setting]))
            stages["encode_s"] = time.perf_counter() - start
            return pack(tokenizer, tokens)

        def read(data: bytes) -> Any:
            return decompress(tokenizer, data)[0].permute(1, 2, 0).numpy()

        name = f"{tokenizer.name}{f' {options.setting} levels' if options.setting else ''}"
    else:
        before, stages = peak_bytes(), {}

        def write() -> bytes:
            buffer = io.BytesIO()
            image.save(buffer, options.one, quality=options.setting)
            return buffer.getvalue()

        def read(data: bytes) -> Any:
            return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

        name = f"{options.one} q{options.setting}"
    image = Image.open(options.picture).convert("RGB")
    pixels = np.asarray(image)
    start, used = time.perf_counter(), time.process_time()
    data = write()
    middle, used_middle = time.perf_counter(), time.process_time()
    back = read(data)
    end, used_end = time.perf_counter(), time.process_time()
    peak = peak_bytes()
    if options.one == "vistok" and options.rates is None:
        begun = time.perf_counter()
        unpack(tokenizer, data)
        stages["unpack_s"] = time.perf_counter() - begun
    error = np.mean([np.square(a.astype(np.float32) - b).mean() for a, b in zip(pixels, back, strict=True)])
    return {
        "name": name,
        "bytes": len(data),
        "bpp": 8 * len(data) / (image.width * image.height),
        "psnr": float(10 * np.log10(255**2 / error)),
        "to_file_s": middle - start,
        "back_s": end - middle,
        "to_file_cpu_s": used_middle - used,
        "back_cpu_s": used_end - used_middle,
        "memory_mb": (peak - before) / (1 << 20),
        **stages,
    }


def peak_bytes() -> int:
    """The most resident memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
