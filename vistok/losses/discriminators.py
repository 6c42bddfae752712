"""Discriminators by name: judges of whether pixels are real, as each published system has them.

    build_discriminator("patchgan", layers=3) -> module;  module(pixels in [0, 1]) -> logits

| name | what | pixels |
| --- | --- | --- |
| patchgan | pix2pix's patches with BatchNorm or ActNorm: taming, LlamaGen, FQGAN, ... | (B, 3, H, W) |
| titok | GroupNorm and blurred strides: TiTok, MaskBit, One-D-Piece | (B, 3, H, W) |
| stylegan | StyleGAN2's residual net with one logit per picture: ViT-VQGAN, TexTok | squares of one size |
| dino | heads on a frozen DINO ViT: StyleGAN-T, VAR, RobustTok, GigaTok | (B, 3, H, W) |
| by-length | several of another one, each for reconstructions from more tokens: KARL | as those |
| omnitokenizer-image, omnitokenizer-video | TATS' patches in two and three dimensions | (B, 3, [T,] H, W) |
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from vistok.errors import ConfigError, InputError, UnknownNameError, nearest

Range = tuple[float, float]

# name -> module of this package, class, options that make it this one
_TABLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "patchgan": ("patchgan", "PatchDiscriminator", {}),
    "titok": ("blurred", "BlurredDiscriminator", {}),
    "stylegan": ("stylegan", "StyleDiscriminator", {}),
    "dino": ("dino", "DinoDiscriminator", {}),
    "by-length": ("by_length", "ByLength", {}),
    "omnitokenizer-image": ("patchgan", "ClipDiscriminator", {"dims": 2}),
    "omnitokenizer-video": ("patchgan", "ClipDiscriminator", {"dims": 3}),
}
DISCRIMINATORS = tuple(_TABLE)


@dataclass(frozen=True)
class JudgedSizes:
    """What a discriminator takes. `minimum`: of either side; `only`: the one side of its squares; `frames`: fewest."""

    minimum: int = 1
    only: int | None = None
    frames: int | None = None

    def legal(self, size: tuple[int, ...]) -> bool:
        """Whether pixels of this size, (H, W) or (T, H, W), can be judged."""
        if len(size) != (2 if self.frames is None else 3):
            return False
        if self.only is not None and size[-2:] != (self.only, self.only):
            return False
        return min(size[-2:]) >= self.minimum and (self.frames is None or size[0] >= self.frames)

    def describe(self) -> str:
        """The rule in words, for messages."""
        sides = f"squares of {self.only} pixels" if self.only is not None else f"sides of at least {self.minimum}"
        return sides if self.frames is None else f"clips of at least {self.frames} frames with {sides}"


class Discriminator(nn.Module):
    """Base of the judges: checks sizes, shifts pixels to the judge's own range, augments in training.

    range    the pixels 0 and 1 as the net sees them; (-1, 1) in most published systems
    augment  probability of each group of DiffAugment (translation, colour, cutout) in training; `cutout` its share
    sizes    what it takes

    A judge has `logits(x)` of pixels in its own range.
    """

    sizes: JudgedSizes

    def __init__(self, *, range: Range = (-1.0, 1.0), augment: float = 0.0, cutout: float = 0.2) -> None:
        super().__init__()
        if range[0] >= range[1]:
            raise ConfigError(f"a discriminator's range goes from low to high, got {range}")
        if not 0 <= augment <= 1:
            raise ConfigError(f"augment is a probability, got {augment}")
        self.range, self.augment, self.cutout = range, augment, cutout

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] to logits, positive where they look real. Raises InputError for a size it cannot judge."""
        return self.logits(self.shown(pixels))

    def shown(self, pixels: Tensor) -> Tensor:
        """Pixels as the net sees them: checked, in its range, augmented in training."""
        size = tuple(pixels.shape[2:])
        if not self.sizes.legal(size):
            kind = "x".join(map(str, size))
            raise InputError(f"{type(self).__name__} judges {self.sizes.describe()}, got {kind}: change data.size")
        low, high = self.range
        x = pixels * (high - low) + low
        if self.augment and self.training:
            from vistok.losses.augment import diff_augment

            x = diff_augment(x, self.augment, self.cutout)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Logits of pixels in the judge's own range."""
        raise NotImplementedError


def build_discriminator(name: str, **options: Any) -> Discriminator:
    """The discriminator `name` with fresh weights; `options` are those of its class.

    Raises UnknownNameError for a name that is not in DISCRIMINATORS, ConfigError for an option that does not exist.
    """
    if name not in _TABLE:
        hint = nearest(name, DISCRIMINATORS) or "; known: " + ", ".join(DISCRIMINATORS)
        raise UnknownNameError(f"no discriminator {name!r}{hint}")
    module, cls, fixed = _TABLE[name]
    made = getattr(import_module(f"vistok.losses.{module}"), cls)
    try:
        return made(**fixed, **options)
    except TypeError as error:
        raise ConfigError(f"discriminator {name!r}: {error}") from error
