"""JPEG, WebP, AVIF and JPEG XL at equal bytes: the best picture that each codec makes of a given number of bytes.

    picture --scale down (1, 1/2, 1/4, 1/8)--> encode at quality q --> bytes <= budget ?
                                                     \\--> decode, scale up --> PSNR; the best of all scales is kept

Quality is found by bisection: the highest whose file fits. Scaling down first is what anyone would do by hand at very
low rates, where a codec's headers and block structure alone fill the budget; a result says whether it was done. Files
are counted whole, with their headers, as they would lie on a disk.
"""

import io
import math
import time
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from PIL import Image, features
from torch import Tensor

from vistok.errors import InputError, MissingExtraError
from vistok.metrics.psnr import psnr
from vistok.pixels import from_pil, to_pil

SCALES = (1, 2, 4, 8)
SMALLEST_SIDE = 8  # a scaled-down picture is not made smaller than this


@dataclass(frozen=True)
class Codec:
    """A codec of Pillow: its format, the range of its quality, and settings of which the smallest file is taken."""

    name: str
    format: str
    qualities: tuple[int, int]
    settings: tuple[dict[str, Any], ...]

    def encode(self, image: Image.Image, quality: int) -> tuple[bytes, dict[str, Any]]:
        """The file's bytes, and the setting that made them."""
        files = [(self.write(image, quality, setting), setting) for setting in self.settings]
        return min(files, key=lambda file: len(file[0]))

    def write(self, image: Image.Image, quality: int, setting: dict[str, Any]) -> bytes:
        """The file's bytes with one setting."""
        buffer = io.BytesIO()
        image.save(buffer, format=self.format, quality=quality, **setting)
        return buffer.getvalue()


CODECS: dict[str, Codec] = {
    "jpeg": Codec("jpeg", "JPEG", (1, 95), ({"optimize": True}, {"optimize": True, "progressive": True})),
    "webp": Codec("webp", "WEBP", (0, 100), ({"method": 6},)),
    "avif": Codec("avif", "AVIF", (0, 100), ({"speed": 6, "max_threads": 1},)),
    "avif-slow": Codec("avif-slow", "AVIF", (0, 100), ({"speed": 3, "max_threads": 1},)),
    "jxl": Codec("jxl", "JXL", (0, 100), ({"effort": 7, "num_threads": 1},)),
}
USUAL = ("jpeg", "webp", "avif")


@dataclass(frozen=True)
class Coded:
    """One picture through a codec. `pixels`: uint8 (1, 3, H, W). `scale`: 2 where it was halved first.

    fits: whether `bytes` is within the budget; where no setting was, the smallest file there is stands here.
    Seconds are of the process's CPU time, for the chosen setting alone, without the search for it.
    """

    codec: str
    bytes: int
    quality: int
    scale: int
    fits: bool
    psnr: float
    pixels: Tensor
    encode_seconds: float
    decode_seconds: float


class Ladder:
    """One picture in one codec: every file that was made is remembered, so that many budgets cost little more than one.

    `pixels`: uint8 (1, 3, H, W). Raises InputError for an unknown codec, MissingExtraError where Pillow lacks it.
    """

    def __init__(self, pixels: Tensor, codec: str) -> None:
        if codec not in CODECS:
            raise InputError(f"no codec {codec!r}; expected one of {', '.join(CODECS)}")
        if not writes(codec):
            package = "pillow-jxl-plugin" if codec == "jxl" else "--upgrade pillow"
            raise MissingExtraError(f"this build of Pillow cannot write {codec}; pip install {package}")
        self.pixels, self.codec = pixels, CODECS[codec]
        self.image = to_pil(pixels)
        self._scaled: dict[int, Image.Image] = {}
        self._files: dict[tuple[int, int], tuple[bytes, dict[str, Any]]] = {}
        self._coded: dict[tuple[int, int], Coded] = {}

    def best(self, budget: int) -> Coded:
        """The highest PSNR within `budget` bytes over all scales; the smallest file where nothing fits."""
        found: Coded | None = None
        for scale in self._scales():
            quality = self._highest_quality(scale, budget)
            if quality is None:
                continue
            coded = self._decoded(scale, quality)
            if found is not None and coded.psnr <= found.psnr:
                break  # quality as a function of scale has one peak
            found = coded
        if found is not None:
            return found
        low = self.codec.qualities[0]
        scale = min(self._scales(), key=lambda scale: len(self._file(scale, low)))
        smallest = self._decoded(scale, low)
        return Coded(**{**smallest.__dict__, "fits": False})

    # -- inside --------------------------------------------------------------------------------------------------

    def _scales(self) -> list[int]:
        return [scale for scale in SCALES if scale == 1 or min(self.image.size) // scale >= SMALLEST_SIDE]

    def _highest_quality(self, scale: int, budget: int) -> int | None:
        """The highest quality whose file fits, sizes taken to grow with quality; None where none does.

        Where the logs of the sizes known so far point to, a few times; then by bisection.
        """
        low, above = self.codec.qualities[0], self.codec.qualities[1] + 1
        if len(self._file(scale, low)) > budget:
            return None
        known = {quality: len(data) for (there, quality), (data, _) in self._files.items() if there == scale}
        low = max(quality for quality, size in known.items() if size <= budget)
        above = min((quality for quality in known if quality > low), default=above)
        guesses = 4
        while above - low > 1:
            middle = (low + above) // 2
            if above in known and guesses:
                share = math.log(budget / known[low]) / math.log(known[above] / known[low])
                middle = min(max(low + round(share * (above - low)), low + 1), above - 1)
                guesses -= 1
            known[middle] = len(self._file(scale, middle))
            low, above = (middle, above) if known[middle] <= budget else (low, middle)
        return low

    def _file(self, scale: int, quality: int) -> bytes:
        key = (scale, quality)
        if key not in self._files:
            self._files[key] = self.codec.encode(self._down(scale), quality)
        return self._files[key][0]

    def _down(self, scale: int) -> Image.Image:
        if scale not in self._scaled:
            self._scaled[scale] = _shrink(self.image, scale)
        return self._scaled[scale]

    def _decoded(self, scale: int, quality: int) -> Coded:
        key = (scale, quality)
        if key not in self._coded:
            self._file(scale, quality)
            setting = self._files[key][1]
            begun = time.process_time()
            data = self.codec.write(_shrink(self.image, scale), quality, setting)
            encoded = time.process_time()
            image = Image.open(io.BytesIO(data)).convert("RGB")
            if image.size != self.image.size:
                image = image.resize(self.image.size, Image.Resampling.BICUBIC)
            decoded = time.process_time()
            pixels = from_pil(image)
            self._coded[key] = Coded(
                codec=self.codec.name,
                bytes=len(data),
                quality=quality,
                scale=scale,
                fits=True,
                psnr=float(psnr(pixels, self.pixels)[0]),
                pixels=pixels,
                encode_seconds=encoded - begun,
                decode_seconds=decoded - encoded,
            )
        return self._coded[key]


def encode_within(pixels: Tensor, codec: str, budget: int) -> Coded:
    """The best that `codec` ("jpeg", "webp", "avif") makes of uint8 (1, 3, H, W) in at most `budget` bytes."""
    return Ladder(pixels, codec).best(budget)


def available() -> list[str]:
    """The usual codecs that this build of Pillow can write."""
    return [name for name in USUAL if writes(name)]


def writes(codec: str) -> bool:
    """Whether this build of Pillow can write a codec's files; JPEG XL takes the package pillow-jxl-plugin."""
    if codec == "jxl":
        if not find_spec("pillow_jxl"):
            return False
        import_module("pillow_jxl")  # registers the format
        return True
    return codec == "jpeg" or bool(features.check(CODECS[codec].format.lower()))


def _shrink(image: Image.Image, scale: int) -> Image.Image:
    if scale == 1:
        return image
    size = (max(1, round(image.width / scale)), max(1, round(image.height / scale)))
    return image.resize(size, Image.Resampling.LANCZOS)
