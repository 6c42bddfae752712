"""Gaussian latents (VAE, arXiv:1312.6114, as in latent diffusion): continuous tokens with a KL term.

moments (B, N, 2 D) = mean | log variance  ->  mean, or mean + std * noise  (B, N, D)
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vistok.errors import InputError
from vistok.quantize.base import Quantized, Quantizer, one_of, within

_LOG_VARIANCE = (-30.0, 20.0)  # clamped to, as latent diffusion has it


class GaussianQuantizer(Quantizer):
    """A diagonal Gaussian per position; nothing is rounded, so there are no codes and `codebooks` is ().

    dim        D of a vector; the latent that comes in has 2 D: means first, then log variances, clamped to -30..20
    weight     of the KL divergence to the standard normal
    reduction  "item": the KL is summed over an item's numbers (latent diffusion); "mean": averaged over them

    `forward` samples in training mode and gives the mode otherwise; a seed samples always. Losses: "kl"; stats: "kl"
    (unweighted). Raises ConfigError for illegal options, InputError for wrong shapes.
    """

    input_dim_factor = 2

    def __init__(self, dim: int, *, weight: float = 1e-6, reduction: Literal["item", "mean"] = "item"):
        super().__init__(dim, ())
        self.weight = within("weight", weight)
        self.reduction = one_of("reduction", reduction, ("item", "mean"))
        self._seed: int | Sequence[int] | None = None

    def forward(self, z: Tensor, *, seed: int | Sequence[int] | None = None) -> Quantized:
        """Vectors (B, N, D) of the moments `z` (B, N, 2 D); `seed` as in `encode`."""
        self._seed = seed
        try:
            return super().forward(z)
        finally:
            self._seed = None

    @torch.no_grad()
    def encode(self, z: Tensor, *, seed: int | Sequence[int] | None = None) -> Tensor:
        """Vectors (B, N, D) of the moments `z` (B, N, 2 D): the mode, or with `seed` a sample.

        `seed` is one number for all items or one for each. An item's noise depends on its seed alone, not on the batch.
        """
        z = self._checked(z)
        mean, log_variance = self.moments(z)
        return mean if seed is None else mean + torch.exp(log_variance / 2) * _noise(mean, seed)

    def decode(self, codes: Tensor) -> Tensor:
        """The vectors themselves, (B, N, D)."""
        if codes.ndim != 3 or codes.shape[-1] != self.dim:
            raise InputError(f"Gaussian tokens are vectors of shape (B, N, {self.dim}), got {tuple(codes.shape)}")
        return codes

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and clamped log variance, each (B, N, D)."""
        mean, log_variance = z.chunk(2, dim=-1)
        return mean, log_variance.clamp(*_LOG_VARIANCE)

    def _quantize(self, z: Tensor) -> Quantized:
        mean, log_variance = self.moments(z)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        kl = divergence.sum() / max(len(z), 1) if self.reduction == "item" else divergence.mean()
        if self._seed is not None:
            noise = _noise(mean, self._seed)
        elif self.training:
            noise = torch.randn_like(mean)
        else:
            noise = None
        vectors = mean if noise is None else mean + torch.exp(log_variance / 2) * noise
        return Quantized(vectors, None, {"kl": self.weight * kl}, {"kl": kl.detach()})


def _noise(like: Tensor, seed: int | Sequence[int]) -> Tensor:
    """Standard normal noise of the shape of `like`, item by item from its own CPU generator: alike on every device."""
    seeds = [seed] * len(like) if isinstance(seed, int) else [int(value) for value in seed]
    if len(seeds) != len(like):
        raise InputError(f"{len(seeds)} seeds for {len(like)} items; give one for all, or one for each")
    drawn = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(value)) for value in seeds]
    return torch.stack(drawn).to(like) if drawn else torch.zeros_like(like)
