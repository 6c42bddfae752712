"""FQGAN: two or three codes at every position, each from a codebook of its own that looks for something else.

"Factorized Visual Tokenization and Generation" (arXiv:2411.16681)

What is new: a shared CNN encoder gets one head per codebook, so that the codebooks are looked up independently and K
rows each make K^2 or K^3 combinations; the code vectors of one position are pushed apart (disentanglement); and the
semantic codes must predict the features of a frozen vision model (representation learning).

    pixels (B, 3, 256, 256) in [0, 1] -> CNN -> (B, 512, h, w)
      -> head "vis": 6 transformer layers -> conv -> 1x1 -> latent (B, 8, h, w) -> VQ on unit vectors -> codes (B, N)
      -> head "sem": the same                                                                       -> codes (B, N)
    codes (B, N, 2) -> rows (B, N, 16) -> 1x1 -> CNN -> pixels
    in training: rows of "sem" -> 3 transformer layers -> the image's CLIP feature (B, 1024)

A triple model has the heads "vis", "sem_mid" (DINOv2) and "sem_high" (CLIP). Codes stand in this order. The heads know
their positions by heart, so that a model takes pictures of one size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from vistok.errors import ConfigError, InputError
from vistok.keys import Drop, KeyTable, Rename, Rule
from vistok.layout import Segment, Sizes, TokenSpec
from vistok.losses.representation import contrastive, load_teacher
from vistok.nn.cnn import CNNConfig, CNNDecoder, CNNTrunk, NormSiLU
from vistok.nn.transformer import Block
from vistok.quantize import EntropyTerm, VectorQuantizer
from vistok.quantize.product import ProductQuantizer
from vistok.registry import System
from vistok.tokenizers._judged import JudgedTokenizer
from vistok.tokenizers._vqgan_keys import cnn_rules
from vistok.tokenizers.vqgan import F8, F16, TINY, reconstruction_terms

DUAL, TRIPLE = ("vis", "sem"), ("vis", "sem_mid", "sem_high")


@dataclass(frozen=True)
class FQGANConfig:
    """Sizes of one model.

    heads             names of the sub-codebooks, in the order of the codes
    code_dim          width of a code vector of one sub-codebook
    adapter_layers, adapter_heads    transformer in front of each head
    features          width of the teacher's feature that each semantic head predicts in training; () without
    teachers          names of these teachers, as `vistok.losses.representation` knows them
    predictor_layers, predictor_heads    transformer that predicts the feature
    beta, entropy     weights of commitment and entropy terms of each codebook
    disentangle       weight of the squared cosine between the code vectors of one position
    representation    weight of the contrastive term, for each teacher
    resolution        side in pixels, the only one taken
    """

    heads: tuple[str, ...] = DUAL
    cnn: CNNConfig = F16
    codebook_size: int = 16384
    code_dim: int = 8
    adapter_layers: int = 6
    adapter_heads: int = 8
    features: tuple[int, ...] = (1024,)
    teachers: tuple[str, ...] = ("clip-l14",)
    predictor_layers: int = 3
    predictor_heads: int = 8
    beta: float = 0.25
    entropy: float = 0.03
    disentangle: float = 0.1
    representation: float = 0.5
    resolution: int = 256
    version: int = 1

    def __post_init__(self) -> None:
        if len(self.heads) < 2:
            raise ConfigError(f"FQGAN has at least two sub-codebooks, got {self.heads}")
        if self.features and len(self.features) != len(self.heads) - 1:
            raise ConfigError(f"{len(self.features)} features for the {len(self.heads) - 1} semantic heads")
        if self.features and len(self.teachers) != len(self.features):
            raise ConfigError(f"{len(self.teachers)} teachers for {len(self.features)} features")
        if self.resolution % self.cnn.factor:
            raise ConfigError(f"a resolution of {self.resolution} is no multiple of {self.cnn.factor}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of positions."""
        return self.resolution // self.cnn.factor, self.resolution // self.cnn.factor

    @property
    def semantic(self) -> tuple[str, ...]:
        """The heads that predict a teacher's feature."""
        return self.heads[1:] if self.features else ()


class PositionedTransformer(nn.Module):
    """Learned positions, a norm, pre-norm blocks, a norm: (B, N, W) to (B, N, W)."""

    def __init__(self, count: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(width**-0.5 * torch.randn(count, width))
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_in(x + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x)


class Head(nn.Module):
    """The trunk's features (B, W, h, w) to the latent (B, d, h, w) of one sub-codebook."""

    def __init__(self, config: FQGANConfig) -> None:
        super().__init__()
        width, count = config.cnn.widths[-1], config.grid[0] * config.grid[1]
        self.adapter = PositionedTransformer(count, width, config.adapter_layers, config.adapter_heads)
        self.norm_out = NormSiLU(width)
        self.conv_out = nn.Conv2d(width, config.cnn.latent_dim, 3, padding=1)
        self.project = nn.Conv2d(config.cnn.latent_dim, config.code_dim, 1)

    def features(self, trunk: Tensor) -> Tensor:
        """(B, W, h, w) to (B, latent_dim, h, w), before the projection to the code's width."""
        adapted = self.adapter(trunk.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, trunk.shape[2:])
        return self.conv_out(self.norm_out(adapted))

    def forward(self, trunk: Tensor) -> Tensor:
        return self.project(self.features(trunk))


class Encoder(nn.Module):
    """Pixels (B, 3, S, S) in [0, 1] to the latents of all sub-codebooks, one after another: (B, C d, h, w)."""

    def __init__(self, config: FQGANConfig) -> None:
        super().__init__()
        self.trunk = CNNTrunk(config.cnn)
        self.heads = nn.ModuleDict({name: Head(config) for name in config.heads})

    def forward(self, pixels: Tensor) -> Tensor:
        trunk = self.trunk(pixels * 2 - 1)
        return torch.cat([head(trunk) for head in self.heads.values()], 1)


class Decoder(nn.Module):
    """Code vectors (B, C d, h, w) to pixels (B, 3, S, S), near [0, 1] but not clamped."""

    def __init__(self, config: FQGANConfig) -> None:
        super().__init__()
        self.project = nn.Conv2d(len(config.heads) * config.code_dim, config.cnn.latent_dim, 1)
        self.cnn = CNNDecoder(config.cnn)

    def forward(self, vectors: Tensor) -> Tensor:
        return (self.cnn(self.project(vectors.to(self.cnn.last_layer.dtype))) + 1) / 2


class FeaturePredictor(nn.Module):
    """Code vectors (B, N, d) of one sub-codebook to one feature of the image (B, W)."""

    def __init__(self, config: FQGANConfig, width: int) -> None:
        super().__init__()
        count = config.grid[0] * config.grid[1] + 1
        self.widen = nn.Sequential(nn.Linear(config.code_dim, width), nn.ReLU(), nn.Linear(width, width))
        self.query = nn.Parameter(width**-0.5 * torch.randn(1, width))
        self.transformer = PositionedTransformer(count, width, config.predictor_layers, config.predictor_heads)

    def forward(self, vectors: Tensor) -> Tensor:
        query = self.query.expand(len(vectors), 1, -1)
        return self.transformer(torch.cat([query, self.widen(vectors)], 1))[:, 0]


class FQGAN(JudgedTokenizer):
    """See the module's docstring. `codes[..., c]` is the code of `config.heads[c]`."""

    system = "fqgan"
    config: FQGANConfig
    encoder: Encoder
    quantizer: ProductQuantizer
    decoder: Decoder

    def __init__(self, config: FQGANConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.encoder = Encoder(config)
        entropy = EntropyTerm(weight=config.entropy) if config.entropy else None
        self.quantizer = ProductQuantizer(
            {
                head: VectorQuantizer(
                    config.code_dim, config.codebook_size, metric="cosine", commitment=config.beta, entropy=entropy
                )
                for head in config.heads
            },
            disentangle=config.disentangle,
        )
        self.decoder = Decoder(config)
        self.predictors = nn.ModuleDict(
            {
                head: FeaturePredictor(config, width)
                for head, width in zip(config.semantic, config.features, strict=True)
            }
        )
        segment = Segment("grid", config.grid, (config.codebook_size,) * len(config.heads))
        size = (config.resolution, config.resolution)
        self.spec = TokenSpec(size=size, layout=lambda size: (segment,), sizes=Sizes(only=(size,)))
        self._teachers: dict[str, Callable[[Tensor], Tensor]] = {}

    # -- training ------------------------------------------------------------------------------------------------

    def teach(self, teachers: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        """Set who teaches the semantic heads, by name: pixels (B, 3, S, S) in [0, 1] to features (B, W).

        Without this call the teachers that the config names are loaded when `loss` first needs them.
        """
        strangers = set(teachers) - set(self.config.semantic)
        if strangers:
            raise InputError(f"no semantic head {sorted(strangers)}; there are {', '.join(self.config.semantic)}")
        self._teachers = dict(teachers)

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Terms for `batch["pixels"]` (B, 3, S, S) in [0, 1] (section 3 of the paper).

        "reconstruction"               mean squared error in [-1, 1]
        "perceptual", "adversarial"    where `judge` set them
        "commitment:<head>", "codebook:<head>", "entropy:<head>", "disentanglement"    of the quantizer
        "representation:<head>"        contrastive, between the predicted and the teacher's feature

        `batch["features"]` may hold {head: (B, W)}; else the teachers look at the pixels. The reconstruction goes into
        `batch["reconstruction"]`, for the discriminator's turn.
        """
        pixels = self.prepare(batch["pixels"])
        latent = self.encoder(pixels)
        quantized = self.quantizer(latent.flatten(2).transpose(1, 2))
        image = self.decoder(quantized.vectors.transpose(1, 2).unflatten(2, latent.shape[2:]))
        batch["reconstruction"] = image.detach()
        terms = reconstruction_terms("llamagen", image, pixels, self.perceptual)
        terms |= self.adversarial_terms(image, terms, self.decoder.cnn.last_layer, step)
        return terms | quantized.losses | self.representation_terms(quantized.vectors, batch)

    def representation_terms(self, vectors: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The contrastive term of every semantic head, for code vectors (B, N, C d)."""
        terms = {}
        for head, predictor in self.predictors.items():
            given = (batch.get("features") or {}).get(head)
            with torch.no_grad():
                feature = self._teacher(head)(batch["pixels"]) if given is None else given
            predicted = predictor(self.quantizer.part(head, vectors))
            if feature.shape != predicted.shape:
                raise InputError(
                    f"the teacher of {head!r} gives features {tuple(feature.shape)}, expected {tuple(predicted.shape)}"
                )
            value = contrastive(predicted, feature.to(predicted))
            terms[f"representation:{head}"] = self.config.representation * value
        return terms

    def _teacher(self, head: str) -> Callable[[Tensor], Tensor]:
        if head not in self._teachers:
            name = self.config.teachers[self.config.semantic.index(head)]
            width = self.config.features[self.config.semantic.index(head)]
            self._teachers[head] = load_teacher(name, width).to(self.device)
        return self._teachers[head]


# -- variants --------------------------------------------------------------------------------------------------------

DUAL_F16 = FQGANConfig()
TRIPLE_F16 = FQGANConfig(heads=TRIPLE, features=(384, 768), teachers=("dinov2-s14", "clip-b16"))
SMALL = FQGANConfig(
    cnn=TINY,
    codebook_size=64,
    adapter_layers=1,
    adapter_heads=4,
    features=(64,),
    teachers=("gradients",),
    predictor_layers=1,
    predictor_heads=4,
    resolution=32,
)

VARIANTS = {
    "fqgan-dual-ds16": DUAL_F16,
    "fqgan-triple-ds16": TRIPLE_F16,
    "fqgan-dual-ds8": replace(DUAL_F16, cnn=F8),
    "fqgan-triple-ds8": replace(TRIPLE_F16, cnn=F8),
    "fqgan-tiny": SMALL,
    "fqgan-tiny-triple": replace(SMALL, heads=TRIPLE, features=(32, 64), teachers=("gradients", "gradients")),
}


# -- the authors' checkpoints ----------------------------------------------------------------------------------------

THEIR_HEADS = {"vis": "visual_head", "sem": "semantic_head", "sem_mid": "semantic_head_mid"}
THEIR_HEADS["sem_high"] = "semantic_head_high"
THEIR_PREDICTORS = {"sem": "feat_pred_head", "sem_mid": "mid_sem_feat_pred", "sem_high": "high_sem_feat_pred"}


def key_table(config: FQGANConfig) -> KeyTable:
    """Their state dict to ours. Theirs also holds, per codebook, a ring of recent codes."""
    levels = len(config.cnn.multipliers)
    rules: list[Rule] = []
    for head in config.heads:
        theirs, ours = f"encoder.{THEIR_HEADS[head]}.0.", f"encoder.heads.{head}."
        rules += _transformer_rules(theirs, f"{ours}adapter.")
        rules += [
            Rename(f"encoder.norm_out_{head}.*", f"{ours}norm_out.*"),
            Rename(f"encoder.conv_out_{head}.*", f"{ours}conv_out.*"),
            Rename(f"quant_conv_{head}.*", f"{ours}project.*"),
            Rename(f"quantize_{head}.embedding.weight", f"quantizer.parts.{head}.codebook"),
        ]
        ring = f"quantize_{head}.codebook_used"
        rules.append(Drop(ring, restore=lambda ours, ring=ring: {ring: torch.zeros(65536)}))  # type: ignore[misc]
    for head in THEIR_PREDICTORS:
        theirs, ours = f"{THEIR_PREDICTORS[head]}.", f"predictors.{head}."
        if head not in config.semantic:
            rules.append(Drop(f"{theirs}*"))
            continue
        rules += _transformer_rules(theirs, f"{ours}transformer.")
        rules += [
            Rename(f"{theirs}upscale.*", f"{ours}widen.*"),
            Rename(f"{theirs}class_embedding", f"{ours}query"),
        ]
    rules += [
        *cnn_rules("llamagen", "encoder", "encoder.", "encoder.trunk.", levels),
        *cnn_rules("llamagen", "decoder", "decoder.", "decoder.cnn.", levels),
        Rename("post_quant_conv.*", "decoder.project.*"),
    ]
    return KeyTable(*rules)


def _transformer_rules(theirs: str, ours: str) -> list[Rule]:
    block, our_block = f"{theirs}transformer.#.", f"{ours}blocks.#."
    return [
        Rename(f"{block}attn.in_proj_*", f"{our_block}attention.qkv.*"),
        Rename(f"{block}attn.out_proj.*", f"{our_block}attention.out.*"),
        Rename(f"{block}mlp.c_fc.*", f"{our_block}mlp.expand.*"),
        Rename(f"{block}mlp.c_proj.*", f"{our_block}mlp.contract.*"),
        Rename(f"{block}ln_1.*", f"{our_block}norm1.*"),
        Rename(f"{block}ln_2.*", f"{our_block}norm2.*"),
        Rename(f"{theirs}ln_pre.*", f"{ours}norm_in.*"),
        Rename(f"{theirs}ln_post.*", f"{ours}norm_out.*"),
        Rename(f"{theirs}positional_embedding", f"{ours}positions"),
    ]


def recognise(state: Mapping[str, Tensor]) -> FQGANConfig | None:
    """The config of an authors' state dict, from its names and shapes alone; None if it is no FQGAN.

    Numbers of attention heads cannot be seen: they are the published 8.
    """
    if "quantize_vis.embedding.weight" not in state:
        return None
    base = TRIPLE_F16 if "quantize_sem_mid.embedding.weight" in state else DUAL_F16
    width = state["encoder.conv_in.weight"].shape[0]
    levels = _count(state, "encoder.conv_blocks.{}.res.0.conv1.weight")
    widths = [state[f"encoder.conv_blocks.{level}.res.0.conv1.weight"].shape[0] for level in range(levels)]
    cnn = CNNConfig(
        width=width,
        multipliers=tuple(channels // width for channels in widths),
        blocks=_count(state, "encoder.conv_blocks.0.res.{}.conv1.weight"),
        latent_dim=state["decoder.conv_in.weight"].shape[1],
        attention=(levels - 1,),
    )
    predictors = [THEIR_PREDICTORS[head] for head in base.heads[1:]]
    supervised = all(f"{name}.class_embedding" in state for name in predictors)
    rows, code_dim = state["quantize_vis.embedding.weight"].shape
    count = state["encoder.visual_head.0.positional_embedding"].shape[0]
    return replace(
        base,
        cnn=cnn,
        codebook_size=rows,
        code_dim=code_dim,
        adapter_layers=_count(state, "encoder.visual_head.0.transformer.{}.ln_1.weight"),
        features=tuple(state[f"{name}.class_embedding"].shape[1] for name in predictors) if supervised else (),
        teachers=base.teachers if supervised else (),
        predictor_layers=_count(state, predictors[0] + ".transformer.{}.ln_1.weight") if supervised else 3,
        resolution=isqrt(count) * cnn.factor,
    )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return next(index for index in range(len(state) + 1) if pattern.format(index) not in state)


SYSTEM = System("fqgan", FQGAN, FQGANConfig, VARIANTS, keys=key_table, recognise=recognise)
