"""OmniTokenizer's language model: a GPT over the codes of pictures and clips, in the order of the tokens.

"OmniTokenizer: A Joint Image-Video Tokenizer for Visual Generation" (arXiv:2406.09399, section 3.3)

    ids: 0 is the start, then the classes, then the visual codes
    [class | start | codes ..] (pictures) or [start | class | codes ..] (clips) or [start | codes ..] (frame prediction)
      -> GPT -> logits over all ids, of which the visual ones count -> the next code

Guidance compares with the sequence that begins with the start alone. Frame prediction continues `known` tokens: those
of the first frames.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.errors import ConfigError
from vistok.generator import Generator, Known, fixed_spec, known_prefix
from vistok.generators._mingpt_keys import mingpt_rules
from vistok.keys import Drop, KeyTable
from vistok.layout import Segment
from vistok.nn.mingpt import MinGPT
from vistok.nn.packing import packed
from vistok.registry import System
from vistok.sampling.noise import uniforms
from vistok.sampling.tokens import Sampling, draw, guide
from vistok.tokens import Source

START = 0


@dataclass(frozen=True)
class OmniLMConfig:
    """Sizes of one model.

    width, depth, heads  of the GPT
    codebook_size        visual codes
    grid                 rows and columns of a frame's codes; `factor` pixels each along a side
    frames               frames of the clips it makes, None for pictures; `step` frames share a grid after the first
    classes              of the condition, 0 for none; `class_first` puts the class before the start
    class_dropout        share of sequences that train without their class
    guidance, ramp       of sampling: (1 + t) with - t without the class, t constant or times the number of the step
    positions            learned positions, where they are more than needed
    """

    width: int = 1536
    depth: int = 24
    heads: int = 16
    codebook_size: int = 8192
    grid: tuple[int, int] = (32, 32)
    factor: int = 8
    frames: int | None = None
    step: int = 4
    classes: int = 1000
    class_first: bool = True
    class_dropout: float = 0.1
    dropout: float = 0.0
    guidance: float = 2.5
    ramp: bool = False
    top_k: int = 2048
    top_p: float = 1.0
    positions: int | None = None
    tokenizer: Source | None = None
    version: int = 1

    def __post_init__(self) -> None:
        if self.frames is not None and (self.frames < 1 + self.step or (self.frames - 1) % self.step):
            raise ConfigError(f"frames {self.frames} are not 1 + k * {self.step}")
        if self.grid[0] != self.grid[1]:
            raise ConfigError(f"a grid of {self.grid}; it is square")
        if self.positions is not None and self.positions < self.length:
            raise ConfigError(f"{self.positions} positions for sequences of {self.length}")

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Layout of what is generated: that of the tokenizer."""
        first = Segment("first", (1, *self.grid), (self.codebook_size,))
        if self.frames is None:
            return (first,)
        rest = (self.frames - 1) // self.step
        return (first, replace(first, name="rest", shape=(rest, *self.grid)))

    @property
    def length(self) -> int:
        """Positions that the model reads: condition and start, and all codes but the last."""
        return (2 if self.classes else 1) + sum(prod(segment.shape) for segment in self.segments) - 1

    @property
    def offset(self) -> int:
        """Id of visual code 0."""
        return 1 + self.classes


class OmniLM(Generator):
    """See the module's docstring. `generate(classes, ramp=...)` gives codes (B, N)."""

    system = "omnitokenizer"
    config: OmniLMConfig

    def __init__(self, config: OmniLMConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        vocabulary = config.offset + config.codebook_size
        self.gpt = MinGPT(
            vocabulary, config.positions or config.length, config.width, config.depth, config.heads, config.dropout
        )
        self.classes = config.classes or None
        self.sampling = Sampling(
            guidance=config.guidance if config.classes else 1.0,
            top_k=min(config.top_k, config.codebook_size),
            top_p=config.top_p,
        )
        self.spec = fixed_spec(config.segments, config.grid[0] * config.factor, config.frames)

    def begin(self, labels: Tensor | None, items: int) -> tuple[Tensor, Tensor, Tensor]:
        """What sequences begin with: ids (B, p), their positions (B, p), and whether they are there, bool (B, p).

        A label of -1 is no class: the start then stands at position 0 and the class's place is empty.
        """
        start = torch.full((items, 1), START, device=self.device)
        if labels is None:
            return start, torch.zeros_like(start), torch.ones_like(start, dtype=torch.bool)
        given = (labels >= 0)[:, None]
        label = (labels.clamp_min(0) + 1)[:, None]
        zero, one = torch.zeros_like(start), torch.ones_like(start)
        if self.config.class_first:
            return (
                torch.cat([label, start], 1),
                torch.cat([zero, given.long()], 1),
                torch.cat([given, torch.ones_like(given)], 1),
            )
        return torch.cat([start, label], 1), torch.cat([zero, one], 1), torch.cat([torch.ones_like(given), given], 1)

    def logits(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        """Teacher-forced logits (B, N, V) over all ids, of codes (B, N) for classes (B,), -1 for none."""
        ids, at, there = self.begin(labels, len(codes))
        rest = codes[:, :-1] + self.config.offset
        places = torch.arange(ids.shape[1], ids.shape[1] + rest.shape[1], device=self.device).expand_as(rest)
        whole = torch.cat([there, torch.ones_like(rest, dtype=torch.bool)], 1)
        mask = None if bool(there.all()) else _visible(whole)
        found = self.gpt(torch.cat([ids, rest], 1), at=torch.cat([at, places], 1), mask=mask)
        return found[:, ids.shape[1] - 1 :]

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """ "cross_entropy" of the visual codes, over all ids; `batch` as in `Generator.loss`."""
        codes = self.batch_tokens(batch)
        labels = None
        if self.classes is not None:
            labels = self.batch_labels(batch, len(codes))
            if self.training:
                drop = torch.rand(len(labels), generator=rng, device=rng.device) < self.config.class_dropout
                labels = labels.masked_fill(drop.to(labels.device), -1)
        found = self.logits(codes, labels)
        return {"cross_entropy": F.cross_entropy(found.flatten(0, 1).float(), codes.flatten() + self.config.offset)}

    def sample(  # type: ignore[override]
        self,
        conditions: Tensor | None,
        *,
        seeds: list[int],
        sampling: Sampling,
        known: Known | None,
        ramp: bool | None = None,
        visual: bool = True,
    ) -> Tensor:
        """Codes (B, N). `ramp` (the config's by default): guidance beyond 1 grows with every step, from none.

        Where guided, the second half of a doubled batch begins with the start alone. With `visual` False all ids may be
        drawn, as in the authors' code, and are counted from the first visual one: start and classes are negative.
        """
        items, length, offset = len(seeds), self.spec.length, self.config.offset
        start = known_prefix(known, self.name)
        codes = torch.zeros(items, length, dtype=torch.long, device=self.device)
        if known is not None:
            codes[:, :start] = known.data[:, :start]
        labels = conditions
        if self.classes is not None and labels is None:
            labels = torch.full((items,), -1, device=self.device)
        branches = 2 if sampling.guided and conditions is not None else 1
        if branches == 2:
            labels = torch.cat([conditions, torch.full_like(conditions, -1)])  # type: ignore[list-item, arg-type]
        ids, at, there = self.begin(labels, items * branches)
        first = ids.shape[1]
        ids = torch.cat([ids, codes[:, :start].repeat(branches, 1) + offset], 1)
        at = torch.cat([at, torch.arange(first, first + start, device=self.device).expand(len(at), -1)], 1)
        there = torch.cat([there, there.new_ones(len(there), length)], 1)
        empty = not bool(there.all())
        past = self.gpt.cache(len(ids), first + length)
        uniform = uniforms(seeds, (length,), self.device)
        ramps = self.config.ramp if ramp is None else ramp
        with packed(self.gpt):
            for position in range(start, length):
                end = first + position
                mask = _visible(there[:, :end], ids.shape[1]) if empty else None
                found = self.gpt(ids, at=at, mask=mask, past=past)[:, -1]
                if branches == 2:
                    scale = 1 + (sampling.guidance - 1) * (position if ramps else 1)
                    found = guide(found, scale)
                drawn = draw(found[:, offset:] if visual else found, uniform[:, position], sampling)
                codes[:, position] = drawn if visual else drawn - offset
                ids = (codes[:, position : position + 1] + offset).repeat(branches, 1)
                at = torch.full_like(ids, end)
        return codes


def _visible(there: Tensor, queries: int | None = None) -> Tensor:
    """Mask (B, 1, q, n) for the last q of n positions: causal, without those that are not there but for themselves."""
    length = there.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=there.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=there.device)
    mask = causal & (there[:, None] | itself)
    return mask[:, None, length - (queries or length) :]


# -- variants --------------------------------------------------------------------------------------------------------

_TINY = OmniLMConfig(32, 2, 2, codebook_size=64, grid=(4, 4), classes=10, step=2, top_k=32)

VARIANTS = {
    "omnitokenizer-lm-imagenet": OmniLMConfig(),
    "omnitokenizer-lm-ucf": OmniLMConfig(
        frames=17, classes=101, class_first=False, guidance=1.5, top_k=4096, top_p=0.9
    ),
    "omnitokenizer-lm-k600": OmniLMConfig(frames=17, classes=0, top_p=0.9),
    "omnitokenizer-lm-tiny": _TINY,
    "omnitokenizer-lm-tiny-clips": replace(_TINY, frames=5, class_first=False),
    "omnitokenizer-lm-tiny-frames": replace(_TINY, frames=5, classes=0),
}


# -- published checkpoints -------------------------------------------------------------------------------------------


def key_table(config: OmniLMConfig) -> KeyTable:
    """The authors' keys to ours. Their files hold the whole tokenizer again, which is left out."""
    rules = mingpt_rules("transformer.", "gpt.", config.positions or config.length)
    return KeyTable(Drop("first_stage_model.*"), Drop("cond_stage_model.*"), *rules)


def recognise(state: Mapping[str, Tensor]) -> OmniLMConfig | None:
    """The config of one of the published models, by its vocabulary and positions; None if it is none of them."""
    if "transformer.tok_emb.weight" not in state or "transformer.pos_emb" not in state:
        return None
    rows, positions = len(state["transformer.tok_emb.weight"]), state["transformer.pos_emb"].shape[1]
    for name, config in VARIANTS.items():
        if "tiny" not in name and rows == config.offset + config.codebook_size and positions >= config.length:
            return config if positions == config.length else replace(config, positions=positions)
    return None


SYSTEM = System("omnitokenizer", OmniLM, OmniLMConfig, VARIANTS, keys=key_table, recognise=recognise)
