"""Finite scalar quantization (arXiv:2309.15505): round each of a few bounded dimensions; the codebook is the grid.

    z (B, N, D) -> [project_in] -> bound to the levels -> round -> vectors in [-1, 1] -> [project_out] -> (B, N, D)
                                                             \\-> index in base L, first dimension least significant

No losses, nothing to learn but the optional projections. `symmetric` is section 3.2 of arXiv:2411.19842.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.quantize.base import Projection, Quantized, Quantizer, one_of, positive
from vistok.quantize.rotation import floor_through, round_through

_MARGIN = 1e-3  # widens the bound so that the outermost levels can be reached


class FSQ(Quantizer):
    """A grid with `levels[i]` values in dimension i; its codebook has prod(levels) entries.

    levels         values per dimension, each at least 2
    dim            D of the latent; other than `num_codebooks * len(levels)`, linear projections go in and out
    num_codebooks  the projected latent is cut into so many consecutive groups, one code each
    symmetric      levels at equal distances from -1 to 1, also for even L; needed for L = 2
    bound          "tanh", or "clamp" for latents that are bounded already

    Raises ConfigError for fewer than 2 levels.
    """

    levels: Tensor
    strides: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        *,
        num_codebooks: int = 1,
        symmetric: bool = False,
        bound: Literal["tanh", "clamp"] = "tanh",
    ):
        if not levels or any(positive("an FSQ level", level) < 2 for level in levels):
            raise ConfigError(f"FSQ needs at least 2 levels in every dimension, got {tuple(levels)}")
        if min(levels) == 2 and not symmetric:
            raise ConfigError("2 levels need symmetric=True: the plain bound never reaches the second one evenly")
        size, width = prod(levels), positive("num_codebooks", num_codebooks) * len(levels)
        super().__init__(width if dim is None else dim, (size,) * num_codebooks)
        self.num_codebooks = num_codebooks
        self.symmetric = bool(symmetric)
        self.bound = one_of("bound", bound, ("tanh", "clamp"))
        projects = self.dim != width
        self.project_in = Projection(self.dim, width) if projects else nn.Identity()
        self.project_out = Projection(width, self.dim) if projects else nn.Identity()
        strides = [prod(levels[:index]) for index in range(len(levels))]
        self.register_buffer("levels", torch.tensor(list(levels)), persistent=False)
        self.register_buffer("strides", torch.tensor(strides), persistent=False)

    def table(self) -> Tensor:
        """Every vector of one codebook in the order of its codes, (prod(levels), len(levels)), before project_out."""
        return self._grid(torch.arange(self.codebooks[0], device=self.levels.device))

    def round(self, z: Tensor) -> Tensor:
        """Grid points for `z` (..., len(levels)), in [-1, 1]; the gradient passes the rounding, not the bound."""
        levels = self.levels.to(z.dtype)
        if self.symmetric:
            squashed = torch.tanh(z) if self.bound == "tanh" else z.clamp(-1, 1)
            return floor_through((levels - 1) * (squashed + 1) / 2 + 0.5) * (2 / (levels - 1)) - 1
        half = (levels - 1) * (1 + _MARGIN) / 2
        offset = (self.levels % 2 == 0).to(z.dtype) / 2
        if self.bound == "tanh":
            squashed = torch.tanh(z + torch.atanh(offset / half))
        else:
            squashed = (z + offset / half).clamp(-1, 1)
        return round_through(squashed * half - offset) / (self.levels // 2)

    def codes_of(self, points: Tensor) -> Tensor:
        """Codes (...) of grid points (..., len(levels)): the inverse of the lookup in `table`."""
        if self.symmetric:
            digits = (points + 1) * (self.levels - 1) / 2
        else:
            digits = (points + 1) * (self.levels // 2)
        return (digits.round().long() * self.strides).sum(-1)

    def _grid(self, codes: Tensor) -> Tensor:
        digits = (codes[..., None] // self.strides) % self.levels
        if self.symmetric:
            return digits * (2 / (self.levels - 1).to(torch.float32)) - 1
        half = self.levels // 2
        return (digits - half) / half

    def _points(self, z: Tensor) -> Tensor:
        return self.round(self.project_in(z).unflatten(-1, (self.num_codebooks, -1)))

    def _quantize(self, z: Tensor) -> Quantized:
        points = self._points(z)
        return Quantized(self.project_out(points.flatten(-2)), self._squeeze(self.codes_of(points.detach())))

    def _encode(self, z: Tensor) -> Tensor:
        return self._squeeze(self.codes_of(self._points(z)))

    def _decode(self, codes: Tensor) -> Tensor:
        if self.num_codebooks == 1:
            codes = codes[..., None]
        return self.project_out(self._grid(codes.long()).flatten(-2))

    def _squeeze(self, codes: Tensor) -> Tensor:
        return codes.squeeze(-1) if self.num_codebooks == 1 else codes


def authors_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from vector-quantize-pytorch's: the projections keep their names, constant buffers go."""
    return {key: value for key, value in state.items() if key.startswith(("project_in.", "project_out."))}
