"""MM-DiT: pictures and text as two streams with weights of their own that attend together (SD3, arXiv:2403.03206).

    x (B, N, W)     -> norm, shift, scale -> q, k, v -+-> attention -> x += gate out(..),    x += gate MLP(..)
    text (B, L, W)  -> norm, shift, scale -> q, k, v -+   over both -> text += gate out(..), text += gate MLP(..)

Shifts, scales and gates come from one vector per item (B, W). The last block gives no text: nobody reads it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.nn.attention import attend
from vistok.nn.transformer import MLP, Modulation, modulate

EPS = 1e-6


class JointBlock(nn.Module):
    """One block of both streams; `last` reads the text and leaves it.

    Chunks of the modulations, in order: shift, scale, gate of the attention; shift, scale, gate of the MLP. That of a
    last block's text: scale, shift.
    """

    def __init__(self, width: int, heads: int, *, last: bool = False) -> None:
        super().__init__()
        self.heads, self.last = heads, last
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.modulation = Modulation(width, width, 6)
        self.text_modulation = Modulation(width, width, 2 if last else 6)
        self.qkv = nn.Linear(width, 3 * width)
        self.text_qkv = nn.Linear(width, 3 * width)  # of a last block, the queries are in checkpoints and unused
        self.out = nn.Linear(width, width)
        self.mlp = MLP(width, 4 * width, activation="gelu-tanh")
        if not last:
            self.text_out = nn.Linear(width, width)
            self.text_mlp = MLP(width, 4 * width, activation="gelu-tanh")

    def forward(self, x: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """`x` (B, N, W), `text` (B, L, W), `condition` (B, W) to both streams, the text of a last block None."""
        count = x.shape[1]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        told = self.text_modulation(condition)
        text_scale, text_shift = told if self.last else (told[1], told[0])
        queries, keys, values = self._heads(self.qkv, modulate(self.norm(x), shift1, scale1), 3)
        read = modulate(self.norm(text), text_shift, text_scale)
        if self.last:
            text_keys, text_values = self._heads(self.text_qkv, read, 2)
        else:
            text_queries, text_keys, text_values = self._heads(self.text_qkv, read, 3)
            queries = torch.cat([queries, text_queries], 2)
        joined = attend(queries, torch.cat([keys, text_keys], 2), torch.cat([values, text_values], 2))
        x = torch.addcmul(x, gate1, self.out(joined[:, :count]))
        x = torch.addcmul(x, gate2, self.mlp(modulate(self.norm(x), shift2, scale2)))
        if self.last:
            return x, None
        text = torch.addcmul(text, told[2], self.text_out(joined[:, count:]))
        return x, torch.addcmul(text, told[5], self.text_mlp(modulate(self.norm(text), told[3], told[4])))

    def _heads(self, project: nn.Linear, x: Tensor, parts: int) -> Tensor:
        """The last `parts` of queries, keys and values, each (B, heads, N, head)."""
        width = x.shape[-1]
        begin = (3 - parts) * width
        out = F.linear(x, project.weight[begin:], None if project.bias is None else project.bias[begin:])
        return out.unflatten(-1, (parts, self.heads, width // self.heads)).permute(2, 0, 3, 1, 4)


class ModulatedNorm(nn.Module):
    """The norm behind the last block, scaled and shifted by the condition; chunks in this order."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.modulation = Modulation(width, width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`x` (B, N, W), `condition` (B, W)."""
        scale, shift = self.modulation(condition)
        return modulate(self.norm(x), shift, scale)
