"""Binary latent diffusion: a Bernoulli diffusion process over the bits of a picture.

"Binary Latent Diffusion" (arXiv:2304.04820)

What is new: diffusion where every step throws some bits anew, and its reverse is exact. The network is asked which of
the noisy bits are wrong, not what they should be; 16 to 64 steps are enough.

    bits (B, N, C) -> -1 or 1 -> linear -> + 2D position -> [N positions | time | class] -> transformer -> norm
      -> linear -> logits (B, N, C): is this bit flipped?

    training    t drawn from 1..T, bits thrown from q(x_t | x_0), cross-entropy with x_0 xor x_t
    generation  x_T fair coins; down a few of the steps: flips -> P(x_0) -> exact posterior of the next x -> throw

The class, where there is one, is a token at the end that is simply absent when unconditional.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt, log
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError, InputError
from vistok.generator import Generator, Known, fixed_spec
from vistok.keys import Drop, KeyTable, Rename, Rule
from vistok.layout import Segment
from vistok.nn.positions import sincos_2d
from vistok.nn.transformer import Block
from vistok.registry import System
from vistok.sampling.bernoulli import Schedule, bernoulli_schedule
from vistok.sampling.noise import ItemNoise
from vistok.sampling.tokens import Sampling, guide
from vistok.tokens import Source


@dataclass(frozen=True)
class BinaryDiffusionConfig:
    """Sizes, process and loss of one model.

    bits, grid, factor    C; rows and columns of positions; pixels per position along a side
    embed_width           D of the autoencoder's table of bits, which their file carries along
    steps, schedule       T and how K_t falls
    clock                 the T that the time embedding divides by; T itself where None
    flips                 the network says which bits are flipped, or, if not, what the data are
    focal                 gamma of the focal loss with balanced classes; below 0: plain cross-entropy. Without `flips`
                          it is the weight of ones as well, 0 for none (as published)
    timestep_weight       "mean": all t alike; "weighted": by 1 - (t - 1) / T
    auxiliary             weight of the cross-entropy between predicted and true posterior of the step before
    classes               None without a class; `class_dropout` is drawn once for a batch
    sample_steps, guidance, temperature    of generation
    tokenizer             whose tokens these are, as far as it is known
    """

    bits: int = 64
    grid: tuple[int, int] = (16, 16)
    factor: int = 16
    embed_width: int = 256
    width: int = 768
    depth: int = 24
    heads: int = 12
    dropout: float = 0.0
    steps: int = 64
    schedule: Schedule = "linear"
    clock: int | None = None
    flips: bool = True
    focal: float = 0.0
    timestep_weight: Literal["mean", "weighted"] = "mean"
    auxiliary: float = 0.0
    classes: int | None = None
    class_dropout: float = 0.1
    sample_steps: int = 64
    guidance: float = 1.0
    temperature: float = 0.9
    tokenizer: Source | None = None
    version: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.sample_steps <= self.steps:
            raise ConfigError(f"sample_steps {self.sample_steps} of {self.steps} steps")
        if self.timestep_weight not in ("mean", "weighted"):
            raise ConfigError(f"timestep_weight {self.timestep_weight!r}; expected 'mean' or 'weighted'")

    @property
    def positions(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]


class Denoiser(nn.Module):
    """Noisy bits, a step and a class to logits."""

    def __init__(self, config: BinaryDiffusionConfig) -> None:
        super().__init__()
        width = config.width
        self.clock = config.clock or config.steps
        self.bit_table = nn.Parameter(0.02 * torch.randn(config.bits, width))
        self.positions = nn.Parameter(sincos_2d(*config.grid, width)[None])
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.class_table = None if config.classes is None else nn.Embedding(config.classes, width)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, layer_scale=1.0, dropout=config.dropout) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.bits)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, bits: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, N, C) of bits (B, N, C), 0 or 1, at steps `t` (B,) in 1..T.

        `labels` (B,), -1 where an item has none; None for no class at all.
        """
        x = (2 * bits.to(self.positions.dtype) - 1) @ self.bit_table + self.positions
        x = torch.cat([x, self.time_token(t)[:, None]], 1)
        mask = None
        if labels is not None and self.class_table is not None and bool((labels >= 0).any()):
            x = torch.cat([x, self.class_table(labels.clamp(min=0))[:, None]], 1)
            if bool((labels < 0).any()):
                seen = torch.ones(len(x), x.shape[1], dtype=torch.bool, device=x.device)
                seen[:, -1] = labels >= 0
                mask = seen[:, None, None]
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.head(self.norm(x[:, : bits.shape[1]]))

    def time_token(self, t: Tensor) -> Tensor:
        """(B, W) of steps 1..T."""
        half = self.positions.shape[2] // 2
        frequencies = torch.exp(-log(10_000) / (half - 1) * torch.arange(half, device=t.device))
        angles = ((t - 1) / self.clock * 4000)[:, None] * frequencies
        return self.time(torch.cat([angles.sin(), angles.cos()], 1).to(self.positions.dtype))


class BinaryDiffusion(Generator):
    """See the module's docstring. `generate(classes, steps=)` gives bits (B, N, C); `known` bits are put back after
    every step, which fills in the rest of a picture.
    """

    system = "binary-latent-diffusion"
    config: BinaryDiffusionConfig
    embedding: Tensor

    def __init__(self, config: BinaryDiffusionConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.denoiser = Denoiser(config)
        self.register_buffer("embedding", torch.zeros(config.bits, config.embed_width))
        self.schedule = bernoulli_schedule(config.steps, config.schedule)
        self.classes = config.classes
        self.sampling = Sampling(guidance=config.guidance, temperature=config.temperature)
        segment = Segment("grid", config.grid, (2,) * config.bits)
        self.spec = fixed_spec((segment,), config.grid[0] * config.factor)

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """ "cross_entropy", and "auxiliary" where it has a weight. `batch` as in `Generator.loss`.

        Steps and throws are drawn by `rng`, unless the batch holds "t" (B,) in 1..T and "uniform" (B, N, C).
        """
        bits = self.batch_tokens(batch)
        labels = None
        if self.classes is not None:
            labels = self.batch_labels(batch, len(bits))
            if self.training and float(torch.rand((), generator=rng, device=rng.device)) < self.config.class_dropout:
                labels = None
        t, uniform = batch.get("t"), batch.get("uniform")
        if t is None:
            t = torch.randint(1, self.config.steps + 1, (len(bits),), generator=rng, device=rng.device)
        if uniform is None:
            uniform = torch.rand(bits.shape, generator=rng, device=rng.device)
        t, data = t.to(bits.device), bits.to(self.dtype)
        noisy = (uniform.to(data.device) < self.schedule.marginal(data, t)).to(data.dtype)
        return self.terms(self.denoiser(noisy, t, labels), data, noisy, t)

    def terms(self, logits: Tensor, data: Tensor, noisy: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Loss terms of logits (B, N, C) for data and noisy bits (B, N, C) at steps t (B,)."""
        config = self.config
        weight = torch.ones_like(t, dtype=logits.dtype)
        if config.timestep_weight == "weighted":
            weight = (1 - (t - 1) / config.steps).to(logits.dtype)
        each = self.cross_entropy(logits, data, noisy).mean((1, 2))
        terms = {"cross_entropy": (weight * each).mean()}
        if config.auxiliary:
            terms["auxiliary"] = (
                config.auxiliary * (weight * self.auxiliary(logits, data, noisy, t).mean((1, 2))).mean()
            )
        return terms

    def cross_entropy(self, logits: Tensor, data: Tensor, noisy: Tensor) -> Tensor:
        """The element-wise loss (B, N, C) that the config asks for."""
        focal = self.config.focal
        if focal < 0:
            return F.binary_cross_entropy_with_logits(self.data_logits(logits, noisy), data, reduction="none")
        target = (data != noisy).to(logits.dtype) if self.config.flips else data
        plain = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        p = logits.sigmoid()
        right = p * target + (1 - p) * (1 - target)
        value = plain * (1 - right).clamp(1e-6, 1 - 1e-6) ** focal
        if self.config.flips:  # flips are rare late and common early: both sides get the same total weight
            share = target.mean((1, 2), keepdim=True)
            value = value * torch.where(target > 0, 1 - share, share)
        elif focal > 0:
            value = value * torch.where(target > 0, focal, 1 - focal)
        return value

    def data_logits(self, logits: Tensor, noisy: Tensor) -> Tensor:
        """Logits of the data themselves: those of flips, turned round where the noisy bit is set."""
        return torch.where(noisy > 0, -logits, logits) if self.config.flips else logits

    def auxiliary(self, logits: Tensor, data: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """Cross-entropy (B, N, C) between the predicted and the true posterior of step t - 1."""
        p = self.data_logits(logits, noisy).sigmoid()
        first = (t == 1).reshape(-1, 1, 1)
        predicted = torch.where(first, p, self.schedule.step_back(p, noisy, t, eps=1e-6))
        true = self.schedule.step_back(data, noisy, t, eps=1e-6)
        return F.binary_cross_entropy(predicted.clamp(1e-6, 1 - 1e-6), true, reduction="none")

    # -- sampling ------------------------------------------------------------------------------------------------

    def sample(  # type: ignore[override]
        self,
        conditions: Tensor | None,
        *,
        seeds: list[int],
        sampling: Sampling,
        known: Known | None,
        steps: int | None = None,
        uniform: Tensor | None = None,
    ) -> Tensor:
        """Bits (B, N, C). `steps` of the process are visited; `uniform` (steps, B, N, C) replaces the seeds' throws."""
        if sampling.top_k or sampling.top_p < 1:
            raise InputError(f"{self.name} throws bits: top_k and top_p mean nothing here, temperature does")
        visited = self.schedule.timesteps(self.config.sample_steps if steps is None else steps)
        noise, shape = ItemNoise(seeds, self.device), (self.config.positions, self.config.bits)

        def throws(step: int) -> Tensor:
            return noise.uniforms(*shape) if uniform is None else uniform[step].to(self.device)

        bits = self._with_known(throws(0) < 0.5, known)
        for index, t in enumerate(visited):
            p = self.predict(bits, t, conditions, sampling)
            if index + 1 < len(visited):
                bits = throws(index + 1) < self.schedule.posterior(p, bits.to(p.dtype), t, visited[index + 1])
            else:
                bits = p > 0.5
            bits = self._with_known(bits, known)
        return bits.long()

    def predict(self, bits: Tensor, t: int, labels: Tensor | None, sampling: Sampling) -> Tensor:
        """P(x_0 = 1) of every bit, (B, N, C), for bits at step t; both branches of the guidance in one batch."""
        noisy = bits.to(self.dtype)
        guided = sampling.guided and labels is not None
        if guided:
            assert labels is not None
            noisy, labels = torch.cat([noisy, noisy]), torch.cat([labels, torch.full_like(labels, -1)])
        logits = self.denoiser(noisy, torch.full((len(noisy),), t, device=noisy.device), labels)
        logits = (guide(logits, sampling.guidance) if guided else logits) / max(sampling.temperature, 1e-5)
        return self.data_logits(logits, bits).sigmoid()

    @staticmethod
    def _with_known(bits: Tensor, known: Known | None) -> Tensor:
        return bits if known is None else torch.where(known.present[..., None], known.data > 0, bits)


# -- variants --------------------------------------------------------------------------------------------------------

C64 = BinaryDiffusionConfig()
VARIANTS = {
    "binary-latent-diffusion-generator-c64": C64,
    "binary-latent-diffusion-generator-tiny": replace(
        C64, bits=16, grid=(4, 4), factor=8, embed_width=32, width=128, depth=4, heads=4, classes=10, temperature=1.0
    ),
    "binary-latent-diffusion-generator-tiny-free": replace(
        C64, bits=16, grid=(4, 4), factor=8, embed_width=32, width=64, depth=2, heads=4, schedule="cos", sample_steps=16
    ),
}


# -- the authors' checkpoints ----------------------------------------------------------------------------------------


def key_table(config: BinaryDiffusionConfig) -> KeyTable:
    """Their state dict to ours. The tables of their schedule are made anew from the config."""

    def tables(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        schedule = bernoulli_schedule(config.steps, config.schedule)
        kept = {"k_final": schedule.kept, "cumbeta": schedule.kept, "beta": schedule.step, "b_final": schedule.coin}
        return {f"scheduler.{name}": table for name, table in kept.items()}

    theirs, ours = "_denoise_fn.blocks.#.", "denoiser.blocks.#."
    rules: list[Rule] = [
        Rename("embedding_weight", "embedding"),
        Rename("_denoise_fn.tok_emb.weight", "denoiser.bit_table"),
        Rename("_denoise_fn.pos_emb", "denoiser.positions"),
        Rename("_denoise_fn.time_step_embedding.l0.*", "denoiser.time.0.*"),
        Rename("_denoise_fn.time_step_embedding.linear.*", "denoiser.time.2.*"),
        Rename("_denoise_fn.cls_embedding.weight", "denoiser.class_table.weight"),
        Rename("_denoise_fn.ln_f.*", "denoiser.norm.*"),
        Rename("_denoise_fn.head.*", "denoiser.head.*"),
        Rename(f"{theirs}gamma_#", f"{ours}scale#"),
        Rename(f"{theirs}ln1.*", f"{ours}norm1.*"),
        Rename(f"{theirs}ln2.*", f"{ours}norm2.*"),
        Rename(f"{theirs}attn.qkv.*", f"{ours}attention.qkv.*"),
        Rename(f"{theirs}attn.proj.*", f"{ours}attention.out.*"),
        Rename(f"{theirs}mlp.0.*", f"{ours}mlp.expand.*"),
        Rename(f"{theirs}mlp.2.*", f"{ours}mlp.contract.*"),
        Drop("scheduler.k_final", restore=tables),
        *(Drop(f"scheduler.{name}") for name in ("b_final", "beta", "cumbeta")),
    ]
    return KeyTable(*rules)


def recognise(state: Mapping[str, Tensor]) -> BinaryDiffusionConfig | None:
    """The config of an authors' state dict, from its names, shapes and schedule; None if it is none.

    Heads cannot be seen: they are the published 64 numbers wide. Raises ConfigError for a schedule that is not known,
    and for the text-to-image models, whose denoiser reads a caption.
    """
    if "_denoise_fn.tok_emb.weight" not in state or "_denoise_fn.time_step_embedding.l0.weight" not in state:
        return None
    if any(".cross." in key for key in state):
        raise ConfigError("a binary latent diffusion that reads captions, which is not supported; others are")
    bits, width = state["_denoise_fn.tok_emb.weight"].shape
    side = isqrt(state["_denoise_fn.pos_emb"].shape[1])
    classes = state.get("_denoise_fn.cls_embedding.weight")
    kept = state["scheduler.k_final"]
    return replace(
        C64,
        bits=bits,
        grid=(side, side),
        embed_width=state["embedding_weight"].shape[1],
        width=width,
        depth=next(n for n in range(len(state) + 1) if f"_denoise_fn.blocks.{n}.ln1.weight" not in state),
        heads=max(width // 64, 1),
        steps=len(kept) - 1,
        sample_steps=min(len(kept) - 1, C64.sample_steps),
        schedule=_schedule_of(kept),
        classes=None if classes is None else classes.shape[0],
    )


def _schedule_of(kept: Tensor) -> Schedule:
    kinds: tuple[Schedule, ...] = ("linear", "cos", "sigmoid")
    if kept.is_meta:  # shapes without numbers
        return kinds[0]
    for kind in kinds:
        if torch.allclose(bernoulli_schedule(len(kept) - 1, kind).kept, kept.float().cpu(), atol=1e-4):
            return kind
    raise ConfigError("a Bernoulli diffusion with a schedule that is neither linear nor cos nor sigmoid")


def configure(plain: Mapping[str, Any]) -> BinaryDiffusionConfig:
    """Our config from the authors' arguments. Raises KeyError where they are none."""
    rows, columns = plain["latent_shape"][-2:]
    steps = plain["total_steps"]
    labelled = plain.get("dataset", "").startswith("imagenet")
    return BinaryDiffusionConfig(
        bits=plain["codebook_size"],
        grid=(rows, columns),
        embed_width=plain["emb_dim"],
        width=plain["bert_n_emb"],
        depth=plain["bert_n_layers"],
        heads=plain["bert_n_head"],
        steps=steps,
        schedule=plain.get("beta_type", "linear"),
        clock=plain.get("sample_steps") if plain.get("sample_steps") != steps else None,
        flips=plain.get("p_flip", False),
        focal=plain.get("focal", 0),
        timestep_weight=plain.get("loss_final", "weighted"),
        auxiliary=plain.get("aux", 0.0),
        classes=plain.get("num_classes", 1000) if labelled else None,
        sample_steps=min(steps, plain.get("sample_steps", steps)),
    )


SYSTEM = System(
    "binary-latent-diffusion",
    BinaryDiffusion,
    BinaryDiffusionConfig,
    VARIANTS,
    keys=key_table,
    recognise=recognise,
    configure=configure,
)
