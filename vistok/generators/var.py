"""VAR: a picture is drawn scale by scale, all tokens of a scale at once.

"Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction" (arXiv:2404.02905)

What is new: the step of the autoregression is a whole token map. The model reads the sum of all coarser maps, made as
large as the next one, and predicts its tokens in one pass: ten passes for 680 tokens.

    class c -> e_c (B, W)
    scale 1: [e_c + start]                                                          (B, 1, W)
    scale s: linear map of f_hat after scale s - 1, area-resized to h_s x w_s       (B, h_s w_s, W)
      + place + scale -> blocks under e_c, which see this scale and those before -> norm under e_c -> logits (B, n, K)
    codes of scale s -> rows of the tokenizer's codebook -> f_hat                   (vistok/quantize/multiscale.py)

Guidance grows with the scale: 1 + (guidance - 1) s / (S - 1) for scale s = 0 .. S - 1. What is read are vectors of the
tokenizer, so its quantizer is kept with the generator, frozen: `attach(tokenizer)` copies it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import isqrt
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError, InputError, MismatchError
from vistok.generator import Generator, Known, drop_labels, fixed_spec
from vistok.generators._var_keys import VARKeys
from vistok.nn.scale_transformer import ScaleTransformer, ScaleTransformerSize, coarser_or_same, initialise, level_of
from vistok.nn.transformer import Modulation, modulate
from vistok.quantize.multiscale import VAR_SCALES, MultiScaleVectorQuantizer
from vistok.registry import System
from vistok.sampling.noise import ItemNoise, uniforms
from vistok.sampling.tokens import Sampling, draw, guide, probabilities
from vistok.tokenizer import Tokenizer
from vistok.tokenizers.var import SCALES_512, TINY, phis_of, scale_segments
from vistok.tokens import Source

Stream = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class VARConfig:
    """Sizes of one model.

    scales, codebook_size, code_dim, factor    of the tokenizer: sides of the maps, K, D, pixels per position
    phis, ratio      of its quantizer
    classes          classes of the condition; one more row stands for none
    class_dropout    share of labels that training replaces by none
    gate_init        factor of the gates' maps at the start: the smaller, the deeper a stack that still trains
    guidance, top_k, top_p    published settings of sampling
    tokenizer        whose tokens these are, as far as it is known
    """

    trunk: ScaleTransformerSize = field(default_factory=ScaleTransformerSize)
    scales: tuple[int, ...] = VAR_SCALES
    codebook_size: int = 4096
    code_dim: int = 32
    factor: int = 16
    phis: int = 4
    ratio: float = 0.5
    classes: int = 1000
    class_dropout: float = 0.1
    gate_init: float = 1e-5
    guidance: float = 2.5
    top_k: int = 900
    top_p: float = 0.96
    tokenizer: Source | None = None
    version: int = 1


class VAR(Generator):
    """See the module's docstring. `generate(classes)` gives codes (B, N), coarse to fine.

    `known` tokens may be the first scales, or any that their `keep` marks, as `outside` does for inpainting. Further
    options of `generate`:

    more_smooth    the model reads mixtures of code vectors (Gumbel-softmax) in place of the drawn ones; the codes are
                   the heaviest of each mixture, and `pixels` decodes the mixtures themselves
    stream         is called after each scale with the codes so far (B, n) and their sum f_hat (B, h w, D)
    """

    system = "var"
    config: VARConfig
    level: Tensor  # (N,), the scale of every position
    mask: Tensor  # (N, N), which positions see which
    undecayed: ClassVar[tuple[str, ...]] = ("start", "positions", "levels.weight", "*.log_length", "*.offsets")

    def __init__(self, config: VARConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        width = config.trunk.width
        self.lengths = tuple(side * side for side in config.scales)
        self.ends = tuple(accumulate(self.lengths))
        self.class_table = nn.Embedding(config.classes + 1, width)
        self.start = nn.Parameter(torch.empty(self.lengths[0], width))
        self.words = nn.Linear(config.code_dim, width)
        self.positions = nn.Parameter(torch.empty(self.ends[-1], width))
        self.levels = nn.Embedding(len(config.scales), width)
        self.trunk = ScaleTransformer(config.trunk)
        self.norm = nn.LayerNorm(width, eps=config.trunk.eps, elementwise_affine=False)
        self.head_modulation = Modulation(width, width, 2)
        self.head = nn.Linear(width, config.codebook_size)
        self.quantizer = _quantizer(config)
        self.register_buffer("level", level_of(self.lengths), persistent=False)
        self.register_buffer("mask", coarser_or_same(self.level), persistent=False)
        self._initialise()
        self.classes = config.classes
        self.sampling = Sampling(config.guidance, 1.0, config.top_k, config.top_p)
        segments = scale_segments(config.scales, config.codebook_size)
        self.spec = fixed_spec(segments, config.scales[-1] * config.factor)

    @torch.no_grad()
    def _initialise(self) -> None:
        width = self.config.trunk.width
        for part in (self.class_table, self.words, self.levels, self.head_modulation, self.head):
            initialise(part, width)
        for places in (self.start, self.positions):
            nn.init.trunc_normal_(places, std=(1 / width / 3) ** 0.5)
        self.head.weight *= 0.02
        self.head_modulation.project.weight *= 0.5
        self.trunk.initialise(self.config.gate_init)

    @property
    def null(self) -> int:
        """The class that stands for none."""
        return self.config.classes

    def attach(self, tokenizer: Tokenizer) -> "VAR":
        """As `Generator.attach`; also copies the tokenizer's quantizer, whose vectors the model reads."""
        theirs = getattr(tokenizer, "quantizer", None)
        if not isinstance(theirs, MultiScaleVectorQuantizer):
            raise MismatchError(f"{self.name} reads the sums of a multi-scale tokenizer, which {tokenizer.name} is not")
        if theirs.dim != self.config.code_dim:
            raise MismatchError(
                f"{self.name} reads vectors of {self.config.code_dim} numbers, {tokenizer.name} has {theirs.dim}"
            )
        super().attach(tokenizer)
        phis, ratio = tokenizer.config.phis, tokenizer.config.ratio
        if (phis, ratio) != (self.config.phis, self.config.ratio):
            self.config = replace(self.config, phis=phis, ratio=ratio)
            self.quantizer = _quantizer(self.config).to(self.device, self.dtype)
        state = theirs.state_dict()
        self.quantizer.load_state_dict({name: state[name] for name in self.quantizer.state_dict()})
        return self

    # -- the network ---------------------------------------------------------------------------------------------

    def embedded(self, inputs: Tensor, condition: Tensor, first: int, last: int) -> Tensor:
        """What the trunk reads at positions first..last-1, (B, last - first, W).

        `inputs` (b, n, D) are the area-resized sums at those of them that are not of the first scale; b is B, or half
        of it where the branches of guidance read the same. `condition` (B, W) is the class's row.
        """
        with torch.autocast(inputs.device.type, enabled=False):
            words = self.words(inputs.to(self.words.weight.dtype))
            words = words.repeat(len(condition) // len(words), 1, 1)
            if first == 0:
                words = torch.cat([condition[:, None] + self.start, words], 1)
            return words + (self.levels(self.level[first:last]) + self.positions[first:last])

    def outputs(self, x: Tensor, condition: Tensor) -> Tensor:
        """Logits (B, n, K), float32, of the trunk's outputs (B, n, W)."""
        with torch.autocast(x.device.type, enabled=False):
            scale, shift = self.head_modulation(condition)
            return self.head(modulate(self.norm(x.to(condition.dtype)), shift, scale)).float()

    def logits(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced logits (B, N, K) of codes (B, N) for classes (B,); `null` stands for none."""
        self._check_quantizer()
        condition = self.class_table(labels)
        x = self.embedded(self.quantizer.next_inputs(codes), condition, 0, self.ends[-1])
        return self.outputs(self.trunk(x, condition, mask=self.mask), condition)

    def _check_quantizer(self) -> None:
        if not bool(self.quantizer.codebook.any()):
            raise InputError(
                f"{self.name} reads the code vectors of its tokenizer and has none yet: call attach(tokenizer) first"
            )

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy over the tokens of all scales, "code", given those of the scales before.

        `batch` as in `Generator.loss`; labels are dropped by `rng`.
        """
        codes = self.batch_tokens(batch)
        labels = self.batch_labels(batch, len(codes))
        if self.training:
            labels = drop_labels(labels, self.config.class_dropout, self.null, rng)
        return {"code": F.cross_entropy(self.logits(codes, labels).flatten(0, 1), codes.flatten())}

    # -- sampling ------------------------------------------------------------------------------------------------

    def sample(  # type: ignore[override]
        self,
        conditions: Tensor | None,
        *,
        seeds: list[int],
        sampling: Sampling,
        known: Known | None,
        more_smooth: bool = False,
        stream: Stream | None = None,
    ) -> Tensor:
        """Codes (B, N), one pass of the trunk for each scale; see the class. Where guided, the second half of a doubled
        batch runs without the class.
        """
        self._check_quantizer()
        items, length, scales = len(seeds), self.ends[-1], len(self.lengths)
        labels = torch.full((items,), self.null, device=self.device) if conditions is None else conditions
        branches = 2 if sampling.guided and conditions is not None else 1
        if branches == 2:
            labels = torch.cat([labels, torch.full_like(labels, self.null)])
        condition = self.class_table(labels)
        past = self.trunk.cache(len(labels), length)
        uniform, noise = uniforms(seeds, (length,), self.device), ItemNoise(seeds, self.device)
        codes = torch.zeros(items, length, dtype=torch.long, device=self.device)
        whole = 0 if known is None else self._whole_scales(known.present)
        f_hat: Tensor | None = None
        inputs, begin = [condition.new_zeros(items, 0, self.config.code_dim)], 0
        for scale, (last, count) in enumerate(zip(self.ends, self.lengths, strict=True)):
            here = slice(last - count, last)
            if scale < whole:
                assert known is not None
                codes[:, here] = found = known.data[:, here]
            else:
                x = self.embedded(torch.cat(inputs, 1), condition, begin, last)
                mask = self.mask[begin:last, :last] if begin < last - count else None
                state = self.trunk(x, condition, mask=mask, past=past)[:, -count:]
                logits, place = self.outputs(state, condition), scale / max(scales - 1, 1)
                if branches == 2:
                    logits = guide(logits, self.guidance_at(sampling.guidance, place))
                if more_smooth:
                    weights = self._mixture(logits, place, sampling, noise)
                    codes[:, here], found = weights.argmax(-1), weights @ self.quantizer.table()
                else:
                    codes[:, here] = found = draw(logits, uniform[:, here], sampling)
                if known is not None:
                    found = self._put_known(codes[:, here], found, known, here)
                inputs, begin = [], last
            f_hat, following = self.quantizer.advance(scale, found, f_hat)
            if following is not None:
                inputs.append(following)
            if stream is not None:
                stream(codes[:, :last], f_hat)
        return codes

    def guidance_at(self, guidance: float, place: float) -> float:
        """The guidance of a scale, `place` of the way from the first (0) to the last (1)."""
        return 1 + (guidance - 1) * place

    def pixels(self, condition: Any = None, *, more_smooth: bool = True, **options: Any) -> Tensor:
        """Pictures (B, 3, S, S) in [0, 1] of what `generate(condition, ..)` gives, from the sums themselves.

        With `more_smooth`, these are mixtures of code vectors, for which no code stands. Raises InputError without an
        attached tokenizer.
        """
        if self.tokenizer is None:
            raise InputError(f"{self.name} needs a tokenizer to make pixels: call attach(tokenizer) first")
        sums: list[Tensor] = []
        self.generate(condition, more_smooth=more_smooth, stream=lambda codes, f_hat: sums.append(f_hat), **options)
        tokenizer = self.tokenizer.to(self.device)
        with tokenizer.inference():
            return tokenizer.decoder(tokenizer.arrange(sums[-1], tokenizer.spec)).clamp(0, 1)

    def outside(self, mask: Tensor) -> Tensor:
        """Which tokens of pictures stay where a region is drawn anew: bool (B, N).

        `mask` (B, 1, H, W) is 1 inside the region. A token goes where half of its cell or more lies inside. For
        `generate(.., known=replace(tokens, keep=gen.outside(mask)))`, the paper's zero-shot inpainting.
        """
        if mask.ndim != 4 or mask.shape[1] != 1:
            raise InputError(f"a mask of shape {tuple(mask.shape)}; expected (B, 1, H, W)")
        cells = [F.interpolate(mask.float(), (side, side), mode="area").flatten(1) for side in self.config.scales]
        return torch.cat(cells, 1) < 0.5

    def _whole_scales(self, present: Tensor) -> int:
        """How many leading scales are known in every item; the rest may be known here and there."""
        known = present.all(0).tolist()
        return next((scale for scale, last in enumerate(self.ends) if not all(known[:last])), len(self.ends))

    def _put_known(self, codes: Tensor, found: Tensor, known: Known, here: slice) -> Tensor:
        """Put what is known into the codes (B, n) of a scale, in place, and into what the quantizer gets of it."""
        present, given = known.present[:, here], known.data[:, here].clamp(min=0)
        codes.copy_(torch.where(present, given, codes))
        return codes if found.ndim == 2 else torch.where(present[..., None], self.quantizer.table()[given], found)

    def _mixture(self, logits: Tensor, place: float, sampling: Sampling, noise: ItemNoise) -> Tensor:
        """Weights (B, n, K) over the codes: Gumbel-softmax, harder from scale to scale, as the authors smooth."""
        uniform = noise.uniforms(*logits.shape[1:]).clamp(min=1e-20)
        sharp = probabilities(logits, sampling).log() * (1 + place)
        return ((sharp - (-uniform.log()).log()) / max(0.27 * (1 - 0.95 * place), 0.005)).softmax(-1)


def _quantizer(config: VARConfig) -> MultiScaleVectorQuantizer:
    """The frozen quantizer of the tokenizer to come: empty until it is attached, or read from a file."""
    quantizer = MultiScaleVectorQuantizer(
        config.code_dim, config.codebook_size, config.scales, convs=config.phis, ratio=config.ratio
    ).requires_grad_(False)
    nn.init.zeros_(quantizer.codebook)
    return quantizer


# -- variants --------------------------------------------------------------------------------------------------------


def _of_depth(depth: int, **changes: Any) -> VARConfig:
    """The published rule: a width of 64 and a head for every block."""
    return VARConfig(ScaleTransformerSize(64 * depth, depth, depth, **changes))


SMALL = VARConfig(
    ScaleTransformerSize(64, 2, 4),
    scales=TINY.scales,
    codebook_size=TINY.codebook_size,
    code_dim=TINY.cnn.latent_dim,
    factor=TINY.cnn.factor,
    classes=10,
    guidance=1.5,
    top_k=0,
    top_p=1.0,
)

VARIANTS = {
    "var-cifar10": replace(
        SMALL, trunk=ScaleTransformerSize(112, 6, 2), scales=(1, 2, 4, 8), codebook_size=512, code_dim=8, phis=1
    ),
    **{f"var-d{depth}": _of_depth(depth) for depth in (16, 20, 24, 30)},
    "var-d36": replace(_of_depth(36, shared_condition=True), scales=SCALES_512),
    "var-generator-tiny": SMALL,
    "var-generator-tiny-shared": replace(
        SMALL, trunk=replace(SMALL.trunk, shared_condition=True, by_angle=False), scales=(1, 2, 4, 8), phis=1
    ),
}


# -- the authors' checkpoints ----------------------------------------------------------------------------------------


def key_table(config: VARConfig) -> VARKeys:
    """Their state dict to ours, with or without that of the tokenizer beside it."""
    return VARKeys(config.scales, config.trunk.depth, config.trunk.width, config.codebook_size, config.code_dim,
                   config.phis, config.ratio)  # fmt: skip


def recognise(state: Mapping[str, Tensor]) -> VARConfig | None:
    """The config of an authors' state dict, from its names and shapes alone; None if it is no VAR transformer.

    Sizes of the scales are read from its buffer of levels, else told by their number and sum. Without attention by
    angle heads cannot be seen: they are taken to be 64 wide.
    """
    if "pos_1LC" not in state or "head_nm.ada_lin.1.weight" not in state:
        return None
    width, code_dim = state["word_embed.weight"].shape
    by_angle = "blocks.0.attn.scale_mul_1H11" in state
    size = ScaleTransformerSize(
        width,
        next(index for index in range(len(state) + 1) if f"blocks.{index}.attn.mat_qkv.weight" not in state),
        state["blocks.0.attn.scale_mul_1H11"].shape[1] if by_angle else max(width // 64, 1),
        by_angle=by_angle,
        shared_condition="blocks.0.ada_gss" in state,
        mlp=state["blocks.0.ffn.fc1.weight"].shape[0] / width,
    )
    return VARConfig(
        size,
        scales=_scales(state),
        codebook_size=state["head.weight"].shape[0],
        code_dim=code_dim,
        classes=state["class_emb.weight"].shape[0] - 1,
        **(phis_of(state) if "quantize.embedding.weight" in state else {}),
    )


def _scales(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    count, length, levels = state["lvl_embed.weight"].shape[0], state["pos_1LC"].shape[1], state.get("lvl_1L")
    if levels is not None and not levels.is_meta:
        return tuple(isqrt(number) for number in levels.flatten().bincount(minlength=count).tolist())
    for scales in (VAR_SCALES, SCALES_512):
        if (len(scales), sum(side * side for side in scales)) == (count, length):
            return scales
    raise ConfigError(
        f"a VAR of {count} scales with {length} tokens, whose sides cannot be seen in its weights: pass --config with "
        "patch_nums: [1, 2, ..]"
    )


def configure(plain: Mapping[str, Any]) -> VARConfig:
    """Our config from the arguments of the authors' `VAR`; `vae_kwargs` holds those of its tokenizer, as published
    where it is missing. Raises ConfigError where it is none.
    """
    if "depth" not in plain or "patch_nums" not in plain:
        raise ConfigError("no config of VAR's transformer: expected 'depth' and 'patch_nums'")
    if plain.get("attn_drop_rate", 0.0) != plain.get("drop_rate", 0.0):
        raise ConfigError("attn_drop_rate and drop_rate differ, which no published model does")
    vae: Mapping[str, Any] = plain.get("vae_kwargs", {})
    depth = plain["depth"]
    size = ScaleTransformerSize(
        plain.get("embed_dim", 64 * depth),
        depth,
        plain.get("num_heads", depth),
        by_angle=plain.get("attn_l2_norm", False),
        shared_condition=plain.get("shared_aln", False),
        mlp=plain.get("mlp_ratio", 4.0),
        drop_path=plain.get("drop_path_rate"),
        dropout=plain.get("drop_rate", 0.0),
        eps=plain.get("norm_eps", 1e-6),
    )
    return VARConfig(
        size,
        scales=tuple(plain["patch_nums"]),
        codebook_size=vae.get("vocab_size", 4096),
        code_dim=vae.get("z_channels", 32),
        factor=2 ** (len(vae.get("ch_mult", (1, 1, 2, 2, 4))) - 1),
        phis=vae.get("share_quant_resi", 4),
        ratio=abs(vae.get("quant_resi", 0.5)),
        classes=plain.get("num_classes", 1000),
        class_dropout=plain.get("cond_drop_rate", 0.1),
    )


SYSTEM = System("var", VAR, VARConfig, VARIANTS, keys=key_table, recognise=recognise, configure=configure)
