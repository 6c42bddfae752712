"""RAR: an autoregressive generator that learns tokens in random orders first, and in raster order in the end.

"Randomized Autoregressive Visual Generation" (arXiv:2411.00776), as RobustTok (2503.08354) trains it on its tokens.

What is new: every position has two embeddings, of the place whose token it holds and of the place whose token comes
next, so that one GPT can learn all orders. The share of shuffled sequences falls from 1 to 0 in training.

    [start | class | codes in order] (B, 2 + N, W) + positions + position of the next token
      -> blocks: LN, causal attention with normed queries and keys, LN, MLP; scaled, shifted and gated by
         the class embedding + an embedding of the step -> LN, scaled and shifted -> logits (B, N + 1, K), one per place
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import cos, isqrt, pi
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.generator import Generator, Known, drop_labels, fixed_spec, known_prefix
from vistok.keys import KeyTable, Rename
from vistok.layout import Segment
from vistok.nn.attention import KeyValues, SelfAttention
from vistok.nn.packing import packed
from vistok.nn.transformer import MLP, Modulation, modulate
from vistok.registry import System
from vistok.sampling.noise import uniforms
from vistok.sampling.tokens import Sampling, draw, guide
from vistok.tokens import Source

EPS = 1e-6
SPARE_POSITIONS, SPARE_STEPS = 1024, 100  # rows that the published tables have beyond the tokens'


@dataclass(frozen=True)
class RARConfig:
    """Sizes of one model.

    codebook_size, grid, factor   of the tokens, and pixels a side of each
    classes          of the condition; one more row stands for none
    class_dropout    share of labels that training replaces by none; `dropout` in attention and MLP
    anneals          training steps between which the share of shuffled sequences falls from 1 to 0
    guidance, temperature          how the authors sample; guidance grows from 1 by a cosine of (i / N)^power
    tokenizer        whose tokens these are, as far as it is known
    """

    width: int = 768
    depth: int = 24
    heads: int = 16
    hidden: int = 3072
    codebook_size: int = 4096
    grid: tuple[int, int] = (16, 16)
    factor: int = 16
    classes: int = 1000
    class_dropout: float = 0.1
    dropout: float = 0.1
    anneals: tuple[int, int] = (125_000, 187_500)
    guidance: float = 6.0
    power: float = 1.15
    temperature: float = 1.02
    tokenizer: Source | None = None
    version: int = 1

    def __post_init__(self) -> None:
        if self.width % self.heads or self.grid[0] != self.grid[1] or self.anneals[0] > self.anneals[1]:
            raise ConfigError(f"RAR needs heads that divide its width, a square grid and anneals in order, got {self}")

    @property
    def length(self) -> int:
        """N, the number of tokens."""
        return self.grid[0] * self.grid[1]


class RARBlock(nn.Module):
    """x += gate attention(norm x), x += gate MLP(norm x), (B, n, W); norms scaled and shifted by the condition."""

    def __init__(self, config: RARConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attention = SelfAttention(width, config.heads, qk_norm="layer", eps=EPS, dropout=config.dropout)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width, config.hidden, dropout=config.dropout)
        self.modulation = Modulation(width, width, 6)

    def forward(self, x: Tensor, condition: Tensor, past: KeyValues | None = None) -> Tensor:
        """`condition` (B, n, W), one for every position."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        attended = self.attention(modulate(self.norm1(x), shift1, scale1), causal=True, past=past)
        x = torch.addcmul(x, gate1, attended)
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class RAR(Generator):
    """See the module's docstring. `generate(classes)` gives codes (B, N), in raster order.

    `generate(.., power=)` shapes how guidance grows along the sequence; 0 guides all tokens alike.
    """

    system = "robusttok"
    config: RARConfig

    def __init__(self, config: RARConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        width, length = config.width, config.length
        # rows: codes, one that is never read, classes, none
        self.table = nn.Embedding(config.codebook_size + config.classes + 2, width)
        self.start = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, length + SPARE_POSITIONS, width))
        self.next_positions = nn.Parameter(torch.zeros(1, length + SPARE_POSITIONS, width))
        self.steps = nn.Parameter(torch.zeros(1, length + SPARE_STEPS, width))
        self.blocks = nn.ModuleList(RARBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.modulation = Modulation(width, width, 2)
        self.head = nn.Linear(width, config.codebook_size)
        self._start()
        self.classes = config.classes
        self.sampling = Sampling(guidance=config.guidance, temperature=config.temperature)
        segment = Segment("grid", config.grid, (config.codebook_size,))
        self.spec = fixed_spec((segment,), config.grid[0] * config.factor)

    @property
    def null(self) -> int:
        """The class that stands for none."""
        return self.config.classes

    def logits(self, codes: Tensor, labels: Tensor, orders: Tensor | None = None) -> Tensor:
        """Logits (B, n + 1, K) of codes (B, n), given in the order that they are learned, for classes (B,).

        `orders` (B, n), long: the places in raster order of these codes; None is raster order. Logits i are for the
        code number i; the last are beyond the end where n = N.
        """
        items, count = codes.shape
        if orders is None:
            orders = torch.arange(count, device=codes.device).expand(items, -1)
        condition = self.table(labels + self.config.codebook_size + 1)[:, None]
        tokens = torch.cat([self.start.expand(items, -1, -1), condition, self.table(codes)], 1)
        here, ahead = self.positions[0, 2:][orders], self.next_positions[0, 2:][orders]
        placed = torch.cat([self.positions[:, :2].expand(items, -1, -1), here], 1)
        none = torch.zeros_like(condition)
        x = tokens + placed + torch.cat([none, ahead, none], 1)
        return self._run(x, condition + self.steps[:, : count + 2])[:, 1:]

    def _run(self, x: Tensor, condition: Tensor, past: Sequence[KeyValues] | None = None) -> Tensor:
        """Logits (B, n, K) of the embedded positions x (B, n, W)."""
        for index, block in enumerate(self.blocks):
            x = block(x, condition, None if past is None else past[index])
        scale, shift = self.modulation(condition)
        return self.head(modulate(self.norm(x), shift, scale))

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """ "code": cross-entropy of the codes in their order, raster or shuffled; `batch` as in `Generator.loss`.

        Labels are dropped, and orders drawn, by `rng`.
        """
        codes = self.batch_tokens(batch)
        labels = self.batch_labels(batch, len(codes))
        orders = None
        if self.training:
            labels = drop_labels(labels, self.config.class_dropout, self.null, rng)
            orders = self.orders(len(codes), step, rng).to(codes.device)
            codes = codes.gather(1, orders)
        logits = self.logits(codes, labels, orders)[:, :-1]
        return {"code": F.cross_entropy(logits.flatten(0, 1), codes.flatten())}

    def randomness(self, step: int) -> float:
        """Share of sequences that are shuffled at a training step."""
        first, last = self.config.anneals
        return 1 - min(max((step - first) / max(last - first, 1), 0.0), 1.0)

    def orders(self, items: int, step: int, rng: torch.Generator) -> Tensor:
        """Places (items, N) in the order that they are learned: shuffled for a share of the items, else raster."""
        length = self.config.length
        raster = torch.arange(length, device=rng.device).expand(items, -1)
        shuffled = torch.rand(items, length, generator=rng, device=rng.device).argsort(1)
        chosen = torch.rand(items, 1, generator=rng, device=rng.device) < self.randomness(step)
        return torch.where(chosen, shuffled, raster)

    # -- sampling ------------------------------------------------------------------------------------------------

    def sample(  # type: ignore[override]
        self,
        conditions: Tensor | None,
        *,
        seeds: list[int],
        sampling: Sampling,
        known: Known | None,
        power: float | None = None,
    ) -> Tensor:
        """Codes (B, N). Where guided, the second half of a doubled batch runs without the class."""
        items, length = len(seeds), self.config.length
        power = self.config.power if power is None else power
        first = known_prefix(known, self.name)
        codes = torch.zeros(items, length, dtype=torch.long, device=self.device)
        if known is not None:
            codes[:, :first] = known.data[:, :first]
        labels = torch.full((items,), self.null, device=self.device) if conditions is None else conditions
        branches = 2 if sampling.guided and conditions is not None else 1
        if branches == 2:
            labels = torch.cat([labels, torch.full_like(labels, self.null)])
        condition = self.table(labels + self.config.codebook_size + 1)[:, None]
        x = torch.cat([self.start.expand(len(labels), -1, -1), condition], 1) + self.positions[:, :2]
        known_codes = self.table(codes[:, :first]).repeat(branches, 1, 1) + self.positions[:, 2 : 2 + first]
        x = torch.cat([x, known_codes], 1)
        x[:, 1:] = x[:, 1:] + self.next_positions[:, 2 : 3 + first]
        past = self._cache(len(labels), length + 1)
        uniform = uniforms(seeds, (length,), self.device)
        with packed(self):
            for index in range(first, length):
                end = index + 2
                logits = self._run(x, condition + self.steps[:, end - x.shape[1] : end], past)[:, -1]
                if branches == 2:
                    logits = guide(logits, guidance_at(index / length, sampling.guidance, power))
                codes[:, index] = draw(logits, uniform[:, index], sampling)
                if index + 1 < length:
                    x = self.table(codes[:, index : index + 1]).repeat(branches, 1, 1)
                    x = x + self.positions[:, end : end + 1] + self.next_positions[:, end + 1 : end + 2]
        return codes

    def _cache(self, batch: int, length: int) -> list[KeyValues]:
        heads, head = self.config.heads, self.config.width // self.config.heads
        return [KeyValues(batch, heads, length, head, dtype=self.dtype, device=self.device) for _ in self.blocks]

    def _start(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for part in self.modules():
            if isinstance(part, Modulation):
                nn.init.zeros_(part.project.weight)
        for table in (self.start, self.positions, self.next_positions, self.steps):
            nn.init.trunc_normal_(table, std=0.02)


def guidance_at(progress: float, scale: float, power: float) -> float:
    """1 + (scale - 1) (1 - cos(pi progress^power)) / 2 for progress in [0, 1); power 0 is `scale` throughout."""
    if power == 0:
        return scale
    return 1 + (scale - 1) * (1 - cos(pi * progress**power)) / 2


# -- variants --------------------------------------------------------------------------------------------------------

BASE = RARConfig()
LARGE = RARConfig(width=1024, hidden=4096, guidance=6.75, power=1.01, temperature=1.04)

VARIANTS = {
    "robusttok-rar-b": BASE,
    "robusttok-rar-l": LARGE,
    "robusttok-rar-tiny": RARConfig(
        width=64,
        depth=2,
        heads=4,
        hidden=256,
        codebook_size=128,
        grid=(8, 8),
        factor=4,
        classes=10,
        dropout=0.0,
        anneals=(500, 750),
        guidance=2.0,
    ),
}


# -- the authors' checkpoints ----------------------------------------------------------------------------------------


def key_table(config: RARConfig) -> KeyTable:
    """Their state dict to ours."""
    return KeyTable(
        Rename("cls_token", "start"),
        Rename("pos_embed", "positions"),
        Rename("target_aware_pos_embed", "next_positions"),
        Rename("timesteps_embeddings", "steps"),
        Rename("embeddings.weight", "table.weight"),
        Rename("adaln_before_head.adaLN_modulation.1.*", "modulation.project.*"),
        Rename("lm_head.*", "head.*"),
        Rename("blocks.#.adaLN_modulation.1.*", "blocks.#.modulation.project.*"),
        Rename("blocks.#.attn.qkv.*", "blocks.#.attention.qkv.*"),
        Rename("blocks.#.attn.proj.*", "blocks.#.attention.out.*"),
        Rename("blocks.#.attn.q_norm.*", "blocks.#.attention.q_norm.*"),
        Rename("blocks.#.attn.k_norm.*", "blocks.#.attention.k_norm.*"),
        Rename("blocks.#.mlp.fc1.*", "blocks.#.mlp.expand.*"),
        Rename("blocks.#.mlp.fc2.*", "blocks.#.mlp.contract.*"),
        Rename("blocks.#.norm#.*", "blocks.#.norm#.*"),
    )


def recognise(state: Mapping[str, Tensor]) -> RARConfig | None:
    """The config of an authors' state dict, from its names and shapes alone; None if it is no RAR."""
    if "target_aware_pos_embed" not in state or "lm_head.bias" not in state:
        return None
    codebook_size, width = state["lm_head.weight"].shape
    side = isqrt(state["timesteps_embeddings"].shape[1] - SPARE_STEPS)
    base = LARGE if width == LARGE.width else BASE
    return replace(
        base,
        width=width,
        depth=next(index for index in range(len(state) + 1) if f"blocks.{index}.norm1.weight" not in state),
        heads=width // state["blocks.0.attn.q_norm.weight"].shape[0],
        hidden=state["blocks.0.mlp.fc1.weight"].shape[0],
        codebook_size=codebook_size,
        grid=(side, side),
        classes=state["embeddings.weight"].shape[0] - codebook_size - 2,
    )


def configure(plain: Mapping[str, Any]) -> RARConfig:
    """Our config from the arguments of the authors' RAR (`model.generator`, or these alone). KeyError where missing."""
    model = plain.get("model", plain)
    args = {**model.get("vq_model", {}), **model.get("generator", model)}
    side = isqrt(args["image_seq_len"])
    return RARConfig(
        width=args["hidden_size"],
        depth=args["num_hidden_layers"],
        heads=args["num_attention_heads"],
        hidden=args["intermediate_size"],
        codebook_size=args["codebook_size"],
        grid=(side, side),
        classes=args["condition_num_classes"],
        guidance=args.get("guidance_scale", BASE.guidance),
        power=args.get("guidance_scale_pow", BASE.power),
        temperature=args.get("randomize_temperature", BASE.temperature),
    )


SYSTEM = System("robusttok", RAR, RARConfig, VARIANTS, keys=key_table, recognise=recognise, configure=configure)
