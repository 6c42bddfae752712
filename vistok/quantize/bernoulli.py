"""Bernoulli bits: every position becomes C coin throws, and a linear map of the bits is what the decoder reads.

    z (B, N, D) -> linear, sigmoid -> probabilities (B, N, C) -> bits (B, N, C) -> sum of rows that are set (B, N, D)

Source: "Binary Latent Diffusion" (arXiv:2304.04820, section 3.1). Training throws the coins, evaluation takes the more
likely side; the gradient of a bit is that of its probability.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from vistok.errors import InputError
from vistok.quantize.base import Quantized, Quantizer, positive, within


class BernoulliQuantizer(Quantizer):
    """C bits per position.

    dim, bits      D of the latent and of the vectors; C
    signed         bits count as -1 and 1, from a tanh, instead of 0 and 1, from a sigmoid
    deterministic  no coins in training either
    code_weight    of mean s (1 - s) with s the sigmoid of the activation, as published with weight 0
    rng            the generator of the throws, or None for torch's own

    Losses: "code" where it has a weight; stats: "code", "sure" (share of probabilities beyond 0.1 or 0.9).
    """

    def __init__(
        self, dim: int, bits: int, *, signed: bool = False, deterministic: bool = False, code_weight: float = 0.0
    ):
        super().__init__(dim, (2,) * positive("bits", bits))
        self.bits, self.signed, self.deterministic = bits, signed, deterministic
        self.code_weight = within("code_weight", code_weight)
        self.project = nn.Linear(dim, bits)
        self.embed = nn.Parameter(torch.randn(bits, dim))
        self.rng: torch.Generator | None = None

    def activation(self, z: Tensor) -> Tensor:
        """What a bit's gradient passes to, (B, N, C): its probability, or with `signed` tanh, in -1..1."""
        logits = linear(z, self.project.weight.to(z.dtype), self.project.bias.to(z.dtype))
        return logits.tanh() if self.signed else logits.sigmoid()

    def probabilities(self, activation: Tensor) -> Tensor:
        """P(bit = 1) of an activation."""
        return (activation + 1) / 2 if self.signed else activation

    def vectors(self, values: Tensor) -> Tensor:
        """(B, N, C) bits as they count, to (B, N, D)."""
        return values @ self.embed.to(values.dtype)

    @torch.no_grad()
    def encode(self, z: Tensor, *, seed: int | Sequence[int] | None = None) -> Tensor:
        """Bits (B, N, C) of the latent (B, N, D): the likelier side of each coin, or throws from each item's `seed`."""
        if seed is None:
            return super().encode(z)
        seeds = [seed] * len(z) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(z):
            raise InputError(f"{len(seeds)} seeds for {len(z)} items; give one for all, or one for each")
        p = self.probabilities(self.activation(self._checked(z)))
        drawn = [torch.rand(p.shape[1:], generator=torch.Generator().manual_seed(int(one))) for one in seeds]
        uniform = torch.stack(drawn).to(p.device) if drawn else torch.zeros_like(p)
        return self._as_codes((uniform < p).long())

    def _quantize(self, z: Tensor) -> Quantized:
        activation = self.activation(z)
        p = self.probabilities(activation)
        if self.training and not self.deterministic:
            device = p.device if self.rng is None else self.rng.device
            bits = torch.rand(p.shape, generator=self.rng, device=device).to(p.device) < p.detach()
        else:
            bits = p.detach() > 0.5
        values = self._as_values(bits, activation.dtype)
        second = activation.sigmoid()
        code = (second * (1 - second)).mean() if z.numel() else activation.sum()
        sure = (p.detach() - 0.5).abs().gt(0.4).float().mean() if z.numel() else code
        return Quantized(
            self.vectors(activation + (values - activation).detach()),
            self._as_codes(bits.long()),
            {"code": self.code_weight * code} if self.code_weight else {},
            {"code": code.detach(), "sure": sure.detach()},
        )

    def _encode(self, z: Tensor) -> Tensor:
        return self._as_codes((self.probabilities(self.activation(z)) > 0.5).long())

    def _decode(self, codes: Tensor) -> Tensor:
        bits = codes if self.bits > 1 else codes[..., None]
        dtype = self.embed.dtype if self.embed.dtype == torch.float64 else torch.float32
        return self.vectors(self._as_values(bits, dtype))

    def _as_values(self, bits: Tensor, dtype: torch.dtype) -> Tensor:
        values = bits.to(dtype)
        return 2 * values - 1 if self.signed else values

    def _as_codes(self, bits: Tensor) -> Tensor:
        return bits if self.bits > 1 else bits[..., 0]
