"""Where a token stands: rotary tables in one and two dimensions, and fixed sine-cosine tables.

Rotary (RoFormer, arXiv:2104.09864): pairs of channels of q and k are turned by position * frequency, so that q . k
depends on the difference of positions alone. Two conventions exist for which channels make a pair, and checkpoints
depend on it: neighbours (2i, 2i + 1), as in RoFormer and LlamaGen, or halves (i, i + head / 2), as in GPT-NeoX and the
transformers library.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Rotation:
    """Turns queries or keys (B, heads, N, head) by the angles of their positions.

    cos, sin  (N, head / 2), float32, as the rotation is computed in, whatever the dtype of what is turned
    halves    pairs are (i, i + head / 2) instead of (2i, 2i + 1)
    """

    cos: Tensor
    sin: Tensor
    halves: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        if not (self.halves or x.device.type != "cpu" or torch.is_grad_enabled()):
            return self._product(x)
        a, b = x.float().chunk(2, -1) if self.halves else x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = a * self.cos - b * self.sin, a * self.sin + b * self.cos
        joined = torch.cat(turned, -1) if self.halves else torch.stack(turned, -1).flatten(-2)
        return joined.to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        """The same as one product of complex numbers, which a CPU does in a tenth of the time for few positions."""
        pairs = x.float().unflatten(-1, (-1, 2))
        if any(stride % 2 for stride in pairs.stride()[:-1]) or pairs.storage_offset() % 2 or pairs.stride(-1) != 1:
            pairs = pairs.contiguous()
        turned = torch.view_as_complex(pairs) * torch.complex(self.cos, self.sin)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)

    def __getitem__(self, positions: slice) -> "Rotation":
        return Rotation(self.cos[positions], self.sin[positions], self.halves)

    def to(self, device: torch.device | str) -> "Rotation":
        """The tables on another device."""
        return Rotation(self.cos.to(device), self.sin.to(device), self.halves)


def rotation_1d(
    positions: int | Tensor,
    head: int,
    *,
    base: float = 10_000.0,
    halves: bool = False,
    device: torch.device | None = None,
) -> Rotation:
    """Rotation of a sequence: pair i of position n turns by n * base^(-2i / head).

    `positions`: a length (0..N-1) or the positions themselves (N,), fractions allowed.
    Raises ConfigError for an odd head.
    """
    angles = _angles(positions, head, base, device)
    return Rotation(angles.cos(), angles.sin(), halves)


def rotation_2d(
    rows: int | Tensor,
    columns: int | Tensor,
    head: int,
    *,
    base: float = 10_000.0,
    halves: bool = False,
    device: torch.device | None = None,
) -> Rotation:
    """Rotation of a grid in row-major order: the first half of the pairs turns by the row, the second by the column.

    `rows`, `columns`: sizes, or positions along each axis, (h,) and (w,). Raises ConfigError unless 4 divides `head`.
    """
    if head % 4:
        raise ConfigError(f"2D rotation needs a head width that 4 divides, got {head}")
    down = _angles(rows, head // 2, base, device)
    across = _angles(columns, head // 2, base, device)
    shape = (len(down), len(across), head // 4)
    angles = torch.cat([down[:, None].expand(shape), across[None].expand(shape)], -1).flatten(0, 1)
    return Rotation(angles.cos(), angles.sin(), halves)


def sincos_1d(positions: int | Tensor, width: int, *, base: float = 10_000.0) -> Tensor:
    """Fixed table (N, width): sines of n * base^(-2i / width), then cosines. Raises ConfigError for an odd width."""
    angles = _angles(positions, width, base, None)
    return torch.cat([angles.sin(), angles.cos()], -1)


def sincos_2d(rows: int, columns: int, width: int, *, base: float = 10_000.0) -> Tensor:
    """Fixed table (rows * columns, width), row-major: half the channels for the column, then half for the row.

    The order is that of MAE and DiT (arXiv:2111.06377, arXiv:2212.09748). Raises ConfigError unless 4 divides `width`.
    """
    if width % 4:
        raise ConfigError(f"a 2D sine-cosine table needs a width that 4 divides, got {width}")
    across = sincos_1d(columns, width // 2, base=base)[None].expand(rows, -1, -1)
    down = sincos_1d(rows, width // 2, base=base)[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], -1).flatten(0, 1)


def _angles(positions: int | Tensor, width: int, base: float, device: torch.device | None) -> Tensor:
    """positions x frequencies, (N, width / 2), computed in float64 and kept in float32."""
    if width % 2:
        raise ConfigError(f"pairs of channels need an even width, got {width}")
    if isinstance(positions, int):
        positions = torch.arange(positions, device=device)
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width)
    return (positions.double()[:, None] * frequencies).float()
