"""The main job on real photographs, with a report to look at: `make demo`, or `python -m examples.demo`.

    photographs --tokenize--> every prefix length --rebuild--> beside JPEG and WebP of the same bytes
    squares cut from them --train, about a minute--> a small tokenizer, early and late
                                                                         --> out/demo/report.html

The photographs are scikit-image's bundled ones; nothing is downloaded.
"""

import argparse
import csv
import time
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

import vistok
from vistok.compressed import pack
from vistok.data.images import read_image
from vistok.evaluation.codecs import Coded, Ladder
from vistok.evaluation.reconstruction import fitting, prefix_lengths
from vistok.metrics.psnr import psnr
from vistok.metrics.ssim import ssim
from vistok.pixels import from_pil
from vistok.training.recipe import load_recipe
from vistok.training.trainer import train

# Photographs that come in scikit-image's wheel, and the corner (top, left) of the detail that the report shows.
SHOWN = {
    "astronaut.png": ("Astronaut", 20, 120),
    "coffee.png": ("Coffee", 60, 170),
    "chelsea.png": ("Chelsea the cat", 20, 90),
    "rocket.jpg": ("Rocket", 60, 200),
}
TILE = 96
CODECS = ("webp", "jpeg")


@dataclass(frozen=True)
class Rebuilt:
    """One prefix of one photograph: what its tokens cost and give, and what each codec makes of the same bytes."""

    tokens: int
    bytes: int
    bits_per_pixel: float
    file_bits_per_pixel: float  # of the compressed file
    psnr: float
    ssim: float
    pixels: Tensor
    codecs: dict[str, Coded]


@dataclass(frozen=True)
class Photograph:
    """A photograph, uint8 (1, 3, H, W), with its reconstructions from the shortest prefix to all tokens."""

    title: str
    pixels: Tensor
    corner: tuple[int, int]
    rebuilt: list[Rebuilt]
    encode_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Training:
    """What became of the small tokenizer."""

    recipe: str
    seconds: float
    steps: int
    parameters: int
    losses: list[tuple[float, float]]
    qualities: dict[str, list[tuple[float, float]]]
    first: Image.Image
    last: Image.Image
    first_step: int


def bundled(name: str) -> Image.Image:
    """A picture of scikit-image's wheel, RGB."""
    import skimage

    return read_image(Path(skimage.__file__).parent / "data" / name)


def rebuild(tokenizer: Any, name: str) -> Photograph:
    """Tokenize a photograph and decode every prefix; find JPEG and WebP files of the same bytes."""
    title, top, left = SHOWN[name]
    pixels = from_pil(bundled(name))
    height, width = pixels.shape[2:]
    begun = time.perf_counter()
    tokens = tokenizer.encode(pixels, on_size=fitting(tokenizer.spec, (height, width)))
    encode_seconds = time.perf_counter() - begun
    ladders = {codec: Ladder(pixels, codec) for codec in CODECS}
    canvas, found, decode_seconds = tokens.canvas[0], [], 0.0
    for length in prefix_lengths(tokenizer.spec.at(canvas.tile, canvas.tiles)):
        begun = time.perf_counter()
        prefix = tokens.prefix(length)
        decoded = tokenizer.decode(prefix, dtype=torch.uint8)
        decode_seconds = time.perf_counter() - begun
        bits = int(prefix.bits()[0])
        size = ceil(bits / 8)
        found.append(
            Rebuilt(
                tokens=length,
                bytes=size,
                bits_per_pixel=bits / (height * width),
                file_bits_per_pixel=8 * len(pack(tokenizer, prefix)) / (height * width),
                psnr=float(psnr(decoded, pixels)[0]),
                ssim=float(ssim(decoded, pixels)[0]),
                pixels=decoded,
                codecs={codec: ladder.best(size) for codec, ladder in ladders.items()},
            )
        )
    return Photograph(title, pixels, (top, left), found, encode_seconds, decode_seconds)


def tiles(names: Iterable[str], folder: Path) -> Path:
    """Cut photographs into squares of 96 px, so that a training step need not decode whole ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        picture = np.asarray(bundled(name))
        for top in range(0, picture.shape[0] - TILE + 1, TILE):
            for left in range(0, picture.shape[1] - TILE + 1, TILE):
                tile = Image.fromarray(picture[top : top + TILE, left : left + TILE])
                tile.save(folder / f"{Path(name).stem}-{top:04d}-{left:04d}.png")
    return folder


def train_small(out: Path, steps: int, console: Console) -> Training:
    """Train `strata/tiny` from scratch on squares of the photographs and measure it on squares held out."""
    data = tiles([*SHOWN, "motorcycle_left.png"], out / "squares")
    seen = max(1, steps // 20)
    changes = [f"train.steps={steps}", f"train.log_every={max(1, steps // 50)}", "model.init_pictures=48"]
    changes += [f"train.validate_every={seen}", f"train.sample_every={seen}", f"train.checkpoint_every={steps}"]
    recipe = load_recipe("strata/tiny", [*changes, "data.scale=[0.45, 1.0]", "train.tensorboard=false"])
    begun = time.perf_counter()
    model = train(recipe, data, out / "run", overwrite=True, console=console)
    seconds = time.perf_counter() - begun
    losses = [(float(row["step"]), float(row["loss"])) for row in rows(out / "run" / "log.csv")]
    qualities: dict[str, list[tuple[float, float]]] = {}
    for row in rows(out / "run" / "validation.csv"):
        for key, value in row.items():
            if key.startswith("psnr"):
                qualities.setdefault(key, []).append((float(row["step"]), float(value)))
    grids = sorted((out / "run" / "samples").glob("*.png"))
    return Training(
        recipe="strata/tiny",
        seconds=seconds,
        steps=steps,
        parameters=sum(parameter.numel() for parameter in vistok.load(model).parameters()),
        losses=losses,
        qualities=qualities,
        first=Image.open(grids[0]).convert("RGB"),
        last=Image.open(grids[-1]).convert("RGB"),
        first_step=seen,
    )


def rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    from examples.report import write_report

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", help="the tokenizer that ships, if left out")
    parser.add_argument("-o", "--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--steps", type=int, default=1200, help="of the small training")
    args = parser.parse_args()
    console, begun = Console(soft_wrap=True, highlight=False), time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the models are small: threads would wait for each other more than they work
    tokenizer = vistok.load(args.model)
    console.print(f"[bold]1[/bold]  {tokenizer.name}: tokenize, rebuild, compare with JPEG and WebP at equal bytes")
    photographs = []
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(SHOWN))
        for name, (title, *_) in SHOWN.items():
            progress.update(task, description=title)
            photographs.append(rebuild(tokenizer, name))
            progress.advance(task)
        progress.update(task, description="")
    for photograph in photographs:
        whole = photograph.rebuilt[-1]
        others = ", ".join(f"{codec.upper()} {coded.psnr:.2f}" for codec, coded in whole.codecs.items())
        console.print(
            f"   {photograph.title:<16} {whole.tokens} tokens, {whole.bytes:,} bytes: {whole.psnr:.2f} dB "
            f"({others} at the same bytes)"
        )
    console.print(f"[bold]2[/bold]  train a small tokenizer from scratch, {args.steps} steps")
    training = train_small(args.out, args.steps, console)
    report = write_report(args.out / "report.html", tokenizer, photographs, training, time.perf_counter() - begun)
    console.print(f"[bold]3[/bold]  report: {report} ({report.stat().st_size / 1e6:.1f} MB, opens in any browser)")


if __name__ == "__main__":
    main()
