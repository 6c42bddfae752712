"""FAR: FQGAN's autoregressive generator, one position after another and one sub-code after another within it.

"Factorized Visual Tokenization and Generation" (arXiv:2411.16681, section 3.4)

What is new: LlamaGen's GPT runs over positions; a second, shallow one runs over the C sub-codes of a position, so that
each is predicted knowing those before it.

    [class | a_0 .. a_(N-2)] (B, N, W) -> GPT -> h (B, N, W)            a_n = linear [e_1(code_1) | .. | e_C(code_C)]
    for every position: [h | e_1(code_1) | ..] (C, W) -> head GPT -> norm -> logits over sub-code 1, 2, ..

The order of sub-codes is the tokenizer's: vis, sem; or vis, sem_mid, sem_high. No weights of it were published.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.generator import Generator, Known, drop_labels, fixed_spec, known_prefix
from vistok.generators._llamagen_keys import block_rules, count_blocks, sized
from vistok.keys import KeyTable, Rename, Rule
from vistok.layout import Segment
from vistok.nn.gpt import GPT, GPTSize, initialise, prefixed_rotation
from vistok.nn.packing import packed
from vistok.nn.positions import Rotation
from vistok.registry import System
from vistok.sampling.noise import uniforms
from vistok.sampling.tokens import Sampling, draw, guide
from vistok.tokens import Source


@dataclass(frozen=True)
class FARConfig:
    """Sizes of one model.

    trunk            the GPT over positions; the one over sub-codes has `head_layers` blocks of the same kind
    sub_codes        C, codes at a position, each of `codebook_size`
    grid             rows and columns of positions
    factor           pixels per position, along a side, of the tokenizer
    classes          classes of the condition; one more row stands for none
    class_dropout    share of labels that training replaces by none; `token_dropout` of the trunk's input
    tokenizer        whose tokens these are, as far as it is known
    """

    trunk: GPTSize = field(default_factory=lambda: GPTSize(1024, 24, 16))
    head_layers: int = 3
    sub_codes: int = 2
    codebook_size: int = 16384
    grid: tuple[int, int] = (16, 16)
    factor: int = 16
    classes: int = 1000
    class_dropout: float = 0.1
    token_dropout: float = 0.1
    guidance: float = 2.0
    tokenizer: Source | None = None
    version: int = 1

    def __post_init__(self) -> None:
        if self.sub_codes < 2 or self.grid[0] != self.grid[1]:
            raise ConfigError(f"FAR has a square grid of at least two sub-codes, got {self.grid}, {self.sub_codes}")


class FAR(Generator):
    """See the module's docstring. `generate(classes)` gives codes (B, N, C)."""

    system = "fqgan"
    config: FARConfig

    def __init__(self, config: FARConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        width, count = config.trunk.width, config.sub_codes
        self.class_table = nn.Embedding(config.classes + 1, width)
        self.embeddings = nn.ModuleList(nn.Embedding(config.codebook_size, width) for _ in range(count))
        self.aggregate = nn.Linear(count * width, width)
        self.token_dropout = nn.Dropout(config.token_dropout)
        self.trunk = GPT(config.trunk)
        self.head = GPT(replace(config.trunk, depth=config.head_layers))
        self.norm = nn.RMSNorm(width, eps=config.trunk.eps)
        self.outputs = nn.ModuleList(nn.Linear(width, config.codebook_size, bias=False) for _ in range(count))
        initialise(self)
        for output in self.outputs:
            nn.init.zeros_(output.weight)  # type: ignore[arg-type]
        self.classes = config.classes
        self.sampling = Sampling(guidance=config.guidance)
        segment = Segment("grid", config.grid, (config.codebook_size,) * count)
        self.spec = fixed_spec((segment,), config.grid[0] * config.factor)

    @property
    def null(self) -> int:
        """The class that stands for none."""
        return self.config.classes

    def rotation(self) -> Rotation:
        """Rotation of the class and of all positions; the head's slots use its first rows, as the authors have it."""
        return prefixed_rotation(1, *self.config.grid, self.config.trunk.head, device=self.device)

    def tokens(self, codes: Tensor) -> Tensor:
        """Codes (B, n, C) to what the trunk reads, (B, n, W)."""
        parts = [table(column) for table, column in zip(self.embeddings, codes.unbind(-1), strict=True)]
        return self.aggregate(torch.cat(parts, -1))

    def features(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Trunk outputs (B, N, W): at position n, knowing the class and the codes (B, N, C) of positions below n."""
        x = torch.cat([self.class_table(labels)[:, None], self.tokens(codes[:, :-1])], 1)
        return self.trunk(self.token_dropout(x), self.rotation()[0 : x.shape[1]])

    def head_features(self, features: Tensor, codes: Tensor) -> Tensor:
        """Normed head outputs (B, N, C, W): at slot c, knowing the position's sub-codes below c."""
        count = self.config.sub_codes
        known = [table(codes[..., slot]) for slot, table in enumerate(list(self.embeddings)[: count - 1])]
        slots = torch.stack([features, *known], 2).flatten(0, 1)
        return self.norm(self.head(slots, self.rotation()[0:count])).unflatten(0, features.shape[:2])

    def logits(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced logits (B, N, C, K) of codes (B, N, C) for classes (B,)."""
        slots = self.head_features(self.features(codes, labels), codes)
        return torch.stack([output(slots[:, :, slot]) for slot, output in enumerate(self.outputs)], 2)

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropies of the sub-codes, "code_1", "code_2", .., each divided by their number: the sum is the mean.

        `batch` as in `Generator.loss`; labels are dropped by `rng`.
        """
        codes = self.batch_tokens(batch)
        labels = self.batch_labels(batch, len(codes))
        if self.training:
            labels = drop_labels(labels, self.config.class_dropout, self.null, rng)
        slots = self.head_features(self.features(codes, labels), codes)
        terms = {}
        for slot, output in enumerate(self.outputs):
            value = F.cross_entropy(output(slots[:, :, slot]).flatten(0, 1), codes[..., slot].flatten())
            terms[f"code_{slot + 1}"] = value / self.config.sub_codes
        return terms

    # -- sampling ------------------------------------------------------------------------------------------------

    def sample(  # type: ignore[override]
        self, conditions: Tensor | None, *, seeds: list[int], sampling: Sampling, known: Known | None
    ) -> Tensor:
        """Codes (B, N, C). Where guided, the second half of a doubled batch runs without the class."""
        items, length, count = len(seeds), self.spec.length, self.config.sub_codes
        start = known_prefix(known, self.name)
        codes = torch.zeros(items, length, count, dtype=torch.long, device=self.device)
        if known is not None:
            codes[:, :start] = known.data[:, :start]
        labels = torch.full((items,), self.null, device=self.device) if conditions is None else conditions
        branches = 2 if sampling.guided and conditions is not None else 1
        if branches == 2:
            labels = torch.cat([labels, torch.full_like(labels, self.null)])
        uniform = uniforms(seeds, (length, count), self.device)
        past, slots = self.trunk.cache(len(labels), length), self.head.cache(len(labels), count)
        rotation = self.rotation()
        x = torch.cat([self.class_table(labels)[:, None], self.tokens(codes[:, :start]).repeat(branches, 1, 1)], 1)
        with packed(self.trunk, self.head, self.outputs):
            for position in range(start, length):
                state = self.trunk(x, rotation[position + 1 - x.shape[1] : position + 1], past=past)[:, -1:]
                for slot, output in enumerate(self.outputs):
                    state = self.head(state, rotation[slot : slot + 1], past=slots)
                    logits = output(self.norm(state[:, 0]))
                    logits = guide(logits, sampling.guidance) if branches == 2 else logits
                    code = draw(logits, uniform[:, position, slot], sampling)
                    codes[:, position, slot] = code
                    state = self.embeddings[slot](code)[:, None].repeat(branches, 1, 1)
                for cache in slots:
                    cache.clear()
                x = self.tokens(codes[:, position : position + 1]).repeat(branches, 1, 1)
        return codes


# -- variants --------------------------------------------------------------------------------------------------------

BASE = FARConfig()
LARGE = FARConfig(GPTSize(1280, 36, 20), head_layers=4)
SMALL = FARConfig(
    GPTSize(64, 2, 4, hidden=176, dropout=0.0),
    head_layers=1,
    codebook_size=64,
    grid=(8, 8),
    factor=4,
    classes=10,
    token_dropout=0.0,
)

VARIANTS = {
    "fqgan-far-dual-b": BASE,
    "fqgan-far-dual-l": LARGE,
    "fqgan-far-triple-b": replace(BASE, sub_codes=3),
    "fqgan-far-triple-l": replace(LARGE, sub_codes=3),
    "fqgan-far-tiny": SMALL,
    "fqgan-far-tiny-triple": replace(SMALL, sub_codes=3),
}


# -- the authors' checkpoints ----------------------------------------------------------------------------------------


def key_table(config: FARConfig) -> KeyTable:
    """Their state dict to ours; they count sub-codes from 1."""
    rules: list[Rule] = [
        Rename("cls_embedding.embedding_table.weight", "class_table.weight"),
        Rename("aggregation_layer.*", "aggregate.*"),
        Rename("norm.weight", "norm.weight"),
    ]
    for slot in range(config.sub_codes):
        rules.append(Rename(f"tok_embeddings_{slot + 1}.weight", f"embeddings.{slot}.weight"))
        rules.append(Rename(f"output_{slot + 1}.weight", f"outputs.{slot}.weight"))
    return KeyTable(*rules, *block_rules("layers", "trunk"), *block_rules("ar_head", "head"))


def recognise(state: Mapping[str, Tensor]) -> FARConfig | None:
    """The config of an authors' state dict, from its names and shapes alone; None if it is no FAR.

    Heads and the grid cannot be seen: heads are the published 64 numbers wide, the grid 16 x 16.
    """
    if "aggregation_layer.weight" not in state or "tok_embeddings_1.weight" not in state:
        return None
    width, joined = state["aggregation_layer.weight"].shape
    hidden = state["layers.0.feed_forward.w1.weight"].shape[0]
    return FARConfig(
        trunk=sized(GPTSize(width, count_blocks(state, "layers"), max(width // 64, 1)), hidden),
        head_layers=count_blocks(state, "ar_head"),
        sub_codes=joined // width,
        codebook_size=state["tok_embeddings_1.weight"].shape[0],
        classes=state["cls_embedding.embedding_table.weight"].shape[0] - 1,
    )


def configure(plain: Mapping[str, Any]) -> FARConfig:
    """Our config from the arguments of the authors' transformer. Raises KeyError where it is none."""
    side = isqrt(plain["block_size"])
    return FARConfig(
        trunk=GPTSize(
            plain["dim"], plain["n_layer"], plain["n_head"], plain.get("ffn_hidden"), eps=plain.get("norm_eps", 1e-5)
        ),
        head_layers=plain["ar_n_layer"],
        sub_codes=len(plain.get("sub_code_order", "12")),
        codebook_size=plain["vocab_size"],
        grid=(side, side),
        classes=plain["num_classes"],
        guidance=plain.get("cfg_scale", 2.0),
    )


SYSTEM = System("fqgan", FAR, FARConfig, VARIANTS, keys=key_table, recognise=recognise, configure=configure)
