"""Residual quantization: each level quantizes what the levels before it left over (SoundStream, arXiv:2107.03312).

    r_0 = z;   q_i = level_i(r_i),   r_{i+1} = r_i - sg(q_i);   out = sum_i q_i      codes (B, N, levels)

Codes of the last levels may be absent (-1): `decode` then sums the first ones alone. In training, quantizer dropout
cuts a share of the items after a random level, so that every prefix of levels decodes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vistok.errors import ConfigError, InputError
from vistok.quantize.base import Projection, Quantized, Quantizer, check_range, positive, within
from vistok.quantize.fsq import FSQ
from vistok.quantize.vq import VectorQuantizer
from vistok.quantize.vq import authors_state as vq_authors_state


class ResidualQuantizer(Quantizer):
    """The loop over levels, for any quantizers of one dim with one code each.

    quantizers  the levels, coarse to fine
    dropout     share of the items that are cut in training, in 0..1
    min_levels  levels that a cut item keeps at least

    Losses are sums over levels; stats hold them per level, (levels,), under the same names. An item that was cut
    counts in the losses and statistics of the levels it kept alone.
    """

    allows_absent = True

    def __init__(self, quantizers: Sequence[Quantizer], *, dropout: float = 0.0, min_levels: int = 1):
        if not quantizers:
            raise ConfigError("residual quantization needs at least one level")
        if any(len(level.codebooks) != 1 or level.dim != quantizers[0].dim for level in quantizers):
            raise ConfigError("the levels of a residual quantizer have one code each and the same dim")
        super().__init__(quantizers[0].dim, [level.codebooks[0] for level in quantizers])
        self.quantizers = nn.ModuleList(quantizers)
        self.dropout = within("dropout", dropout, 0, 1)
        self.min_levels = positive("min_levels", min_levels)
        if self.min_levels > len(quantizers):
            raise ConfigError(f"min_levels is {min_levels}, but there are {len(quantizers)} levels")

    @property
    def levels(self) -> int:
        """Number of levels, the last axis of codes."""
        return len(self.quantizers)

    def forward(self, z: Tensor, *, keep: Tensor | None = None, generator: torch.Generator | None = None) -> Quantized:
        """Quantize `z` (B, N, D).

        `keep` (B,) says after how many levels to cut each item, 1..levels; without it, training draws it with `dropout`
        from `generator` (torch's own by default). Codes beyond are -1.
        """
        if keep is None and self.training and self.dropout:
            keep = self.draw_keep(len(z), z.device, generator)
        if keep is not None:
            if keep.shape != z.shape[:1]:
                raise InputError(f"keep has one number of levels per item, ({len(z)},), got {tuple(keep.shape)}")
            check_range(keep, (self.levels + 1,), lowest=1)
        self._keep = keep
        try:
            return super().forward(z)
        finally:
            self._keep = None

    @torch.no_grad()
    def encode(self, z: Tensor, levels: int | None = None) -> Tensor:
        """Codes (B, N, levels) of `z` (B, N, D); with `levels`, those after the first so many are -1."""
        self._limit = self.levels if levels is None else levels
        if not 1 <= self._limit <= self.levels:
            raise InputError(f"levels must be in 1..{self.levels}, got {levels}")
        return super().encode(z)

    def decode_levels(self, codes: Tensor) -> Tensor:
        """Each level's own vectors (levels, B, N, D) of `codes` (B, N, levels), zero where a code is -1."""
        self._check_codes(codes)
        return torch.stack(self._level_vectors(codes))

    def draw_keep(self, items: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Random numbers of levels (items,): with probability `dropout` uniform in min_levels..levels, else all."""
        where = generator.device if generator is not None else device
        cut = torch.rand(items, generator=generator, device=where) < self.dropout
        drawn = torch.randint(self.min_levels, self.levels + 1, (items,), generator=generator, device=where)
        return torch.where(cut, drawn, self.levels).to(device)

    _keep: Tensor | None = None
    _limit: int = 0

    def level(self, index: int) -> Quantizer:
        """The quantizer of one level."""
        found = self.quantizers[index]
        assert isinstance(found, Quantizer)
        return found

    def _level(self, index: int, residual: Tensor) -> Quantized:
        """Quantize at one level; a subclass may scale around it."""
        return self.level(index)(residual)

    def _level_decode(self, index: int, codes: Tensor) -> Tensor:
        return self.level(index).decode(codes)

    def _before(self, z: Tensor) -> Tensor:
        return z

    def _after(self, q: Tensor) -> Tensor:
        return q

    def _finish(self) -> None:
        """Called once after all levels in training mode."""

    def _quantize(self, z: Tensor) -> Quantized:
        keep = self._keep
        residual = self._before(z)
        total: Tensor | None = None
        codes, losses = [], []
        for index in range(self.levels):
            # every level runs in every process, with no items if need be: its statistics are summed over all of them
            items = None if keep is None else (keep > index).nonzero().flatten()
            out = self._level(index, residual if items is None else residual[items])
            assert out.codes is not None
            losses.append(out.losses)
            if items is None:
                q, code = out.vectors, out.codes
            else:
                q = torch.zeros_like(residual).index_copy(0, items, out.vectors)
                code = out.codes.new_full(z.shape[:2], -1).index_copy(0, items, out.codes)
            residual = residual - q.detach()
            total = q if total is None else total + q
            codes.append(code)
        assert total is not None
        if self.training:
            self._finish()
        per_level = {name: torch.stack([terms[name] for terms in losses]) for name in losses[0]}
        return Quantized(
            self._after(total),
            torch.stack(codes, -1),
            {name: values.sum() for name, values in per_level.items()},
            {name: values.detach() for name, values in per_level.items()},
        )

    def _encode(self, z: Tensor) -> Tensor:
        residual = self._before(z)
        codes = []
        for index in range(self._limit):
            code = self._level_encode(index, residual)
            codes.append(code)
            if index + 1 < self._limit:
                residual = residual - self._level_decode(index, code)
        return torch.stack(codes + [torch.full_like(codes[0], -1)] * (self.levels - self._limit), -1)

    def _level_encode(self, index: int, residual: Tensor) -> Tensor:
        return self.level(index).encode(residual)

    def _level_vectors(self, codes: Tensor) -> list[Tensor]:
        levels = []
        for index, code in enumerate(codes.long().unbind(-1)):
            absent = (code < 0)[..., None]
            levels.append(self._level_decode(index, code.clamp(min=0)).masked_fill(absent, 0))
        return levels

    def _decode(self, codes: Tensor) -> Tensor:
        vectors = self._level_vectors(codes)
        total = vectors[0]
        for level in vectors[1:]:  # the order of `forward`, so that the sums have the same bits
            total = total + level
        return self._after(total)


class ResidualVQ(ResidualQuantizer):
    """Residual vector quantization: `levels` VectorQuantizers of one size.

    shared      one codebook for all levels; its statistics then move once per step, by all levels' residuals together
    dropout, min_levels   see ResidualQuantizer
    options     of VectorQuantizer (metric, learning, estimator, commitment, ...)

    Raises ConfigError for illegal options.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        levels: int,
        *,
        shared: bool = False,
        dropout: float = 0.0,
        min_levels: int = 1,
        **options: Any,
    ):
        count = positive("levels", levels)
        seed = options.pop("seed", 0)
        if shared:
            quantizers = [VectorQuantizer(dim, codebook_size, seed=seed, **options)] * count
        else:
            quantizers = [VectorQuantizer(dim, codebook_size, seed=seed + level, **options) for level in range(count)]
        super().__init__(quantizers, dropout=dropout, min_levels=min_levels)
        self.shared = bool(shared)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def _level(self, index: int, residual: Tensor) -> Quantized:
        level = self.level(index)
        if not self.shared:
            return level(residual)
        assert isinstance(level, VectorQuantizer)
        out, rows = level.quantize(residual)
        if self.training and out.codes is not None:
            self._seen.append((rows, out.codes.flatten()))
        return out

    def _finish(self) -> None:
        if self.shared and self._seen:
            rows, codes = zip(*self._seen, strict=True)
            self._seen = []
            level = self.level(0)
            assert isinstance(level, VectorQuantizer)
            level.learn(torch.cat(rows), torch.cat(codes))


class ResidualFSQ(ResidualQuantizer):
    """Residual finite scalar quantization: the same symmetric grid at every level, L times finer at each.

    The latent is first bounded softly to c = 1 + 1 / (L - 1) per dimension, c tanh(z / c); level i rounds the residual
    times L^i, clamped to [-1, 1]. `bound="tanh"` squashes at every level instead, as older versions of
    vector-quantize-pytorch did. Other than `len(levels)`, `dim` brings linear projections around all levels.

    No losses. Raises ConfigError for illegal options.
    """

    def __init__(
        self,
        levels: Sequence[int],
        num_quantizers: int,
        dim: int | None = None,
        *,
        bound: str = "clamp",
        dropout: float = 0.0,
        min_levels: int = 1,
    ):
        count = positive("num_quantizers", num_quantizers)
        grids = [FSQ(levels, symmetric=True, bound=bound) for _ in range(count)]  # type: ignore[arg-type]
        super().__init__(grids, dropout=dropout, min_levels=min_levels)
        width = len(levels)
        self.dim = width if dim is None else positive("dim", dim)
        projects = self.dim != width
        self.project_in = Projection(self.dim, width) if projects else nn.Identity()
        self.project_out = Projection(width, self.dim) if projects else nn.Identity()
        self.soft_bound = bound == "clamp"

    def _before(self, z: Tensor) -> Tensor:
        z = self.project_in(z)
        if not self.soft_bound:
            return z
        limit = 1 + 1 / (self._sizes() - 1)
        return torch.tanh(z / limit) * limit

    def _after(self, q: Tensor) -> Tensor:
        return self.project_out(q)

    def _sizes(self) -> Tensor:
        grid = self.level(0)
        assert isinstance(grid, FSQ)
        return grid.levels.float()

    def _scale(self, index: int) -> Tensor:
        return self._sizes() ** -index

    def _level(self, index: int, residual: Tensor) -> Quantized:
        scale = self._scale(index)
        out = self.level(index)(residual / scale)
        out.vectors = out.vectors * scale
        return out

    def _level_encode(self, index: int, residual: Tensor) -> Tensor:
        return self.level(index).encode(residual / self._scale(index))

    def _level_decode(self, index: int, codes: Tensor) -> Tensor:
        return self.level(index).decode(codes) * self._scale(index)


def authors_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our ResidualVQ state dict from vector-quantize-pytorch's (`layers.{i}._codebook.*`)."""
    ours: dict[str, Tensor] = {}
    levels: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("layers."):
            _, index, rest = key.split(".", 2)
            levels.setdefault(index, {})[rest] = value
    for index, level in levels.items():
        ours |= {f"quantizers.{index}.{name}": value for name, value in vq_authors_state(level).items()}
    return ours
