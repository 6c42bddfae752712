"""Transformers over clips, space and time in turn: the line of C-ViViT (Phenaki, arXiv:2210.02399) and OmniTokenizer
(arXiv:2406.09399).

    x (B, T, H, W, D) --space: attention within each frame--> --time: attention along each position--> (B, T, H, W, D)

Blocks are written as letters: "t" has a depth-wise convolution for positions, cosine attention and a gated MLP; "w"
has attention within windows and the same MLP. Every step is added to what it read.
"""

from dataclasses import dataclass
from math import ceil, log2
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.nn.attention import attend
from vistok.nn.positions import Rotation

SCALE = 8.0  # of cosine attention's scores
Axis = Literal["space", "time"]


@dataclass(frozen=True)
class SpaceTimeSize:
    """Width D, heads and their width, and the gated MLP's factor: it has int(factor * 2/3 * D) hidden values."""

    width: int = 512
    heads: int = 8
    head: int = 64
    mlp_factor: float = 4.0

    @property
    def hidden(self) -> int:
        """Hidden values of the gated MLP."""
        return int(self.mlp_factor * (2 / 3) * self.width)


class FixedNorm(nn.Module):
    """Layer norm with a learned gain; its shift is a buffer that never trains."""

    shift: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.register_buffer("shift", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gain, self.shift)


class PositionConv(nn.Conv3d):
    """Depth-wise 3 x 3 x 3 convolution of (B, T, H, W, D): each position learns where it is from its neighbours (PEG).

    `causal`: in time it sees the frame itself and the two before it.
    """

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__(width, width, 3, groups=width)
        self.before, self.after = (2, 0) if causal else (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x.permute(0, 4, 1, 2, 3), (1, 1, 1, 1, self.before, self.after))
        return super().forward(padded).permute(0, 2, 3, 4, 1)


class CosineAttention(nn.Module):
    """Attention (B, N, D) whose queries and keys are of unit length, times learned scales; scores times 8.

    Queries come from the normed input, keys and values from the input as it is: so the authors' code has it.
    """

    def __init__(self, size: SpaceTimeSize, bias: nn.Module | None = None) -> None:
        super().__init__()
        inner = size.heads * size.head
        self.heads = size.heads
        self.norm = FixedNorm(size.width)
        self.q = nn.Linear(size.width, inner, bias=False)
        self.kv = nn.Linear(size.width, 2 * inner, bias=False)
        self.q_scale, self.k_scale = (nn.Parameter(torch.ones(size.head)) for _ in range(2))
        self.out = nn.Linear(inner, size.width, bias=False)
        self.bias = bias

    def forward(
        self,
        x: Tensor,
        *,
        rotation: Rotation | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """`bias` (heads, N, N) is added to the scores."""
        q = self.q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        q = F.normalize(q, dim=-1) * self.q_scale * (SCALE * q.shape[-1] ** 0.5)
        k = F.normalize(k, dim=-1) * self.k_scale
        if bias is not None and causal:
            bias = bias.masked_fill(~torch.ones_like(bias[0], dtype=torch.bool).tril(), -torch.inf)
        mask = None if bias is None else bias.to(q.dtype)
        return self.out(attend(q, k, v, mask=mask, causal=causal and bias is None))


class PositionBias(nn.Module):
    """Bias (heads, h w, h w) from the signed log distances of grid positions, by a small MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, width), nn.LeakyReLU(0.1), nn.Linear(width, width), nn.LeakyReLU(0.1), nn.Linear(width, heads)
        )

    def forward(self, rows: int, columns: int) -> Tensor:
        weight = next(self.net.parameters())
        device, dtype = weight.device, weight.dtype
        down = torch.arange(1 - rows, rows, device=device)
        across = torch.arange(1 - columns, columns, device=device)
        steps = torch.stack(torch.meshgrid(down, across, indexing="ij"), -1).to(dtype)
        table = self.net(steps.sign() * (steps.abs() + 1).log())  # one row for each difference, not for each pair
        y = torch.arange(rows, device=device).repeat_interleave(columns)
        x = torch.arange(columns, device=device).repeat(rows)
        down = y[:, None] - y[None] + rows - 1
        across = x[:, None] - x[None] + columns - 1
        return table[down, across].permute(2, 0, 1)


def alibi(heads: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Bias (heads, N, N) of -slope |i - j| (arXiv:2108.12409)."""
    power = 2 ** int(log2(heads))
    slopes = [2 ** (-8 * k / power) for k in range(1, power + 1)]
    slopes += [2 ** (-8 * k / (2 * power)) for k in range(1, 2 * power + 1, 2)][: heads - power]
    steps = torch.arange(length, device=device)
    distance = (steps[:, None] - steps[None]).abs()
    return -torch.tensor(slopes, device=device)[:, None, None] * distance


class WindowAttention(nn.Module):
    """Attention within windows of a frame (Swin's, arXiv:2103.14030, without shifts): (B, H, W, D) to the same."""

    offsets: Tensor

    def __init__(self, size: SpaceTimeSize, window: int) -> None:
        super().__init__()
        self.heads, self.window = size.heads, window
        if size.width % size.heads:
            raise ConfigError(f"{size.heads} heads do not divide a width of {size.width}")
        self.norm = FixedNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out = nn.Linear(size.width, size.width)
        self.bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, size.heads))
        nn.init.trunc_normal_(self.bias, std=0.02)
        self.register_buffer("offsets", window_offsets(window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, columns, _ = x.shape
        side = self.window
        if rows % side or columns % side:
            raise ConfigError(f"a grid of {rows}x{columns}, which windows of {side} do not tile")
        cut = self.norm(x).unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
        windows = cut.flatten(3, 4).flatten(0, 2)
        q, k, v = self.qkv(windows).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias[self.offsets].permute(2, 0, 1).to(q.dtype)
        out = self.out(attend(q, k, v, mask=bias))
        joined = out.unflatten(0, (batch, rows // side, columns // side)).unflatten(3, (side, side))
        return joined.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def window_offsets(window: int) -> Tensor:
    """Row of the bias table for every pair of positions of a window, long (window^2, window^2)."""
    line = torch.arange(window)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij")).flatten(1)
    steps = grid[:, :, None] - grid[:, None] + window - 1
    return steps[0] * (2 * window - 1) + steps[1]


class GatedMLP(nn.Module):
    """Norm, then value * GELU(gate), D -> hidden -> D, without biases: the first half of `expand` is the value."""

    def __init__(self, size: SpaceTimeSize) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size.width)
        self.expand = nn.Linear(size.width, 2 * size.hidden, bias=False)
        self.contract = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.expand(self.norm(x)).chunk(2, -1)
        return self.contract(value * F.gelu(gate))


class Block(nn.Module):
    """One letter; see the module's docstring."""

    def __init__(self, kind: str, size: SpaceTimeSize, *, window: int, causal: bool, bias: nn.Module | None) -> None:
        super().__init__()
        self.positions: PositionConv | None = None
        self.attention: CosineAttention | WindowAttention
        if kind == "t":
            self.positions = PositionConv(size.width, causal)
            self.attention = CosineAttention(size, bias)
        elif kind == "w":
            self.attention = WindowAttention(size, window)
        else:
            raise ConfigError(f"a block {kind!r}; expected 't' or 'w'")
        self.mlp = GatedMLP(size)


class SpaceTimeTransformer(nn.Module):
    """Blocks along one axis of (B, T, H, W, D), and a norm.

    kinds           a letter per block
    axis            "space": positions of a frame see each other; "time": frames see each other at one position
    causal          along time, frames see those before them; the convolution too (`causal_conv`)
    rotary          2D rotation of the cosine attention along space
    biased          scores get biases: learned ones along space (not with `rotary`), ALiBi along time
    scrambled       along time, the convolution reads the tensor in the order (H, W, T) as if it were (T, H, W): the
                    released models were trained so, and are not causal because of it
    """

    def __init__(
        self,
        kinds: str,
        size: SpaceTimeSize,
        *,
        axis: Axis,
        window: int = 8,
        causal: bool = False,
        causal_conv: bool = True,
        rotary: bool = False,
        biased: bool = False,
        scrambled: bool = False,
    ) -> None:
        super().__init__()
        self.axis, self.size = axis, size
        self.causal, self.rotary, self.biased, self.scrambled = causal, rotary, biased, scrambled
        learned = biased and axis == "space" and not rotary
        self.blocks = nn.ModuleList(
            Block(
                kind,
                size,
                window=window,
                causal=causal_conv,
                bias=PositionBias(size.width, size.heads) if learned and kind == "t" else None,
            )
            for kind in kinds
        )
        self.norm = FixedNorm(size.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, D) to the same."""
        _, frames, rows, columns, _ = x.shape
        rotation = grid_rotation(rows, columns, self.size.head, x.device) if self.rotary else None
        slopes = alibi(self.size.heads, frames, x.device) if self.biased and self.axis == "time" else None
        block: Any
        for block in self.blocks:
            if block.positions is not None:
                x = x + self._positions(block.positions, x)
            if isinstance(block.attention, WindowAttention):
                x = x + block.attention(x.flatten(0, 1)).view_as(x)
            else:
                attention = block.attention
                bias = slopes if attention.bias is None else attention.bias(rows, columns)
                causal = self.causal and self.axis == "time"
                sequences = self._sequences(x)
                attended = attention(sequences, rotation=rotation, bias=bias, causal=causal)
                x = x + self._back(attended, x)
            x = x + block.mlp(x)
        return self.norm(x)

    def _positions(self, conv: nn.Module, x: Tensor) -> Tensor:
        if not (self.scrambled and self.axis == "time"):
            return conv(x)
        placed = x.permute(0, 2, 3, 1, 4)  # (B, H, W, T, D), as it lies in memory there
        return conv(placed.reshape(x.shape)).reshape(placed.shape).permute(0, 3, 1, 2, 4)

    def _sequences(self, x: Tensor) -> Tensor:
        if self.axis == "space":
            return x.flatten(2, 3).flatten(0, 1)
        return x.permute(0, 2, 3, 1, 4).flatten(0, 2)

    def _back(self, sequences: Tensor, x: Tensor) -> Tensor:
        if self.axis == "space":
            return sequences.reshape(x.shape)
        batch, frames, rows, columns, width = x.shape
        return sequences.view(batch, rows, columns, frames, width).permute(0, 3, 1, 2, 4)


def grid_rotation(rows: int, columns: int, head: int, device: torch.device | str = "cpu") -> Rotation:
    """Rotation of a grid, row-major, whose pairs turn by column and row in turn: x_0, y_0, x_1, y_1, ..."""
    if head % 4:
        raise ConfigError(f"2D rotation needs a head width that 4 divides, got {head}")
    rates = 10_000.0 ** (-4 * torch.arange(ceil(head / 4), dtype=torch.float64, device=device) / head)
    y = torch.arange(rows, device=device).repeat_interleave(columns)
    x = torch.arange(columns, device=device).repeat(rows)
    angles = (torch.stack([x, y], -1)[:, None].double() * rates[:, None]).flatten(1).float()
    return Rotation(angles.cos(), angles.sin())
