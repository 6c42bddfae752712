"""PatchGAN: convolutions whose logits each judge one overlapping patch, in two dimensions and in three.

    pixels (B, 3, H, W) -> 4x4 convolutions, stride 2, .. -> logits (B, 1, H/8 - 2, W/8 - 2)   PatchDiscriminator
    pixels (B, 3, [T,] H, W) -> the same with padding 2   -> logits (B, 1, [t,] h, w)          ClipDiscriminator

Sources: pix2pix (arXiv:1611.07004) in VQGAN's form (2012.09841); TATS (2204.03638) in OmniTokenizer's (2406.09399).
BatchNorm's statistics are those of all processes together.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.keys import KeyTable, Rename
from vistok.losses.discriminators import Discriminator, JudgedSizes
from vistok.nn.batch_norm import ActNorm, SharedBatchNorm


class PatchDiscriminator(Discriminator):
    """`layers` strided stages, then logits per patch, (B, C, H, W) -> (B, 1, h, w).

    The first stage has no normalisation; later ones have BatchNorm ("batch") or ActNorm ("act"). Weights start at
    N(0, 0.02). Further options are those of `Discriminator`.
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 64,
        layers: int = 3,
        norm: Literal["batch", "act"] = "batch",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if width < 1 or layers < 1:
            raise ConfigError(f"a patch discriminator needs width and layers of at least 1, got {width} and {layers}")
        if norm not in ("batch", "act"):
            raise ConfigError(f"norm is 'batch' or 'act', got {norm!r}")
        stages: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        entering = width
        for stage in range(1, layers + 1):
            leaving = width * min(2**stage, 8)
            stride = 2 if stage < layers else 1
            stages += [
                nn.Conv2d(entering, leaving, 4, stride=stride, padding=1, bias=norm == "act"),
                SharedBatchNorm(leaving) if norm == "batch" else ActNorm(leaving),
                nn.LeakyReLU(0.2),
            ]
            entering = leaving
        self.main = nn.Sequential(*stages, nn.Conv2d(entering, 1, 4, stride=1, padding=1))
        self.sizes = JudgedSizes(minimum=3 * 2**layers)
        self.apply(_start_small)

    def logits(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 1, h, w)."""
        return self.main(x)


class ClipDiscriminator(Discriminator):
    """OmniTokenizer's judge of pictures (`dims` 2) or clips (`dims` 3): five blocks, three of them with stride 2.

    noise     standard deviations per channel of what is added to the pixels in training are learned, from 0
    features  every block's output, for feature matching; the last are the logits
    """

    def __init__(
        self, dims: int = 2, channels: int = 3, width: int = 64, layers: int = 3, noise: bool = False, **options: Any
    ) -> None:
        super().__init__(**({"range": (-0.5, 0.5)} | options))
        if dims not in (2, 3):
            raise ConfigError(f"dims is 2 (pictures) or 3 (clips), got {dims}")
        conv: Any = nn.Conv2d if dims == 2 else nn.Conv3d
        self.noise = nn.Parameter(torch.zeros(channels))
        self.noisy = noise
        widths = [min(width * 2**block, 512) for block in range(layers + 1)]
        blocks = [nn.Sequential(conv(channels, widths[0], 4, stride=2, padding=2), nn.LeakyReLU(0.2))]
        for block in range(1, layers + 1):
            stride = 2 if block < layers else 1
            blocks.append(
                nn.Sequential(
                    conv(widths[block - 1], widths[block], 4, stride=stride, padding=2),
                    SharedBatchNorm(widths[block]),
                    nn.LeakyReLU(0.2),
                )
            )
        last: list[nn.Module] = [conv(widths[-1], 1, 4, stride=1, padding=2)]
        if dims == 3:
            last += [SharedBatchNorm(1), nn.LeakyReLU(0.2)]
        self.blocks = nn.ModuleList([*blocks, nn.Sequential(*last)])
        self.sizes = JudgedSizes(minimum=2, frames=None if dims == 2 else 2)

    def logits(self, x: Tensor) -> Tensor:
        """(B, C, [T,] H, W) to (B, 1, [t,] h, w)."""
        return self._features(x)[-1]

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Outputs of all blocks for pixels in [0, 1]."""
        return self._features(self.shown(pixels))

    def feature_distance(self, real: Tensor, fake: Tensor) -> Tensor:
        """Feature matching: mean absolute differences of all blocks but the last, summed; no gradient into `real`."""
        with torch.no_grad():
            targets = self.features(real)[:-1]
        return torch.stack([(a - b).abs().mean() for a, b in zip(self.features(fake), targets, strict=False)]).sum()

    def _features(self, x: Tensor) -> list[Tensor]:
        if self.noisy and self.training:
            x = x + self.noise.view(-1, *[1] * (x.ndim - 2)) * torch.randn_like(x)
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return found


def omnitokenizer_keys(layers: int = 3, prefix: str = "") -> KeyTable:
    """Their `image_discriminator` or `video_discriminator` (its keys after `prefix`) to `ClipDiscriminator`."""
    first = [Rename(f"{prefix}noise.weight", "noise"), Rename(f"{prefix}model0.0.*", "blocks.0.0.*")]
    strided = [
        rule
        for block in range(1, layers)
        for rule in (
            Rename(f"{prefix}model{block}.1.*", f"blocks.{block}.0.*"),
            Rename(f"{prefix}model{block}.2.*", f"blocks.{block}.1.*"),
        )
    ]
    return KeyTable(*first, *strided, Rename(f"{prefix}model#.#.*", "blocks.#.#.*"))


def _start_small(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, SharedBatchNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
