"""TokenBridge's head: the codes of one position one after another, by a small causal transformer over dimensions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.nn.attention import KeyValues, SelfAttention
from vistok.nn.transformer import MLP, Modulation, modulate
from vistok.sampling.tokens import Sampling, draw

EPS = 1e-6


class ChannelBlock(nn.Module):
    """A causal block over the dimensions of one token, modulated at each by what is there: x, condition (M, D, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attention = SelfAttention(width, heads, qk_norm="layer", eps=EPS)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width, 4 * width)
        self.modulation = Modulation(width, width, 6)

    def forward(self, x: Tensor, condition: Tensor, past: KeyValues | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        attended = self.attention(modulate(self.norm1(x), shift1, scale1), causal=True, past=past)
        x = torch.addcmul(x, gate1, attended)
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class ChannelHead(nn.Module):
    """What is known of a position, z (M, `entering`), to its D = `count` codes of `levels` each, as they are predicted.

    Not `sequential`: the same blocks, without codes, predict all of them at once (the paper's ablation).
    """

    def __init__(
        self, entering: int, width: int, depth: int, heads: int, *, count: int, levels: int, sequential: bool = True
    ) -> None:
        super().__init__()
        self.levels, self.sequential = levels, sequential
        self.condition = nn.Linear(entering, width)
        self.embeddings = nn.Parameter(torch.randn((count - 1) * levels, width))  # one table after another
        self.places = nn.Parameter(0.02 * torch.randn(1, count, width))
        self.shifts = nn.Parameter(0.02 * torch.randn(1, count, width))
        self.blocks = nn.ModuleList(ChannelBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.norm_final = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.modulation = Modulation(width, width, 2)
        self.weight = nn.Parameter(torch.empty(count, levels, width))
        self.bias = nn.Parameter(torch.zeros(count, levels))

    def forward(self, z: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced logits (M, D, 2^b) for z (M, W) and codes (M, D), both in the order of prediction."""
        condition = self.condition(z)[:, None]
        rest = self._embed(codes[:, :-1]) if self.sequential else condition.expand(-1, codes.shape[1] - 1, -1)
        x = torch.cat([condition, rest], 1) + self.places
        condition = condition + self.shifts
        for block in self.blocks:
            x = block(x, condition)
        return torch.einsum("mdc,dkc->mdk", self._finish(x, condition), self.weight) + self.bias

    def sample(self, z: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
        """Codes (M, D) in the order of prediction, for z (M, W) and a number in [0, 1) for each, `uniform` (M, D)."""
        if not self.sequential:
            return draw(self(z, torch.zeros_like(uniform, dtype=torch.long)), uniform, sampling)
        condition = self.condition(z)[:, None]
        # The authors' sampler gives the first slot its shift as an input too, unlike their training.
        x = condition + self.shifts[:, :1]
        attention: SelfAttention = self.blocks[0].attention  # type: ignore[assignment]
        shape = (len(z), attention.heads, uniform.shape[1], attention.head)
        past = [KeyValues(*shape, dtype=z.dtype, device=z.device) for _ in self.blocks]
        codes = torch.empty(uniform.shape, dtype=torch.long, device=z.device)
        for slot in range(uniform.shape[1]):
            x, shifted = x + self.places[:, slot : slot + 1], condition + self.shifts[:, slot : slot + 1]
            for block, cache in zip(self.blocks, past, strict=True):
                x = block(x, shifted, cache)
            logits = F.linear(self._finish(x, shifted)[:, 0], self.weight[slot], self.bias[slot])
            codes[:, slot] = draw(logits, uniform[:, slot], sampling)
            if slot + 1 < uniform.shape[1]:
                x = F.embedding(codes[:, slot : slot + 1] + slot * self.levels, self.embeddings)
        return codes

    def _embed(self, codes: Tensor) -> Tensor:
        offsets = torch.arange(codes.shape[1], device=codes.device) * self.levels
        return F.embedding(codes + offsets, self.embeddings)

    def _finish(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)
        return modulate(self.norm_final(self.norm(x)), shift, scale)
