"""The GPT of taming-transformers (minGPT), which the first generators over visual codes use.

    ids (B, N) -> table + learned positions -> causal blocks: x += attention(norm x), x += MLP(norm x) -> norm -> head

Biases everywhere but in the head; GELU is exact. Source: VQGAN (arXiv:2012.09841).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vistok.nn.attention import KeyValues, SelfAttention
from vistok.nn.transformer import MLP


class MinGPTBlock(nn.Module):
    """One block, (B, N, W) to (B, N, W)."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width, dropout=dropout)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, past: KeyValues | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask=mask, causal=mask is None, past=past)
        return x + self.mlp(self.norm2(x))


class MinGPT(nn.Module):
    """A vocabulary of `vocabulary` ids, `positions` learned positions, `depth` blocks."""

    def __init__(
        self, vocabulary: int, positions: int, width: int, depth: int, heads: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(positions, width))
        self.blocks = nn.ModuleList(MinGPTBlock(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.heads = heads
        for part in self.modules():
            if isinstance(part, (nn.Linear, nn.Embedding)):
                nn.init.normal_(part.weight, std=0.02)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)

    def forward(
        self,
        ids: Tensor,
        *,
        at: int | Tensor = 0,
        mask: Tensor | None = None,
        past: Sequence[KeyValues] | None = None,
    ) -> Tensor:
        """Logits (B, N, V) of what follows each of `ids` (B, N).

        `at`: position of the first id, the rest follow; or the positions themselves, (B, N). `mask` (B, 1, N, M) of
        what sees what instead of the causal one. `past` as in `SelfAttention`, a cache per block.
        """
        places = self.positions[at : at + ids.shape[1]] if isinstance(at, int) else self.positions[at]
        x = self.table(ids) + places
        for index, block in enumerate(self.blocks):
            x = block(x, mask=mask, past=None if past is None else past[index])
        return self.head(self.norm(x))

    def cache(self, batch: int, length: int) -> list[KeyValues]:
        """Room for the keys and values of `length` positions, one per block."""
        weight = self.positions
        head = weight.shape[1] // self.heads
        return [
            KeyValues(batch, self.heads, length, head, dtype=weight.dtype, device=weight.device) for _ in self.blocks
        ]
