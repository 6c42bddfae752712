"""RobustTok: a ViT tokenizer that learns to decode the wrong tokens which a generator will sample.

"Robust Latent Matters: Boosting Image Generation with Sampling Error Synthesis" (arXiv:2503.08354)

What is new: in training some tokens of some images are exchanged for near neighbours of their latents, ever fewer and
ever nearer, and the decoder has to rebuild the image all the same (`quantize/perturbation.py`). The same perturbation
makes a metric, pFID (`metrics/pfid.py`). The tokenizer itself is XQ-GAN's (arXiv:2412.01762), two DINOv2-shaped ViTs:

    pixels (B, 3, 256, 256) -> ViT over [class | 16 x 16 patches | 256 queries] -> queries (B, 256, 768)
      -> linear -> latent (B, 64, 16, 16) -> nearest of 4096 unit vectors -> codes (B, 256)
      -> linear -> ViT over [class | 256 masks | class | 256 tokens] -> masks -> linear -> 16 x 16 patches of pixels
    in training: mean code vector (B, 64) against DINOv2's class feature through the same linear map, both ways

The queries stand at the patches' positions; which of the two a position is, its level embedding says.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError, InputError
from vistok.keys import Constant, Drop, KeyTable, Rename, Rule, State
from vistok.layout import Segment, Sizes, TokenSpec
from vistok.losses.representation import ViTTeacher, load_teacher
from vistok.losses.weights import read_weights
from vistok.nn.patching import unpatchify
from vistok.nn.vit import ViT, ViTConfig, fitted, recognise_vit, vit_keys, vit_rules
from vistok.processes import sum_over_processes
from vistok.quantize import Quantized, VectorQuantizer
from vistok.quantize.perturbation import perturb
from vistok.quantize.rotation import straight_through
from vistok.registry import System
from vistok.tokenizers._judged import JudgedTokenizer
from vistok.tokenizers._vqgan_keys import as_linear, as_pixelwise
from vistok.tokenizers.vqgan import reconstruction_terms


@dataclass(frozen=True)
class Perturbation:
    """How training perturbs (section 3.2 of the paper), and how that fades.

    rate, strength  share of the tokens that are drawn anew, and among how many neighbours; both fall to `final` of that
                    between the steps of `fades`
    share           of the images of a batch: the first int(B * share), at least one where it is above 0
    """

    rate: float = 1.0
    share: float = 0.1
    strength: int = 100
    fades: tuple[int, int] = (50_000, 150_000)
    final: float = 0.5

    def __post_init__(self) -> None:
        shares = (self.rate, self.share, self.final)
        if not all(0 <= share <= 1 for share in shares) or self.strength < 1 or self.fades[0] > self.fades[1]:
            raise ConfigError(f"a perturbation needs shares in [0, 1], strength >= 1 and fades in order: {self}")

    def at(self, step: int) -> tuple[float, int]:
        """Rate and strength at a training step."""
        first, last = self.fades
        progress = min(max((step - first) / max(last - first, 1), 0.0), 1.0)
        left = 1 - (1 - self.final) * progress
        return self.rate * left, max(int(self.strength * left), 1)

    def images(self, batch: int) -> int:
        """How many images of a batch are perturbed."""
        return max(int(batch * self.share), int(self.share > 0 and batch > 0))


@dataclass(frozen=True)
class RobustTokConfig:
    """Sizes of one model.

    vit          of encoder and decoder; its `image` is the only side taken
    normalize    codes and latents are compared at unit length
    beta         weight of the commitment
    restart      codes with a lower averaged count per step move to latents of the batch; 0, as published: none does
    drop_path    share of items that skip a branch of the last block in training, less in earlier ones
    perturbation what training does to codes, None for the plain tokenizer
    semantic     weight of the contrast with the teacher's features, 0 for none
    backbone     a DINOv2 file, path or `owner/repo:file`, from which a fresh training starts both ViTs, or None
    teacher      "backbone": that DINOv2, frozen; or a name of `vistok.losses.representation`; `teach` sets another
    """

    vit: ViTConfig = field(default_factory=lambda: ViTConfig(256, 16, 768, 12, 12, layer_scale=1e-5))
    codebook_size: int = 4096
    code_dim: int = 64
    normalize: bool = True
    beta: float = 0.25
    restart: float = 0.0
    drop_path: float = 0.1
    perturbation: Perturbation | None = None
    semantic: float = 0.1
    teacher: str = "backbone"
    backbone: str | None = "timm/vit_base_patch14_dinov2.lvd142m:model.safetensors"
    version: int = 1

    def __post_init__(self) -> None:
        if self.perturbation is not None and self.perturbation.strength > self.codebook_size:
            raise ConfigError(f"{self.perturbation.strength} neighbours in a codebook of {self.codebook_size}")
        if self.semantic and self.teacher == "backbone" and self.backbone is None:
            raise ConfigError("teacher 'backbone' needs a backbone: give its file, another teacher, or semantic=0")


class Encoder(nn.Module):
    """Pixels (B, 3, S, S) in [0, 1] to the latent (B, D, h, w)."""

    def __init__(self, config: RobustTokConfig) -> None:
        super().__init__()
        size = config.vit
        self.vit = ViT(size, drop_path=config.drop_path)
        self.queries = nn.Parameter(torch.randn(1, size.grid**2, size.width) * 1e-6)
        self.levels = nn.Parameter(torch.randn(2, size.width) * 0.02)
        self.project = nn.Linear(size.width, config.code_dim)

    def tokens(self, pixels: Tensor) -> Tensor:
        """What the queries become, (B, N, W)."""
        patches = self.vit.placed(self.vit.embed(pixels * 2 - 1)) + self.levels[0]
        queries = self.queries + self.vit.positions[:, 1:] + self.levels[1]
        whole = torch.cat([patches, queries.expand(len(patches), -1, -1)], 1)
        return self.vit.run(whole, last=queries.shape[1])

    def forward(self, pixels: Tensor) -> Tensor:
        side = self.vit.config.grid
        return self.project(self.tokens(pixels)).transpose(1, 2).unflatten(2, (side, side))


class Decoder(nn.Module):
    """Code vectors (B, D, h, w) to pixels (B, 3, S, S), near [0, 1] but not clamped."""

    def __init__(self, config: RobustTokConfig) -> None:
        super().__init__()
        size = config.vit
        self.vit = ViT(size, patches=False, drop_path=config.drop_path)
        self.project = nn.Linear(config.code_dim, size.width)
        self.mask = nn.Parameter(torch.randn(1, 1, size.width) * 1e-6)
        self.levels = nn.Parameter(torch.randn(2, size.width) * 0.02)
        self.to_pixels = nn.Linear(size.width, 3 * size.patch**2)

    @property
    def last_layer(self) -> Tensor:
        """The weight at which an adaptive adversarial weight compares gradients."""
        return self.to_pixels.weight

    def forward(self, vectors: Tensor) -> Tensor:
        side = self.vit.config.grid
        tokens = self.vit.placed(self.project(vectors.to(self.last_layer.dtype).flatten(2).transpose(1, 2)))
        canvas = self.vit.placed(self.mask.expand(len(tokens), side**2, -1)) + self.levels[0]
        whole = self.vit.run(torch.cat([canvas, tokens + self.levels[1]], 1), first=1 + side**2)
        pixels = unpatchify(self.to_pixels(whole[:, 1:]), (side, side), self.vit.config.patch, "ppc")
        return (pixels + 1) / 2


class RobustTok(JudgedTokenizer):
    """See the module's docstring. Pictures of one size, 16 x 16 codes."""

    system = "robusttok"
    config: RobustTokConfig
    encoder: Encoder
    quantizer: VectorQuantizer
    decoder: Decoder
    hits: Tensor  # (K,) how often each code was used, a moving average over training steps

    def __init__(self, config: RobustTokConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.encoder = Encoder(config)
        self.quantizer = VectorQuantizer(
            config.code_dim,
            config.codebook_size,
            metric="cosine" if config.normalize else "l2",
            commitment=config.beta,
            restart_below=config.restart,
        )
        self.decoder = Decoder(config)
        self.register_buffer("hits", torch.zeros(config.codebook_size))
        side = (config.vit.image, config.vit.image)
        grid = Segment("grid", (config.vit.grid, config.vit.grid), (config.codebook_size,))
        self.spec = TokenSpec(size=side, layout=lambda size: (grid,), sizes=Sizes(only=(side,)))
        self._teacher: list[Callable[[Tensor], Tensor]] = []

    # -- training ------------------------------------------------------------------------------------------------

    def teach(self, teacher: Callable[[Tensor], Tensor]) -> None:
        """Set who gives the semantic features, (B, W) of pixels in [0, 1]. Else the one that the config names."""
        self._teacher = [teacher]

    def initialise(self, batches: Any, rng: torch.Generator) -> None:
        """Start both ViTs from `config.backbone`, whose kernel and positions are resampled to this patch and grid."""
        if self.config.backbone is None:
            return
        ours = self._backbone()
        for vit in (self.encoder.vit, self.decoder.vit):
            wanted = vit.state_dict().keys()
            vit.load_state_dict({key: value for key, value in ours.items() if key in wanted})

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Terms for `batch["pixels"]` (B, 3, S, S) in [0, 1].

        "reconstruction"             mean squared error in [-1, 1]
        "perceptual", "adversarial"  where `judge` set them
        "commitment", "codebook"     of the codes before any perturbation
        "semantic"                   contrast of the mean code vector with the teacher's feature

        Which codes are perturbed is drawn from `rng`. The reconstruction goes into `batch["reconstruction"]`.
        """
        pixels = self.prepare(batch["pixels"])
        latent = self.encoder(pixels).flatten(2).transpose(1, 2)
        quantized = self.quantizer(latent)
        if self.training:
            self._count(quantized, step)
        vectors = self.perturbed(latent, quantized, step, rng) if self.training else quantized.vectors
        image = self.decoder(self.arrange(vectors, self.spec))
        batch["reconstruction"] = image.detach()
        terms = reconstruction_terms("llamagen", image, pixels, self.perceptual)
        terms |= self.adversarial_terms(image, terms, self.decoder.last_layer, step)
        if self.config.semantic:
            terms["semantic"] = self.config.semantic * self.semantic(vectors, batch)
        return terms | quantized.losses

    def perturbed(self, latent: Tensor, quantized: Quantized, step: int, rng: torch.Generator) -> Tensor:
        """Code vectors (B, N, D) of which those of some images are perturbed, gradients straight through.

        Latents are (B, N, D), as the encoder gives them. Draws are made for all items, whoever is perturbed.
        """
        rule = self.config.perturbation
        assert quantized.codes is not None
        if rule is None or rule.share == 0:
            return quantized.vectors
        (rate, strength), count = rule.at(step), rule.images(len(latent))
        chance = torch.rand(quantized.codes.shape, generator=rng, device=rng.device).to(latent.device)
        rank = torch.randint(strength, quantized.codes.shape, generator=rng, device=rng.device).to(latent.device)
        z = self.compared(latent[:count])
        changed = perturb(
            z,
            self.quantizer.table().detach(),
            quantized.codes[:count],
            rate=rate,
            strength=strength,
            chance=chance[:count],
            rank=rank[:count],
        )
        moved = straight_through(z, self.quantizer.decode(changed)).to(quantized.vectors.dtype)
        return torch.cat([moved, quantized.vectors[count:]])

    def compared(self, latent: Tensor) -> Tensor:
        """Latents as they are compared with codes: at full precision, of unit length where codes are."""
        latent = latent if latent.dtype == torch.float64 else latent.float()
        return F.normalize(latent, dim=-1) if self.config.normalize else latent

    def semantic(self, vectors: Tensor, batch: dict[str, Any]) -> Tensor:
        """The contrast, both ways, of mean code vectors (B, D) with projected features of the teacher.

        `batch["features"]` (B, W) may hold these features; else the teacher looks at the pixels.
        """
        with torch.no_grad():
            given = batch.get("features")
            feature = self._teach()(self.prepare(batch["pixels"])) if given is None else given
        if feature.shape != (len(vectors), self.config.vit.width):
            raise InputError(
                f"the teacher gives features {tuple(feature.shape)}, expected ({len(vectors)}, {self.config.vit.width})"
            )
        wanted = self.encoder.project(feature.to(self.encoder.project.weight))
        logits = vectors.mean(1).float() @ wanted.float().T
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def code_usage(self, tokens: int) -> float:
        """Share of the codes whose hits are at least 0.08 of the mean, for `tokens` a step over all processes."""
        return float((self.hits >= 0.08 * tokens / len(self.hits)).float().mean())

    def _teach(self) -> Callable[[Tensor], Tensor]:
        if not self._teacher and self.config.teacher == "backbone":
            teacher = ViTTeacher(self.config.vit)
            teacher.vit.load_state_dict(self._backbone())
            self._teacher = [teacher.to(self.device)]
        elif not self._teacher:
            self._teacher = [load_teacher(self.config.teacher, self.config.vit.width).to(self.device)]
        return self._teacher[0]

    def _backbone(self) -> dict[str, Tensor]:
        """A ViT's state dict in our names, resampled to this model's patch and grid."""
        assert self.config.backbone is not None
        state = read_weights(self.config.backbone, "RobustTok's backbone")
        known = {key: value for key, value in state.items() if not key.startswith(("head.", "mask_token", "register"))}
        return fitted(vit_keys().to_ours(known), self.config.vit)

    @torch.no_grad()
    def _count(self, quantized: Quantized, step: int) -> None:
        assert quantized.codes is not None
        counts = torch.bincount(quantized.codes.flatten(), minlength=len(self.hits)).to(self.hits.dtype)
        counts = sum_over_processes(counts)
        self.hits.lerp_(counts, 1.0 if step == 0 else 0.1 if step < 100 else 0.01)


# -- variants --------------------------------------------------------------------------------------------------------

XQGAN = RobustTokConfig()
TINY = RobustTokConfig(
    vit=ViTConfig(32, 4, 64, 2, 4, layer_scale=0.1),
    codebook_size=128,
    code_dim=16,
    restart=2.0,
    drop_path=0.0,
    perturbation=Perturbation(strength=8, fades=(200, 600)),
    teacher="gradients",
    backbone=None,
)

VARIANTS = {
    "robusttok-4096": replace(XQGAN, perturbation=Perturbation()),
    "xqgan-4096": XQGAN,
    "xqgan-8192": replace(XQGAN, codebook_size=8192),
    "robusttok-tiny": TINY,
    "robusttok-tiny-plain": replace(TINY, perturbation=None),
}


# -- the authors' checkpoints ----------------------------------------------------------------------------------------


def key_table(config: RobustTokConfig) -> KeyTable:
    """Their state dict to ours. Theirs also holds the teacher, and which level every position has."""
    positions = config.vit.grid**2

    def level(first: int, second: int) -> Callable[[State], dict[str, Tensor]]:
        side = "encoder" if second == positions else "decoder"
        numbers = torch.cat([torch.zeros(1, first), torch.ones(1, second)], 1).long()
        return lambda ours: {f"{side}.lvl1LC": numbers}

    restarts: list[Rule] = []
    if config.restart:
        restarts = [
            Constant("quantizer.counts", lambda: torch.full((config.codebook_size,), max(1.0, config.restart))),
            Constant("quantizer.steps", lambda: torch.zeros((), dtype=torch.long)),
        ]
    return KeyTable(
        *restarts,
        Drop("semantic_model.*"),
        Drop("encoder.lvl1LC", restore=level(1 + positions, positions)),
        Drop("decoder.lvl1LC", restore=level(1 + positions, 1 + positions)),
        Rename("encoder.latent_tokens", "encoder.queries"),
        Rename("encoder.lvl_embed.weight", "encoder.levels"),
        Rename("decoder.lvl_embed.weight", "decoder.levels"),
        Rename("decoder.mask_token", "decoder.mask"),
        Rename("decoder.to_pixel.model.*", "decoder.to_pixels.*"),
        *vit_rules("encoder.model.", "encoder.vit."),
        *vit_rules("decoder.model.", "decoder.vit."),
        Rename("quant_conv.weight", "encoder.project.weight", into=as_linear, back=as_pixelwise),
        Rename("quant_conv.bias", "encoder.project.bias"),
        Rename("post_quant_conv.weight", "decoder.project.weight", into=as_linear, back=as_pixelwise),
        Rename("post_quant_conv.bias", "decoder.project.bias"),
        Rename("quantize.embedding.weight", "quantizer.codebook"),
        Rename("quantize.ema_vocab_hit_SV", "hits"),
    )


def recognise(state: Mapping[str, Tensor]) -> RobustTokConfig | None:
    """The config of an authors' state dict, from its names and shapes alone; None if it is none of these.

    Heads are the published 64 numbers wide, and codes of unit length; whether training perturbed cannot be seen.
    """
    vit = recognise_vit(state, "encoder.model.")
    if vit is None or "encoder.latent_tokens" not in state or "quantize.embedding.weight" not in state:
        return None
    if state["encoder.latent_tokens"].shape[1] != vit.grid**2:
        return None  # several products or scales: ImageFolder, not this file
    rows, code_dim = state["quantize.embedding.weight"].shape
    return replace(XQGAN, vit=vit, codebook_size=rows, code_dim=code_dim)


def configure(plain: Mapping[str, Any]) -> RobustTokConfig:
    """Our config from the authors' arguments; sizes of the ViT, which theirs name and do not give, from "vit".

    Raises ConfigError for what this file does not hold: several products or scales, other encoders.
    """
    args = plain.get("model_args", plain)
    kinds = {"enc_type": "dinov2", "dec_type": "dinov2", "product_quant": 1}
    wrong = [f"{key} {args[key]!r}" for key, value in kinds.items() if args.get(key, value) != value]
    if wrong or len(args.get("v_patch_nums", [16])) != 1 or "codebook_embed_dim" not in args:
        raise ConfigError(
            "expected XQ-GAN's arguments with one product, one scale and DINOv2 ViTs; got "
            + (", ".join(wrong) or "others")
        )
    if not args.get("abs_pos_embed", True):
        raise ConfigError("abs_pos_embed false has other positions than the published models")
    size = plain.get("vit")
    vit = XQGAN.vit
    if size is not None:
        vit = ViTConfig(
            size["img_size"],
            size["patch_size"],
            size["embed_dim"],
            size["depth"],
            size["num_heads"],
            layer_scale=size.get("init_values", 1e-5),
            mlp=float(size.get("mlp_ratio", 4)),
        )
    return replace(
        XQGAN,
        vit=vit,
        codebook_size=args["codebook_size"],
        code_dim=args["codebook_embed_dim"],
        normalize=args.get("codebook_l2_norm", True),
        beta=args.get("commit_loss_beta", 0.25),
        semantic=args.get("sem_loss_weight", 0.1) if args.get("semantic_guide", "dinov2") != "none" else 0.0,
        drop_path=size.get("drop_path_rate", 0.1) if size else 0.1,
    )


SYSTEM = System(
    "robusttok", RobustTok, RobustTokConfig, VARIANTS, keys=key_table, recognise=recognise, configure=configure
)
