"""Binary latent diffusion: a Bernoulli diffusion process over the bits of a picture.

"Binary Latent Diffusion" (arXiv:2304.04820)

What is new: diffusion where every step throws some bits anew, and its reverse is exact. The network is asked which of
the noisy bits are wrong, not what they should be; 16 to 64 steps are enough.

    bits (B, N, C) -> -1 or 1 -> linear -> + 2D position -> [N positions | time | class] -> transformer -> norm
      -> linear -> logits (B, N, C): is this bit flipped?

    training    t drawn from 1..T, bits thrown from q(x_t | x_0), cross-entropy with x_0 xor x_t
    generation  x_T fair coins; down a few of the steps: flips -> P(x_0) -> exact posterior of the next x -> throw

The class, where there is one, is a token at the end that is simply absent when unconditional. A text is such a token
too (CLIP's vector), or what every block reads by cross-attention (T5's states; in its absence a learned vector).
"""

from collections.abc import Mapping, Sequence
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
from vistok.nn.clip_text import clip_text_condition
from vistok.nn.positions import sincos_2d
from vistok.nn.t5_text import T5Features, T5Text, as_features
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
    text                  (positions at most, width) of a text's features, None without
    text_as               what they are: a "token" at the end, or what is read by "cross" attention
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
    text: tuple[int, int] | None = None
    text_as: Literal["token", "cross"] = "token"
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
        if self.text_as not in ("token", "cross"):
            raise ConfigError(f"text_as {self.text_as!r}; expected 'token' or 'cross'")
        if self.classes is not None and self.text is not None:
            raise ConfigError("a model reads classes or text: set one of classes and text, the other None")

    @property
    def positions(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]


Condition = Tensor | T5Features | None


class Denoiser(nn.Module):
    """Noisy bits, a step and a class or a text to logits."""

    def __init__(self, config: BinaryDiffusionConfig) -> None:
        super().__init__()
        width = config.width
        text = None if config.text is None else config.text[1]
        crossed = text if config.text_as == "cross" else None
        self.clock = config.clock or config.steps
        self.bit_table = nn.Parameter(0.02 * torch.randn(config.bits, width))
        self.positions = nn.Parameter(sincos_2d(*config.grid, width)[None])
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.class_table = None if config.classes is None else nn.Embedding(config.classes, width)
        self.text_project = None if text is None or crossed else nn.Linear(text, width)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, layer_scale=1.0, dropout=config.dropout, context_width=crossed)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.bits)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        self.null_text: nn.ParameterList | None = None
        if crossed:  # one for every block
            self.null_text = nn.ParameterList(0.01 * torch.randn(1, 1, crossed) for _ in range(config.depth))

    def forward(self, bits: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        """Logits (B, N, C) of bits (B, N, C), 0 or 1, at steps `t` (B,) in 1..T.

        `condition`: classes (B,), -1 where an item has none; or features of texts, whose mask is empty where an item
        has none; None where no item has any.
        """
        x = (2 * bits.to(self.positions.dtype) - 1) @ self.bit_table + self.positions
        x = torch.cat([x, self.time_token(t)[:, None]], 1)
        token, there = self.condition_token(condition)
        mask = None
        if token is not None:
            x = torch.cat([x, token[:, None]], 1)
        if there is not None:
            seen = torch.ones(len(x), x.shape[1], dtype=torch.bool, device=x.device)
            seen[:, -1] = there
            mask = seen[:, None, None]
        for index, block in enumerate(self.blocks):
            context, context_mask = self.context(index, condition, len(x))
            x = block(x, context, mask=mask, context_mask=context_mask)
        return self.head(self.norm(x[:, : bits.shape[1]]))

    def condition_token(self, condition: Condition) -> tuple[Tensor | None, Tensor | None]:
        """The last token (B, W), or none; and which items have it, bool (B,), None for all."""
        if condition is None or self.null_text is not None:
            return None, None
        if isinstance(condition, T5Features):
            assert self.text_project is not None
            told, there = self.text_project(condition.features[:, 0]), condition.present[:, 0]
        else:
            assert self.class_table is not None
            told, there = self.class_table(condition.clamp(min=0)), condition >= 0
        if not bool(there.any()):
            return None, None
        return told, None if bool(there.all()) else there

    def context(self, block: int, condition: Condition, items: int) -> tuple[Tensor | None, Tensor | None]:
        """What a block's cross-attention reads, (B, L, D), and which of it is there; none without cross-attention."""
        if self.null_text is None:
            return None, None
        null = self.null_text[block]
        if condition is None:
            return null.expand(items, -1, -1), None
        assert isinstance(condition, T5Features)
        present = condition.present
        without = ~present.any(1, keepdim=True)  # reads the null vector, which takes its first place
        features = torch.where(without[..., None], null.to(condition.features), condition.features)
        present = present | (without & (torch.arange(present.shape[1], device=present.device) == 0))
        return features, None if bool(present.all()) else present[:, None, None]

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

    # -- conditions ----------------------------------------------------------------------------------------------

    def conditions(self, condition: Any, items: int) -> Any:
        """Class numbers (B,), or of a model that reads text `T5Features` of strings or of features (B, L, D).

        Raises InputError for what the model does not know.
        """
        if self.config.text is None or condition is None:
            return super().conditions(condition, items)
        encoder = self._text_encoder.held or (clip_vector if self.config.text_as == "token" else t5_states)
        told = as_features(condition, encoder, self.name, ("L", self.config.text[1]))
        if told.features.shape[1] > self.config.text[0]:
            raise InputError(
                f"a text of {told.features.shape[1]} positions; {self.name} reads up to {self.config.text[0]}"
            )
        return told.to(self.device, self.dtype).expand(items)

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """ "cross_entropy", and "auxiliary" where it has a weight. `batch` as in `Generator.loss`.

        Steps and throws are drawn by `rng`, unless the batch holds "t" (B,) in 1..T and "uniform" (B, N, C).
        """
        bits = self.batch_tokens(batch)
        condition = self.batch_condition(batch, len(bits))
        if condition is not None and self.training:
            dropped = float(torch.rand((), generator=rng, device=rng.device)) < self.config.class_dropout
            condition = None if dropped else condition
        t, uniform = batch.get("t"), batch.get("uniform")
        if t is None:
            t = torch.randint(1, self.config.steps + 1, (len(bits),), generator=rng, device=rng.device)
        if uniform is None:
            uniform = torch.rand(bits.shape, generator=rng, device=rng.device)
        t, data = t.to(bits.device), bits.to(self.dtype)
        noisy = (uniform.to(data.device) < self.schedule.marginal(data, t)).to(data.dtype)
        return self.terms(self.denoiser(noisy, t, condition), data, noisy, t)

    def batch_condition(self, batch: dict[str, Any], items: int) -> Condition:
        """Classes of batch["label"], or texts of batch["text"], else of batch["caption"]."""
        if self.classes is not None:
            return self.batch_labels(batch, items)
        if self.config.text is None:
            return None
        text = batch.get("caption") if batch.get("text") is None else batch["text"]
        if text is None:
            raise InputError(f"{self.name} learns with texts: the data needs captions (batch['text'] or ['caption'])")
        return self.conditions(text, items)

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
        conditions: Condition,
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

    def predict(self, bits: Tensor, t: int, condition: Condition, sampling: Sampling) -> Tensor:
        """P(x_0 = 1) of every bit, (B, N, C), for bits at step t; both branches of the guidance in one batch."""
        noisy = bits.to(self.dtype)
        guided = sampling.guided and condition is not None
        if guided:
            noisy, condition = torch.cat([noisy, noisy]), with_none(condition)
        logits = self.denoiser(noisy, torch.full((len(noisy),), t, device=noisy.device), condition)
        logits = (guide(logits, sampling.guidance) if guided else logits) / max(sampling.temperature, 1e-5)
        return self.data_logits(logits, bits).sigmoid()

    @staticmethod
    def _with_known(bits: Tensor, known: Known | None) -> Tensor:
        return bits if known is None else torch.where(known.present[..., None], known.data > 0, bits)


def with_none(condition: Condition) -> Condition:
    """A batch of conditions, followed by as many that say nothing."""
    if isinstance(condition, T5Features):
        features, present = condition.features, condition.present
        return T5Features(torch.cat([features, features]), torch.cat([present, torch.zeros_like(present)]))
    assert condition is not None
    return torch.cat([condition, torch.full_like(condition, -1)])


def clip_vector(texts: Sequence[str]) -> T5Features:
    """What the published text-to-image models read as a token: CLIP ViT-L/14's vector, one position of 768."""
    return T5Features(clip_text_condition(texts, "openai/clip-vit-large-patch14").pooled[:, None])


def t5_states(texts: Sequence[str]) -> T5Features:
    """What their models with cross-attention read: the states of T5-large, up to 128 positions of 1024."""
    return _t5(texts)


_t5 = T5Text("google-t5/t5-large", 128, lower=False)


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
    "binary-latent-diffusion-generator-tiny-text": replace(
        C64, bits=16, grid=(4, 4), factor=8, embed_width=32, width=64, depth=2, heads=4, text=(5, 24), text_as="cross"
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
        Rename("_denoise_fn.cls_embedding.*", f"denoiser.{'text_project' if config.text else 'class_table'}.*"),
        Rename("_denoise_fn.ln_f.*", "denoiser.norm.*"),
        Rename("_denoise_fn.head.*", "denoiser.head.*"),
        Rename(f"{theirs}gamma_#", f"{ours}scale#"),
        Rename(f"{theirs}gamma_1_5", f"{ours}scale_cross"),
        Rename(f"{theirs}ln1_5.*", f"{ours}norm_cross.*"),
        Rename(f"{theirs}cross.null_emb", "denoiser.null_text.#"),
        Rename(f"{theirs}cross.query.*", f"{ours}cross.q.*"),
        Rename(f"{theirs}cross.kv.*", f"{ours}cross.kv.*"),
        Rename(f"{theirs}cross.proj.*", f"{ours}cross.out.*"),
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

    Heads cannot be seen: they are the published 64 numbers wide. Raises ConfigError for a schedule that is not known.
    """
    if "_denoise_fn.tok_emb.weight" not in state or "_denoise_fn.time_step_embedding.l0.weight" not in state:
        return None
    bits, width = state["_denoise_fn.tok_emb.weight"].shape
    side = isqrt(state["_denoise_fn.pos_emb"].shape[1])
    table, crossed = state.get("_denoise_fn.cls_embedding.weight"), state.get("_denoise_fn.blocks.0.cross.kv.weight")
    told = "_denoise_fn.cls_embedding.bias" in state  # a linear map of a text's vector, not a table of classes
    text = None if table is None or not told else (1, table.shape[1])
    text = text if crossed is None else (128, crossed.shape[1])
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
        classes=None if table is None or told else table.shape[0],
        text=(128, crossed.shape[1])
        if crossed is not None
        else (1, table.shape[1])
        if table is not None and told
        else None,
        text_as="token" if crossed is None else "cross",
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
    labelled, told = (plain.get("dataset", "").startswith(name) for name in ("imagenet", "laion"))
    crossed = bool(told and plain.get("cross", False))
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
        text=((128, plain.get("text_emb", 1024)) if crossed else (1, 768)) if told else None,
        text_as="cross" if crossed else "token",
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
