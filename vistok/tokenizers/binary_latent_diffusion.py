"""Binary autoencoder: every position of a picture is a string of bits that are drawn like coins.

"Binary Latent Diffusion" (arXiv:2304.04820)

What is new: no codebook. Each position has 32 to 128 bits, each thrown with a probability that the encoder gives; what
the decoder reads is a linear map of the bits. The generator of the same name (`vistok/generators/`) is a diffusion
process over such bits.

    pixels (B, 3, H, W) in [0, 1] -> CNN -> (B, 256, h, w) -> linear, sigmoid -> bits (B, N, C), N = h w, h = H / 16
    bits -> sum of the rows of a table (B, 256, h, w) -> norm -> CNN -> pixels

Tokens have C codes of 2 at every position. `encode` takes the likelier side of each coin; `sample=True` throws them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.keys import KeyTable
from vistok.layout import Segment, Sizes, TokenSpec
from vistok.nn.cnn import EPS, GROUPS, CNNConfig, CNNDecoder, CNNEncoder
from vistok.quantize.bernoulli import BernoulliQuantizer
from vistok.registry import System
from vistok.tokenizer import TokenData
from vistok.tokenizers import _binary_latent_diffusion_keys as names
from vistok.tokenizers._judged import JudgedTokenizer

F16 = CNNConfig(multipliers=(1, 1, 2, 2, 4), attention=(4,), activated=False, decoder_blocks=2)


@dataclass(frozen=True)
class BinaryConfig:
    """Sizes of one autoencoder.

    bits            C, per position
    norm_first      a GroupNorm before the decoder's first convolution, as in all published weights
    signed          bits are -1 and 1, from a tanh
    deterministic   no coins are thrown in training
    code_weight     of the term that makes probabilities sure, published with weight 0
    resolution      side in pixels that the weights were trained for; any multiple of the factor is taken
    """

    cnn: CNNConfig = field(default_factory=lambda: F16)
    bits: int = 64
    norm_first: bool = True
    signed: bool = False
    deterministic: bool = False
    code_weight: float = 0.0
    resolution: int = 256
    version: int = 1

    def __post_init__(self) -> None:
        if self.cnn.activated or self.cnn.decoder_blocks is None:
            raise ConfigError("the binary autoencoder's CNN has activated=False, and decoder_blocks of its own")


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) in [0, 1], which is the model's own range, to the latent (B, D, h, w)."""

    def __init__(self, config: BinaryConfig) -> None:
        super().__init__()
        self.cnn = CNNEncoder(config.cnn)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.cnn(pixels)


class Decoder(nn.Module):
    """Vectors (B, D, h, w) to pixels (B, 3, H, W), near [0, 1] but not clamped."""

    def __init__(self, config: BinaryConfig) -> None:
        super().__init__()
        width = config.cnn.latent_dim
        self.norm = nn.GroupNorm(GROUPS, width, eps=EPS) if config.norm_first else nn.Identity()
        self.cnn = CNNDecoder(config.cnn)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.cnn(self.norm(vectors.to(self.cnn.last_layer.dtype)))


class BinaryAutoencoder(JudgedTokenizer):
    """See the module's docstring. `encode(images, sample=True, seed=...)` throws the coins, from each item's seed."""

    system = "binary-latent-diffusion"
    config: BinaryConfig
    encoder: Encoder
    quantizer: BernoulliQuantizer
    decoder: Decoder

    def __init__(self, config: BinaryConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.encoder = Encoder(config)
        self.quantizer = BernoulliQuantizer(
            config.cnn.latent_dim,
            config.bits,
            signed=config.signed,
            deterministic=config.deterministic,
            code_weight=config.code_weight,
        )
        self.decoder = Decoder(config)
        factor, codebooks = config.cnn.factor, (2,) * config.bits
        self.spec = TokenSpec(
            size=(config.resolution, config.resolution),
            layout=lambda size: (Segment("grid", (size[0] // factor, size[1] // factor), codebooks),),
            sizes=Sizes(multiple=factor, minimum=factor),
        )

    def tokenize(  # type: ignore[override]
        self, pixels: Tensor, spec: TokenSpec, *, seeds: list[int], sample: bool = False
    ) -> TokenData:
        """Bits (B, N, C): the likelier ones, or with `sample` throws from each item's own seed."""
        latent = self.encoder(self.prepare(pixels)).flatten(2).transpose(1, 2)
        return TokenData(codes=self.quantizer.encode(latent, seed=seeds if sample else None))

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Terms for `batch["pixels"]` (B, 3, H, W) in [0, 1], the coins thrown by `rng`.

        "reconstruction" (mean absolute error), "perceptual" and "adversarial" where `judge` set them, and "code"
        where it has a weight. The authors show LPIPS pixels in [0, 1] and bound the adaptive weight by 1.
        """
        self.quantizer.rng = rng
        pixels = self.prepare(batch["pixels"])
        latent = self.encoder(pixels)
        quantized = self.quantizer(latent.flatten(2).transpose(1, 2))
        image = self.decoder(quantized.vectors.transpose(1, 2).unflatten(2, latent.shape[2:]))
        batch["reconstruction"] = image.detach()
        terms = {"reconstruction": (image - pixels).abs().mean()}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(image, pixels).mean()
        terms |= self.adversarial_terms(image, terms, self.decoder.cnn.last_layer, step)
        return terms | quantized.losses


# -- variants --------------------------------------------------------------------------------------------------------

C64 = BinaryConfig()
VARIANTS = {
    "binary-latent-diffusion-c64": C64,
    "binary-latent-diffusion-c128": replace(C64, bits=128, cnn=replace(F16, decoder_blocks=6)),
    "binary-latent-diffusion-tiny": BinaryConfig(
        cnn=replace(F16, width=32, multipliers=(1, 1, 2, 2), blocks=1, latent_dim=32, attention=(3,), decoder_blocks=1),
        bits=16,
        resolution=32,
    ),
    "binary-latent-diffusion-tiny-signed": BinaryConfig(
        cnn=replace(F16, width=32, multipliers=(1, 2), blocks=1, latent_dim=32, attention=(), decoder_blocks=2),
        bits=8,
        signed=True,
        norm_first=False,
        resolution=16,
    ),
}


# -- the authors' checkpoints ----------------------------------------------------------------------------------------


def key_table(config: BinaryConfig) -> KeyTable:
    """Their state dict to ours. Their blocks are one flat list a side; some of their weights are never used."""
    return KeyTable(*names.rules(config.cnn, config.norm_first))


def recognise(state: Mapping[str, Tensor]) -> BinaryConfig | None:
    """The config of an authors' state dict, from its names and shapes; None if it is none.

    Whether bits are signed cannot be seen: they are not, as in all published weights.
    """
    if "encoder.blocks.0.weight" not in state or "quantize.proj.0.weight" not in state:
        return None
    cnn, norm_first = names.sizes(state)
    return BinaryConfig(cnn, bits=state["quantize.embed.weight"].shape[0], norm_first=norm_first)


def configure(plain: Mapping[str, Any]) -> BinaryConfig:
    """Our config from the authors' arguments. Raises KeyError where they are none."""
    multipliers, side = tuple(plain["ch_mult"]), plain["img_size"]
    attends = {side // 2**level: level for level in range(len(multipliers))}
    blocks = plain["res_blocks"]
    cnn = CNNConfig(
        width=plain["nf"],
        multipliers=multipliers,
        blocks=blocks,
        latent_dim=plain["emb_dim"],
        attention=tuple(attends[side] for side in plain.get("attn_resolutions", [16]) if side in attends),
        channels=plain.get("n_channels", 3),
        decoder_blocks=int(blocks * plain.get("gen_mul", 1.0)),
        activated=False,
    )
    return BinaryConfig(
        cnn,
        bits=plain["codebook_size"],
        norm_first=plain.get("norm_first", True),
        signed=plain.get("use_tanh", False),
        deterministic=plain.get("deterministic", False),
        resolution=side,
    )


SYSTEM = System(
    "binary-latent-diffusion",
    BinaryAutoencoder,
    BinaryConfig,
    VARIANTS,
    keys=key_table,
    recognise=recognise,
    configure=configure,
)
