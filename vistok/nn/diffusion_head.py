"""MAR's diffusion head: an MLP that denoises one continuous token, given what a transformer knows of it.

    noisy token x (M, C), t (M,), condition z (M, Z)
      -> y = embed(t) + linear(z) -> h = linear(x), h += gate(y) MLP(norm h, scaled and shifted by y), ..
      -> noise (M, C), and where its variance lies between the two bounds, v (M, C)

Source: "Autoregressive Image Generation without Vector Quantization" (arXiv:2406.11838, section 3). What is sampled and
learned with it is `vistok.sampling.diffusion`.
"""

from math import log

import torch
from torch import Tensor, nn

from vistok.nn.transformer import MLP, Modulation, modulate

EPS = 1e-6
FREQUENCIES, SLOWEST = 128, 10_000.0  # of the time embedding: t / 10000^(k / 128)


class HeadBlock(nn.Module):
    """h += gate MLP(norm(h) (1 + scale) + shift), all (M, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width, width, activation="silu")
        self.modulation = Modulation(width, width, 3)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = (part[:, 0] for part in self.modulation(y))
        return torch.addcmul(h, gate, self.mlp(modulate(self.norm(h), shift, scale)))


class DiffusionHead(nn.Module):
    """See the module's docstring. `dim` is C, `condition` Z, `width` W and `depth` the number of blocks."""

    def __init__(self, dim: int, condition: int, width: int, depth: int) -> None:
        super().__init__()
        self.dim = dim
        self.time = MLP(2 * FREQUENCIES, width, out=width, activation="silu")
        self.condition = nn.Linear(condition, width)
        self.project = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.modulation = Modulation(width, width, 2)
        self.out = nn.Linear(width, 2 * dim)
        for part in self.time.expand, self.time.contract:
            nn.init.normal_(part.weight, std=0.02)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and v, each (M, C), of tokens `x` (M, C) at steps `t` (M,), knowing `z` (M, Z)."""
        y = self.time(time_embedding(t).to(x.dtype)) + self.condition(z)
        h = self.project(x)
        for block in self.blocks:
            h = block(h, y)
        shift, scale = (part[:, 0] for part in self.modulation(y))
        noise, v = self.out(modulate(self.norm(h), shift, scale)).chunk(2, -1)
        return noise, v


def time_embedding(t: Tensor) -> Tensor:
    """Cosines, then sines, of t times falling frequencies: (M,) to (M, 256), float32."""
    frequencies = torch.exp(-log(SLOWEST) * torch.arange(FREQUENCIES, device=t.device) / FREQUENCIES)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)
