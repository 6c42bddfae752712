"""Pictures for benchmarks where there are no data: photographs that come with scikit-image, and fine patterns."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from vistok.extras import import_extra

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_left")


def photographs(count: int = 24, side: int = 256, seed: int = 0) -> Iterator[Image.Image]:
    """`count` square crops of `side` pixels of five photographs, in turns; each is the same on every machine.

    Raises MissingExtraError without scikit-image.
    """
    from pathlib import Path

    folder = Path(import_extra("skimage.data", "eval").__file__).parent
    there = [folder / f"{name}.png" for name in PHOTOGRAPHS] + [folder / "rocket.jpg"]
    pictures = [Image.open(path).convert("RGB") for path in there if path.exists()]
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        picture = pictures[number % len(pictures)]
        cut = int(rng.integers(min(side, min(picture.size)), min(picture.size) + 1))
        left, top = (int(rng.integers(0, length - cut + 1)) for length in picture.size)
        box = (left, top, left + cut, top + cut)
        yield picture.crop(box).resize((side, side), Image.Resampling.LANCZOS)


def patterns(count: int = 24, side: int = 256, seed: int = 0) -> Iterator[Image.Image]:
    """Gratings, checkerboards, rings and line grids of periods of 2 to 16 pixels in two colours."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float64)
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        period, angle = 2 * 8 ** rng.uniform(0, 1), rng.uniform(0, np.pi)
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        phase = 2 * np.pi / period
        kind = number % 4
        if kind == 0:
            wave = np.sin(phase * along)
        elif kind == 1:
            wave = np.sign(np.sin(phase * x / 2) * np.sin(phase * y / 2) + 1e-9)
        elif kind == 2:
            wave = np.sin(phase * np.hypot(x - side / 2, y - side / 2))
        else:
            wave = np.maximum(np.cos(phase * along / 2) > 0.9, np.cos(phase * across / 2) > 0.9) * 2.0 - 1
        colours = rng.integers(0, 256, (2, 3))
        share = ((wave + 1) / 2)[..., None]
        yield Image.fromarray((share * colours[0] + (1 - share) * colours[1]).round().astype(np.uint8))
