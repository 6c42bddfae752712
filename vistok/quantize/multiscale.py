"""Multi-scale residual quantization (VAR, arXiv:2404.02905): a picture as token maps of growing size, one codebook.

    f (B, H W, D) as a map;  f_hat = 0, rest = f;  for each scale s of (h_s, w_s), the last being (H, W):
        codes_s = nearest(area-resize rest to (h_s, w_s));   u = bicubic-resize E[codes_s] to (H, W)
        u = (1 - r) u + r conv_s(u);   f_hat += u;   rest -= u                                 (r = `ratio`)

    codes (B, sum_s h_s w_s), scale after scale, each in raster order; vectors (B, H W, D), the sum f_hat

Any whole number of scales decodes, and a scale whose codes are -1 (dropped in training) adds nothing. The class also
holds what an autoregressive model over scales needs: the cumulated maps, the inputs of all scales at once (teacher
forcing), and one step of generation.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import conv2d, embedding, interpolate, normalize

from vistok.errors import ConfigError, InputError
from vistok.quantize.base import Quantized, Quantizer, check_range, mean_square, one_of, positive, within
from vistok.quantize.processes import sum_over_processes
from vistok.quantize.restarts import restart
from vistok.quantize.rotation import straight_through
from vistok.quantize.search import nearest

VAR_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


class MultiScaleVectorQuantizer(Quantizer):
    """VAR's quantizer, and ImageFolder's, which differs in the losses and drops scales in training.

    dim, codebook_size  D and K
    scales              sizes of the token maps, growing; a number is a square, a pair is (height, width)
    metric              "l2", or "cosine" to choose codes by angle; the rows themselves are used as they are
    convs               number of 3x3 convolutions: each scale takes the nearest in depth; 1 is shared by all, 0 means
                        one for each scale
    ratio               r, the share of the convolution in its residual blend; at 0 there are no convolutions
    commitment          beta
    commitment_over     "mean" over scales (VAR), or their "sum" (ImageFolder)
    scale_dropout       share of the items for which a random number of the last scales is dropped in training; they
                        count neither in the output nor in the losses of that item
    min_scales          scales that such an item keeps at least
    restart_below       codes that are chosen less often than this in a step, averaged with `decay`, are replaced by
                        what a scale had to choose for, drawn from `seed`; 0 turns it off, which leaves small models
                        with a handful of codes in use

    Losses: "commitment" = beta mean((f - sg f_hat_s)^2), "codebook" = mean((sg f - f_hat_s)^2), f_hat_s after each
    scale. Raises ConfigError for illegal options.
    """

    counts: Tensor  # (K,) averaged number of choices per step
    steps: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        scales: Sequence[int | tuple[int, int]] = VAR_SCALES,
        *,
        metric: Literal["l2", "cosine"] = "l2",
        convs: int = 4,
        ratio: float = 0.5,
        commitment: float = 0.25,
        commitment_over: Literal["mean", "sum"] = "mean",
        scale_dropout: float = 0.0,
        min_scales: int = 1,
        restart_below: float = 0.0,
        decay: float = 0.99,
        seed: int = 0,
    ):
        super().__init__(dim, (positive("codebook_size", codebook_size),))
        pairs = [(scale, scale) if isinstance(scale, int) else tuple(scale) for scale in scales]
        self.scales = tuple((positive("scale", height), positive("scale", width)) for height, width in pairs)
        if not self.scales or any(a > c or b > d for (a, b), (c, d) in zip(self.scales, self.scales[1:], strict=False)):
            raise ConfigError(f"scales must grow from first to last, got {tuple(scales)}")
        self.metric = one_of("metric", metric, ("l2", "cosine"))
        self.ratio = within("ratio", ratio, 0, 1)
        self.commitment = within("commitment", commitment)
        self.commitment_over = one_of("commitment_over", commitment_over, ("mean", "sum"))
        self.scale_dropout = within("scale_dropout", scale_dropout, 0, 1)
        self.min_scales = positive("min_scales", min_scales)
        if self.min_scales > len(self.scales):
            raise ConfigError(f"min_scales is {min_scales}, but there are {len(self.scales)} scales")
        self.lengths = tuple(height * width for height, width in self.scales)
        if not isinstance(convs, int) or convs < 0:
            raise ConfigError(f"convs must be a whole number of at least 0, got {convs!r}")
        count = len(self.scales) if convs == 0 else convs
        self.conv_of_scale = tuple(range(count)) if convs == 0 else nearest_convs(len(self.scales), count)
        self.codebook = nn.Parameter(torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size))
        self.restart_below = within("restart_below", restart_below)
        self.decay, self.seed = within("decay", decay, 0, 1), seed
        if restart_below:
            self.register_buffer("counts", torch.full((codebook_size,), max(1.0, restart_below)))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(count if self.ratio else 0))

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the latent, the last scale."""
        return self.scales[-1]

    def table(self) -> Tensor:
        """The vectors (K, D) that codes stand for."""
        return self.codebook if self.codebook.dtype == torch.float64 else self.codebook.float()

    def split(self, codes: Tensor) -> list[Tensor]:
        """Codes of each scale [(B, h_s w_s)] from codes (B, total) of all scales or of the first ones, whole.

        Raises InputError where the length does not end with a scale, naming the lengths that do.
        """
        ends = [sum(self.lengths[: count + 1]) for count in range(len(self.lengths))]
        if codes.ndim != 2 or codes.shape[1] not in ends:
            legal = ", ".join(map(str, ends))
            raise InputError(f"codes of whole scales have shape (B, N) with N one of {legal}; got {tuple(codes.shape)}")
        return list(codes.split(list(self.lengths[: ends.index(codes.shape[1]) + 1]), dim=1))

    def cumulative(self, codes: Tensor) -> list[Tensor]:
        """The sum f_hat (B, H W, D) after each scale of `codes` (B, total); `decode` gives the last of them."""
        self._check_codes(codes)
        with torch.autocast(codes.device.type, enabled=False):
            return [_to_rows(total) for total in self._cumulative(codes)]

    def next_inputs(self, codes: Tensor) -> Tensor:
        """What an autoregressive model reads at scales 2, 3, .. (B, total - first, D), from all `codes` (teacher
        forcing).

        At scale s + 1 that is f_hat after scale s, area-resized to (h_{s+1}, w_{s+1}).
        """
        self._check_codes(codes)
        parts = self.split(codes)
        with torch.autocast(codes.device.type, enabled=False):
            sums = self._cumulative(codes)
            count = min(len(parts), len(self.scales) - 1)
            inputs = [_to_rows(self._shrink(sums[scale], scale + 1)) for scale in range(count)]
        return torch.cat(inputs, 1) if inputs else self.table().new_zeros(len(codes), 0, self.dim)

    def advance(self, scale: int, codes: Tensor, f_hat: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """One step of generation: add the `codes` (B, h_s w_s) of `scale` (0-based) to `f_hat` (B, H W, D; None is
        zero). Vectors (B, h_s w_s, D) in place of codes are taken as they are: mixtures of rows, for instance.

        Gives the new f_hat and the model's next input (B, h w, D) at the following scale, None after the last.
        """
        if not 0 <= scale < len(self.scales):
            raise InputError(f"scale must be in 0..{len(self.scales) - 1}, got {scale}")
        rows = codes if codes.ndim == 3 else None
        wanted = (self.lengths[scale],) if rows is None else (self.lengths[scale], self.dim)
        if codes.ndim not in (2, 3) or codes.shape[1:] != wanted:
            told = ", ".join(map(str, wanted))
            raise InputError(f"scale {scale} has codes of shape (B, {told}), got {tuple(codes.shape)}")
        if rows is None:
            check_range(codes, self.codebooks)
        with torch.autocast(codes.device.type, enabled=False):
            total = self._detail(codes, scale) if rows is None else self._spread(rows.to(self.table().dtype), scale)
            if f_hat is not None:
                total = self._to_map(f_hat.to(total.dtype)) + total
            following = _to_rows(self._shrink(total, scale + 1)) if scale + 1 < len(self.scales) else None
        return _to_rows(total), following

    def _check_codes(self, codes: Tensor) -> None:
        self.split(codes)
        check_range(codes, self.codebooks, lowest=-1)

    def _checked(self, z: Tensor) -> Tensor:
        z = super()._checked(z)
        if z.shape[1] != self.lengths[-1]:
            height, width = self.grid
            raise InputError(f"the latent must fill the last scale, ({height}, {width}) = {height * width} positions, "
                             f"got {z.shape[1]}")  # fmt: skip
        return z

    def _quantize(self, z: Tensor) -> Quantized:
        f = self._to_map(z)
        keep = self._draw_keep(z)
        rest, f_hat = f.detach(), torch.zeros_like(f)
        codes, commitments, codebooks, wanted = [], [], [], []
        for scale in range(len(self.scales)):
            rows = _to_rows(self._shrink(rest, scale))
            found = self._choose(rows)
            wanted.append(rows)
            detail = self._detail(found, scale)
            rest = rest - detail.detach()
            if keep is None:
                f_hat = f_hat + detail
                commitments.append(mean_square(f_hat.detach(), f))
                codebooks.append(mean_square(f_hat, f.detach()))
            else:
                present = (keep > scale).to(f.dtype)[:, None, None, None]
                f_hat = f_hat + detail * present
                share = present / f.numel()
                commitments.append(((f_hat.detach() - f).square() * share).sum())
                codebooks.append(((f_hat - f.detach()).square() * share).sum())
                found = torch.where((keep > scale)[:, None], found, -1)
            codes.append(found)
        commitment = torch.stack(commitments)
        losses = {
            "commitment": self.commitment * (commitment.mean() if self.commitment_over == "mean" else commitment.sum()),
            "codebook": torch.stack(codebooks).mean(),
        }
        if self.training and self.restart_below:
            self._restart(torch.cat(wanted, 1).flatten(0, 1), torch.cat(codes, 1))
        return Quantized(_to_rows(straight_through(f, f_hat)), torch.cat(codes, 1), losses)

    @torch.no_grad()
    def _restart(self, rows: Tensor, codes: Tensor) -> None:
        """Count codes (B, total), and replace those that are hardly chosen by some of `rows` (M, D)."""
        self.steps += 1
        packed = torch.bincount(codes[codes >= 0], minlength=self.codebooks[0]).to(self.counts.dtype)
        sum_over_processes(packed)
        if packed.sum() == 0:
            return
        self.counts.lerp_(packed, 1 - self.decay)
        restart(self.codebook, self.counts, self.restart_below, rows, self.seed * 1_000_003 + int(self.steps))

    def _draw_keep(self, z: Tensor) -> Tensor | None:
        if not (self.training and self.scale_dropout):
            return None
        cut = torch.rand(len(z), device=z.device) < self.scale_dropout
        drawn = torch.randint(self.min_scales, len(self.scales) + 1, (len(z),), device=z.device)
        return torch.where(cut, drawn, len(self.scales))

    def _encode(self, z: Tensor) -> Tensor:
        rest = self._to_map(z)
        codes = []
        for scale in range(len(self.scales)):
            codes.append(self._choose(_to_rows(self._shrink(rest, scale))))
            rest = rest - self._detail(codes[-1], scale)
        return torch.cat(codes, 1)

    def _decode(self, codes: Tensor) -> Tensor:
        return _to_rows(self._cumulative(codes)[-1])

    def _cumulative(self, codes: Tensor) -> list[Tensor]:
        sums: list[Tensor] = []
        for scale, part in enumerate(self.split(codes)):
            detail = self._detail(part.clamp(min=0), scale)
            detail = detail * (part >= 0).all(1)[:, None, None, None]
            sums.append(sums[-1] + detail if sums else detail)
        return sums

    def _choose(self, wanted: Tensor) -> Tensor:
        """Codes (B, n) for what is left at a scale, (B, n, D)."""
        rows = wanted.flatten(0, 1)
        table = self.table().detach().to(rows.dtype)
        if self.metric == "cosine":
            codes = nearest(normalize(rows, dim=-1), normalize(table, dim=-1), "dot")
        else:
            codes = nearest(rows, table)
        return codes.view(wanted.shape[:2])

    def _detail(self, codes: Tensor, scale: int) -> Tensor:
        """What the codes (B, h_s w_s) of a scale add to f_hat, a map (B, D, H, W)."""
        return self._spread(embedding(codes.long(), self.table()), scale)

    def _spread(self, rows: Tensor, scale: int) -> Tensor:
        """The rows (B, h_s w_s, D) of a scale at full size and refined, (B, D, H, W)."""
        height, width = self.scales[scale]
        grown = rearrange(rows, "b (h w) d -> b d h w", h=height, w=width).contiguous()
        if scale + 1 < len(self.scales):
            grown = _resize(grown, self.grid, "bicubic")
        if not self.ratio:
            return grown
        conv = self.convs[self.conv_of_scale[scale]]
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        refined = conv2d(grown, conv.weight.to(grown.dtype), conv.bias.to(grown.dtype), padding=1)
        return grown * (1 - self.ratio) + refined * self.ratio

    def _shrink(self, x: Tensor, scale: int) -> Tensor:
        return x if scale + 1 == len(self.scales) else _resize(x, self.scales[scale], "area")

    def _to_map(self, z: Tensor) -> Tensor:
        return rearrange(z, "b (h w) d -> b d h w", h=self.grid[0])


def nearest_convs(scales: int, convs: int) -> tuple[int, ...]:
    """Which of `convs` convolutions each of `scales` uses: the first of the ticks nearest to s / (scales - 1).

    Ticks run evenly from 1/(3 convs) to 1 - 1/(3 convs) for 4 convolutions, from 1/(2 convs) otherwise. Places often
    lie exactly between two ticks; then the last bit of float64 decides, as in the published models. float32 decides
    otherwise.
    """
    if convs == 1:
        return (0,) * scales
    edge = 1 / 3 / convs if convs == 4 else 1 / 2 / convs
    ticks = np.linspace(edge, 1 - edge, convs)
    return tuple(int(np.argmin(np.abs(ticks - scale / max(scales - 1, 1)))) for scale in range(scales))


def _resize(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if len(x) == 0:  # interpolate refuses an empty batch
        return x.new_zeros(0, x.shape[1], *size)
    return interpolate(x, size=size, mode=mode)


def _to_rows(x: Tensor) -> Tensor:
    return rearrange(x, "b d h w -> b (h w) d")


def authors_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from VAR's or ImageFolder's: `embedding.weight`, `quant_resi.{qresi_ls.k | qresi | k}.*`."""
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == "embedding.weight":
            ours["codebook"] = value
        elif key.startswith("quant_resi."):
            parts = key.split(".")
            index = "0" if parts[1] == "qresi" else parts[-2]
            ours[f"convs.{index}.{parts[-1]}"] = value
    return ours
