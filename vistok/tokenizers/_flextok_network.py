"""FlexTok's two transformers: the register encoder, and the flow decoder that is asked once per step and branch.

    encoder   latent (B, C, h, w) -> 2x2 patches (B, P, W) | N learned registers -> blocks -> registers -> (B, N, D)
              patches see patches, a register sees all patches and the registers before it
    decoder   x_t (B, C, h, w), t, registers -> [patches | registers] -> blocks, scaled and shifted by t -> velocity

No norm has weights of its own, no linear map of the trunk a bias; queries and keys are normalised.

Registers that were dropped are all replaced by one vector, without positions, so all of them stay alike in every block:
one stand-in, whose logits in attention get log(how many it stands for), gives the same numbers for the price of one.
A prefix of k tokens thus costs P + k + 1 positions instead of P + N, and the branch without a condition P + 1. Items
of different lengths lie packed (`vistok.nn.ragged`).
"""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor, nn

from vistok.nn.attention import SelfAttention
from vistok.nn.patching import patchify, unpatchify
from vistok.nn.positions import sincos_1d
from vistok.nn.query_vit import causal_queries
from vistok.nn.ragged import Ragged, ragged
from vistok.nn.transformer import MLP, Modulation, modulate

EPS = 1e-5
FREQUENCIES, SLOWEST = 128, 256.0  # of the time embedding: 1000 t / 256^(i / 128)


@dataclass(frozen=True)
class TrunkSize:
    """Width, number of blocks, width of a head; `scale` of the products of queries and keys, 8 / head unless given."""

    width: int
    depth: int
    head: int = 64
    scale: float | None = None

    def blocks(self, modulated: bool) -> nn.ModuleList:
        """Fresh blocks of this size."""
        return nn.ModuleList(TrunkBlock(self, modulated) for _ in range(self.depth))


@dataclass(frozen=True, eq=False)
class Places:
    """Where patches and registers are in a batch (B, P + M, W), or, `ragged`, among its rows, B P patches first."""

    patches: int
    ragged: Ragged | None = None
    mask: Tensor | None = None

    @property
    def leading(self) -> slice:
        """The patches, along the last axis but one."""
        return slice(0, self.patches if self.ragged is None else self.ragged.leading)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (B, P, W), and registers (B, M, W), or their rows (R, W)."""
        end = self.leading.stop
        patches, registers = x[..., :end, :], x[..., end:, :]
        return (patches if self.ragged is None else patches.unflatten(0, (-1, self.patches))), registers

    def join(self, patches: Tensor, registers: Tensor) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([patches if self.ragged is None else patches.flatten(0, 1), registers], -2)

    def spread(self, value: Tensor) -> Tensor:
        """A value per item (B or 1, 1, W), as it meets the registers."""
        if self.ragged is None:
            return value
        return value[:, 0] if len(value) == 1 else value[self.ragged.items, 0]


class TrunkBlock(nn.Module):
    """x += attention(norm x), x += MLP(norm x); `modulated`: shifts, scales and gates, of their own for registers."""

    def __init__(self, size: TrunkSize, modulated: bool) -> None:
        super().__init__()
        width = size.width
        scale = 8 / size.head if size.scale is None else size.scale
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.attention = SelfAttention(
            width, width // size.head, head=size.head, bias=False, qk_norm="plain-layer", eps=EPS, scale=scale
        )
        self.mlp = MLP(width, int(2 * int(4 * width) / 3), activation="swiglu", bias=False)
        self.modulation = Modulation(width, width, 12) if modulated else None

    def forward(self, x: Tensor, mask: Tensor | None = None, only: slice | None = None) -> Tensor:
        """(B, N, W), all alike, or those positions `only`."""
        kept = x if only is None else x[:, only]
        x = kept + self.attention(self.norm(x), mask=mask, only=only)
        return x + self.mlp(self.norm(x))

    def step(self, x: Tensor, condition: Tensor, places: Places, last: bool = False) -> Tensor:
        """Patches and registers, as `places` says, under a condition (B or 1, W); the patches alone if `last`."""
        assert self.modulation is not None
        parts = self.modulation(condition)
        gate1, gate2, shift1, scale1, shift2, scale2 = parts[:6]
        others = [places.spread(part) for part in parts[6:]]
        patches, registers = places.split(x)
        normed = self._modulated(patches, shift1, scale1), self._modulated(registers, others[2], others[3])
        attended = self.attention(
            places.join(*normed), mask=places.mask, ragged=places.ragged, only=places.leading if last else None
        )
        if last:
            patches = torch.addcmul(patches, gate1, attended.view_as(patches))
            return torch.addcmul(patches, gate2, self.mlp(self._modulated(patches, shift2, scale2)))
        more_patches, more_registers = places.split(attended)
        patches = torch.addcmul(patches, gate1, more_patches)
        registers = torch.addcmul(registers, others[0], more_registers)
        normed = self._modulated(patches, shift2, scale2), self._modulated(registers, others[4], others[5])
        more_patches, more_registers = places.split(self.mlp(places.join(*normed)))
        return places.join(
            torch.addcmul(patches, gate2, more_patches), torch.addcmul(registers, others[1], more_registers)
        )

    def _modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return modulate(self.norm(x), shift, scale)


class RegisterEncoder(nn.Module):
    """Latent (B, C, h, w) to what FSQ rounds, (B, N, D)."""

    positions: Tensor

    def __init__(
        self, channels: int, patch: int, grid: tuple[int, int], registers: int, size: TrunkSize, dim: int
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = _linear(patch * patch * channels, size.width)
        self.register_buffer("positions", position_table(grid, size.width))
        self.registers = nn.Parameter(_small(registers, size.width))
        self.blocks = size.blocks(modulated=False)
        self.norm_out = nn.LayerNorm(size.width, eps=EPS, elementwise_affine=False)
        self.project = _zeroed(nn.Linear(size.width, dim))
        _xavier(self.blocks)

    def features(self, latent: Tensor) -> Tensor:
        """The registers after the last block, (B, N, W)."""
        patches = embed_patches(latent, self.patch, self.embed, self.positions)
        registers = self.registers.to(patches.dtype).expand(len(latent), -1, -1)
        x = torch.cat([patches, registers], 1)
        first = patches.shape[1]
        mask, only = causal_queries(x.shape[1], first, x.device), slice(first, None)
        for block in self.blocks[:-1]:
            x = block(x, mask)
        return self.blocks[-1](x, mask[only], only)

    def forward(self, latent: Tensor) -> Tensor:
        return self.project(self.norm_out(self.features(latent)))


@dataclass(frozen=True, eq=False)
class Registers:
    """What the decoder knows of each picture, made once for all steps: the stand-in, and what registers there are."""

    rows: Tensor
    places: Places
    items: int


class FlowDecoder(nn.Module):
    """Noisy latents, time and registers to the velocity, all (B, C, h, w)."""

    positions: Tensor

    def __init__(
        self,
        channels: int,
        patch: int,
        grid: tuple[int, int],
        registers: int,
        size: TrunkSize,
        dim: int,
        modulated_head: bool = True,
    ) -> None:
        super().__init__()
        width = size.width
        self.patch, self.count = patch, registers
        self.embed_codes = _linear(dim, width)
        self.register_positions = nn.Parameter(_small(registers, width))
        self.mask_token = nn.Parameter(_small(width))
        self.null_token = nn.Parameter(_small(width))
        self.embed = _linear(patch * patch * channels, width)
        self.register_buffer("positions", position_table(grid, width))
        self.time = nn.Sequential(_linear(2 * FREQUENCIES, width), nn.SiLU(), _linear(width, width))
        self.blocks = size.blocks(modulated=True)
        self.norm_out = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.head_modulation = Modulation(width, width, 2) if modulated_head else None
        self.project = _zeroed(nn.Linear(width, patch * patch * channels))
        _xavier(self.blocks, but=Modulation)

    def time_embedding(self, t: Tensor) -> Tensor:
        """Times (B,) in [0, 1] to conditions (B, W)."""
        steps = torch.arange(FREQUENCIES, device=t.device, dtype=torch.float32) / FREQUENCIES
        angles = t.float()[:, None] * (1000 * torch.exp(-log(SLOWEST) * steps))
        return self.time(torch.cat([angles.cos(), angles.sin()], -1).to(self.positions.dtype))

    def registers(
        self, vectors: Tensor, cells: int, lengths: Tensor | None = None, absent: Tensor | None = None
    ) -> Registers:
        """The registers of code vectors (B, k, D), for a latent of `cells` patches.

        lengths   how many of each item's vectors are there, (B,), all unless given; the mask token replaces the others
        absent    items (B,) without a condition, all of whose registers are the null token, whatever their lengths
        """
        batch, k = vectors.shape[:2]
        lengths = torch.full((batch,), k, device=vectors.device) if lengths is None else lengths.to(vectors.device)
        missing = self.mask_token.expand(batch, -1)
        if absent is not None:
            lengths = lengths.masked_fill(absent, 0)
            missing = torch.where(absent[:, None], self.null_token, missing)
        embedded = self.embed_codes(vectors.to(self.positions.dtype)) + self.register_positions[:k]
        padded = torch.cat([missing[:, None].to(embedded.dtype), embedded], 1)
        longest, shortest = (int(end) for end in torch.aminmax(lengths)[::-1]) if batch else (k, k)
        padded = padded[:, : longest + 1]
        stands_for = (self.count - lengths).to(embedded.dtype).log()
        bias = padded.new_zeros(batch, cells + longest + 1)
        bias[:, cells] = stands_for
        if longest == shortest:
            return Registers(padded, Places(cells, mask=bias[:, None, None]), batch)
        layout = ragged(lengths + 1, cells, bias)
        column = layout.index[layout.leading :] % layout.shape[1] - cells
        return Registers(padded[layout.items, column], Places(cells, layout), batch)

    def forward(self, noisy: Tensor, t: Tensor, registers: Registers) -> Tensor:
        """Velocity of noisy latents (B, C, h, w) at times `t`, (B,) or (1,) for all.

        Registers of twice as many items are two branches of the same latents: their velocities (2 B, C, h, w).
        """
        return self.look(noisy, t, registers)[0]

    def look(self, noisy: Tensor, t: Tensor, registers: Registers, block: int = 0) -> tuple[Tensor, Tensor]:
        """The velocity, and the patches (B, P, W) as they are before that block."""
        grid = noisy.shape[-2] // self.patch, noisy.shape[-1] // self.patch
        patches = embed_patches(noisy, self.patch, self.embed, self.positions)
        if registers.items != len(patches):
            patches = patches.repeat(registers.items // len(patches), 1, 1)
        places, condition = registers.places, self.time_embedding(t)
        x, features = places.join(patches, registers.rows.to(patches.dtype)), patches
        for index, layer in enumerate(self.blocks):
            if index == block:
                features = places.split(x)[0]
            assert isinstance(layer, TrunkBlock)
            x = layer.step(x, condition, places, last=index == len(self.blocks) - 1)
        x = self.norm_out(x)
        if self.head_modulation is not None:
            x = modulate(x, *self.head_modulation(condition))
        return unpatchify(self.project(x), grid, self.patch, "ppc"), features


def embed_patches(latent: Tensor, patch: int, embed: nn.Linear, positions: Tensor) -> Tensor:
    """Latent (B, C, h, w) to patches (B, P, W) with their places in the table (rows, columns, W), cut to the grid."""
    rows, columns = latent.shape[-2] // patch, latent.shape[-1] // patch
    return embed(patchify(latent, patch, "ppc")) + positions[:rows, :columns].flatten(0, 1)


def position_table(grid: tuple[int, int], width: int) -> Tensor:
    """The authors' sine-cosine table (rows, columns, W): sines and cosines of the slow index, then of the fast one.

    Their slow index counts columns; read as (rows, columns) afterwards, it is the row of square grids alone.
    """
    rows, columns = grid
    slow = sincos_1d(columns, width // 2)[:, None].expand(-1, rows, -1)
    fast = sincos_1d(rows, width // 2)[None].expand(columns, -1, -1)
    return torch.cat([slow, fast], -1).reshape(rows, columns, width).contiguous()


def _linear(entering: int, leaving: int) -> nn.Linear:
    linear = nn.Linear(entering, leaving)
    _xavier(linear)
    return linear


def _xavier(module: nn.Module, but: type[nn.Module] | None = None) -> None:
    """Xavier's weights and no biases for all linear maps, except those inside modules of the class `but`."""
    spared = {id(inner) for part in module.modules() if but and isinstance(part, but) for inner in part.modules()}
    for part in module.modules():
        if isinstance(part, nn.Linear) and id(part) not in spared:
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _zeroed(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _small(*shape: int) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(*shape), std=0.02)
