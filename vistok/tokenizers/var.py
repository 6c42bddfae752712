"""VAR's tokenizer: a picture as token maps of growing size, each of which refines the sum of those before it.

"Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction" (arXiv:2404.02905, section 3.2)

What is new: the residual levels of one codebook are scales. The first token says what the whole picture looks like on
average, the last 16 x 16 hold the detail, and any whole number of scales decodes.

    pixels (B, 3, 256, 256) -> CNN encoder -> 3x3 convolution -> latent f (B, 32, 16, 16)
    f -> for 1x1, 2x2, .. 16x16: rest, made small -> nearest of 4096 codes -> made large, refined -> taken off the rest
      -> codes (B, 1 + 4 + 9 + .. + 256 = 680), coarse to fine; their sum f_hat (B, 32, 16, 16)
    f_hat -> 3x3 convolution -> CNN decoder -> pixels

The quantizer is `vistok/quantize/multiscale.py`; the generator over scales `vistok/generators/var.py`. The authors did
not publish how they trained it; the losses here are those that the paper names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.keys import Constant, Drop, KeyTable, Rename, Rule, State
from vistok.layout import Segment, Sizes, TokenSpec
from vistok.nn.cnn import CNNConfig, CNNDecoder, CNNEncoder
from vistok.quantize.multiscale import VAR_SCALES, MultiScaleVectorQuantizer
from vistok.registry import System
from vistok.tokenizers._judged import JudgedTokenizer
from vistok.tokenizers._vqgan_keys import cnn_rules
from vistok.tokenizers.vqgan import reconstruction_terms

SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
PUBLISHED_CNN = CNNConfig(width=160, multipliers=(1, 1, 2, 2, 4), latent_dim=32, attention=(4,))


@dataclass(frozen=True)
class VARTokenizerConfig:
    """Sizes and conventions of one model; D is `cnn.latent_dim`.

    scales        sides of the square token maps, growing; the last is the latent's
    codebook_size K
    metric        "cosine" chooses codes by angle; the vectors themselves are used as they are
    phis          convolutions that refine a scale's map at full size: so many, spread over the scales; 0 is one each
    ratio         their share in the map they refine; 0 leaves them out
    kernel        side of the convolutions beside the quantizer
    beta          weight of the commitment
    restart       averaged count of choices per step below which training replaces a code; 0 leaves them, as published
    """

    cnn: CNNConfig = field(default_factory=lambda: PUBLISHED_CNN)
    scales: tuple[int, ...] = VAR_SCALES
    codebook_size: int = 4096
    metric: Literal["l2", "cosine"] = "l2"
    phis: int = 4
    ratio: float = 0.5
    kernel: int = 3
    beta: float = 0.25
    restart: float = 0.0
    version: int = 1

    def __post_init__(self) -> None:
        if self.cnn.double_latent:
            raise ConfigError("VAR quantizes its latent itself; double_z is for KL autoencoders")
        if self.kernel % 2 == 0:
            raise ConfigError(f"kernel {self.kernel}; expected an odd side, so that the map keeps its size")

    @property
    def side(self) -> int:
        """Sides of the pictures, in pixels."""
        return self.scales[-1] * self.cnn.factor


def scale_segments(scales: Sequence[int], codebook_size: int) -> tuple[Segment, ...]:
    """The layout of VAR's tokens: `scale_1`, `scale_2`, .., one square map each."""
    return tuple(Segment(f"scale_{index + 1}", (side, side), (codebook_size,)) for index, side in enumerate(scales))


class Encoder(nn.Module):
    """Pixels (B, 3, S, S) in [0, 1] to the latent (B, D, h, w)."""

    def __init__(self, config: VARTokenizerConfig) -> None:
        super().__init__()
        self.cnn = CNNEncoder(config.cnn)
        self.project = _beside(config)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.project(self.cnn(pixels * 2 - 1))


class Decoder(nn.Module):
    """Sums of code vectors (B, D, h, w) to pixels (B, 3, S, S), near [0, 1] but not clamped."""

    def __init__(self, config: VARTokenizerConfig) -> None:
        super().__init__()
        self.project = _beside(config)
        self.cnn = CNNDecoder(config.cnn)

    @property
    def last_layer(self) -> Tensor:
        """The weight at which an adaptive adversarial weight compares gradients."""
        return self.cnn.last_layer

    def forward(self, vectors: Tensor) -> Tensor:
        return (self.cnn(self.project(vectors.to(self.project.weight.dtype))) + 1) / 2


def _beside(config: VARTokenizerConfig) -> nn.Conv2d:
    dim = config.cnn.latent_dim
    return nn.Conv2d(dim, dim, config.kernel, padding=config.kernel // 2)


class VARTokenizer(JudgedTokenizer):
    """See the module's docstring. `decode(tokens.prefix(n))` decodes whole scales alone, `spec.prefixes` of them."""

    system = "var"
    config: VARTokenizerConfig
    decoder: Decoder
    quantizer: MultiScaleVectorQuantizer

    def __init__(self, config: VARTokenizerConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.encoder = Encoder(config)
        self.quantizer = make_quantizer(config)
        self.decoder = Decoder(config)
        segments = scale_segments(config.scales, config.codebook_size)
        self.spec = TokenSpec(
            size=(config.side, config.side),
            layout=lambda size: segments,
            sizes=Sizes(only=((config.side, config.side),)),
            prefix_rule="segments",
        )

    def arrange(self, vectors: Tensor, spec: TokenSpec) -> Tensor:
        """Rows of the sum (B, h w, D) to the map (B, D, h, w)."""
        return vectors.transpose(1, 2).unflatten(2, self.quantizer.grid)

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Terms for `batch["pixels"]` (B, 3, S, S) in [0, 1]: squared error in [-1, 1], "perceptual" and "adversarial"
        where `judge` set them, "commitment" and "codebook", each the mean over scales.

        The reconstruction in [0, 1] goes into `batch["reconstruction"]`, for the discriminator's turn.
        """
        pixels = self.prepare(batch["pixels"])
        quantized = self.quantizer(self.encoder(pixels).flatten(2).transpose(1, 2))
        image = self.decoder(self.arrange(quantized.vectors, self.spec))
        batch["reconstruction"] = image.detach()
        terms = reconstruction_terms("llamagen", image, pixels, self.perceptual)
        terms |= self.adversarial_terms(image, terms, self.decoder.last_layer, step)
        return terms | quantized.losses


def make_quantizer(config: VARTokenizerConfig) -> MultiScaleVectorQuantizer:
    """The quantizer of a config."""
    return MultiScaleVectorQuantizer(
        config.cnn.latent_dim,
        config.codebook_size,
        config.scales,
        metric=config.metric,
        convs=config.phis,
        ratio=config.ratio,
        commitment=config.beta,
        restart_below=config.restart,
    )


# -- variants --------------------------------------------------------------------------------------------------------

PUBLISHED = VARTokenizerConfig()
TINY = VARTokenizerConfig(
    CNNConfig(width=32, multipliers=(1, 1, 2), blocks=1, latent_dim=16, attention=(2,)),
    scales=(1, 2, 3, 5, 8),
    codebook_size=64,
)

VARIANTS = {
    "var-vae": PUBLISHED,
    "var-vae-512": replace(PUBLISHED, scales=SCALES_512),
    "var-tiny": TINY,
    "var-tiny-cosine": replace(TINY, scales=(1, 2, 4, 8), metric="cosine", phis=1),
}


# -- the authors' checkpoints ----------------------------------------------------------------------------------------


def phi_rules(phis: int) -> list[Rule]:
    """The quantizer's part: `qresi_ls` where a few are spread over the scales, `qresi` one for all, else a list."""
    theirs = {0: "quantize.quant_resi.#.*", 1: "quantize.quant_resi.qresi.*"}.get(
        phis, "quantize.quant_resi.qresi_ls.#.*"
    )
    ours = "quantizer.convs.0.*" if phis == 1 else "quantizer.convs.#.*"
    return [Rename("quantize.embedding.weight", "quantizer.codebook"), Rename(theirs, ours)]


def key_table(config: VARTokenizerConfig) -> KeyTable:
    """Their state dict to ours. Their running counts of codes are made anew, as zeros, on the way out."""
    levels, statistics = len(config.cnn.multipliers), []
    if config.restart:
        counts = partial(torch.full, (config.codebook_size,), max(1.0, config.restart))
        statistics = [Constant("quantizer.counts", counts), Constant("quantizer.steps", lambda: torch.tensor(0))]

    def no_counts(ours: State) -> dict[str, Tensor]:
        return {"quantize.ema_vocab_hit_SV": torch.zeros(len(config.scales), config.codebook_size)}

    return KeyTable(
        *cnn_rules("var", "encoder", "encoder.", "encoder.cnn.", levels),
        *cnn_rules("var", "decoder", "decoder.", "decoder.cnn.", levels),
        Rename("quant_conv.*", "encoder.project.*"),
        Rename("post_quant_conv.*", "decoder.project.*"),
        *phi_rules(config.phis),
        *statistics,
        Drop("quantize.ema_vocab_hit_SV", restore=no_counts),
    )


def recognise(state: Mapping[str, Tensor]) -> VARTokenizerConfig | None:
    """The config of an authors' state dict, from its names and shapes alone; None if it is no VAR tokenizer.

    Sides of the scales cannot be seen, but their number can: they are those of the variant that has as many.
    """
    counts, codebook = state.get("quantize.ema_vocab_hit_SV"), state.get("quantize.embedding.weight")
    if counts is None or codebook is None or "encoder.mid.block_1.conv1.weight" not in state:
        return None
    width = state["encoder.conv_in.weight"].shape[0]
    levels = _count(state, "encoder.down.#.block.0.conv1.weight")
    widths = [state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    cnn = CNNConfig(
        width=width,
        multipliers=tuple(channels // width for channels in widths),
        blocks=_count(state, "encoder.down.0.block.#.conv1.weight"),
        latent_dim=state["encoder.conv_out.weight"].shape[0],
        attention=tuple(level for level in range(levels) if f"encoder.down.{level}.attn.0.norm.weight" in state),
        middle_attention="encoder.mid.attn_1.norm.weight" in state,
        channels=state["encoder.conv_in.weight"].shape[1],
    )
    return VARTokenizerConfig(
        cnn=cnn,
        scales=_scales(len(counts)),
        codebook_size=codebook.shape[0],
        kernel=state["quant_conv.weight"].shape[-1],
        **phis_of(state),
    )


def phis_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`phis` and `ratio` of the quantizer in a state dict; the published ratio where there are convolutions at all."""
    spread = _count(state, "quantize.quant_resi.qresi_ls.#.weight")
    if spread:
        return {"phis": spread}
    if "quantize.quant_resi.qresi.weight" in state:
        return {"phis": 1}
    return {"phis": 0} if "quantize.quant_resi.0.weight" in state else {"ratio": 0.0}


def _scales(number: int) -> tuple[int, ...]:
    known = {len(config.scales): config.scales for config in reversed(VARIANTS.values())}
    if number not in known:
        raise ConfigError(
            f"a VAR tokenizer of {number} scales, whose sides cannot be seen in its weights: pass --config with "
            "patch_nums: [1, 2, ..]"
        )
    return known[number]


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return next(index for index in count() if pattern.replace("#", str(index)) not in state)


def configure(plain: Mapping[str, Any]) -> VARTokenizerConfig:
    """Our config from the arguments of the authors' `VQVAE`; what is not there is as published.

    Raises ConfigError where it is none.
    """
    scales = plain.get("v_patch_nums", plain.get("patch_nums"))
    if scales is None or "depth" in plain or not {"z_channels", "vocab_size"} & plain.keys():
        raise ConfigError("no config of VAR's tokenizer: expected 'z_channels' or 'vocab_size', and 'patch_nums'")
    multipliers = tuple(plain.get("ch_mult", PUBLISHED.cnn.multipliers))
    cnn = CNNConfig(
        width=plain.get("ch", 160),
        multipliers=multipliers,
        blocks=plain.get("num_res_blocks", 2),
        latent_dim=plain.get("z_channels", 32),
        attention=(len(multipliers) - 1,) if plain.get("using_sa", True) else (),
        middle_attention=plain.get("using_mid_sa", True),
        double_latent=plain.get("double_z", False),
        dropout=plain.get("dropout", 0.0),
        channels=plain.get("in_channels", 3),
    )
    return VARTokenizerConfig(
        cnn=cnn,
        scales=tuple(scales),
        codebook_size=plain.get("vocab_size", 4096),
        metric="cosine" if plain.get("using_znorm", False) else "l2",
        phis=plain.get("share_quant_resi", 4),
        ratio=abs(plain.get("quant_resi", 0.5)),
        kernel=plain.get("quant_conv_ks", 3),
        beta=plain.get("beta", 0.25),
    )


SYSTEM = System(
    "var", VARTokenizer, VARTokenizerConfig, VARIANTS, keys=key_table, recognise=recognise, configure=configure
)
