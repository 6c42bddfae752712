"""The GPT trunk of LlamaGen (arXiv:2406.06525), which most autoregressive generators of images stand on.

    x (B, N, W) -> blocks: x += attention(RMSNorm x), x += SwiGLU(RMSNorm x) -> (B, N, W)

No biases. Positions are turned by a 2D rotation; the condition stands before the grid and has cos = sin = 0, so that
its queries and keys are zero vectors: its score is 0 whatever it says, and its value alone counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.nn.attention import KeyValues, SelfAttention
from vistok.nn.positions import Rotation, rotation_2d
from vistok.nn.transformer import MLP


@dataclass(frozen=True)
class GPTSize:
    """Width W, number of blocks and heads of a trunk; `hidden` values in its SwiGLU, 8/3 W rounded up to 256s if None.

    dropout acts on what attention and SwiGLU add, in training. `kv_heads` heads of keys and values, fewer than the
    queries', are shared by groups of those (arXiv:2305.13245).
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int | None = None
    dropout: float = 0.1
    eps: float = 1e-5
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ConfigError(f"{self.heads} heads of a width of {self.width}; a head's width must be a multiple of 4")
        if self.heads % (self.kv_heads or self.heads):
            raise ConfigError(f"{self.kv_heads} heads of keys and values do not divide {self.heads} heads")

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def swiglu(self) -> int:
        """Hidden values of the SwiGLU."""
        return self.hidden or ceil(int(8 * self.width / 3) / 256) * 256


class GPTBlock(nn.Module):
    """One block, (B, N, W) to (B, N, W)."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(size.width, eps=size.eps)
        self.attention = SelfAttention(size.width, size.heads, kv_heads=size.kv_heads, bias=False)
        self.norm2 = nn.RMSNorm(size.width, eps=size.eps)
        self.mlp = MLP(size.width, size.swiglu, activation="swiglu", bias=False)
        self.dropout = nn.Dropout(size.dropout)

    def forward(
        self, x: Tensor, rotation: Rotation, *, past: KeyValues | None = None, mask: Tensor | None = None
    ) -> Tensor:
        attended = self.attention(self.norm1(x), rotation=rotation, past=past, mask=mask, causal=mask is None)
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.ModuleList):
    """A stack of blocks, causal unless a mask says otherwise. No final norm: heads differ in where they put it."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__(GPTBlock(size) for _ in range(size.depth))
        self.size = size

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        *,
        past: Sequence[KeyValues] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, N, W) to (B, N, W). `rotation` is that of these N positions; `past`, from `cache`, holds those before."""
        for index, block in enumerate(self):
            x = block(x, rotation, past=None if past is None else past[index], mask=mask)
        return x

    def cache(self, batch: int, length: int) -> list[KeyValues]:
        """Room for the keys and values of `length` positions, one per block."""
        weight, heads = next(self.parameters()), self.size.kv_heads or self.size.heads
        return [KeyValues(batch, heads, length, self.size.head, dtype=weight.dtype, device=weight.device) for _ in self]


def prefixed_rotation(
    prefix: int, rows: int, columns: int, head: int, *, base: float = 10_000.0, device: torch.device | None = None
) -> Rotation:
    """Rotation of `prefix` positions of a condition, with cos = sin = 0, before a grid in row-major order."""
    grid = rotation_2d(rows, columns, head, base=base, device=device)
    zeros = grid.cos.new_zeros(prefix, head // 2)
    return Rotation(torch.cat([zeros, grid.cos]), torch.cat([zeros, grid.sin]))


def initialise(module: nn.Module) -> None:
    """Linear maps and embeddings from N(0, 0.02), biases zero, as LlamaGen starts."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
