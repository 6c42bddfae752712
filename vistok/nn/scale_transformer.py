"""VAR's transformer (arXiv:2404.02905): DiT-like blocks over the token maps of all scales, under a condition.

    x (B, N, W), condition (B, W) -> blocks -> (B, N, W)
        x += gate1 attention(norm(x) (1 + scale1) + shift1)      x += gate2 MLP(norm(x) (1 + scale2) + shift2)

Attention is by angle: queries and keys have unit length, and each head learns by how much their products are
multiplied. A position sees its own scale and the coarser ones (`coarser_or_same`); drawing scale by scale with a cache
needs no mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.nn.attention import KeyValues, SelfAttention
from vistok.nn.transformer import MLP, Modulation, modulate

MOST = 100.0  # that products of queries and keys are multiplied with


@dataclass(frozen=True)
class ScaleTransformerSize:
    """Width W, number of blocks and heads.

    by_angle         attention by angle; otherwise products are scaled by 1 / (4 sqrt(head))
    shared_condition one map from the condition for all blocks, each of which adds vectors of its own (the 512 model)
    mlp              hidden values of the MLP, relative to W
    drop_path        share of items that skip a branch of the last block in training, less in earlier ones; 0.1 for
                     every 24 blocks unless given
    dropout          of attention and MLP, in training
    """

    width: int = 1024
    depth: int = 16
    heads: int = 16
    by_angle: bool = True
    shared_condition: bool = False
    mlp: float = 4.0
    drop_path: float | None = None
    dropout: float = 0.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"{self.heads} heads do not divide a width of {self.width}")

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def skip(self) -> float:
        """`drop_path` of the last block."""
        return 0.1 * self.depth / 24 if self.drop_path is None else self.drop_path


class QueryValueBias(nn.Linear):
    """The map to queries, keys and values (.., W) -> (.., 3 W), with biases for queries and values alone."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))


class UnitLength(nn.Module):
    """Vectors (B, heads, N, head) scaled to unit length."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


class LearnedLength(nn.Module):
    """Vectors (B, heads, N, head) scaled to a length that each head learns as a logarithm: 4 at first, at most 100."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.log_length = nn.Parameter(torch.full((heads, 1, 1), log(4.0)))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.log_length.clamp(max=log(MOST)).exp()


class ScaleAttention(SelfAttention):
    """Self-attention of VAR; see the module's docstring."""

    def __init__(self, size: ScaleTransformerSize) -> None:
        scale = 1.0 if size.by_angle else 0.25 / sqrt(size.head)
        super().__init__(size.width, size.heads, scale=scale, dropout=size.dropout)
        self.qkv = QueryValueBias(size.width)
        if size.by_angle:
            self.q_norm, self.k_norm = LearnedLength(size.heads), UnitLength()


class ScaleBlock(nn.Module):
    """One block, (B, N, W) to (B, N, W). Parts of its modulation, in order: gates, scales, shifts, two of each."""

    def __init__(self, size: ScaleTransformerSize, skip: float) -> None:
        super().__init__()
        width = size.width
        self.skip, self.dropout = skip, size.dropout
        self.norm = nn.LayerNorm(width, eps=size.eps, elementwise_affine=False)
        self.attention = ScaleAttention(size)
        self.mlp = MLP(width, round(width * size.mlp), activation="gelu-tanh", dropout=size.dropout)
        self.modulation = None if size.shared_condition else Modulation(width, width, 6)
        self.offsets = nn.Parameter(torch.zeros(6, width)) if size.shared_condition else None

    def parts(self, condition: Tensor, shared: Tensor | None) -> Sequence[Tensor]:
        """The six vectors (B, 1, W) of a condition (B, W), or of what all blocks `share`d made of it, (B, 6, W)."""
        if self.modulation is not None:
            return self.modulation(condition)
        assert shared is not None
        assert self.offsets is not None
        return (shared + self.offsets).split(1, 1)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        *,
        shared: Tensor | None = None,
        mask: Tensor | None = None,
        past: KeyValues | None = None,
    ) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = self.parts(condition, shared)
        attended = self.attention(modulate(self.norm(x), shift1, scale1), mask=mask, past=past)
        x = torch.addcmul(x, self._kept(gate1), attended)
        return torch.addcmul(x, self._kept(gate2), self.mlp(modulate(self.norm(x), shift2, scale2)))

    def _kept(self, gate: Tensor) -> Tensor:
        """The gate of a branch, closed in training for a share of the items (arXiv:1603.09382)."""
        if not (self.skip and self.training):
            return gate
        return gate * gate.new_empty(len(gate), 1, 1).bernoulli_(1 - self.skip) / (1 - self.skip)


class ScaleTransformer(nn.Module):
    """A stack of blocks, without a final norm."""

    def __init__(self, size: ScaleTransformerSize) -> None:
        super().__init__()
        self.size = size
        last = max(size.depth - 1, 1)
        self.modulation = Modulation(size.width, size.width, 6) if size.shared_condition else None
        self.blocks = nn.ModuleList(ScaleBlock(size, size.skip * index / last) for index in range(size.depth))

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        *,
        mask: Tensor | None = None,
        past: Sequence[KeyValues] | None = None,
    ) -> Tensor:
        """`x` (B, N, W) under `condition` (B, W); `past`, from `cache`, holds the positions before these N."""
        shared = None if self.modulation is None else torch.cat(self.modulation(condition), 1)
        for index, block in enumerate(self.blocks):
            x = block(x, condition, shared=shared, mask=mask, past=None if past is None else past[index])
        return x

    def cache(self, batch: int, length: int) -> list[KeyValues]:
        """Room for the keys and values of `length` positions, one per block."""
        weight = next(self.parameters())
        size = self.size
        return [
            KeyValues(batch, size.heads, length, size.head, dtype=weight.dtype, device=weight.device)
            for _ in self.blocks
        ]

    @torch.no_grad()
    def initialise(self, gate: float) -> None:
        """As VAR starts: linear maps from N(0, 1 / 3 W), those that end a branch divided by sqrt(2 depth), maps to
        scales and shifts by two, maps to gates times `gate`; biases zero.
        """
        size = self.size
        initialise(self, size.width)
        for block in self.blocks:
            assert isinstance(block, ScaleBlock)
            block.attention.out.weight /= sqrt(2 * size.depth)
            block.mlp.contract.weight /= sqrt(2 * size.depth)
            if block.modulation is not None:
                parts = block.modulation.project.weight.view(6, -1)
            else:
                assert block.offsets is not None
                parts = block.offsets.normal_(std=sqrt(1 / size.width))
            parts[:2] *= gate
            parts[2:] *= 0.5


@torch.no_grad()
def initialise(module: nn.Module, width: int) -> None:
    """Linear maps and embeddings from N(0, 1 / 3 W), biases zero."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(part.weight, std=sqrt(1 / width / 3))
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def level_of(lengths: Sequence[int]) -> Tensor:
    """The scale of every position, long (N,), for scales of so many positions each."""
    return torch.cat([torch.full((length,), level) for level, length in enumerate(lengths)])


def coarser_or_same(level: Tensor) -> Tensor:
    """Which positions may see which, bool (N, N), by their scales (N,): their own scale and all before it."""
    return level[:, None] >= level[None]
