"""VQ-VAE: a small convolutional autoencoder whose latent is replaced by the nearest vectors of a codebook.

"Neural Discrete Representation Learning" (arXiv:1711.00937)

What was new: codes instead of a Gaussian latent, with gradients passed straight through them. Neither norms nor
attention, so that it trains in minutes on a CPU, in bf16 above all: the tokenizer for small pictures here.

    pixels (B, 3, H, W) -> for each width: 4x4 convolution of stride 2, residual blocks -> 1x1 -> latent (B, D, h, w)
    latent -> nearest codebook row -> codes (B, N), N = h w -> rows (B, N, D)
    rows -> 1x1 -> residual blocks, transposed 4x4 convolution for each width -> pixels

Training: squared error and commitment; the codebook follows the mean of what chose it (appendix A.1), and rows that
nothing chooses are drawn anew from the batch. "cosine" is ViT-VQGAN's and LlamaGen's choice, codes of unit length.

With `scales` the codes are VAR's instead: token maps of growing size, each refining the sum of those before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.layout import Segment, Sizes, TokenSpec
from vistok.quantize import VectorQuantizer
from vistok.quantize.multiscale import MultiScaleVectorQuantizer
from vistok.registry import System
from vistok.tokenizers._judged import JudgedTokenizer
from vistok.tokenizers.var import scale_segments


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes of one model.

    widths         channels after each halving of the sides, so that f = 2^(their number)
    blocks         residual blocks at each of these resolutions
    residual       channels inside a block, as a share of the width
    codebook_size  K; `code_dim` D
    metric         "l2", or "cosine": vectors of unit length
    beta           weight of the commitment
    decay          of the codebook's moving averages; `restart` is the averaged count below which a row is drawn anew
    scales         sides of VAR's token maps, the last the latent's; () is one grid. With scales the codebook learns by
                   gradient and one size of pictures is taken
    resolution     side in pixels that the weights were trained for; any multiple of f is taken
    """

    widths: tuple[int, ...] = (128, 256)
    blocks: tuple[int, ...] = (0, 2)
    residual: float = 1.0
    codebook_size: int = 512
    code_dim: int = 64
    metric: Literal["l2", "cosine"] = "l2"
    beta: float = 0.25
    decay: float = 0.99
    restart: float = 0.1
    scales: tuple[int, ...] = ()
    resolution: int = 32
    version: int = 1

    def __post_init__(self) -> None:
        if not self.widths or len(self.blocks) != len(self.widths) or min(self.widths) < 1 or min(self.blocks) < 0:
            raise ConfigError(f"a number of blocks for each width, got widths {self.widths} and blocks {self.blocks}")
        if not 0 < self.residual <= 4:
            raise ConfigError(f"residual={self.residual}; expected a share of the width above 0 and at most 4")
        if self.scales and self.scales[-1] * self.factor != self.resolution:
            side = self.resolution // self.factor
            raise ConfigError(f"scales {self.scales} end at {self.scales[-1]}, the latent at a side of {side}")

    @property
    def factor(self) -> int:
        """f: pixels per code, along a side."""
        return 2 ** len(self.widths)

    @property
    def phis(self) -> int:
        """Convolutions that refine the maps of `scales`; `ratio` is their share."""
        return 1

    @property
    def ratio(self) -> float:
        """See `phis`."""
        return 0.5


class Residual(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), (B, C, h, w)."""

    def __init__(self, width: int, share: float) -> None:
        super().__init__()
        inner = max(round(width * share), 1)
        self.first = nn.Conv2d(width, inner, 3, padding=1)
        self.second = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


def residuals(width: int, count: int, share: float) -> nn.Sequential:
    """`count` residual blocks and, where there are any, a ReLU."""
    blocks: list[nn.Module] = [Residual(width, share) for _ in range(count)]
    return nn.Sequential(*blocks, nn.ReLU())


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) in [0, 1] to the latent (B, D, h, w)."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        entering = (3, *config.widths[:-1])
        self.shrink = nn.ModuleList(
            nn.Conv2d(before, width, 4, stride=2, padding=1)
            for before, width in zip(entering, config.widths, strict=True)
        )
        self.levels = nn.ModuleList(residuals(*pair, config.residual) for pair in _levels(config))
        self.project = nn.Conv2d(config.widths[-1], config.code_dim, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = (pixels * 2 - 1).contiguous(memory_format=torch.channels_last)
        for shrink, level in zip(self.shrink, self.levels, strict=True):
            x = level(shrink(x))
        return self.project(x)


class Decoder(nn.Module):
    """Code vectors (B, D, h, w) to pixels (B, 3, H, W), near [0, 1] but not clamped."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.project = nn.Conv2d(config.code_dim, config.widths[-1], 3, padding=1)
        self.levels = nn.ModuleList(residuals(*pair, config.residual) for pair in reversed(_levels(config)))
        leaving = (*reversed(config.widths[:-1]), 3)
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(width, after, 4, stride=2, padding=1)
            for width, after in zip(reversed(config.widths), leaving, strict=True)
        )

    @property
    def last_layer(self) -> Tensor:
        """The weight at which an adaptive adversarial weight compares gradients."""
        weight = self.grow[-1].weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, vectors: Tensor) -> Tensor:
        x = self.project(vectors.to(self.project.weight.dtype).contiguous(memory_format=torch.channels_last))
        for level, grow in zip(self.levels, self.grow, strict=True):
            x = grow(level(x))
        return (x + 1) / 2


def _levels(config: VQVAEConfig) -> Sequence[tuple[int, int]]:
    return list(zip(config.widths, config.blocks, strict=True))


class VQVAE(JudgedTokenizer):
    """See the module's docstring. Takes any picture whose sides are multiples of f."""

    system = "vq-vae"
    config: VQVAEConfig
    encoder: Encoder
    decoder: Decoder
    quantizer: VectorQuantizer | MultiScaleVectorQuantizer

    def __init__(self, config: VQVAEConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.encoder = Encoder(config)
        self.quantizer = make_quantizer(config)
        self.decoder = Decoder(config)
        side = config.resolution
        if config.scales:
            segments = scale_segments(config.scales, config.codebook_size)
            self.spec = TokenSpec(
                size=(side, side),
                layout=lambda size: segments,
                sizes=Sizes(only=((side, side),)),
                prefix_rule="segments",
            )
        else:
            factor, codes = config.factor, (config.codebook_size,)
            self.spec = TokenSpec(
                size=(side, side),
                layout=lambda size: (Segment("grid", (size[0] // factor, size[1] // factor), codes),),
                sizes=Sizes(multiple=factor, minimum=factor),
            )

    def arrange(self, vectors: Tensor, spec: TokenSpec) -> Tensor:
        """Rows (B, h w, D) to the map (B, D, h, w); of scales, the rows of their sum."""
        if isinstance(self.quantizer, MultiScaleVectorQuantizer):
            return vectors.transpose(1, 2).unflatten(2, self.quantizer.grid)
        return super().arrange(vectors, spec)

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Terms for `batch["pixels"]` (B, 3, H, W) in [0, 1]: squared error in [-1, 1], "perceptual" and "adversarial"
        where `judge` set them, "commitment".

        The reconstruction in [0, 1] goes into `batch["reconstruction"]`, for the discriminator's turn.
        """
        pixels = self.prepare(batch["pixels"])
        latent = self.encoder(pixels)
        quantized = self.quantizer(latent.flatten(2).transpose(1, 2))
        image = self.decoder(quantized.vectors.transpose(1, 2).unflatten(2, latent.shape[2:])).float()
        batch["reconstruction"] = image.detach()
        terms = {"reconstruction": 4 * F.mse_loss(image, pixels)}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(image, pixels).mean()
        terms |= self.adversarial_terms(image, terms, self.decoder.last_layer, step)
        return terms | quantized.losses


def make_quantizer(config: VQVAEConfig) -> VectorQuantizer | MultiScaleVectorQuantizer:
    """The quantizer of a config."""
    if config.scales:
        return MultiScaleVectorQuantizer(
            config.code_dim,
            config.codebook_size,
            config.scales,
            metric=config.metric,
            convs=config.phis,
            ratio=config.ratio,
            commitment=config.beta,
            decay=config.decay,
            restart_below=config.restart,
        )
    return VectorQuantizer(
        config.code_dim,
        config.codebook_size,
        metric=config.metric,
        learning="ema",
        commitment=config.beta,
        decay=config.decay,
        restart_below=config.restart,
    )


# -- variants --------------------------------------------------------------------------------------------------------

PAPER = VQVAEConfig()

SMALL = VQVAEConfig(widths=(64, 128), blocks=(1, 2), code_dim=8, metric="cosine")

VARIANTS = {
    "vq-vae-32": PAPER,
    "vq-vae-128": replace(PAPER, resolution=128),
    "vq-vae-small": SMALL,
    "vq-vae-cifar10": SMALL,
    "vq-vae-small-scales": VQVAEConfig((64, 128), (1, 2), code_dim=8, scales=(1, 2, 4, 8), restart=0.0),
    "vq-vae-tiny": VQVAEConfig(widths=(16, 32), blocks=(0, 1), codebook_size=64, code_dim=8, metric="cosine"),
}

SYSTEM = System("vq-vae", VQVAE, VQVAEConfig, VARIANTS)
