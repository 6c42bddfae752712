"""What TiTok's generators are made of: three ways to read masked codes, and one to read masked vectors.

    BertNetwork   [class | codes] (B, 1 + N) -> post-norm blocks -> logits (B, N, K)
    UViTNetwork   [class | codes] (B, 1 + N) -> pre-norm blocks in a U with long skips -> logits (B, N, K)
    CodeNetwork   codes (B, N) beside a text -> MM-DiT -> logits (B, N, K)
    VectorNetwork vectors (B, N, C) beside a text -> MM-DiT -> what is known of each, (B, N, W) -> a diffusion head

Ids of the first two: 0..K-1 codes, K the mask, K + 1 + c the classes, then the class that stands for none.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vistok.nn.clip_text import TextFeatures
from vistok.nn.diffusion_head import DiffusionHead
from vistok.nn.mmdit import JointBlock, ModulatedNorm
from vistok.nn.query_vit import initialise
from vistok.nn.transformer import Block, PostNormBlock

AESTHETIC_SCALE = 100  # of a score before it becomes a sinusoid


class BertNetwork(nn.Module):
    """Hugging Face's BERT without its pooler (arXiv:1810.04805): learned positions, one type of token."""

    def __init__(
        self, codes: int, classes: int, tokens: int, width: int, depth: int, heads: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.codes = codes
        self.table = nn.Embedding(codes + classes + 2, width)
        self.positions = nn.Parameter(torch.empty(tokens + 1, width))
        self.types = nn.Parameter(torch.empty(2, width))  # the second is in checkpoints and unused
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(PostNormBlock(width, heads, hidden=hidden, dropout=dropout) for _ in range(depth))
        self.head = nn.Linear(width, codes)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for table in (self.positions, self.types):
            nn.init.normal_(table, std=0.02)

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, N, K) of codes (B, N), K where masked, for classes (B,)."""
        ids = torch.cat([self.codes + 1 + labels[:, None], codes], 1)
        x = self.dropout(self.norm(self.table(ids) + self.positions + self.types[0]))
        for block in self.blocks[:-1]:
            x = block(x)
        return self.head(self.blocks[-1](x, only=slice(1, None)))  # nobody reads the class's own output


class UViTNetwork(nn.Module):
    """U-ViT (arXiv:2209.12152): depth // 2 blocks in, one between, depth // 2 out, each reading what went in."""

    def __init__(self, codes: int, classes: int, tokens: int, width: int, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.codes = codes
        self.table = nn.Embedding(codes + classes + 2, width)
        self.positions = nn.Parameter(torch.empty(1, tokens + 1, width))

        def block() -> Block:
            return Block(width, heads, hidden=hidden, qkv_bias=False)

        self.down = nn.ModuleList(block() for _ in range(depth // 2))
        self.middle = block()
        self.up = nn.ModuleList(block() for _ in range(depth // 2))
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, codes)
        initialise(self)
        for table in (self.table.weight, self.positions):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, N, K) of codes (B, N), K where masked, for classes (B,)."""
        x = self.table(torch.cat([self.codes + 1 + labels[:, None], codes], 1)) + self.positions
        passed = []
        for block in self.down:
            x = block(x)
            passed.append(x)
        x = self.middle(x)
        for block, skip in zip(self.up, self.skips, strict=True):
            x = block(skip(torch.cat([x, passed.pop()], -1)))
        return self.head(self.norm(x[:, 1:]))


class Read(NamedTuple):
    """A text as the blocks read it: its positions (B, L, W), and one vector (B, W) that modulates them."""

    states: Tensor
    vector: Tensor

    def join(self, other: "Read") -> "Read":
        """Both, one batch after the other."""
        return Read(torch.cat([self.states, other.states]), torch.cat([self.vector, other.vector]))


class TextTrunk(nn.Module):
    """MaskGen's MM-DiT: (B, N, W) beside a text (B, L, W) -> (B, N, W), normalised.

    text       width of the text's features
    aesthetic  width of the sinusoid of an aesthetic score that stands beside the pooled text; 0 for none
    """

    def __init__(self, width: int, depth: int, heads: int, text: int, aesthetic: int) -> None:
        super().__init__()
        self.aesthetic = aesthetic
        self.text = nn.Linear(text, width)
        self.pooled = nn.Linear(text + aesthetic, width)
        self.blocks = nn.ModuleList(JointBlock(width, heads, last=index == depth - 1) for index in range(depth))
        self.norm = ModulatedNorm(width)

    def read(self, features: TextFeatures, embedded: Tensor) -> Read:
        """A text of features (B, L, D) and its aesthetic score, as an embedding (B, `aesthetic`)."""
        beside = [features.pooled, embedded.to(features.pooled.dtype)] if self.aesthetic else [features.pooled]
        return Read(self.text(features.states), self.pooled(torch.cat(beside, -1)))

    def forward(self, x: Tensor, read: Read) -> Tensor:
        text: Tensor | None = read.states
        for block in self.blocks:
            x, text = block(x, text, read.vector)
        return self.norm(x, read.vector)


class CodeNetwork(nn.Module):
    """MaskGen-VQ. Of its table, the first K rows are codes in and out, row K is the mask; the others are unused."""

    def __init__(
        self, codes: int, spare: int, tokens: int, width: int, depth: int, heads: int, text: int, aesthetic: int
    ) -> None:
        super().__init__()
        self.codes = codes
        self.table = nn.Embedding(codes + 1 + spare, width)
        self.positions = nn.Parameter(torch.empty(1, tokens, width))
        self.trunk = TextTrunk(width, depth, heads, text, aesthetic)
        initialise(self)
        for table in (self.table.weight, self.positions):
            nn.init.trunc_normal_(table, std=0.02)
        nn.init.zeros_(self.trunk.norm.modulation.project.weight)
        if depth:
            nn.init.zeros_(self.trunk.blocks[-1].text_modulation.project.weight)  # type: ignore[union-attr, arg-type]

    def read(self, features: TextFeatures, scores: Tensor) -> Read:
        """A text and its aesthetic scores (B,)."""
        return self.trunk.read(features, falling_sinusoid(scores, self.trunk.aesthetic))

    def forward(self, codes: Tensor, read: Read) -> Tensor:
        """Logits (B, N, K) of codes (B, N), K where masked."""
        x = self.trunk(self.table(codes) + self.positions, read)
        return x @ self.table.weight[: self.codes].T


class VectorNetwork(nn.Module):
    """MaskGen-KL. `head` draws a vector from what `forward` says of its position."""

    def __init__(
        self,
        dim: int,
        tokens: int,
        width: int,
        depth: int,
        heads: int,
        text: int,
        aesthetic: int,
        head_width: int,
        head_depth: int,
    ) -> None:
        super().__init__()
        self.project = nn.Linear(dim, width)
        self.project_norm = nn.LayerNorm(width, eps=1e-6)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, tokens, width))
        self.trunk = TextTrunk(width, depth, heads, text, aesthetic)
        self.output_positions = nn.Parameter(torch.empty(1, tokens, width))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.mask_token, self.positions, self.output_positions):
            nn.init.normal_(table, std=0.02)
        self.head = DiffusionHead(dim, width, head_width, head_depth)

    def read(self, features: TextFeatures, scores: Tensor) -> Read:
        """A text and its aesthetic scores (B,)."""
        return self.trunk.read(features, paired_sinusoid(scores, self.trunk.aesthetic))

    def forward(self, vectors: Tensor, masked: Tensor, read: Read) -> Tensor:
        """What is known of every position, (B, N, W), of scaled vectors (B, N, C); `masked` bool (B, N)."""
        x = torch.where(masked[..., None], self.mask_token, self.project_norm(self.project(vectors)))
        return self.trunk(x + self.positions, read) + self.output_positions


def falling_sinusoid(scores: Tensor, width: int) -> Tensor:
    """MaskGen-VQ's embedding (B, width) of scores (B,): sines, then cosines, periods up to 1000."""
    half = width // 2
    angles = _angles(scores, 1000.0, torch.arange(half, dtype=torch.float64) / max(half, 1))
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], -1), (0, width % 2))


def paired_sinusoid(scores: Tensor, width: int) -> Tensor:
    """MaskGen-KL's embedding (B, width) of scores (B,): sine and cosine of each frequency side by side, base 10000."""
    angles = _angles(scores, 10_000.0, torch.arange(0, width, 2, dtype=torch.float64) / max(width, 1))
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


def _angles(scores: Tensor, base: float, powers: Tensor) -> Tensor:
    """100 x score x base^-power, (B, powers). In float32, as the authors have it: angles reach the hundreds, where the
    rounding of a product shows; the rates are exact before they are rounded."""
    rates = (base**-powers).float().to(scores.device)
    return (AESTHETIC_SCALE * scores)[:, None].float() * rates
