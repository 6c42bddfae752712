"""VQGAN+ and MaskBit's tokenizer: MaskGIT's convolutional net, with a looked-up codebook or with sign bits.

"MaskBit: Embedding-free Image Generation via Bit Tokens" (arXiv:2409.16211); the net is that of "MaskGIT: Masked
Generative Image Transformer" (2202.04200), whose own tokenizer is one of the published weights here.

What is new: a VQGAN without attention that rebuilds far better than the old one (rFID 1.67 for 7.96), and a latent of
K numbers of which only the signs are kept: a code is K bits, and its vector is those bits.

    pixels (B, 3, H, W) in [0, 1] -> CNN -> latent (B, D, H/16, W/16)
      lookup        nearest of K rows (K, D)              -> codes (B, N), rows
      lookup-free   signs, the first channel the lowest bit -> codes (B, N) below 2^D, vectors of +-1
    vectors (B, D, h, w) -> CNN -> pixels (B, 3, H, W), near [0, 1], not clamped

Residual blocks whose width changes apply their shortcut to the branch and drop their input (`nn/cnn.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.keys import Drop, KeyTable, Rename, Rule, State
from vistok.layout import Segment, Sizes, TokenSpec
from vistok.nn.cnn import CNNConfig, CNNDecoder, CNNEncoder
from vistok.quantize import LFQ, EntropyTerm, Quantized, Quantizer, VectorQuantizer
from vistok.registry import System
from vistok.tokenizers._judged import JudgedTokenizer

F16 = CNNConfig(multipliers=(1, 1, 2, 2, 4), latent_dim=14, style="maskgit", halving="conv")


@dataclass(frozen=True)
class VQGANPlusConfig:
    """Sizes and conventions of one model.

    cnn             its `latent_dim` is D, which is the number of bits where the codebook is "lookup-free"
    codebook        "lookup", or "lookup-free"
    codebook_size   K of a looked-up codebook; 2^D otherwise, whatever stands here
    normalize       a looked-up codebook compares and gives vectors of unit length
    commitment      weight of the latent's distance to its vector
    entropy         weight of (mean entropy of a code - `entropy_batch` x entropy of the mean code), of the softmax of
                    similarities / `entropy_temperature`
    entropy_start   so many times the weight is added at the first step, falling to none at `entropy_steps`
    full_first      the authors' file numbers the decoder's levels from full resolution (MaskGIT), not from the deepest
    resolution      side in pixels that the weights were trained for; any multiple of f is taken
    """

    cnn: CNNConfig = field(default_factory=lambda: F16)
    codebook: Literal["lookup", "lookup-free"] = "lookup-free"
    codebook_size: int = 1024
    normalize: bool = False
    commitment: float = 0.25
    entropy: float = 0.02
    entropy_temperature: float = 0.01
    entropy_batch: float = 1.0
    entropy_start: float = 2.0
    entropy_steps: int = 2000
    full_first: bool = False
    resolution: int = 256
    version: int = 1

    def __post_init__(self) -> None:
        if self.codebook not in ("lookup", "lookup-free"):
            raise ConfigError(f"codebook {self.codebook!r}; expected 'lookup' or 'lookup-free'")
        if self.cnn.style != "maskgit" or self.cnn.double_latent:
            raise ConfigError("VQGAN+ has a CNN of style 'maskgit', whose latent is not doubled")
        if self.codebook == "lookup-free" and self.cnn.latent_dim > 24:
            raise ConfigError(f"a code of {self.cnn.latent_dim} bits; the entropy over all codes takes at most 24")
        if self.entropy_steps < 1 or self.entropy_start < 0:
            raise ConfigError("entropy_steps must be at least 1, and entropy_start at least 0")

    @property
    def codes(self) -> int:
        """How many codes there are."""
        return 2**self.cnn.latent_dim if self.codebook == "lookup-free" else self.codebook_size


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) in [0, 1] to the latent (B, D, h, w)."""

    def __init__(self, config: VQGANPlusConfig) -> None:
        super().__init__()
        self.cnn = CNNEncoder(config.cnn)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.cnn(pixels)


class Decoder(nn.Module):
    """Vectors (B, D, h, w) to pixels (B, 3, H, W), near [0, 1] but not clamped."""

    def __init__(self, config: VQGANPlusConfig) -> None:
        super().__init__()
        self.cnn = CNNDecoder(config.cnn)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.cnn(vectors.to(self.cnn.last_layer.dtype))


class VQGANPlus(JudgedTokenizer):
    """See the module's docstring. Any picture whose sides are multiples of f."""

    system = "maskgit"
    config: VQGANPlusConfig
    encoder: Encoder
    decoder: Decoder
    quantizer: Quantizer

    def __init__(self, config: VQGANPlusConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.encoder = Encoder(config)
        self.quantizer = _quantizer(config)
        self.decoder = Decoder(config)
        factor, codes = config.cnn.factor, (config.codes,)
        self.spec = TokenSpec(
            size=(config.resolution, config.resolution),
            layout=lambda size: (Segment("grid", (size[0] // factor, size[1] // factor), codes),),
            sizes=Sizes(multiple=factor, minimum=factor),
        )

    def quantize(self, latent: Tensor) -> Quantized:
        """Vectors (B, N, D), codes (B, N) and losses of a latent (B, D, h, w)."""
        return self.quantizer(latent.flatten(2).transpose(1, 2))

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Terms for `batch["pixels"]` (B, 3, H, W) in [0, 1]: squared error, "perceptual" and "adversarial" where
        `judge` set them, and the quantizer's, of which the entropy counts more in the first steps.

        The reconstruction (B, 3, H, W) in [0, 1] goes into `batch["reconstruction"]`, for the discriminator's turn.
        """
        pixels = self.prepare(batch["pixels"])
        latent = self.encoder(pixels)
        quantized = self.quantize(latent)
        image = self.decoder(quantized.vectors.transpose(1, 2).unflatten(2, latent.shape[2:]))
        batch["reconstruction"] = image.detach()
        terms = {"reconstruction": (image - pixels).square().mean()}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(image, pixels).mean()
        terms |= self.adversarial_terms(image, terms, self.decoder.cnn.last_layer, step)
        losses = dict(quantized.losses)
        if "entropy" in losses:
            left = max(0.0, 1 - step / self.config.entropy_steps)
            losses["entropy"] = losses["entropy"] * (1 + self.config.entropy_start * left)
        return terms | losses


def _quantizer(config: VQGANPlusConfig) -> Quantizer:
    entropy = None
    if config.entropy:
        entropy = EntropyTerm(config.entropy, config.entropy_temperature, batch=config.entropy_batch, log="clamp")
    dim = config.cnn.latent_dim
    if config.codebook == "lookup-free":
        return LFQ(dim, bit_order="lsb", commitment=config.commitment, entropy=entropy)
    metric: Literal["cosine", "l2"] = "cosine" if config.normalize else "l2"
    return VectorQuantizer(dim, config.codebook_size, metric=metric, commitment=config.commitment, entropy=entropy)


# -- variants --------------------------------------------------------------------------------------------------------


def bits(count: int) -> VQGANPlusConfig:
    """MaskBit's tokenizer of so many bits."""
    return VQGANPlusConfig(replace(F16, latent_dim=count))


def looked_up(codes: int, dim: int) -> VQGANPlusConfig:
    """VQGAN+ with a codebook of `codes` vectors."""
    return VQGANPlusConfig(replace(F16, latent_dim=dim), "lookup", codes, entropy=0.0, entropy_start=0.0)


TINY = CNNConfig(width=32, multipliers=(1, 2, 2), blocks=1, latent_dim=8, style="maskgit", halving="conv")

VARIANTS = {
    **{f"maskbit-tokenizer-{count}bit": bits(count) for count in (10, 12, 14, 16, 18)},
    "vqgan-plus-10bit": looked_up(1024, 256),
    "vqgan-plus-12bit": looked_up(4096, 64),
    "maskgit-tokenizer": replace(
        looked_up(1024, 256), cnn=replace(F16, latent_dim=256, halving="pool"), full_first=True
    ),
    "maskbit-tokenizer-tiny": VQGANPlusConfig(TINY, resolution=32),
    "vqgan-plus-tiny": replace(
        looked_up(64, 12), cnn=replace(TINY, latent_dim=12, halving="pool"), full_first=True, resolution=32
    ),
}


# -- the authors' checkpoints ----------------------------------------------------------------------------------------


def key_table(config: VQGANPlusConfig) -> KeyTable:
    """Their state dict to ours. The tables of a lookup-free codebook follow from its number of bits."""
    levels = len(config.cnn.multipliers)
    rules: list[Rule] = [*_cnn_rules("encoder", "down", "down_conv", levels, turned=False)]
    rules += _cnn_rules("decoder", "up", "upsample_conv", levels, turned=config.full_first)
    if config.codebook == "lookup":
        return KeyTable(*rules, Rename("quantize.embedding.weight", "quantizer.codebook"))
    dim = config.cnn.latent_dim

    def tables(ours: State) -> dict[str, Tensor]:
        codes = torch.arange(2**dim)[:, None] >> torch.arange(dim)
        weights = (1 << torch.arange(dim)).int()
        return {"quantize.bits_to_indices": weights, "quantize.codebook": (codes & 1) * 2.0 - 1.0}

    return KeyTable(*rules, Drop("quantize.codebook", restore=tables), Drop("quantize.bits_to_indices"))


def _cnn_rules(side: str, levels_name: str, resample: str, levels: int, turned: bool) -> list[Rule]:
    ours = f"{side}.cnn"
    rules = [Rename(f"{side}.{name}.*", f"{ours}.{name}.*") for name in ("conv_in", "norm_out", "conv_out")]
    stacks = [(f"{side}.mid", f"{ours}.middle.#.")]
    for level in range(levels):
        theirs = f"{side}.{levels_name}.{levels - 1 - level if turned else level}"
        rules.append(Rename(f"{theirs}.{resample}.*", f"{ours}.levels.{level}.resample.conv.*"))
        stacks.append((theirs, f"{ours}.levels.{level}.blocks.#."))
    for theirs, block in stacks:
        names = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "shortcut"}
        rules += [Rename(f"{theirs}.res_blocks.#.{name}.*", f"{block}{to}.*") for name, to in names.items()]
    return [*rules]


def recognise(state: Mapping[str, Tensor]) -> VQGANPlusConfig | None:
    """The config of an authors' state dict, from its names and shapes alone; None if it is none of these.

    Which weights the loss had cannot be seen: they are the published ones.
    """
    first = "encoder.down.0.res_blocks.0.conv1.weight"
    if first not in state or "decoder.up.0.res_blocks.0.conv1.weight" not in state:
        return None
    looked = "quantize.embedding.weight" in state
    if not looked and "quantize.codebook" not in state:
        return None
    levels = _count(state, "encoder.down.{}.res_blocks.0.conv1.weight")
    width = state["encoder.conv_in.weight"].shape[0]
    blocks, middle = (
        _count(state, "encoder.down.0.res_blocks.{}.conv1.weight"),
        "encoder.mid.res_blocks.{}.conv1.weight",
    )
    cnn = CNNConfig(
        width=width,
        multipliers=tuple(
            state[f"encoder.down.{level}.res_blocks.0.conv1.weight"].shape[0] // width for level in range(levels)
        ),
        blocks=blocks,
        latent_dim=state["encoder.conv_out.weight"].shape[0],
        style="maskgit",
        channels=state["encoder.conv_in.weight"].shape[1],
        middle_blocks=None if _count(state, middle) == blocks else _count(state, middle),
        halving="conv" if "encoder.down.0.down_conv.weight" in state else "pool",
    )
    turned = levels > 1 and "decoder.up.0.upsample_conv.weight" not in state
    if not looked:
        return VQGANPlusConfig(cnn, full_first=turned)
    size = state["quantize.embedding.weight"].shape[0]
    return replace(looked_up(size, cnn.latent_dim), cnn=cnn, full_first=turned)


def _count(state: Mapping[str, Tensor], key: str) -> int:
    return next(index for index in range(len(state) + 1) if key.format(index) not in state)


def configure(plain: Mapping[str, Any]) -> VQGANPlusConfig:
    """Our config from the authors': their YAML, or its `model.vq_model`. Raises ConfigError where it is neither.

    `legacy_decoder`, an argument of their code, or `model_class: maskgit` says that decoder levels count from full
    resolution.
    """
    whole = plain
    plain = plain.get("model", plain)
    plain = plain.get("vq_model", plain)
    try:
        multipliers = tuple(plain["channel_mult"])[: plain["num_resolutions"]]
        if len(multipliers) != plain["num_resolutions"]:
            raise ConfigError(f"channel_mult {plain['channel_mult']} for {plain['num_resolutions']} resolutions")
        cnn = CNNConfig(
            width=plain["hidden_channels"],
            multipliers=multipliers,
            blocks=plain["num_res_blocks"],
            latent_dim=plain["token_size"],
            style="maskgit",
            channels=plain.get("num_channels", 3),
            halving="conv" if plain.get("sample_with_conv", True) else "pool",
        )
        losses = whole.get("losses", {})
        return VQGANPlusConfig(
            cnn,
            plain["quantizer_type"],
            plain.get("codebook_size", 1024),
            bool(plain.get("use_l2_normalisation", False)),
            commitment=plain.get("commitment_cost", 0.25),
            entropy=plain.get("entropy_loss_weight", 0.0),
            entropy_temperature=plain.get("entropy_loss_temperature", 0.01),
            entropy_batch=plain.get("entropy_gamma", 1.0),
            entropy_start=losses.get("entropy_annealing_factor", 0.0),
            entropy_steps=losses.get("entropy_annealing_steps", 2000),
            full_first=bool(plain.get("legacy_decoder", plain.get("model_class") == "maskgit")),
            resolution=whole.get("dataset", {}).get("preprocessing", {}).get("resolution", 256),
        )
    except KeyError as error:
        raise ConfigError(f"this is no config of MaskBit's tokenizer: it lacks {error}") from error


SYSTEM = System(
    "maskgit", VQGANPlus, VQGANPlusConfig, VARIANTS, keys=key_table, recognise=recognise, configure=configure
)
