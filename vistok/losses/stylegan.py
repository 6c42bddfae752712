"""StyleGAN2's discriminator: a residual net that shrinks a picture to 4 x 4 and gives it one logit.

    pixels (B, 3, S, S) -> 1x1 conv -> [3x3 conv, 3x3 conv after a blur with stride 2, + blurred 1x1 shortcut] x
        log2(S / 4) -> + deviation within small groups of the batch -> 3x3 conv -> two linear maps -> logits (B, 1)

Source: arXiv:1912.04958, with equalised learning rates: weights are drawn from N(0, 1) and scaled when used.
"""

from math import log2, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.losses.blurred import Blur
from vistok.losses.discriminators import Discriminator, JudgedSizes

GAIN = sqrt(2)
GROUP = 4  # pictures whose deviation is compared


class StyleDiscriminator(Discriminator):
    """For squares of `size`, a power of two from 8 on.

    width        channels at full resolution, doubled with every halving up to `limit`; or
    multipliers  channels at each resolution, the full one first, as multiples of `width` (TexTok: 128 x 1, 2, 4, 4, 4,
                 4, the last of them at 8 x 8)
    """

    def __init__(
        self,
        size: int = 256,
        width: int = 128,
        limit: int = 512,
        multipliers: tuple[float, ...] | None = None,
        channels: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if size < 8 or size & (size - 1):
            raise ConfigError(
                f"StyleGAN's discriminator judges squares whose side is a power of two from 8 on, got {size}"
            )
        halvings = int(log2(size)) - 2
        if multipliers is None:
            widths = [min(width * 2**step, limit) for step in range(halvings + 1)]
        else:
            if len(multipliers) != halvings:
                raise ConfigError(f"size {size} needs {halvings} multipliers, got {len(multipliers)}")
            widths = [int(width * factor) for factor in (*multipliers, multipliers[-1])]
        self.first = ScaledConv(channels, widths[0], 1)
        self.blocks = nn.ModuleList(Residual(widths[step], widths[step + 1]) for step in range(halvings))
        self.last = ScaledConv(widths[-1] + 1, widths[-1], 3)
        self.join = ScaledLinear(widths[-1] * 16, widths[-1])
        self.out = ScaledLinear(widths[-1], 1)
        self.sizes = JudgedSizes(only=size)

    def logits(self, x: Tensor) -> Tensor:
        """(B, C, S, S) to (B, 1)."""
        x = _activate(self.first(x))
        for block in self.blocks:
            x = block(x)
        x = _activate(self.last(torch.cat([x, _deviation(x)], 1)))
        return self.out(_activate(self.join(x.flatten(1))))


class ScaledConv(nn.Module):
    """A convolution that keeps sizes (with `blur`: halves them, after a blur); weights count 1 / sqrt(inputs)."""

    def __init__(self, entering: int, leaving: int, kernel: int, blur: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(leaving, entering, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(leaving)) if bias else None
        self.blur = Blur(2 if kernel == 1 else 1) if blur else None
        self.stride = 2 if blur and kernel > 1 else 1
        self.scale = (entering * kernel * kernel) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.blur is None else self.blur(x)
        pad = self.weight.shape[-1] // 2
        return F.conv2d(x, self.weight * self.scale, self.bias, stride=self.stride, padding=pad)


class ScaledLinear(nn.Module):
    """A linear map whose weights count 1 / sqrt(inputs)."""

    def __init__(self, entering: int, leaving: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(leaving, entering))
        self.bias = nn.Parameter(torch.zeros(leaving))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight.shape[1] ** -0.5, self.bias)


class Residual(nn.Module):
    """(branch + shortcut) / sqrt(2), half the size."""

    def __init__(self, entering: int, leaving: int) -> None:
        super().__init__()
        self.conv1 = ScaledConv(entering, entering, 3)
        self.conv2 = ScaledConv(entering, leaving, 3, blur=True)
        self.shortcut = ScaledConv(entering, leaving, 1, blur=True, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (_activate(self.conv2(_activate(self.conv1(x)))) + self.shortcut(x)) / sqrt(2)


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2) * GAIN


def _deviation(x: Tensor) -> Tensor:
    """One more channel (B, 1, h, w): the mean deviation of all features within groups of up to GROUP pictures."""
    batch = len(x)
    members = next(count for count in range(min(GROUP, batch), 0, -1) if batch % count == 0)
    grouped = x.float().unflatten(0, (members, -1))
    spread = (grouped.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))  # (groups,)
    return spread.repeat(members)[:, None, None, None].expand(-1, 1, *x.shape[-2:]).to(x.dtype)
