"""VQGAN: the convolutional VQ baseline that most visual tokenizers stand on.

    pixels (B, 3, H, W) -> CNN encoder -> (B, Z, H/f, W/f) -> 1x1 -> latent (B, D, H/f, W/f)
    latent -> nearest codebook row -> codes (B, N), N = H/f * W/f -> rows (B, N, D)
    rows -> (B, D, H/f, W/f) -> 1x1 -> CNN decoder -> pixels (B, 3, H, W)

Three published families share this file:

    taming    "Taming Transformers for High-Resolution Image Synthesis" (arXiv:2012.09841); plain or Gumbel codebook
    maskgit   the VQGAN of "MaskGIT" (2202.04200) in the port that TiTok uses: no attention, no 1x1, pixels in [0, 1]
    llamagen  the tokenizer of "LlamaGen" (2406.06525): 8-dimensional codes of unit length

Training: reconstruction + perceptual + adversarial + codebook terms; see `loss`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.keys import Drop, KeyTable, Rename, Rule
from vistok.layout import Segment, Sizes, TokenSpec
from vistok.nn.cnn import CNNConfig, CNNDecoder, CNNEncoder
from vistok.quantize import EntropyTerm, Quantizer, VectorQuantizer
from vistok.quantize.gumbel import GumbelQuantizer
from vistok.registry import System
from vistok.tokenizers._judged import JudgedTokenizer, Perceptual
from vistok.tokenizers._vqgan_keys import Family, as_linear, as_pixelwise, cnn_rules


@dataclass(frozen=True)
class VQGANConfig:
    """Sizes and conventions of one model.

    code_dim       D, the width of a code vector
    codebook       "legacy": beta weighs the codebook term, as the published taming and MaskGIT models were trained;
                   "plain": beta weighs the commitment; "cosine": that, on unit vectors; "gumbel": drawn from logits
    entropy        weight of the entropy term over softmax(-distance / 0.01); not with "gumbel"
    kl_weight, temperature   of the "gumbel" codebook
    resolution     side in pixels that the weights were trained for; any multiple of f is taken
    """

    family: Family = "taming"
    cnn: CNNConfig = field(default_factory=CNNConfig)
    codebook_size: int = 1024
    code_dim: int = 256
    codebook: Literal["legacy", "plain", "cosine", "gumbel"] = "legacy"
    beta: float = 0.25
    entropy: float = 0.0
    kl_weight: float = 1e-8
    temperature: float = 1.0
    resolution: int = 256
    version: int = 1

    def __post_init__(self) -> None:
        if self.cnn.double_latent:
            raise ConfigError("a VQGAN quantizes its latent itself; double_z is for KL autoencoders")
        if self.family == "maskgit" and self.code_dim != self.cnn.latent_dim:
            raise ConfigError(f"family 'maskgit' has no 1x1 convolutions: code_dim must be {self.cnn.latent_dim}")
        if self.entropy and self.codebook == "gumbel":
            raise ConfigError("codebook 'gumbel' has a KL term instead of the entropy term: set kl_weight")


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) in [0, 1] to the latent (B, D, h, w)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.signed = config.family != "maskgit"
        self.cnn = CNNEncoder(config.cnn)
        self.project: nn.Module = nn.Identity()
        if config.family != "maskgit":
            self.project = nn.Conv2d(config.cnn.latent_dim, config.code_dim, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.project(self.cnn(pixels * 2 - 1 if self.signed else pixels))


class Decoder(nn.Module):
    """Code vectors (B, D, h, w) to pixels (B, 3, H, W), near [0, 1] but not clamped."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.signed = config.family != "maskgit"
        self.project: nn.Module = nn.Identity()
        if config.family != "maskgit":
            self.project = nn.Conv2d(config.code_dim, config.cnn.latent_dim, 1)
        self.cnn = CNNDecoder(config.cnn)

    def forward(self, vectors: Tensor) -> Tensor:
        pixels = self.cnn(self.project(vectors.to(self.cnn.last_layer.dtype)))
        return (pixels + 1) / 2 if self.signed else pixels


class VQGAN(JudgedTokenizer):
    """The tokenizer of all three families; any picture whose sides are multiples of f."""

    system = "vqgan"
    config: VQGANConfig
    encoder: Encoder
    decoder: Decoder
    quantizer: Quantizer

    def __init__(self, config: VQGANConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.encoder = Encoder(config)
        self.quantizer = _quantizer(config)
        self.decoder = Decoder(config)
        factor, codes = config.cnn.factor, (config.codebook_size,)
        self.spec = TokenSpec(
            size=(config.resolution, config.resolution),
            layout=lambda size: (Segment("grid", (size[0] // factor, size[1] // factor), codes),),
            sizes=Sizes(multiple=factor, minimum=factor),
        )

    def soft_codes(self, latent: Tensor, temperature: float = 1.0) -> Tensor:
        """Probability of every code at every position, softmax(-|z - e|^2 / temperature): (B, N, K).

        `latent` is (B, D, h, w) as the encoder gives it. For codebooks of vectors, not for "gumbel".
        """
        if not isinstance(self.quantizer, VectorQuantizer):
            raise ConfigError("soft codes need a codebook with distances; this one draws from logits")
        z, table = latent.flatten(2).transpose(1, 2).float(), self.quantizer.table()
        return ((2 * z @ table.T - table.square().sum(1)) / temperature).softmax(-1)

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Terms for `batch["pixels"]` (B, 3, H, W) in [0, 1]: L1 (taming) or squared error, both on the model's own
        range, "perceptual" and "adversarial" where `judge` set them, and the quantizer's terms.

        The reconstruction (B, 3, H, W) in [0, 1] goes into `batch["reconstruction"]`, for the discriminator's turn.
        """
        if isinstance(self.quantizer, GumbelQuantizer):
            self.quantizer.rng = rng
        pixels = self.prepare(batch["pixels"])
        latent = self.encoder(pixels)
        quantized = self.quantizer(latent.flatten(2).transpose(1, 2))
        image = self.decoder(quantized.vectors.transpose(1, 2).unflatten(2, latent.shape[2:]))
        batch["reconstruction"] = image.detach()
        terms = reconstruction_terms(self.config.family, image, pixels, self.perceptual)
        terms |= self.adversarial_terms(image, terms, self.decoder.cnn.last_layer, step)
        return terms | quantized.losses


def reconstruction_terms(
    family: Family, image: Tensor, pixels: Tensor, perceptual: Perceptual | None
) -> dict[str, Tensor]:
    """Pixel and perceptual terms of images in [0, 1]; taming and LlamaGen measure in [-1, 1], twice as wide."""
    if family == "taming":
        terms = {"reconstruction": 2 * (image - pixels).abs().mean()}
    else:
        terms = {"reconstruction": (image - pixels).square().mean() * (4 if family == "llamagen" else 1)}
    if perceptual is not None:
        terms["perceptual"] = perceptual(image, pixels).mean()
    return terms


def _quantizer(config: VQGANConfig) -> Quantizer:
    dim, size, beta = config.code_dim, config.codebook_size, config.beta
    if config.codebook == "gumbel":
        return GumbelQuantizer(dim, size, kl_weight=config.kl_weight, temperature=config.temperature)
    entropy = EntropyTerm(weight=config.entropy) if config.entropy else None
    if config.codebook == "legacy":
        return VectorQuantizer(dim, size, commitment=1.0, codebook_weight=beta, entropy=entropy)
    metric: Literal["cosine", "l2"] = "cosine" if config.codebook == "cosine" else "l2"
    return VectorQuantizer(dim, size, metric=metric, commitment=beta, entropy=entropy)


# -- variants --------------------------------------------------------------------------------------------------------

F16 = CNNConfig(multipliers=(1, 1, 2, 2, 4), attention=(4,))
F8 = CNNConfig(multipliers=(1, 2, 2, 4), attention=(3,))
TINY = CNNConfig(width=32, multipliers=(1, 1, 2), blocks=1, latent_dim=16, attention=(2,))

TAMING_F16 = VQGANConfig(cnn=F16)
TAMING_F8 = VQGANConfig(cnn=replace(F8, latent_dim=4), code_dim=4)
GUMBEL_F8 = VQGANConfig(
    cnn=CNNConfig(multipliers=(1, 1, 2, 4), attention=(3,)), codebook_size=8192, codebook="gumbel", temperature=0.9
)
MASKGIT_F16 = VQGANConfig("maskgit", CNNConfig(multipliers=(1, 1, 2, 2, 4), style="maskgit"))
LLAMAGEN_F16 = VQGANConfig("llamagen", F16, codebook_size=16384, code_dim=8, codebook="cosine")
LLAMAGEN_F8 = replace(LLAMAGEN_F16, cnn=F8)

VARIANTS = {
    "vqgan-imagenet-f16-1024": TAMING_F16,
    "vqgan-imagenet-f16-16384": replace(TAMING_F16, codebook_size=16384),
    "vqgan-openimages-f8-256": replace(TAMING_F8, codebook_size=256),
    "vqgan-openimages-f8-16384": replace(TAMING_F8, codebook_size=16384),
    "vqgan-openimages-gumbel-f8": GUMBEL_F8,
    "vqgan-maskgit-f16": MASKGIT_F16,
    "vqgan-llamagen-f16": LLAMAGEN_F16,
    "vqgan-llamagen-f16-t2i": LLAMAGEN_F16,
    "vqgan-llamagen-f8": LLAMAGEN_F8,
    "vqgan-tiny": replace(TAMING_F16, cnn=TINY, codebook_size=64, code_dim=8, resolution=32),
    "vqgan-gumbel-tiny": replace(
        GUMBEL_F8, cnn=replace(TINY, latent_dim=8), codebook_size=64, code_dim=8, resolution=32
    ),
    "vqgan-maskgit-tiny": replace(
        MASKGIT_F16,
        cnn=replace(TINY, style="maskgit", attention=(), multipliers=(1, 2, 2), latent_dim=12),
        codebook_size=64,
        code_dim=12,
        resolution=32,
    ),
    "vqgan-llamagen-tiny": replace(LLAMAGEN_F16, cnn=TINY, codebook_size=64, resolution=32),
}


# -- the authors' checkpoints ----------------------------------------------------------------------------------------


def key_table(config: VQGANConfig) -> KeyTable:
    """Their state dict to ours. Taming's files also hold the losses' networks, LlamaGen's a ring of recent codes."""
    levels = len(config.cnn.multipliers)
    rules: list[Rule] = [
        *cnn_rules(config.family, "encoder", "encoder.", "encoder.cnn.", levels),
        *cnn_rules(config.family, "decoder", "decoder.", "decoder.cnn.", levels),
        Rename("quant_conv.*", "encoder.project.*"),
        Rename("post_quant_conv.*", "decoder.project.*"),
    ]
    if config.codebook == "gumbel":
        rules += [
            Rename("quantize.proj.*", "quantizer.logits.*", into=as_linear, back=as_pixelwise),
            Rename("quantize.embed.weight", "quantizer.codebook"),
        ]
    else:
        rules.append(Rename("quantize.embedding.weight", "quantizer.codebook"))
    if config.family == "taming":
        rules.append(Drop("loss.*"))
    if config.family == "llamagen":
        ring = {"quantize.codebook_used": torch.zeros(65536)}
        rules.append(Drop("quantize.codebook_used", restore=lambda ours: ring))
    return KeyTable(*rules)


def recognise(state: Mapping[str, Tensor]) -> VQGANConfig | None:
    """The config of an authors' state dict, from its names and shapes alone; None if it is no VQGAN."""
    if "encoder.conv_in.weight" not in state or "decoder.conv_in.weight" not in state:
        return None
    family: Family
    if "encoder.conv_blocks.0.res.0.conv1.weight" in state:
        family, stem, block = "llamagen", "encoder.conv_blocks", "res"
    elif "encoder.mid.block_1.conv1.weight" in state:
        family, stem, block = "taming", "encoder.down", "block"
    elif "encoder.mid.0.conv1.weight" in state and "encoder.down.0.block.0.conv1.weight" in state:
        family, stem, block = "maskgit", "encoder.down", "block"
    else:
        return None
    gumbel = "quantize.embed.weight" in state
    codebook = state.get("quantize.embed.weight" if gumbel else "quantize.embedding.weight")
    if codebook is None:
        return None
    width = state["encoder.conv_in.weight"].shape[0]
    levels = _count(state, lambda level: f"{stem}.{level}.{block}.0.conv1.weight")
    widths = [state[f"{stem}.{level}.{block}.0.conv1.weight"].shape[0] for level in range(levels)]
    base = {"taming": GUMBEL_F8 if gumbel else TAMING_F16, "maskgit": MASKGIT_F16, "llamagen": LLAMAGEN_F16}[family]
    cnn = CNNConfig(
        width=width,
        multipliers=tuple(channels // width for channels in widths),
        blocks=_count(state, lambda index: f"{stem}.0.{block}.{index}.conv1.weight"),
        latent_dim=state["encoder.conv_out.weight"].shape[0],
        attention=tuple(level for level in range(levels) if f"{stem}.{level}.attn.0.norm.weight" in state),
        style=base.cnn.style,
    )
    return replace(base, cnn=cnn, codebook_size=codebook.shape[0], code_dim=codebook.shape[1])


def _count(state: Mapping[str, Tensor], key: Callable[[int], str]) -> int:
    return next(index for index in range(len(state) + 1) if key(index) not in state)


def configure(plain: Mapping[str, Any]) -> VQGANConfig:
    """Our config from the authors': a taming YAML (whole, its `params`), MaskGIT's or LlamaGen's arguments.

    Raises ConfigError where it is none of these.
    """
    model = plain.get("model", plain)
    params = {**model, **model.get("params", {}), **model.get("official_config", {})}
    if "ddconfig" in params:
        return _configure_taming(params, str(model.get("target", "")))
    if "channel_mult" in params:
        cnn = CNNConfig(
            width=params["hidden_channels"],
            multipliers=tuple(params["channel_mult"]),
            blocks=params["num_res_blocks"],
            latent_dim=params["z_channels"],
            style="maskgit",
            dropout=params.get("dropout", 0.0),
            channels=params.get("num_channels", 3),
        )
        size, beta = params.get("num_embeddings", 1024), params.get("commitment_cost", 0.25)
        return VQGANConfig("maskgit", cnn, size, cnn.latent_dim, beta=beta, resolution=params.get("resolution", 256))
    if "encoder_ch_mult" in params:
        if list(params["encoder_ch_mult"]) != list(params.get("decoder_ch_mult", params["encoder_ch_mult"])):
            raise ConfigError("encoder_ch_mult and decoder_ch_mult differ, which no published model does")
        multipliers = tuple(params["encoder_ch_mult"])
        cnn = CNNConfig(
            width=params.get("ch", 128),
            multipliers=multipliers,
            blocks=params.get("num_res_blocks", 2),
            latent_dim=params.get("z_channels", 256),
            attention=(len(multipliers) - 1,),
            dropout=params.get("dropout_p", 0.0),
        )
        return VQGANConfig(
            "llamagen",
            cnn,
            params.get("codebook_size", 16384),
            params.get("codebook_embed_dim", 8),
            "cosine" if params.get("codebook_l2_norm", True) else "plain",
            beta=params.get("commit_loss_beta", 0.25),
            entropy=params.get("entropy_loss_ratio", 0.0),
        )
    raise ConfigError(
        "no VQGAN config: expected taming's 'ddconfig', MaskGIT's 'channel_mult' or LlamaGen's 'encoder_ch_mult'"
    )


def _configure_taming(params: Mapping[str, Any], target: str) -> VQGANConfig:
    net = params["ddconfig"]
    multipliers = tuple(net["ch_mult"])
    sides = [net["resolution"] // 2**level for level in range(len(multipliers))]
    cnn = CNNConfig(
        width=net["ch"],
        multipliers=multipliers,
        blocks=net["num_res_blocks"],
        latent_dim=net["z_channels"],
        attention=tuple(level for level, side in enumerate(sides) if side in net.get("attn_resolutions", ())),
        double_latent=net.get("double_z", False),
        dropout=net.get("dropout", 0.0),
        channels=net.get("in_channels", 3),
    )
    if net.get("out_ch", cnn.channels) != cnn.channels:
        raise ConfigError(f"out_ch {net['out_ch']} differs from in_channels {cnn.channels}, which is not supported")
    base = VQGANConfig(cnn=cnn, codebook_size=params["n_embed"], code_dim=params["embed_dim"])
    base = replace(base, resolution=net["resolution"])
    if "kl_weight" in params or target.endswith("GumbelVQ"):
        return replace(base, codebook="gumbel", kl_weight=params.get("kl_weight", 1e-8))
    return base


SYSTEM = System("vqgan", VQGAN, VQGANConfig, VARIANTS, keys=key_table, recognise=recognise, configure=configure)
