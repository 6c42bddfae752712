"""The query ViT: a picture into a short sequence, and back, by plain self-attention (TiTok, arXiv:2406.07550).

    encoder   [class | patches | queries]          -> blocks -> the N query positions   (B, N, W)
    decoder   [class | G masks | latents | text]   -> blocks -> the G grid positions    (B, G, W)

Learned absolute positions tie both to one picture size. Only the positions that are read come out of the last block;
it skips the rest of its work, and the decoder's mask tokens, alike for all items, are normalised once for the batch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.nn.patching import PatchEmbed
from vistok.nn.transformer import Block

INIT_STD, INIT_WIDTH = 0.02, 512  # of first weights as published, and the narrowest model that had them


@dataclass(frozen=True)
class ViTSize:
    """Width, number of blocks and of heads of a transformer, and how many times wider its MLPs are inside."""

    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0

    def blocks(self) -> nn.ModuleList:
        """Fresh blocks of this size."""
        hidden = int(self.width * self.mlp_ratio)
        return nn.ModuleList(Block(self.width, self.heads, hidden=hidden) for _ in range(self.layers))


class QueryEncoder(nn.Module):
    """Pictures (B, 3, rows * patch, columns * patch) to the outputs of N learned queries (B, N, width), normalised.

    `grid` is (rows, columns) of patches. `causal`: patches do not see the queries, and a query sees those before it
    (HiMTok, arXiv:2503.13026); else all see all. `init_std` of the first weights.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        patch: int,
        queries: int,
        size: ViTSize,
        causal: bool = False,
        init_std: float = INIT_STD,
    ):
        super().__init__()
        cells, width = grid[0] * grid[1], size.width
        self.causal = causal
        self.patches = PatchEmbed(patch, width)
        self.class_token = _table(1, width)
        self.positions = _table(cells + 1, width)
        self.queries = _table(queries, width)
        self.query_positions = _table(queries, width)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = size.blocks()
        self.norm_out = nn.LayerNorm(width)
        initialise(self, init_std)

    def forward(self, pixels: Tensor) -> Tensor:
        batch = len(pixels)
        patches = self.patches(pixels)
        first = (self.class_token + self.positions[:1]).to(patches.dtype).expand(batch, 1, -1)
        queries = (self.queries + self.query_positions).to(patches.dtype).expand(batch, -1, -1)
        x = self.norm_in(torch.cat([first, patches + self.positions[1:], queries], 1))
        begin = x.shape[1] - queries.shape[1]
        mask = causal_queries(x.shape[1], begin, x.device) if self.causal else None
        return self.norm_out(run_blocks(self.blocks, x, slice(begin, None), mask))


class GridDecoder(nn.Module):
    """Latents (B, n, dim), n at most N, to one vector per cell of the grid (B, rows * columns, width), normalised.

    text     (context length, width of its features) of a text whose features may follow the latents
    padded   the sequence always has N latents: those that are not there are zero but for their positions (HiMTok),
             where it is shorter otherwise
    init_std of the first weights
    """

    def __init__(
        self,
        grid: tuple[int, int],
        latents: int,
        dim: int,
        size: ViTSize,
        text: tuple[int, int] | None = None,
        padded: bool = False,
        init_std: float = INIT_STD,
    ):
        super().__init__()
        self.cells, width = grid[0] * grid[1], size.width
        self.padded = padded
        self.embed = nn.Linear(dim, width)
        self.class_token = _table(1, width)
        self.mask_token = _table(1, width)
        self.positions = _table(self.cells + 1, width)
        self.latent_positions = _table(latents, width)
        if text:
            self.text = nn.Linear(text[1], width)
            self.text_positions = _table(text[0], width)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = size.blocks()
        self.norm_out = nn.LayerNorm(width)
        initialise(self, init_std)

    def forward(self, latents: Tensor, text: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """`text` (B, context length, features), for a decoder that was built with it. `lengths` (B,), of a padded one:
        how many latents of each item are there.
        """
        embedded = self.embed(latents)
        if lengths is not None:
            there = torch.arange(embedded.shape[1], device=embedded.device) < lengths[:, None]
            embedded = embedded * there[:, :, None]
        if self.padded:
            embedded = F.pad(embedded, (0, 0, 0, len(self.latent_positions) - embedded.shape[1]))
        parts = [embedded + self.latent_positions[: embedded.shape[1]]]
        if text is not None:
            parts.append(self.text(text) + self.text_positions[: text.shape[1]])
        grid = torch.cat([self.class_token, self.mask_token.expand(self.cells, -1)]) + self.positions
        grid = self.norm_in(grid.to(embedded.dtype)).expand(len(latents), -1, -1)
        x = torch.cat([grid, self.norm_in(torch.cat(parts, 1))], 1)
        return self.norm_out(run_blocks(self.blocks, x, slice(1, self.cells + 1)))


def run_blocks(blocks: nn.ModuleList, x: Tensor, only: slice, mask: Tensor | None = None) -> Tensor:
    """Through all blocks, (B, N, W) to the positions `only`; the last block computes nothing for the others.

    `mask` (N, N) says which positions (rows) see which (columns).
    """
    for block in blocks[:-1]:
        x = block(x, mask=mask)
    return blocks[-1](x, mask=None if mask is None else mask[only], only=only) if len(blocks) else x[:, only]


def causal_queries(length: int, begin: int, device: torch.device | str = "cpu") -> Tensor:
    """Mask (length, length): all see the positions before `begin`, and those from there on the ones before them too."""
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    visible[:, :begin] = True
    return visible


def initialise(module: nn.Module, std: float = INIT_STD) -> None:
    """TiTok's rule: linear and convolution weights from a normal of `std`, cut off at +-2 (so hardly), biases zero."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _table(rows: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, width) * width**-0.5)
