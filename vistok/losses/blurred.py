"""A patch discriminator that blurs before it shrinks: TiTok's, MaskBit's and One-D-Piece's.

    pixels (B, 3, H, W) -> 5x5 conv -> [3x3 conv -> blur, stride 2 -> GroupNorm -> LeakyReLU] x stages
        -> largest value of each cell of a 16 x 16 grid -> 1x1 conv, LeakyReLU, 5x5 conv -> logits (B, 1, 16, 16)

Sources: MaskBit (arXiv:2409.16211), TiTok (2406.07550). Pixels are seen in [0, 1].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.keys import Drop, KeyTable, Rename, State
from vistok.losses.discriminators import Discriminator, JudgedSizes

GRID = 16
SLOPE = 0.1


class Blur(nn.Module):
    """The binomial kernel [1, 3, 3, 1] along both sides, every second pixel: (B, C, H, W) to (B, C, H/2, W/2).

    `down` 1 keeps the size. Borders are zero, as many as TensorFlow's "same" has; sums to 1.
    """

    kernel: Tensor

    def __init__(self, down: int = 2) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.down = down
        self.register_buffer("kernel", torch.outer(taps, taps) / 64, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        sides = []
        for side in (x.shape[-1], x.shape[-2]):
            missing = max((-(-side // self.down) - 1) * self.down + 4 - side, 0)
            sides += [missing // 2, missing - missing // 2]
        width = x.shape[1]
        weight = self.kernel.to(x.dtype).expand(width, 1, 4, 4)
        return F.conv2d(F.pad(x, sides), weight, stride=self.down, groups=width)


class BlurredDiscriminator(Discriminator):
    """See the module's docstring. `width` is doubled at each of `stages` but the first."""

    def __init__(self, channels: int = 3, width: int = 128, stages: int = 3, **options: Any) -> None:
        super().__init__(**({"range": (0.0, 1.0)} | options))
        if stages < 1 or width < 32 or width % 32:
            raise ConfigError(f"needs stages of at least 1 and a width that 32 divides, got {stages} and {width}")
        widths = [width * 2**stage for stage in range(stages)]
        self.first = nn.Conv2d(channels, width, 5, padding=2)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(entering, leaving, 3, padding=1), Blur(), nn.GroupNorm(32, leaving), nn.LeakyReLU(SLOPE)
            )
            for entering, leaving in zip([width, *widths], widths, strict=False)
        )
        self.mix = nn.Conv2d(widths[-1], widths[-1], 1)
        self.last = nn.Conv2d(widths[-1], 1, 5, padding=2)
        self.sizes = JudgedSizes(minimum=2)

    def logits(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 1, 16, 16)."""
        x = F.leaky_relu(self.first(x), SLOPE)
        for stage in self.stages:
            x = stage(x)
        x = F.adaptive_max_pool2d(x, GRID)
        return self.last(F.leaky_relu(self.mix(x), SLOPE))


def key_table(stages: int = 3) -> KeyTable:
    """The authors' `NLayerDiscriminator` to ours. The blur's kernel is a constant here."""

    def kernels(ours: State) -> dict[str, Tensor]:
        return {f"blocks.{stage}.1.kernel": Blur().kernel[None, None] for stage in range(stages)}

    return KeyTable(
        Drop("blocks.#.1.kernel", restore=kernels),
        Rename("block_in.0.*", "first.*"),
        Rename("blocks.#.#.*", "stages.#.#.*"),
        Rename("to_logits.0.*", "mix.*"),
        Rename("to_logits.2.*", "last.*"),
    )
