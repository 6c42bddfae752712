"""Protocols: all besides the model that decides a reconstruction's numbers, under the names of those who use them.

    picture --crop--> original --encode, decode--> float --rounding--> 8 bits --> PSNR, SSIM variants, features

| name | crop | rounding | SSIM | features of rFID |
| --- | --- | --- | --- | --- |
| vistok | pixels as they are | nearest | skimage-u7-dr1 | inception:torch-fidelity |
| llamagen | ADM's | 127.5 x + 128, cut off | skimage-u7-dr2 | inception:pytorch-fid |
| seed-voken | shorter side, bicubic | both sides cut off | skimage-u7-dr1 | inception:pytorch-fid |
| 1d-tokenizer | shorter side, bicubic | cut off | skimage-u7-dr1 | inception:torch-fidelity |
| adm | ADM's | nearest | skimage-u7-dr1 | inception:adm |
| clean-fid | shorter side, bicubic | nearest | skimage-u7-dr1 | inception:clean-fid |

The same reconstructions score differently under each, up to 0.2 dB by rounding alone and up to 0.1 SSIM by its range,
so numbers of different protocols are not compared (`vistok.evaluation.receipt`), only explained.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vistok.data.loader import center_crop
from vistok.errors import ConfigError, UnknownNameError, nearest
from vistok.metrics.eight_bit import llamagen_uint8, seed_voken_uint8
from vistok.metrics.ssim import DEFAULT, VARIANTS
from vistok.pixels import as_uint8

if TYPE_CHECKING:
    from PIL import Image


def evaluation_crop(image: "Image.Image", size: int) -> np.ndarray:
    """The middle square of `size` pixels, uint8 (S, S, 3), pixels as they are; a smaller picture is scaled up to it."""
    if min(image.size) < size:
        return center_crop(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def adm_crop(image: "Image.Image", size: int) -> np.ndarray:
    """ADM's: halved by means while twice too large, bicubic to a shorter side of `size`, then the middle square."""
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def cut_off(pixels: Tensor) -> Tensor:
    """Float in [0, 1] to uint8 by leaving away what is behind the point of 255 x."""
    return (pixels.clamp(0, 1) * 255).to(torch.uint8)


CROPS: dict[str, tuple[Callable[..., np.ndarray], str]] = {
    "centre": (evaluation_crop, "centre crop, pixels as they are; smaller pictures scaled up, bicubic"),
    "shorter-side": (center_crop, "shorter side resized, bicubic (Pillow), then the middle square"),
    "adm": (adm_crop, "halved by means while twice too large, shorter side resized, bicubic, then the middle square"),
}
ROUNDINGS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nearest": (as_uint8, "decoded pixels rounded to 8 bits"),
    "cut-off": (cut_off, "decoded pixels cut off to 8 bits"),
    "llamagen": (lambda pixels: llamagen_uint8(2 * pixels - 1), "decoded pixels 127.5 x + 128, cut off to 8 bits"),
    "seed-voken": (
        lambda pixels: seed_voken_uint8(2 * pixels - 1),
        "decoded pixels and originals through [-1, 1], cut off to 8 bits",
    ),
}
BOTH = ("seed-voken",)  # roundings that the originals go through too


@dataclass(frozen=True)
class Protocol:
    """See the module's docstring. Raises ConfigError for an unknown crop, rounding or SSIM variant."""

    name: str = "vistok"
    crop: str = "centre"
    rounding: str = "nearest"
    ssim: str = DEFAULT
    extractor: str = "inception:torch-fidelity"

    def __post_init__(self) -> None:
        for what, value, known in (
            ("crop", self.crop, CROPS),
            ("rounding", self.rounding, ROUNDINGS),
            ("ssim", self.ssim, VARIANTS),
        ):
            if value not in known:
                raise ConfigError(f"no {what} {value!r}{nearest(value, list(known)) or f'; there are {list(known)}'}")

    def cut(self, image: "Image.Image", side: int) -> np.ndarray:
        """A picture, RGB, to uint8 (side, side, 3); whole where side is 0."""
        return CROPS[self.crop][0](image, side) if side else np.asarray(image)

    def eight_bit(self, decoded: Tensor) -> Tensor:
        """Decoded pixels in [0, 1] to uint8."""
        return ROUNDINGS[self.rounding][0](decoded)

    def original(self, pixels: Tensor) -> Tensor:
        """uint8 originals as they are compared."""
        return self.eight_bit((pixels.float() / 127.5 - 1 + 1) / 2) if self.rounding in BOTH else pixels


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(),
        Protocol("llamagen", "adm", "llamagen", "skimage-u7-dr2", "inception:pytorch-fid"),
        Protocol("seed-voken", "shorter-side", "seed-voken", DEFAULT, "inception:pytorch-fid"),
        Protocol("1d-tokenizer", "shorter-side", "cut-off", DEFAULT, "inception:torch-fidelity"),
        Protocol("adm", "adm", "nearest", DEFAULT, "inception:adm"),
        Protocol("clean-fid", "shorter-side", "nearest", DEFAULT, "inception:clean-fid"),
    )
}


def find_protocol(name: str | Protocol, **changes: str) -> Protocol:
    """A protocol by name, with some of its parts changed, whose name then says so.

    Raises UnknownNameError for an unknown name, ConfigError for an unknown part.
    """
    if isinstance(name, str) and name not in PROTOCOLS:
        known = nearest(name, list(PROTOCOLS)) or f"; there are {', '.join(PROTOCOLS)}"
        raise UnknownNameError(f"no protocol {name!r}{known}")
    found = PROTOCOLS[name] if isinstance(name, str) else name
    changes = {key: value for key, value in changes.items() if getattr(found, key) != value}
    told = ", ".join(f"{key}={value}" for key, value in changes.items())
    return replace(found, **changes, name=f"{found.name} ({told})") if changes else found
