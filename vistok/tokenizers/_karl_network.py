"""KARL's transformers, and the base tokenizers whose grid they summarise and fill in again.

    encoder   [condition | grid (B, G, W) | T learned queries] -> blocks -> latent (B, T, D), halting logits (B, T)
    decoder   [G mask tokens | the latents that are kept] -> blocks -> G predictions for the base tokenizer

A halted token sees itself alone and nobody sees it, so leaving it out changes nothing: the decoder runs on what is
kept, items of different lengths packed without padding (`vistok.nn.ragged`).
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.nn.cnn import CNNConfig, CNNDecoder, CNNEncoder
from vistok.nn.patching import PatchEmbed, unpatchify
from vistok.nn.query_vit import INIT_STD, ViTSize, initialise
from vistok.nn.ragged import compact, ragged
from vistok.quantize import GaussianQuantizer
from vistok.tokenizers.vqgan import VQGAN, VQGANConfig

BINS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.09, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.24, 0.28, 0.32, 0.38)
FIRST_BINS = 0.04  # training begins with wanted errors up to this
KL16_SCALE = 0.2325  # what the authors multiply the VAE's latents by


class Latent(NamedTuple):
    """What the encoder gives: `tokens` (B, T, D) before the quantizer, and the logits of halting (B, T)."""

    tokens: Tensor
    halting: Tensor


class Encoder(nn.Module):
    """Pixels and the base tokenizer's view of them to a `Latent`. `rows` queries exist; a call takes the first T."""

    bins: Tensor

    def __init__(
        self,
        size: ViTSize,
        patch: int,
        base: int,
        dim: int,
        rows: int,
        table: int,
        halting: int,
        bins: tuple[float, ...],
        init_std: float = INIT_STD,
    ) -> None:
        super().__init__()
        width = size.width
        self.patches = PatchEmbed(patch, width - base)
        self.positions = nn.Parameter(torch.randn(width, table, table) * width**-0.5)
        self.conditions = nn.Parameter(torch.tensor(bins)[:, None].repeat(1, width))
        self.queries = nn.Parameter(torch.randn(rows, width) * width**-0.5)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = size.blocks()
        self.norm_out = nn.LayerNorm(width)
        self.norm_halting = nn.LayerNorm(width)
        self.project = nn.Linear(width, dim)
        self.halting = nn.Sequential(nn.Linear(width, halting), nn.Tanh(), nn.Linear(halting, 1))
        self.register_buffer("bins", torch.tensor(bins), persistent=False)
        for part in (self.patches, self.blocks, self.project, self.halting):
            initialise(part, init_std)

    def grid(self, pixels: Tensor, base: Tensor) -> Tensor:
        """Grid tokens (B, G, W), without positions: an embedded patch, and the base's latent (B, G, C) of its cell."""
        return torch.cat([self.patches(pixels), base.to(pixels.dtype)], -1)

    def sequence(self, grid: Tensor, cells: tuple[int, int], target: Tensor, count: int) -> Tensor:
        """The encoder's input (B, 1 + G + T, W), normalised, for target errors (B,) in mean absolute difference."""
        grid = grid + resized(self.positions, cells).to(grid.dtype)
        place = torch.searchsorted(self.bins, target.to(self.bins).contiguous()).clamp_max(len(self.bins) - 1)
        condition = self.conditions[place][:, None].to(grid.dtype)
        queries = self.queries[:count].to(grid.dtype).expand(len(grid), -1, -1)
        return self.norm_in(torch.cat([condition, grid, queries], 1))

    def forward(self, pixels: Tensor, base: Tensor, target: Tensor, count: int) -> Latent:
        cells = pixels.shape[-2] // self.patches.patch, pixels.shape[-1] // self.patches.patch
        x = self.sequence(self.grid(pixels, base), cells, target, count)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.heads(self.blocks[-1](x, only=slice(x.shape[1] - count, None)))

    def heads(self, x: Tensor) -> Latent:
        """The last block's output at the queries (B, T, W) as tokens and halting logits."""
        return Latent(self.project(self.norm_out(x)), self.halting(self.norm_halting(x))[..., 0])


class Decoder(nn.Module):
    """Vectors (B, T, D), of which `keep` (B, T) names those that are there, to predictions (B, G, outputs)."""

    def __init__(
        self,
        size: ViTSize,
        cells: tuple[int, int],
        dim: int,
        rows: int,
        table: int,
        outputs: int,
        init_std: float = INIT_STD,
    ) -> None:
        super().__init__()
        width = size.width
        self.cells = cells
        self.embed = nn.Linear(dim, width)
        self.places = nn.Parameter(torch.randn(rows, width) * width**-0.5)
        self.mask_token = nn.Parameter(torch.randn(1, width) * width**-0.5)
        self.positions = nn.Parameter(torch.randn(width, table, table) * width**-0.5)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = size.blocks()
        self.norm_out = nn.LayerNorm(width)
        self.predict = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, outputs))
        for part in (self.embed, self.blocks, self.predict):
            initialise(part, init_std)

    def forward(self, vectors: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.norm_in(self.embed(vectors.to(self.embed.weight.dtype)) + self.places[: vectors.shape[1]])
        grid = self.norm_in((self.mask_token + resized(self.positions, self.cells)).to(x.dtype))
        batch, cells = len(x), len(grid)
        if keep is not None:
            x, lengths = compact(x, keep)
        if keep is None or bool((lengths == x.shape[1]).all()):
            layout, leading = None, slice(0, cells)
            x = torch.cat([grid.expand(batch, -1, -1), x], 1)
        else:
            layout = ragged(lengths, cells)
            leading = slice(0, layout.leading)
            there = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
            x = torch.cat([grid.repeat(batch, 1), x[there]])
        for block in self.blocks[:-1]:
            x = block(x, ragged=layout)
        x = self.blocks[-1](x, ragged=layout, only=leading)
        return self.predict(self.norm_out(x)).view(batch, cells, -1)


def first_probabilities() -> Tensor:
    """How often training's first call wants each error, to begin with: alike up to FIRST_BINS, never above."""
    small = (torch.tensor(BINS) <= FIRST_BINS).float()
    return small / small.sum()


def resized(table: Tensor, cells: tuple[int, int]) -> Tensor:
    """Positions (rows * columns, W) of a table (W, R, R), taken at the nearest places."""
    return F.interpolate(table[None], size=cells, mode="nearest")[0].flatten(1).T


# -- base tokenizers -------------------------------------------------------------------------------------------------


class CodeBase(nn.Module):
    """A VQGAN: the decoder predicts its codes; their expected vectors go through its CNN.

    `channels` of the latent that the encoder sees, `outputs` of each prediction.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.vqgan = VQGAN(config)
        self.channels, self.outputs = config.code_dim, config.codebook_size

    @property
    def last_layer(self) -> Tensor:
        """The weight at which an adaptive adversarial weight compares gradients."""
        return self.vqgan.decoder.cnn.last_layer

    def latent(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, G, C), before the VQGAN's own quantizer."""
        return self.vqgan.encoder(pixels).flatten(2).transpose(1, 2)

    def expected(self, output: Tensor) -> Tensor:
        """Logits (B, G, K) to the expected code vectors (B, G, C); no gradient reaches the codebook."""
        return output.softmax(-1) @ self.vqgan.quantizer.table().detach().to(output.dtype)  # type: ignore[operator]

    def rebuild(self, output: Tensor, cells: tuple[int, int]) -> Tensor:
        """Logits (B, G, K) to pixels (B, 3, H, W), not clamped."""
        return self.vqgan.decoder(self.expected(output).transpose(1, 2).unflatten(2, cells))

    def distil(self, output: Tensor, latent: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """ "nll" of the base's codes, and "code", the squared error of their expected vectors."""
        quantizer = self.vqgan.quantizer
        codes = quantizer.encode(latent.detach())
        vectors = quantizer.decode(codes).detach()  # type: ignore[operator]
        return {
            "nll": F.cross_entropy(output.flatten(0, 1).float(), codes.flatten()),
            "code": F.mse_loss(self.expected(output).float(), vectors.float()),
        }


class LatentBase(nn.Module):
    """MAR's KL-16: the decoder predicts its latents, which its CNN decodes as they are, scaled and all; pixels stay in
    [0, 1] where MAR has [-1, 1]. So do the authors.
    """

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        dim = config.latent_dim
        attends = replace(
            config, attention=(len(config.multipliers) - 1,)
        )  # at the deepest level, in the encoder alone
        self.encoder, self.decoder = CNNEncoder(attends), CNNDecoder(config)
        self.moments, self.project = nn.Conv2d(2 * dim, 2 * dim, 1), nn.Conv2d(dim, dim, 1)
        self.gaussian = GaussianQuantizer(dim)
        self.channels = self.outputs = dim

    @property
    def last_layer(self) -> Tensor:
        """The weight at which an adaptive adversarial weight compares gradients."""
        return self.decoder.last_layer

    def latent(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """The posterior's mean, or a draw by standard normal `noise` (B, G, C), times KL16_SCALE: (B, G, C)."""
        moments = self.moments(self.encoder(pixels)).flatten(2).transpose(1, 2)
        mean, log_variance = self.gaussian.moments(moments)
        if noise is not None:
            mean = mean + torch.exp(log_variance / 2) * noise.to(mean)
        return mean * KL16_SCALE

    def rebuild(self, output: Tensor, cells: tuple[int, int]) -> Tensor:
        """Latents (B, G, C) to pixels (B, 3, H, W), not clamped."""
        return self.decoder(self.project(output.transpose(1, 2).unflatten(2, cells)))

    def distil(self, output: Tensor, latent: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """ "code": the squared error of the latents."""
        return {"code": F.mse_loss(output.float(), latent.detach().float())}


class PixelBase(nn.Module):
    """No base: the encoder sees patches alone, the decoder predicts pixels."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch, self.channels, self.outputs = patch, 0, 3 * patch * patch

    def latent(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, G, 0)."""
        cells = pixels.shape[-2] * pixels.shape[-1] // self.patch**2
        return pixels.new_zeros(len(pixels), cells, 0)

    def rebuild(self, output: Tensor, cells: tuple[int, int]) -> Tensor:
        """Values (B, G, 3 p p) to pixels (B, 3, H, W), not clamped."""
        return unpatchify(output, cells, self.patch) + 0.5

    def distil(self, output: Tensor, latent: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """ "reconstruction": the mean absolute error."""
        cells = pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch
        return {"reconstruction": (self.rebuild(output, cells) - pixels).abs().mean()}


Base = CodeBase | LatentBase | PixelBase
