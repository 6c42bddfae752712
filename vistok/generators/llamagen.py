"""LlamaGen: a Llama over the codes of a picture in raster order, the plain baseline of autoregressive generation.

"Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (arXiv:2406.06525)

What is new: nothing but scale. A language model as it is, with rotary positions in two dimensions, after one embedding
of a class or 120 projected features of a text.

    class (B,) -> table -> (B, 1, W)     or     T5 features (B, 120, 2048) -> MLP -> (B, 120, W)
    [condition | code_0 .. code_(M-2)] (B, T + M - 1, W) -> GPT -> norm -> logits (B, M, V): position i predicts code i

    generation: keys and values of all positions are kept; each step reads one code; guidance mixes the logits of a
    doubled batch, without the condition in its second half

The codes may be those of any discrete layout: several codebooks or segments share one vocabulary (`vistok.vocabulary`),
and each place draws from its own range of it. A published model has one grid and one codebook.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError, InputError
from vistok.generator import Generator, Known, drop_labels, fixed_spec, known_prefix
from vistok.generators import _llama
from vistok.generators._llamagen_keys import block_rules, count_blocks, size_of_args, sized
from vistok.keys import Drop, KeyTable, Rename
from vistok.layout import Segment
from vistok.nn.gpt import GPT, GPTSize, initialise, prefixed_rotation
from vistok.nn.packing import packed
from vistok.nn.positions import Rotation, rotation_1d
from vistok.nn.t5_text import T5Features, as_features
from vistok.nn.transformer import MLP
from vistok.registry import System
from vistok.sampling.noise import uniforms
from vistok.sampling.tokens import Sampling, draw, guide
from vistok.tokens import Source
from vistok.vocabulary import Vocabulary

Condition = Tensor | T5Features


@dataclass(frozen=True)
class LlamaGenConfig:
    """Sizes of one model.

    trunk            the GPT
    segments         what it generates: the layout of a tokenizer
    size             of the pictures that the tokens decode to, in pixels
    classes          classes of the condition, or None
    text             (T, width) of text features that are the condition instead, or None
    positions        "2d": a rotation by row and column, none of the condition; "1d": Llama's, the condition counts too
    base             of the rotation's frequencies
    class_dropout    share of conditions that training replaces by none; a model with 0 of classes cannot be guided
    token_dropout    of the trunk's input
    guidance, top_k  of generation, as published
    tokenizer        whose tokens these are, as far as it is known
    """

    trunk: GPTSize = field(default_factory=GPTSize)
    segments: tuple[Segment, ...] = (Segment("grid", (16, 16), (16384,)),)
    size: int = 256
    classes: int | None = 1000
    text: tuple[int, int] | None = None
    positions: Literal["2d", "1d"] = "2d"
    base: float = 10_000.0
    class_dropout: float = 0.1
    token_dropout: float = 0.1
    guidance: float = 2.0
    top_k: int = 0
    tokenizer: Source | None = None
    version: int = 1

    def __post_init__(self) -> None:
        if (self.classes is None) == (self.text is None):
            raise ConfigError(
                "LlamaGen is conditioned either on classes or on text: set one of them, and the other None"
            )
        if self.positions not in ("2d", "1d"):
            raise ConfigError(f"positions {self.positions!r}; expected '2d' or '1d'")
        shapes = [(len(segment.shape), len(segment.codebooks)) for segment in self.segments]
        if self.positions == "2d" and shapes != [(2, 1)]:
            raise ConfigError("2D positions need one grid with one code a position; set positions='1d'")

    @property
    def prefix(self) -> int:
        """T, positions of the condition."""
        return 1 if self.text is None else self.text[0]


class LlamaGen(Generator):
    """See the module's docstring. `generate(classes)` or `generate(texts)` gives codes (B, N[, C])."""

    system = "llamagen"
    config: LlamaGenConfig

    def __init__(self, config: LlamaGenConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        width = config.trunk.width
        self.vocabulary = Vocabulary(config.segments)
        self.table = nn.Embedding(self.vocabulary.size, width)
        if config.classes is not None:
            self.class_table = nn.Embedding(config.classes + (config.class_dropout > 0), width)
        if config.text is not None:
            self.text_project = MLP(config.text[1], width, out=width, activation="gelu-tanh", bias=False)
            self.register_buffer("null_text", torch.randn(config.text) / config.text[1] ** 0.5)
        self.token_dropout = nn.Dropout(config.token_dropout)
        self.trunk = GPT(config.trunk)
        self.norm = nn.RMSNorm(width, eps=config.trunk.eps)
        self.output = nn.Linear(width, self.vocabulary.size, bias=False)
        initialise(self)
        nn.init.zeros_(self.output.weight)
        self.classes = config.classes
        self.sampling = Sampling(guidance=config.guidance, top_k=config.top_k)
        self.spec = fixed_spec(config.segments, config.size)

    # -- conditions ----------------------------------------------------------------------------------------------

    def conditions(self, condition: Any, items: int) -> Any:
        """Class numbers (B,), or `T5Features` of strings, of features (B, T, width) or of `T5Features`; None for none.

        Raises InputError for what the model does not know.
        """
        if self.config.text is None:
            return super().conditions(condition, items)
        if condition is None:
            return None
        told = as_features(condition, self._text_encoder.held, self.name, self.config.text)
        return told.to(self.device, self.dtype).expand(items)

    @property
    def null(self) -> int:
        """The class that stands for none. Raises InputError where the model was trained without one."""
        if self.config.class_dropout == 0 or self.classes is None:
            raise InputError(f"{self.name} was trained with a class always (class_dropout 0): guidance=1 and a class")
        return self.classes

    def no_condition(self, items: int) -> Condition:
        """What stands for no condition."""
        if self.config.text is None:
            return torch.full((items,), self.null, device=self.device)
        features = self.null_text.expand(items, -1, -1)  # type: ignore[operator]
        return T5Features(features, torch.ones(features.shape[:2], dtype=torch.bool, device=self.device))

    def embed_condition(self, condition: Condition) -> Tensor:
        """The condition as the trunk reads it, (B, T, W)."""
        if isinstance(condition, T5Features):
            return self.text_project(condition.features)
        return self.class_table(condition)[:, None]

    # -- the network ---------------------------------------------------------------------------------------------

    def rotation(self) -> Rotation:
        """Rotation of the condition and of all places."""
        return self.rotation_of(self.config, self.device)

    @staticmethod
    def rotation_of(config: LlamaGenConfig, device: torch.device | None = None) -> Rotation:
        """The rotation of a model of this config."""
        head = config.trunk.head
        if config.positions == "1d":
            places = sum(segment.count * len(segment.codebooks) for segment in config.segments)
            return rotation_1d(config.prefix + places, head, base=config.base, device=device)
        rows, columns = config.segments[0].shape
        return prefixed_rotation(config.prefix, rows, columns, head, base=config.base, device=device)

    def visible(self, condition: Condition, length: int) -> Tensor | None:
        """Who sees whom among `length` positions, bool (B, 1, n, n); None where that is all before, and itself.

        Positions of the condition that are not there are seen by none but themselves.
        """
        if not isinstance(condition, T5Features):
            return None
        present = F.pad(condition.present, (0, length - condition.present.shape[1]), value=True)
        causal = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        own = torch.eye(length, dtype=torch.bool, device=self.device)
        return ((causal & present[:, None]) | own)[:, None]

    def features(self, ids: Tensor, condition: Condition) -> Tensor:
        """Normed trunk outputs (B, T + n, W) of the condition and ids (B, n)."""
        x = torch.cat([self.embed_condition(condition), self.table(ids)], 1)
        length = x.shape[1]
        x = self.trunk(self.token_dropout(x), self.rotation()[0:length], mask=self.visible(condition, length))
        return self.norm(x)

    def logits(self, codes: Tensor, condition: Condition) -> Tensor:
        """Teacher-forced logits (B, M, V) of codes (B, N[, C]), over the whole vocabulary."""
        ids = self.vocabulary.ids(codes)
        return self.output(self.features(ids[:, :-1], condition)[:, self.config.prefix - 1 :])

    # -- as a Llama of transformers ------------------------------------------------------------------------------

    def to_llama(self, *, custom_positions: bool = False) -> Any:
        """A `transformers.LlamaForCausalLM` with the same logits; see `vistok.generators._llama`.

        `custom_positions` allows one whose rotary embedding is ours, where positions are 2D. Raises ConfigError where
        there is no such Llama, MissingExtraError without transformers.
        """
        return _llama.to_llama(self, custom_positions)

    def save_llama(self, folder: str | Path, *, custom_positions: bool = False) -> None:
        """Write `to_llama` as a folder that transformers loads. Raises OutputError where it exists."""
        _llama.save_llama(self, folder, custom_positions)

    @classmethod
    def from_llama(cls, source: Any, config: LlamaGenConfig | None = None) -> "LlamaGen":
        """A LlamaGen from a `LlamaForCausalLM` or a folder of one; of a foreign one, `config` says what its ids are."""
        return _llama.from_llama(cls, source, config)

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """ "cross_entropy" over all places, among the ids that each may have. `batch` as in `Generator.loss`.

        With text, batch["text"] holds strings, `T5Features`, or features (B, T, width) with batch["text_mask"] (B, T);
        batch["valid"] (B,) may say which items count. Conditions are dropped by `rng`.
        """
        codes = self.batch_tokens(batch)
        ids = self.vocabulary.ids(codes)
        condition = self._batch_condition(batch, len(codes))
        if self.training:
            condition = self._drop(condition, rng)
        logits = self.output(self.features(ids[:, :-1], condition)[:, self.config.prefix - 1 :])
        if not self.vocabulary.uniform:
            logits = logits.masked_fill(~self.vocabulary.mask(device=logits.device), -torch.inf)
        if batch.get("valid") is None:
            return {"cross_entropy": F.cross_entropy(logits.flatten(0, 1), ids.flatten())}
        each = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean(1)
        valid = torch.as_tensor(batch["valid"], device=self.device).to(each)
        return {"cross_entropy": (each * valid).sum() / valid.sum().clamp_min(1)}

    def _batch_condition(self, batch: dict[str, Any], items: int) -> Condition:
        if self.config.text is None:
            return self.batch_labels(batch, items)
        text = batch.get("text")
        if text is None:
            raise InputError(f"{self.name} learns with text: batch['text'] holds strings or T5 features")
        if isinstance(text, Tensor):
            text = T5Features(text, batch.get("text_mask"))
        return self.conditions(text, items)

    def _drop(self, condition: Condition, rng: torch.Generator) -> Condition:
        share = self.config.class_dropout
        if not isinstance(condition, T5Features):
            return condition if share == 0 else drop_labels(condition, share, self.null, rng)
        dropped = drop_labels(torch.zeros(len(condition), dtype=torch.long), share, 1, rng).bool()
        return self.without_text(condition, dropped)

    def without_text(self, condition: T5Features, dropped: Tensor) -> T5Features:
        """The condition with the features of some items, bool (B,), replaced by those of none; masks stay."""
        features = torch.where(dropped.to(self.device)[:, None, None], self.null_text, condition.features)  # type: ignore[arg-type]
        return T5Features(features, condition.mask)

    # -- sampling ------------------------------------------------------------------------------------------------

    def sample(  # type: ignore[override]
        self,
        conditions: Any,
        *,
        seeds: list[int],
        sampling: Sampling,
        known: Known | None,
        cfg_interval: int = -1,
        pack: bool = True,
    ) -> Tensor:
        """Codes (B, N[, C]).

        cfg_interval  -1 guides every code; c >= 0 guides the first c + 2, as the authors count, and from then on the
                      half of the batch without a condition is left out
        pack          lay the weights out for few rows first, on a CPU: a second copy of them, for a faster loop
        """
        if cfg_interval < -1:
            raise InputError(f"cfg_interval={cfg_interval}; expected -1 for all codes, or a step of at least 0")
        items, start = len(seeds), known_prefix(known, self.name)
        start = self.vocabulary.places(start)
        ids = torch.zeros(items, self.vocabulary.length, dtype=torch.long, device=self.device)
        if known is not None and start:
            ids[:, :start] = self.vocabulary.ids(known.data[:, : int(known.present[0].sum())])
        condition = self.no_condition(items) if conditions is None else conditions
        guided = sampling.guided and conditions is not None
        with packed(self.trunk, self.output) if pack else nullcontext():
            self._write(ids, start, condition, guided, cfg_interval, sampling, seeds)
        return self.vocabulary.codes(ids)

    def _write(
        self,
        ids: Tensor,
        start: int,
        condition: Condition,
        guided: bool,
        cfg_interval: int,
        sampling: Sampling,
        seeds: list[int],
    ) -> None:
        """Fill in ids (B, M) from place `start` on."""
        items, length = ids.shape
        ranges, uniform = self.vocabulary.ranges(), uniforms(seeds, (length,), self.device)
        x = torch.cat([self.embed_condition(condition), self.table(ids[:, :start])], 1)
        seen = self.visible(condition, self.config.prefix + length)
        if guided:
            null = torch.cat([self.embed_condition(self.no_condition(items)), x[:, self.config.prefix :]], 1)
            x, seen = torch.cat([x, null]), None if seen is None else torch.cat([seen, seen])
        past, rotation = self.trunk.cache(len(x), self.config.prefix + length), self.rotation()
        for place in range(start, length):
            if guided and cfg_interval >= 0 and place >= cfg_interval + 2:
                guided, x, seen = False, x[:items], None if seen is None else seen[:items]
                for cache in past:
                    cache.keep(items)
            end = self.config.prefix + place
            rows = slice(end - x.shape[1], end)
            mask = None if seen is None else seen[:, :, rows, :end]
            state = self.norm(self.trunk(x, rotation[rows], past=past, mask=mask)[:, -1])
            if guided:  # the output is linear: mixing before it saves half of it
                state = guide(state.float(), sampling.guidance).to(state.dtype)
            low, high = ranges[place]
            code = low + draw(self.output(state)[:, low:high], uniform[:, place], sampling)
            ids[:, place] = code
            x = self.table(code)[:, None]
            x = torch.cat([x, x]) if guided else x


# -- variants --------------------------------------------------------------------------------------------------------

GRID_24 = (Segment("grid", (24, 24), (16384,)),)
GRID_32 = (Segment("grid", (32, 32), (16384,)),)
BASE, LARGE, XL = GPTSize(768, 12, 12), GPTSize(1024, 24, 16), GPTSize(1280, 36, 20)
TEXT = LlamaGenConfig(XL, classes=None, text=(120, 2048), guidance=7.5, top_k=1000)
TINY = LlamaGenConfig(
    GPTSize(64, 2, 4, hidden=176, dropout=0.0),
    (Segment("grid", (8, 8), (64,)),),
    size=32,
    classes=10,
    token_dropout=0.0,
)
PUBLISHED = {
    "llamagen-b": LlamaGenConfig(BASE),
    "llamagen-l": LlamaGenConfig(LARGE),
    "llamagen-b-384": LlamaGenConfig(BASE, GRID_24, 384),
    "llamagen-l-384": LlamaGenConfig(LARGE, GRID_24, 384),
    "llamagen-xl-384": LlamaGenConfig(XL, GRID_24, 384, guidance=1.75),
    "llamagen-xxl-384": LlamaGenConfig(GPTSize(1536, 48, 24), GRID_24, 384, guidance=1.75),
    "llamagen-3b-384": LlamaGenConfig(GPTSize(3200, 24, 32), GRID_24, 384, guidance=1.65),
    "llamagen-t2i-xl": TEXT,
    "llamagen-t2i-xl-512": replace(TEXT, segments=GRID_32, size=512),
}
VARIANTS = PUBLISHED | {
    "llamagen-cifar10": replace(
        TINY, trunk=GPTSize(128, 6, 2, hidden=352, dropout=0.0), segments=(Segment("grid", (8, 8), (512,)),)
    ),
    "llamagen-tiny": TINY,
    "llamagen-tiny-1d": replace(TINY, positions="1d", trunk=replace(TINY.trunk, kv_heads=2)),
    "llamagen-tiny-t2i": replace(TINY, classes=None, text=(6, 20), guidance=3.0, top_k=32),
}


# -- the authors' checkpoints ----------------------------------------------------------------------------------------


def key_table(config: LlamaGenConfig) -> KeyTable:
    """Their state dict to ours; tables of the rotation, which older files hold, are dropped."""
    return KeyTable(
        Rename("cls_embedding.embedding_table.weight", "class_table.weight"),
        Rename("cls_embedding.cap_proj.fc1.weight", "text_project.expand.weight"),
        Rename("cls_embedding.cap_proj.fc2.weight", "text_project.contract.weight"),
        Rename("cls_embedding.uncond_embedding", "null_text"),
        Rename("tok_embeddings.weight", "table.weight"),
        Rename("norm.weight", "norm.weight"),
        Rename("output.weight", "output.weight"),
        Drop("freqs_cis"),
        *block_rules("layers", "trunk"),
    )


def recognise(state: Mapping[str, Tensor]) -> LlamaGenConfig | None:
    """The config of an authors' state dict, from its names and shapes alone; None if it is no LlamaGen.

    Heads and the grid cannot be seen: they are those of the published model of this size (the smaller grid of two),
    else heads of 64 numbers and 16 x 16. Files with a table of the rotation (`freqs_cis`) tell both.
    """
    if "tok_embeddings.weight" not in state or "output.weight" not in state or "layers.0.ffn_norm.weight" not in state:
        return None
    if not any(key.startswith("cls_embedding.") for key in state):
        return None
    codes, width = state["tok_embeddings.weight"].shape
    depth, hidden = count_blocks(state, "layers"), state["layers.0.feed_forward.w1.weight"].shape[0]
    text = state.get("cls_embedding.uncond_embedding")
    fits = [
        config
        for config in PUBLISHED.values()
        if (config.trunk.width, config.trunk.depth, config.text is None) == (width, depth, text is None)
    ]
    found = fits[0] if fits else replace(TEXT if text is not None else LlamaGenConfig(), trunk=GPTSize(width, depth, 1))
    heads = found.trunk.heads if fits else max(width // 64, 1)
    side = found.segments[0].shape[0]
    prefix = 1 if text is None else text.shape[0]
    if "freqs_cis" in state:
        positions, pairs = state["freqs_cis"].shape[:2]
        heads, side = width // (2 * pairs), isqrt(positions - prefix)
    grown = state["layers.0.attention.wqkv.weight"].shape[0] - width
    kv_heads = grown * heads // (2 * width)
    trunk = GPTSize(width, depth, heads, kv_heads=None if kv_heads == heads else kv_heads)
    return replace(
        found,
        trunk=sized(trunk, hidden),
        segments=(Segment("grid", (side, side), (codes,)),),
        size=16 * side,
        classes=None if text is not None else state["cls_embedding.embedding_table.weight"].shape[0] - 1,
        text=None if text is None else (text.shape[0], text.shape[1]),
    )


def configure(plain: Mapping[str, Any]) -> LlamaGenConfig:
    """Our config from the authors' `ModelArgs`. Raises KeyError where they are none."""
    plain = plain.get("official_model_args", plain)
    side, text = isqrt(plain["block_size"]), plain.get("model_type", "c2i") == "t2i"
    default = TEXT if text else LlamaGenConfig()
    return replace(
        default,
        trunk=size_of_args(plain),
        segments=(Segment("grid", (side, side), (plain["vocab_size"],)),),
        size=side * 16,
        classes=None if text else plain["num_classes"],
        text=(plain.get("cls_token_num", 120), plain.get("caption_dim", 2048)) if text else None,
        base=float(plain.get("rope_base", 10_000)),
        class_dropout=plain.get("class_dropout_prob", 0.1),
        token_dropout=plain.get("token_dropout_p", 0.1),
    )


SYSTEM = System(
    "llamagen", LlamaGen, LlamaGenConfig, VARIANTS, keys=key_table, recognise=recognise, configure=configure
)
