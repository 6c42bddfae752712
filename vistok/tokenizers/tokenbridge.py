"""TokenBridge: the tokens of a trained continuous VAE made discrete afterwards, one dimension at a time.

"Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation" (arXiv:2503.16430)

What is new: no codebook is trained. Each of the 16 numbers of a VAE's token is rounded on its own to one of 64 levels
of a normal distribution, which costs next to nothing in quality; a position then has 16 codes, 64^16 combinations, and
the generator (`vistok/generators/tokenbridge.py`) predicts them one after another.

    pixels (B, 3, H, W) in [0, 1] -> CNN -> 1x1 -> moments (B, 32, h, w) -> mean (or a draw) (B, 16, h, w)
      -> scaled to variance 1 -> nearest of 64 levels, each number alone -> codes (B, N, 16), N = h w, h = H / 16
    codes -> levels -> scaled back -> 1x1 -> CNN -> pixels

The published VAE is MAR's KL-16 (arXiv:2406.11838), whose latents have a deviation of 1 / 0.2325. The paper trains no
tokenizer; `loss` here trains a VAE of this kind for the smaller recipes, and follows the deviation of its latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.keys import Constant, KeyTable, Rename
from vistok.layout import Segment, Sizes, TokenSpec
from vistok.nn.cnn import CNNConfig, CNNDecoder, CNNEncoder
from vistok.quantize import GaussianQuantizer
from vistok.quantize.normal import NormalQuantizer
from vistok.registry import System
from vistok.tokenizer import TokenData
from vistok.tokenizers._judged import JudgedTokenizer
from vistok.tokenizers._vqgan_keys import cnn_rules
from vistok.tokenizers.vqgan import reconstruction_terms

KL16 = CNNConfig(multipliers=(1, 1, 2, 2, 4), latent_dim=16, double_latent=True)
KL16_SCALE = 0.2325  # what MAR multiplies the latents by, to make their deviation 1


@dataclass(frozen=True)
class TokenBridgeConfig:
    """The VAE and how its tokens are rounded.

    cnn                 the VAE's decoder; its encoder also attends at the levels `encoder_attention`
    scale               1 / deviation of the VAE's latents
    bits, low, high, clamp    levels of every number: 2^bits over low..high deviations (see `vistok.quantize.normal`)
    kl_weight           of the KL divergence against the squared or absolute error summed over an image's pixels
    resolution          side in pixels that the weights were trained for; any multiple of the factor is taken
    """

    cnn: CNNConfig = field(default_factory=lambda: KL16)
    encoder_attention: tuple[int, ...] = (4,)
    scale: float = KL16_SCALE
    bits: int = 6
    low: float = -5.0
    high: float = 5.0
    clamp: float = 3.0
    kl_weight: float = 1e-6
    resolution: int = 256
    version: int = 1

    def __post_init__(self) -> None:
        if not self.cnn.double_latent:
            raise ConfigError("TokenBridge's encoder gives mean and log variance: set double_latent in cnn")
        if not self.scale > 0:
            raise ConfigError(f"scale must be above 0, got {self.scale}")


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) in [0, 1] to the moments (B, 2 D, h, w): means, then log variances."""

    def __init__(self, config: TokenBridgeConfig) -> None:
        super().__init__()
        self.cnn = CNNEncoder(replace(config.cnn, attention=config.encoder_attention))
        width = 2 * config.cnn.latent_dim
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.project(self.cnn(pixels * 2 - 1))


class Decoder(nn.Module):
    """Latents (B, D, h, w) to pixels (B, 3, H, W), near [0, 1] but not clamped."""

    def __init__(self, config: TokenBridgeConfig) -> None:
        super().__init__()
        self.project = nn.Conv2d(config.cnn.latent_dim, config.cnn.latent_dim, 1)
        self.cnn = CNNDecoder(config.cnn)

    def forward(self, vectors: Tensor) -> Tensor:
        return (self.cnn(self.project(vectors.to(self.cnn.last_layer.dtype))) + 1) / 2


class TokenBridge(JudgedTokenizer):
    """See the module's docstring. `encode(images, sample=True, seed=...)` rounds a draw from the VAE's Gaussian, as the
    authors do; the default is its mean.
    """

    system = "tokenbridge"
    config: TokenBridgeConfig
    encoder: Encoder
    quantizer: NormalQuantizer
    decoder: Decoder

    def __init__(self, config: TokenBridgeConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        dim, factor = config.cnn.latent_dim, config.cnn.factor
        self.encoder = Encoder(config)
        self.gaussian = GaussianQuantizer(dim, weight=1.0)
        self.quantizer = NormalQuantizer(
            dim, config.bits, low=config.low, high=config.high, clamp=config.clamp, deviation=1 / config.scale
        )
        self.decoder = Decoder(config)
        codebooks = (2**config.bits,) * dim
        self.spec = TokenSpec(
            size=(config.resolution, config.resolution),
            layout=lambda size: (Segment("grid", (size[0] // factor, size[1] // factor), codebooks),),
            sizes=Sizes(multiple=factor, minimum=factor),
        )

    def moments(self, pixels: Tensor) -> Tensor:
        """Means and log variances (B, N, 2 D) of pixels of a legal size."""
        return self.encoder(self.prepare(pixels)).flatten(2).transpose(1, 2)

    def tokenize(  # type: ignore[override]
        self, pixels: Tensor, spec: TokenSpec, *, seeds: list[int], sample: bool = False
    ) -> TokenData:
        """Codes (B, N, D) of the mean, or with `sample` of a draw from each item's own seed."""
        latent = self.gaussian.encode(self.moments(pixels), seed=seeds if sample else None)
        return TokenData(codes=self.quantizer.encode(latent))

    def reconstruct(self, latent: Tensor, size: tuple[int, int]) -> Tensor:
        """Pixels (B, 3, H, W), not clamped, of latents (B, N, D) as the VAE has them, for pictures of `size`."""
        return self.decoder(self.arrange(latent, self.spec.at(size)))

    def forward(self, pixels: Tensor, continuous: bool = False) -> Tensor:  # type: ignore[override]
        """Reconstruction, not clamped, through the rounded means, or the `continuous` ones; differentiable."""
        latent, _ = self.gaussian.moments(self.moments(pixels))
        if not continuous:
            latent = self.quantizer(latent).vectors
        return self.reconstruct(latent, (pixels.shape[-2], pixels.shape[-1]))

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Terms of the VAE, before anything is rounded, for `batch["pixels"]` (B, 3, H, W) in [0, 1].

        "reconstruction" (mean absolute error in [-1, 1]), "kl" (its weight is that of latent diffusion, where errors
        are summed over an image), "perceptual" and "adversarial" where `judge` set them. In training mode mean and
        deviation of the latents are followed, so that the tokens can be rounded at any time.
        """
        pixels = self.prepare(batch["pixels"])
        seeds = torch.randint(2**62, (len(pixels),), generator=rng, device=rng.device).tolist()
        latent = self.gaussian(self.moments(pixels), seed=seeds)
        if self.training and self.quantizer.training:
            self.quantizer.observe(latent.vectors)
        image = self.reconstruct(latent.vectors, (pixels.shape[-2], pixels.shape[-1]))
        batch["reconstruction"] = image.detach()
        terms = reconstruction_terms("taming", image, pixels, self.perceptual)
        terms |= self.adversarial_terms(image, terms, self.decoder.cnn.last_layer, step)
        return terms | {"kl": self.config.kl_weight * latent.losses["kl"] / pixels[0].numel()}


# -- variants --------------------------------------------------------------------------------------------------------

VARIANTS = {
    "tokenbridge-kl16": TokenBridgeConfig(),
    "tokenbridge-tiny": TokenBridgeConfig(
        cnn=CNNConfig(width=32, multipliers=(1, 1, 2, 2), blocks=1, latent_dim=8, double_latent=True),
        encoder_attention=(3,),
        scale=1.0,
        resolution=32,
    ),
}


# -- the authors' checkpoints ----------------------------------------------------------------------------------------


def key_table(config: TokenBridgeConfig) -> KeyTable:
    """MAR's state dict to ours. Theirs knows nothing of the scale, which stands in their code."""
    dim, levels = config.cnn.latent_dim, len(config.cnn.multipliers)
    return KeyTable(
        *cnn_rules("taming", "encoder", "encoder.", "encoder.cnn.", levels),
        *cnn_rules("taming", "decoder", "decoder.", "decoder.cnn.", levels),
        Rename("quant_conv.*", "encoder.project.*"),
        Rename("post_quant_conv.*", "decoder.project.*"),
        Constant("quantizer.running_mean", lambda: torch.zeros(dim)),
        Constant("quantizer.running_var", lambda: torch.full((dim,), config.scale**-2)),
    )


def recognise(state: Mapping[str, Tensor]) -> TokenBridgeConfig | None:
    """The config of a KL autoencoder's state dict, with the scale of KL-16; None if it is none."""
    if "quant_conv.weight" not in state or "encoder.mid.block_1.conv1.weight" not in state:
        return None
    width, twice = state["encoder.conv_in.weight"].shape[0], state["quant_conv.weight"].shape[0]
    dim = state["post_quant_conv.weight"].shape[0]
    if twice != 2 * dim or any(key.startswith("quantize.") for key in state):
        return None
    levels = _count(state, "encoder.down.{}.block.0.conv1.weight")
    widths = [state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    attends = tuple(level for level in range(levels) if f"encoder.down.{level}.attn.0.norm.weight" in state)
    returns = tuple(level for level in range(levels) if f"decoder.up.{level}.attn.0.norm.weight" in state)
    cnn = replace(
        KL16,
        width=width,
        multipliers=tuple(channels // width for channels in widths),
        blocks=_count(state, "encoder.down.0.block.{}.conv1.weight"),
        latent_dim=dim,
        attention=returns,
    )
    return TokenBridgeConfig(cnn, encoder_attention=attends)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return next(index for index in range(len(state) + 1) if pattern.format(index) not in state)


def configure(plain: Mapping[str, Any]) -> TokenBridgeConfig:
    """Our config from the arguments of MAR's AutoencoderKL. Raises KeyError where it is none."""
    multipliers = tuple(plain["ch_mult"])
    attends = (len(multipliers) - 1,) if plain.get("encoder_attn_at_lowest", True) else ()
    cnn = CNNConfig(
        width=plain.get("ch", 128),
        multipliers=multipliers,
        blocks=plain.get("num_res_blocks", 2),
        latent_dim=plain["embed_dim"],
        double_latent=True,
    )
    reach = float(plain.get("range", 5.0))
    scale, bits = plain.get("scale", KL16_SCALE), plain.get("bits", 6)
    return TokenBridgeConfig(cnn, attends, scale=scale, bits=bits, low=-reach, high=reach)


SYSTEM = System(
    "tokenbridge", TokenBridge, TokenBridgeConfig, VARIANTS, keys=key_table, recognise=recognise, configure=configure
)
