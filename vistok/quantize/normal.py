"""Quantization after training: every number of a normal latent on its own, to one of 2^b levels (TokenBridge).

    z (B, N, D) -> (z - mean) / deviation -> each number to the nearest of 2^b levels -> codes (B, N, D)

"Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation" (arXiv:2503.16430, section 3.2). Levels
are the means of a standard normal over 2^b intervals of equal probability, clamped to +-`clamp` deviations; the range
low..high of the latent is stretched over -clamp..clamp first. Nothing is learned and no gradient is needed.
"""

from functools import cache

import torch
from torch import Tensor

from vistok.errors import ConfigError
from vistok.quantize.base import Quantized, Quantizer, positive, within
from vistok.quantize.rotation import straight_through


class NormalLevels:
    """The levels themselves: numbers of any shape to codes, and codes to numbers. Always in float32.

    bits, low, high, clamp    b, the range that is covered, and the deviations it is stretched over

    Codes are those of the nearest level, the lower one where two are as near. Raises ConfigError for an empty range.
    """

    def __init__(self, bits: int = 6, low: float = -5.0, high: float = 5.0, clamp: float = 3.0) -> None:
        self.bits = positive("bits", bits)
        self.clamp = within("clamp", clamp, 1e-3)
        if self.bits > 16 or not low < high:
            raise ConfigError(f"levels of {bits} bits over {low}..{high}; expected at most 16 bits and low < high")
        self.low, self.high = float(low), float(high)

    def levels(self, device: torch.device | None = None) -> Tensor:
        """(2^b,) in units of the stretched range."""
        return _levels(2**self.bits, self.clamp, device or torch.device("cpu"))

    def encode(self, x: Tensor) -> Tensor:
        """Codes, long, of numbers of any shape; those outside the range get the outermost levels."""
        stretched = (x.float() - self.low) / (self.high - self.low) * (2 * self.clamp) - self.clamp
        levels = self.levels(x.device)
        return torch.bucketize(stretched.contiguous(), (levels[1:] + levels[:-1]) / 2)

    def decode(self, codes: Tensor) -> Tensor:
        """The numbers that codes stand for."""
        return (self.levels(codes.device)[codes] + self.clamp) / (2 * self.clamp) * (self.high - self.low) + self.low


def normal_levels(count: int, clamp: float = 3.0) -> tuple[Tensor, Tensor]:
    """Levels (count,) and boundaries (count + 1,): the means of a standard normal between its clamped quantiles."""
    shares = torch.linspace(0, 1, count + 1, dtype=torch.float64, device="cpu")
    quantiles = torch.special.ndtri(shares).clamp(-clamp, clamp)
    density = torch.exp(-quantiles.square() / 2) / (2 * torch.pi) ** 0.5
    levels = (density[:-1] - density[1:]) / torch.special.ndtr(quantiles).diff()
    levels = (levels - levels.flip(0)) / 2  # exactly symmetric: a latent of 0 lies halfway between the middle two
    return levels.float(), quantiles.float()


@cache
def _levels(count: int, clamp: float, device: torch.device) -> Tensor:
    return normal_levels(count, clamp)[0].to(device)


class NormalQuantizer(Quantizer):
    """`NormalLevels` for latents (B, N, D) whose channels have the mean and variance in the buffers.

    dim         D; every position gets D codes of 2^b
    deviation   of a published latent, the same in all channels, around 0
    momentum    with which `observe` follows the latents of a VAE in training
    """

    running_mean: Tensor  # (D,)
    running_var: Tensor  # (D,)

    def __init__(
        self,
        dim: int,
        bits: int = 6,
        *,
        low: float = -5.0,
        high: float = 5.0,
        clamp: float = 3.0,
        deviation: float = 1.0,
        momentum: float = 0.02,
    ):
        super().__init__(dim, (2 ** positive("bits", bits),) * dim)
        self.levels = NormalLevels(bits, low, high, clamp)
        self.momentum = within("momentum", momentum, 0, 1)
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.full((dim,), within("deviation", deviation, 1e-12) ** 2))

    def standardise(self, z: Tensor) -> Tensor:
        """Latents (.., D) to mean 0 and variance 1."""
        return (z - self.running_mean.to(z)) * self.running_var.rsqrt().to(z)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        return x * self.running_var.sqrt().to(x) + self.running_mean.to(x)

    @torch.no_grad()
    def observe(self, z: Tensor) -> None:
        """Let mean and variance follow the latents (B, N, D) of a batch."""
        rows = z.detach().flatten(0, -2).float()
        if len(rows) > 1:
            self.running_mean.lerp_(rows.mean(0).to(self.running_mean), self.momentum)
            self.running_var.lerp_(rows.var(0).to(self.running_var), self.momentum)

    def _quantize(self, z: Tensor) -> Quantized:
        codes = self._encode(z)
        return Quantized(straight_through(z, self._decode(codes).to(z.dtype)), codes)

    def _encode(self, z: Tensor) -> Tensor:
        codes = self.levels.encode(self.standardise(z))
        return codes if self.dim > 1 else codes[..., 0]

    def _decode(self, codes: Tensor) -> Tensor:
        return self.restore(self.levels.decode(codes if self.dim > 1 else codes[..., None]))
