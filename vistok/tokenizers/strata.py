"""Strata: the tokenizer that ships. Small, ordered, discrete; residual codes on a lapped transform.

New here; it builds on residual vector quantization (SoundStream, arXiv 2107.03312), residuals across scales (VAR,
arXiv 2404.02905) and lapped transforms. The latent is written as a sum of codes, coarse to fine: the first level lies
on a grid at 1/32, the others at 1/16, and each level codes what the levels before it left, so every prefix of whole
levels decodes. The transform is orthonormal: the distance to a code is a distance in pixels, k-means gives good first
codebooks, and training starts from a working transform coder.

    pixels (B, 3, H, W)                            H, W multiples of 32
       |  lapped transform at stride 16, the D directions of highest variance                   `Encoder`
    latent (B, D, H/16, W/16)
       |  level 0: one code per 2 x 2 positions, then a predictor fills in what the codes imply
       |  level 1: one code per position, then the predictor once more
       |  level 2, 3, ...: one code per position                                                `Quantizer`
    codes (B, N), level by level, each in raster order
       |  sum of code vectors, refined by the predictor
    latent (B, D, H/16, W/16)
       |  inverse transform + residual network at 1/16, 1/8 and 1/4, told the prefix            `Decoder`
    pixels (B, 3, H, W)

Everything is convolutional with a small receptive field, so a picture of any size is encoded and decoded window by
window in bounded memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.layout import Segment, Size, Sizes, TokenSpec
from vistok.nn.lapped import BLOCK, LappedTransform
from vistok.nn.windows import coarsened, scaled, windows
from vistok.pixels import as_uint8
from vistok.prior import CodePrior
from vistok.quantize.search import nearest
from vistok.registry import System
from vistok.tokenizer import TokenData, Tokenizer


@dataclass(frozen=True)
class LevelConfig:
    """One level of codes: `scale` 2 is a grid at 1/32, 1 at 1/16; its vectors hold the first `dim` latent channels.

    `predict`: whether the predictor refines the sum after this level.
    """

    scale: int
    codes: int
    dim: int
    predict: bool = False


LEVELS = (
    LevelConfig(2, 512, 40, predict=True),
    LevelConfig(1, 2048, 96, predict=True),
    LevelConfig(1, 2048, 128),
    LevelConfig(1, 1024, 128),
    LevelConfig(1, 1024, 128),
    LevelConfig(1, 1024, 128),
)


@dataclass(frozen=True)
class StrataConfig:
    """Sizes of a Strata tokenizer. `widths` and `depths` are those of the decoder at 1/16, 1/8 and 1/4.

    `beam`: how many sums are kept while the codes after the last predictor are searched; 1 takes the nearest at each
    level, faster and 0.15 dB worse at the full length. `level_weights`: how often training decodes the prefix that ends
    with each level. `init_pictures`: how many crops the transform and the first codebooks are fitted to. `prior`: width
    of the prior that compressed files are coded with, which `python -m vistok.training.prior` adds; 0: none.
    """

    dim: int = 128
    levels: tuple[LevelConfig, ...] = LEVELS
    beam: int = 4
    predictor_width: int = 128
    predictor_depth: int = 2
    widths: tuple[int, int, int] = (176, 96, 48)
    depths: tuple[int, int, int] = (4, 3, 2)
    level_weights: tuple[float, ...] = (1.0, 2.0, 1.0, 1.0, 1.0, 2.0)
    init_pictures: int = 1500
    prior: int = 0
    version: int = 1

    def __post_init__(self) -> None:
        if len(self.level_weights) != len(self.levels):
            raise ConfigError(f"{len(self.level_weights)} level_weights for {len(self.levels)} levels")
        if any(level.dim > self.dim for level in self.levels):
            raise ConfigError(f"a level's dim is larger than the latent's, {self.dim}")
        predicts = [index for index, level in enumerate(self.levels) if level.predict]
        searched = self.levels[predicts[-1] + 1 :] if predicts else ()
        if self.beam > 1 and any(level.scale != 1 or level.dim != self.dim for level in searched):
            raise ConfigError(
                "levels after the last predictor are searched together: scale 1 and all channels, or beam 1"
            )

    @property
    def stride(self) -> int:
        """Pixels a side of the coarsest code's block."""
        return BLOCK * max(level.scale for level in self.levels)


# -- modules ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Residual block (B, C, h, w): 3 x 3 convolution, GELU, 1 x 1; scaled and shifted by the level it is told."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.proj = nn.Conv2d(width, width, 1)
        self.film = nn.Embedding(levels, 2 * width)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.film.weight)
        with torch.no_grad():
            self.proj.weight.mul_(0.3)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.conv(x)
        scale, shift = self.film(level).to(h.dtype)[:, :, None, None].chunk(2, 1)
        return x + self.proj(F.gelu(torch.addcmul(shift, h, scale + 1)))


class Predictor(nn.Module):
    """Corrects the sum so far towards the latent expected from it and its neighbours: (B, D, h, w), same out."""

    def __init__(self, dim: int, width: int, depth: int, levels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(dim, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width, levels) for _ in range(depth))
        self.head = nn.Conv2d(width, dim, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h, level)
        return self.head(F.gelu(h))


class Level(nn.Module):
    """The codebook of one level: vectors over `scale` x `scale` positions and the first `dim` channels.

    The parameter is kept in units of `unit` (the residual's deviation per channel), so that one learning rate fits
    channels whose sizes differ a hundredfold.
    """

    unit: Tensor

    def __init__(self, config: LevelConfig) -> None:
        super().__init__()
        self.config = config
        size = config.dim * config.scale**2
        self.weight = nn.Parameter(torch.randn(config.codes, size))
        self.register_buffer("unit", torch.ones(size))

    def vectors(self, latent: Tensor) -> Tensor:
        """Latent (B, D, h, w) -> vectors (B, h/s, w/s, dim s^2)."""
        return F.pixel_unshuffle(latent[:, : self.config.dim], self.config.scale).permute(0, 2, 3, 1)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Index of the nearest code, (..., size) -> long (...); ties go to the lower index."""
        table = (self.weight.detach() * self.unit).float()
        return nearest(vectors.detach().float().reshape(-1, table.shape[1]), table).view(vectors.shape[:-1])

    def embed(self, codes: Tensor, dim: int) -> Tensor:
        """Codes (B, h/s, w/s) -> latent (B, dim, h, w); the channels that the level does not hold are zero."""
        vectors = (F.embedding(codes, self.weight) * self.unit).permute(0, 3, 1, 2)
        latent = F.pixel_shuffle(vectors, self.config.scale)
        return F.pad(latent, (0, 0, 0, 0, 0, dim - self.config.dim))


class Encoder(nn.Module):
    """Pixels in [0, 1] (B, 3, H, W) -> latent (B, D, H/16, W/16): the transform alone.

    A residual network here, trained straight through the quantizer, gained nothing and drifted.
    """

    def __init__(self, transform: LappedTransform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, pixels: Tensor) -> Tensor:
        return self.transform(pixels)


class Quantizer(nn.Module):
    """Latent (B, D, h, w) <-> codes per level, (B, h/s, w/s) each, coarse to fine."""

    scale: Tensor

    def __init__(self, config: StrataConfig) -> None:
        super().__init__()
        self.dim, self.beam = config.dim, config.beam
        self.levels = nn.ModuleList(Level(level) for level in config.levels)
        self.predictor = Predictor(config.dim, config.predictor_width, config.predictor_depth, len(config.levels))
        self.register_buffer("scale", torch.ones(config.dim, 1, 1))

    def predict(self, total: Tensor, index: int) -> Tensor:
        """The latent expected after level `index`; the sum itself after levels that do not predict."""
        if not self.levels[index].config.predict:  # type: ignore[union-attr]
            return total
        level = torch.full((len(total),), index, device=total.device)
        return total + self.predictor(total / self.scale, level).to(total.dtype) * self.scale

    def forward(self, latent: Tensor) -> list[Tensor]:
        """The decoded latent of every prefix, for training: gradients reach codebooks and predictor."""
        total, latents = torch.zeros_like(latent), []
        for index, codes in enumerate(self.encode(latent)):
            total = self.predict(total + self.levels[index].embed(codes, self.dim), index)  # type: ignore[operator]
            latents.append(total)
        return latents

    @torch.no_grad()
    def encode(self, latent: Tensor) -> list[Tensor]:
        """The codes of every level: the nearest to what is left, or, after the last predictor, the best few sums."""
        predicts = [level.config.predict for level in self.levels]  # type: ignore[union-attr]
        together = len(predicts) - predicts[::-1].index(True) if self.beam > 1 and any(predicts) else len(predicts)
        total, found = torch.zeros_like(latent), []
        for index, level in enumerate(self.levels[:together]):
            found.append(level.nearest(level.vectors(latent - total)))  # type: ignore[operator]
            if index + 1 < len(self.levels):
                total = self.predict(total + level.embed(found[-1], self.dim), index)  # type: ignore[operator]
        if together < len(self.levels):
            found += self._search(latent - total, self.levels[together:])
        return found

    def _search(self, residual: Tensor, levels: Any, rows: int = 512) -> list[Tensor]:
        """Beam search over the sums of one code per level, at each position of (B, D, h, w) by itself.

        Such levels lie on one grid and hold all channels, which the config sees to.
        """
        batch, dim, height, width = residual.shape
        tables = [(level.weight * level.unit).float() for level in levels]
        norms = [table.square().sum(1) for table in tables]
        found = []
        for rest in residual.float().permute(0, 2, 3, 1).reshape(-1, 1, dim).split(rows):  # (rows, beams, D)
            history = torch.empty(len(rest), 1, 0, dtype=torch.long, device=rest.device)
            for table, norm in zip(tables, norms, strict=True):
                score = torch.addmm(norm, rest.flatten(0, 1), table.T, alpha=-2)
                best, code = score.topk(min(self.beam, len(table)), dim=1, largest=False)
                best = best.view(*rest.shape[:2], -1) + rest.square().sum(-1, keepdim=True)
                pick = best.flatten(1).topk(min(self.beam, best[0].numel()), dim=1, largest=False).indices
                parent = (pick // best.shape[2])[..., None]
                code = code.view(len(rest), -1).gather(1, pick)
                rest = rest.gather(1, parent.expand(-1, -1, dim)) - table[code]
                history = torch.cat([history.gather(1, parent.expand(-1, -1, history.shape[2])), code[..., None]], 2)
            found.append(history[:, 0])
        return list(torch.cat(found).view(batch, height, width, -1).unbind(3))

    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """Codes of the first levels -> latent (B, D, h, w)."""
        scale: int = self.levels[0].config.scale  # type: ignore[union-attr, assignment]
        batch, height, width = codes[0].shape
        total = self.scale.new_zeros(batch, self.dim, height * scale, width * scale)
        for index, level_codes in enumerate(codes):
            total = self.predict(total + self.levels[index].embed(level_codes, self.dim), index)  # type: ignore[operator]
        return total


class Decoder(nn.Module):
    """Latent (B, D, h, w) and the last level that it holds, long (B,) -> pixels (B, 3, 16 h, 16 w), not clipped."""

    scale: Tensor

    def __init__(self, config: StrataConfig) -> None:
        super().__init__()
        levels, (w16, w8, w4), (d16, d8, d4) = len(config.levels), config.widths, config.depths
        self.transform = LappedTransform(config.dim)
        self.register_buffer("scale", torch.ones(config.dim, 1, 1))
        self.stem = nn.Conv2d(config.dim, w16, 3, padding=1)
        self.blocks16 = nn.ModuleList(Block(w16, levels) for _ in range(d16))
        self.up8 = nn.Conv2d(w16, 4 * w8, 1)
        self.blocks8 = nn.ModuleList(Block(w8, levels) for _ in range(d8))
        self.up4 = nn.Conv2d(w8, 4 * w4, 1)
        self.blocks4 = nn.ModuleList(Block(w4, levels) for _ in range(d4))
        self.head = nn.Conv2d(w4, 3 * 16, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, latent: Tensor, level: Tensor) -> Tensor:
        h = self.stem(latent / self.scale)
        for block in self.blocks16:
            h = block(h, level)
        h = F.pixel_shuffle(self.up8(h), 2)
        for block in self.blocks8:
            h = block(h, level)
        h = F.pixel_shuffle(self.up4(h), 2)
        for block in self.blocks4:
            h = block(h, level)
        residual = F.pixel_shuffle(self.head(F.gelu(h)), 4)
        return self.transform.inverse(latent) + 0.1 * residual.to(latent.dtype)


# -- the tokenizer ---------------------------------------------------------------------------------------------------


class Strata(Tokenizer):
    """Encoder, quantizer and decoder, with the training loss and the start that is fitted to data."""

    system: ClassVar[str] = "strata"
    window = 128  # positions at 1/16 that are computed at once, a side
    margin = 16  # at least the receptive field of predictor and decoder; even, as the coarsest grid asks

    def __init__(self, config: StrataConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.encoder = Encoder(LappedTransform(config.dim))
        self.quantizer = Quantizer(config)
        self.decoder = Decoder(config)

        def layout(size: Size) -> tuple[Segment, ...]:
            return tuple(
                Segment(f"level{index}", tuple(side // BLOCK // level.scale for side in size), (level.codes,))
                for index, level in enumerate(config.levels)
            )

        sizes = Sizes(multiple=config.stride, minimum=config.stride)
        self.spec = TokenSpec(size=(256, 256), layout=layout, sizes=sizes, prefix_rule="segments")
        self.prior = CodePrior(self.spec.segments, config.prior) if config.prior else None

    def tokenize(self, pixels: Tensor, spec: TokenSpec, *, seeds: list[int], **conditions: Any) -> TokenData:
        """Codes of every level, window by window."""
        grid = (spec.size[0] // BLOCK, spec.size[1] // BLOCK)
        levels = [torch.empty(len(pixels), *s.shape, dtype=torch.long, device=self.device) for s in spec.segments]
        for outer, inner, cut in windows(grid, self.window, self.margin):
            part = self.prepare(pixels[(..., *scaled(outer, BLOCK))])
            found = self.quantizer.encode(self.encoder(part))  # type: ignore[operator]
            for level, codes, settings in zip(levels, found, self.config.levels, strict=True):
                level[(..., *coarsened(inner, settings.scale))] = codes[(..., *coarsened(cut, settings.scale))]
        return TokenData(codes=torch.cat([level.flatten(1) for level in levels], 1))

    def detokenize(
        self, data: TokenData, spec: TokenSpec, *, seeds: list[int], dtype: torch.dtype, **conditions: Any
    ) -> Tensor:
        """Pixels from the codes of the first levels, window by window."""
        assert data.codes is not None
        levels, start = [], 0
        for segment in spec.segments:
            if start < data.codes.shape[1]:
                levels.append(data.codes[:, start : start + segment.count].unflatten(1, segment.shape))
            start += segment.count
        grid = (spec.size[0] // BLOCK, spec.size[1] // BLOCK)
        last = torch.full((len(data.codes),), len(levels) - 1, device=self.device)
        pixels = torch.empty(len(data.codes), 3, *spec.size, dtype=dtype, device=self.device)
        for outer, inner, cut in windows(grid, self.window, self.margin):
            codes = [
                level[(..., *coarsened(outer, settings.scale))]
                for level, settings in zip(levels, self.config.levels, strict=False)
            ]
            part = self.decoder(self.quantizer.decode(codes), last).clamp(0, 1)  # type: ignore[operator]
            part = part[(..., *scaled(cut, BLOCK))]
            pixels[(..., *scaled(inner, BLOCK))] = as_uint8(part) if dtype == torch.uint8 else part.to(dtype)
        return pixels

    def embed(self, tokens: Any) -> Tensor:
        """The code vectors, float (B, n, widest level's size), in the latent's units; narrower levels end in zeros."""
        self._check_source(tokens)
        width = max(level.config.dim * level.config.scale**2 for level in self.quantizer.levels)  # type: ignore
        parts, start = [], 0
        with self.inference():
            for segment, level in zip(tokens.segments, self.quantizer.levels, strict=True):  # type: ignore[arg-type]
                codes = tokens.codes[:, start : start + segment.count].to(self.device)
                vectors = F.embedding(codes, level.weight) * level.unit
                parts.append(F.pad(vectors, (0, width - vectors.shape[-1])))
                start += segment.count
        return torch.cat(parts, 1)

    def forward(self, pixels: Tensor, **conditions: Any) -> Tensor:
        """Reconstruction from all levels, (B, 3, H, W), not clipped."""
        latent = self.quantizer(self.encoder(self.prepare(pixels)))[-1]
        return self.decoder(latent, torch.full((len(pixels),), len(self.config.levels) - 1, device=self.device))

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Two terms; `rng` draws the prefix that each item is decoded from.

        `pixel` is the mean log of each picture's mean squared error, the natural loss for mean PSNR: smooth pictures
        count as much as busy ones. `latent` is the same for every prefix under the inverse transform alone; it is cheap
        and trains all levels in every step.
        """
        pixels = batch["pixels"]
        with torch.autocast(pixels.device.type, enabled=False):
            latent = self.encoder(pixels)
            energy = (pixels - self.encoder.transform.mean).square().sum((1, 2, 3))  # type: ignore[union-attr]
            rest = (energy - latent.square().sum((1, 2, 3))).clamp_min(0)  # what the latent does not hold
        latents = self.quantizer(latent)
        weights = torch.tensor(self.config.level_weights, device=rng.device)
        drawn = torch.multinomial(weights, len(pixels), replacement=True, generator=rng).to(pixels.device)
        chosen = torch.stack([latents[level][item] for item, level in enumerate(drawn.tolist())])
        values = pixels[0].numel()
        pixel = (self.decoder(chosen, drawn).float() - pixels).square().sum((1, 2, 3)) / values
        linear = torch.stack([(z - latent).square().sum((1, 2, 3)) + rest for z in latents]) / values
        balance = (weights / weights.sum()).to(linear)
        return {
            "pixel": (pixel + 1e-5).log().mean(),
            "latent": 0.3 * (balance @ (linear + 1e-5).log()).mean(),
        }

    @torch.no_grad()
    def initialise(self, batches: Iterator[dict[str, Any]], rng: torch.Generator) -> None:
        """Fit the transform by PCA, then the codebooks by k-means level by level, to `init_pictures` crops."""
        pictures: list[Tensor] = []
        while sum(len(part) for part in pictures) < self.config.init_pictures:
            pictures.append(next(batches)["pixels"].to(self.device))
        transform: LappedTransform = self.encoder.transform  # type: ignore[assignment]
        transform.fit(pictures)
        self.decoder.transform.load_state_dict(transform.state_dict())  # type: ignore[union-attr]
        latent = torch.cat([transform(part) for part in pictures])
        energy = torch.cat([(part - transform.mean).square().sum((1, 2, 3)) for part in pictures])
        rest = (energy - latent.square().sum((1, 2, 3))).clamp_min(0)
        for module in (self.quantizer, self.decoder):
            module.scale.copy_(latent.square().mean((0, 2, 3)).sqrt()[:, None, None])  # type: ignore[operator, union-attr]
        for level in self.quantizer.levels:  # type: ignore[union-attr]
            share = 1 / (latent.square().sum((1, 2, 3)) + rest)  # as the log in the loss weighs pictures
            vectors = level.vectors(latent)
            weights = share[:, None, None].expand(vectors.shape[:-1]).flatten()
            fit_codebook(level, vectors.flatten(0, 2), weights, rng)
            latent = latent - level.embed(level.nearest(vectors), self.config.dim)


def fit_codebook(level: Level, vectors: Tensor, weights: Tensor, rng: torch.Generator, iterations: int = 8) -> None:
    """Weighted k-means of (N, size) for a level; codes that nothing is near move to vectors that are badly served."""
    count = level.config.codes
    level.unit.copy_(vectors.square().mean(0).sqrt().clamp_min(1e-8))
    picks = torch.multinomial(_capped(weights), count, replacement=len(vectors) < count, generator=rng)
    table = vectors[picks]
    weighted = vectors * weights[:, None]
    for iteration in range(iterations):
        level.weight.copy_(table / level.unit)
        found = level.nearest(vectors)
        mass = weights.new_zeros(count).index_add_(0, found, weights)
        sums = torch.zeros_like(table).index_add_(0, found, weighted)
        used = mass > 0
        table = torch.where(used[:, None], sums / mass[:, None].clamp_min(1e-12), table)
        empty = int((~used).sum())
        if empty and iteration < iterations - 1:
            error = (vectors - table[found]).square().sum(1) * weights
            table[~used] = vectors[torch.multinomial(_capped(error), empty, replacement=True, generator=rng)]
    level.weight.copy_(table / level.unit)


MOST_DRAWN_FROM = 1 << 24  # categories that torch.multinomial takes


def _capped(weights: Tensor) -> Tensor:
    return weights[:MOST_DRAWN_FROM]


TINY = StrataConfig(
    dim=32,
    levels=(LevelConfig(2, 64, 12, predict=True), LevelConfig(1, 64, 32), LevelConfig(1, 64, 32)),
    predictor_width=16,
    predictor_depth=1,
    widths=(24, 16, 8),
    depths=(1, 1, 1),
    level_weights=(1.0, 1.0, 1.0),
    init_pictures=64,
)

SYSTEM = System(
    slug="strata",
    model=Strata,
    config=StrataConfig,
    variants={"strata": StrataConfig(), "strata-tiny": TINY},
)
