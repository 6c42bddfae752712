"""ToMe: merges similar tokens in every block of a ViT, without training.

Token Merging: Your ViT But Faster, arXiv:2210.09461 (ICLR 2023). The authors' code is facebookresearch/ToMe.

    x (B, N, W) -- attention, keys k (B, heads, N, head) --> x
      metric = mean over heads of k --> A: tokens 0, 2, 4 ...   B: tokens 1, 3, 5 ...
      every token of A finds its nearest (cosine) in B; the r of A that are nearest are merged into theirs:
      average weighted by how many patches a token stands for --> x (B, N - r, W) -- MLP --> next block

    next block: softmax(q k^T / sqrt(head) + log s_j): a token that stands for s patches counts s times as a key

Class and distillation tokens are never merged away. Nothing is learned, so a model's weights serve as they are; weights
that were trained with merging load the same way. `restore` gives every patch its group's token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.errors import ConfigError, InputError
from vistok.keys import KeyTable, State
from vistok.nn.classifier import Classifier, ClassifierConfig, classifier_keys, recognise_classifier
from vistok.reducer import Context, Reducer, Reduction, by_layer, check_count, flat, take
from vistok.reducers._tome_matching import EPS, nearest, others_than, screened, screens, similarity
from vistok.registry import System
from vistok.sites import Run, through

Mode = Literal["sum", "mean", "amax"]


@dataclass(frozen=True)
class ToMeConfig:
    """Settings.

    r             tokens merged in each block; a list gives one number a block and 0 after its end
    inflect       -1: r falls linearly from twice to 0 over the blocks, +1: it rises so; 0: constant
    partition     "alternating": every second token is a source; "random": r random sources; "kth": the last of every
                  `k` tokens is a destination and all others are merged, so N become N // k
    proportional  whether a token counts as often as it stands for patches; off for MAE weights that never saw merging
    metric        what is compared: the attention's keys, or the tokens themselves
    weighted_mean whether a network that classifies the mean of its tokens takes the mean over patches. The authors'
                  code does for MAE, and not for timm's models
    network       a ViT classifier to bring along, as published; None: the reducer alone
    """

    r: int | tuple[int, ...] = 8
    inflect: float = 0.0
    partition: Literal["alternating", "random", "kth"] = "alternating"
    k: int = 2
    proportional: bool = True
    metric: Literal["keys", "tokens"] = "keys"
    weighted_mean: bool = True
    network: ClassifierConfig | None = None
    drop_path: float = 0.0
    version: int = 1

    def __post_init__(self) -> None:
        if min((self.r,) if isinstance(self.r, int) else self.r, default=0) < 0:
            raise ConfigError(f"r {self.r}; a number of tokens to merge is at least 0")
        if not isinstance(self.r, int) and self.inflect:
            raise ConfigError("inflect bends a single r over the blocks; a list says every block's r itself")
        if not -1 <= self.inflect <= 1:
            raise ConfigError(f"inflect {self.inflect}; expected -1 (falling) to 1 (rising)")
        if self.k < 2:
            raise ConfigError(f"k {self.k}; a destination for every k tokens needs k of at least 2")


@dataclass(frozen=True, kw_only=True)
class Merged(Reduction):
    """`index` (B, M): the token that each output began as; `source` (B, r): those merged away, `into` (B, r): where."""

    source: Tensor
    into: Tensor

    @property
    def slot(self) -> Tensor:
        """(B, N): the output that each of the N tokens went into."""
        slots = self.index.new_empty(len(self.index), self.length)
        slots.scatter_(1, self.index, torch.arange(self.count, device=self.index.device).expand_as(self.index))
        return slots.scatter_(1, self.source, self.into)


def match(metric: Tensor, r: int, *, protected: int = 0) -> Merged:
    """Bipartite soft matching: which r of the tokens, by `metric` (B, N, C), are merged into which others.

    Even positions are sources, odd ones destinations; the first `protected` tokens are neither. r is at most half of
    what is not protected. Outputs stand in the authors' order: protected tokens, sources that are left (by position;
    without protected tokens by falling similarity), destinations.
    """
    batch, length = metric.shape[:2]
    r = min(r, (length - protected) // 2)
    with torch.no_grad():
        norms = torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp_min_(EPS)
        found = screened(metric, norms, r, protected) if protected and screens(metric, r) else None
        if found is not None:
            chosen, into = found
            left = others_than(chosen, (length + 1) // 2)
        else:
            unit = metric / norms
            sources, others = unit[:, ::2], unit[:, 1::2][:, protected // 2 :]
            best = similarity(sources, others, protected)
            if protected:
                chosen = best.topk(r, dim=-1).indices
                left = others_than(chosen, best.shape[1])
            else:
                chosen, left = best.argsort(dim=-1, descending=True).tensor_split([r], -1)
            into = nearest(take(sources, chosen), others)[1]
        into = into + protected // 2
    places = torch.arange(length, device=metric.device).expand(batch, -1)
    behind = places[:, 1::2][:, protected // 2 :]
    index = torch.cat([places[:, :protected], 2 * left[:, (protected + 1) // 2 :], behind], 1)
    return Merged(length, index, source=2 * chosen, into=into + length - r - length // 2)


def match_random(metric: Tensor, r: int, *, protected: int = 0, rng: torch.Generator | None = None) -> Merged:
    """As `match` with r random sources: every token that is neither drawn nor protected is a destination."""
    batch, length = metric.shape[:2]
    r = min(r, (length - protected) // 2)
    with torch.no_grad():
        draws = torch.rand(batch, length - protected, generator=rng, device=metric.device)
        order = draws.argsort(dim=-1) + protected
        source, rest = order[:, :r].sort(dim=-1)[0], order[:, r:].sort(dim=-1)[0]
        unit = F.normalize(metric, dim=-1)
        into = nearest(take(unit, source), take(unit, rest))[1]
    first = torch.arange(protected, device=metric.device).expand(batch, -1)
    return Merged(length, torch.cat([first, rest], 1), source=source, into=into + protected)


def match_kth(metric: Tensor, k: int) -> Merged:
    """The last of every k tokens is a destination, all others go into their nearest: N to N // k, order kept.

    Tokens beyond the last whole run of k are dropped, as in the authors' code: `index` and `source` leave them out.
    """
    batch, length = metric.shape[:2]
    check_count(length // k, length, "tome")
    whole = (length // k) * k
    positions = torch.arange(whole, device=metric.device).view(-1, k)
    source, rest = positions[:, :-1].flatten().expand(batch, -1), positions[:, -1].expand(batch, -1)
    with torch.no_grad():
        unit = F.normalize(metric, dim=-1)
        into = nearest(take(unit, source), take(unit, rest))[1]
    return Merged(whole, rest, source=source, into=into)


def merge(tokens: Tensor, state: Merged, mode: Mode = "mean") -> Tensor:
    """Merge (B, N, D) to (B, M, D): the sum, mean or largest value of every group, without regard to sizes."""
    kept = take(tokens, state.index)
    rows, moved = flat(state.into, state.count), take(tokens, state.source).flatten(0, 1)
    if mode == "amax":
        where = rows[:, None].expand_as(moved)
        return kept.flatten(0, 1).scatter_reduce(0, where, moved, "amax").view_as(kept)
    total = kept.flatten(0, 1).index_add(0, rows, moved).view_as(kept)
    if mode == "sum":
        return total
    if mode != "mean":
        raise InputError(f"mode {mode!r}; expected 'sum', 'mean' or 'amax'")
    return total / count(state, None, tokens.dtype)[..., None]


def merge_weighted(tokens: Tensor, state: Merged, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge (B, N, D) to (B, M, D), every token with its weight of `sizes` (B, N), 1 unless given; and the new sizes.

    A token moves towards each that is merged into it by that one's share of the group, so that all others are copied
    once and not touched again.
    """
    new = count(state, sizes, tokens.dtype if sizes is None else sizes.dtype)
    share = (1 / new).gather(1, state.into)
    if sizes is not None:
        share = share * sizes.gather(1, state.source)
    target = take(tokens, state.index.gather(1, state.into))
    moved = (take(tokens, state.source) - target) * share[..., None].to(tokens.dtype)
    kept = take(tokens, state.index).flatten(0, 1)
    kept.index_add_(0, flat(state.into, state.count), moved.flatten(0, 1))
    return kept.view(len(tokens), state.count, -1), new


def count(state: Merged, sizes: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sum of `sizes` (B, N), or the number of tokens, in every group: (B, M)."""
    batch, rows = len(state.index), flat(state.into, state.count)
    if sizes is None:
        kept = torch.ones(batch * state.count, dtype=dtype, device=state.index.device)
        moved = torch.ones(rows.numel(), dtype=dtype, device=state.index.device)
    else:
        kept, moved = (sizes.gather(1, index).flatten().to(dtype) for index in (state.index, state.source))
    return kept.index_add(0, rows, moved).view(batch, -1)


def unmerge(tokens: Tensor, state: Merged) -> Tensor:
    """(B, M, D) back to (B, N, D): every token has its group's."""
    return take(tokens, state.slot)


class ToMe(Reducer):
    """See the module's docstring. `forward` and `loss` are for variants with a network."""

    system = "tome"
    places = ("block", "prompt")

    def __init__(self, config: ToMeConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.network: Classifier | None
        self.biased = config.proportional
        if config.network is not None:
            self.network = Classifier(config.network, drop_path=config.drop_path)

    def plan(self, tokens: int, layers: int = 1, *, protected: int = 0) -> tuple[int, ...]:
        """Tokens after each of `layers` blocks. Raises InputError where none would be left."""
        check_count(tokens - protected, tokens, self.name)
        if self.config.partition == "kth":
            left = [tokens]
            for _ in range(layers):
                left.append(protected + check_count((left[-1] - protected) // self.config.k, tokens, self.name))
            return tuple(left[1:])
        planned = []
        for r in by_layer(self.config.r, layers, self.config.inflect):
            tokens -= max(min(r, (tokens - protected) // 2), 0)
            planned.append(tokens)
        return tuple(planned)

    def reduced(self, tokens: Tensor, context: Context) -> tuple[Tensor, Merged]:
        """Merge once, by the r of `context.layer`; sizes are those of the context, 1 each unless given."""
        if context.keep is not None and not bool(context.keep.all()):
            raise InputError(f"{self.name} merges items of one length; give it batches without padding")
        config = self.config
        by_keys = config.metric == "keys" and context.metric is not None
        metric = context.metric if by_keys and context.metric is not None else tokens
        r = by_layer(config.r, context.layers, config.inflect)[context.layer]
        if config.partition == "kth":
            state = _behind(match_kth(metric[:, context.protected :], config.k), context.protected)
        elif config.partition == "random":
            rng = torch.Generator(tokens.device).manual_seed(context.layer)
            state = match_random(metric, r, protected=context.protected, rng=rng)
        else:
            state = match(metric, r, protected=context.protected)
        merged, sizes = merge_weighted(tokens, state, context.sizes)
        return merged, replace(state, sizes=sizes)

    def restore(self, tokens: Tensor, state: Reduction) -> Tensor:
        """(B, M, D) to (B, N, D): every patch has the token that it was merged into."""
        assert isinstance(state, Merged)
        return unmerge(tokens, state)

    # -- with a network ------------------------------------------------------------------------------------------

    def run(self, pixels: Tensor) -> tuple[Tensor, Run]:
        """Logits (B, classes) of pixels in [0, 1], and what became of the tokens.

        Raises InputError for a variant without a network, or pictures of another size.
        """
        net = self.network
        if net is None:
            raise InputError(
                f"{self.name} is a reducer alone: vistok.reduce(model, {self.name!r}) puts it into a model"
            )
        run = Run(self, len(net.blocks), protected=net.config.prefix)
        tokens = through(net.blocks, net.embed(net.normed(pixels)), run)
        return net.classify(tokens, run.sizes if self.config.weighted_mean else None), run

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] to logits (B, classes)."""
        return self.run(pixels)[0]

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy on batch["pixels"] and batch["label"]; gradients flow through the averages.

        Raises InputError where labels are missing or out of range.
        """
        labels = batch.get("label")
        classes = self.network.config.classes if self.network is not None else 0
        if labels is None or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise InputError(f"{self.name} learns with labels from 0 to {classes - 1} (batch['label'])")
        return {"cross_entropy": F.cross_entropy(self(batch["pixels"]), labels)}


# -- inside ----------------------------------------------------------------------------------------------------------


def _behind(state: Merged, protected: int) -> Merged:
    """The same for items with `protected` tokens before them."""
    first = torch.arange(protected, device=state.index.device).expand(len(state.index), -1)
    index = torch.cat([first, state.index + protected], 1)
    return Merged(state.length + protected, index, source=state.source + protected, into=state.into + protected)


# -- the authors' checkpoints ----------------------------------------------------------------------------------------


def key_table(config: ToMeConfig) -> KeyTable:
    """timm's names to ours. Raises ConfigError for the reducer alone, which has no weights."""
    if config.network is None:
        raise ConfigError("ToMe has no weights of its own; a variant with a network has its network's")
    return classifier_keys(config.network, "network.")


def recognise(state: State) -> ToMeConfig | None:
    """The config of a ViT classifier in timm's names, r as published for its size; None where it is none."""
    network = recognise_classifier(state)
    if network is None:
        return None
    known = {192: 13, 384: 13, 768: 16, 1024: 8, 1280: 7}
    return ToMeConfig(r=known.get(network.width, 8), network=network)


def configure(plain: Mapping[str, Any]) -> ToMeConfig:
    """Our config from the sizes of a timm ViT and the authors' settings of the merging (r, prop_attn)."""
    size, patch = plain["img_size"], plain["patch_size"]
    activations: dict[str, Any] = {"gelu (erf)": "gelu", "gelu": "gelu", "gelu (tanh)": "gelu-tanh"}
    classes, with_class = plain["num_classes"], plain.get("class_token", True)
    after = plain.get("fc_norm", plain.get("global_pool") in ("avg", True) or not with_class)
    r = plain.get("r", 0)
    network = ClassifierConfig(
        image=(size, size) if isinstance(size, int) else tuple(size),
        patch=patch if isinstance(patch, int) else patch[0],
        width=plain["embed_dim"],
        depth=plain["depth"],
        heads=plain["num_heads"],
        classes=classes,
        channels=plain.get("in_chans", 3),
        mlp=float(plain.get("mlp_ratio", 4)),
        class_token=with_class,
        distill_token=plain.get("distill_token", False),
        pool="mean" if after else "class",
        norm_first=not after,
        activation=activations[plain.get("act", "gelu")],
        qkv_bias=plain.get("qkv_bias", True),
        eps=plain.get("norm_eps", 1e-6),
        mean=(0.0,) * plain.get("in_chans", 3),
        std=(1.0,) * plain.get("in_chans", 3),
    )
    return ToMeConfig(
        r=r if isinstance(r, int) else tuple(r),
        inflect=plain.get("inflect", 0.0),
        proportional=plain.get("prop_attn", True),
        weighted_mean="mae" in str(plain.get("official", {}).get("patch", "")),
        network=network,
    )


DEIT_TINY = ClassifierConfig(width=192, heads=3)
DEIT_SMALL = ClassifierConfig(width=384, heads=6)
MAE = ClassifierConfig(width=768, heads=12, pool="mean", norm_first=False)
SMALL = ClassifierConfig(
    image=(32, 32), patch=4, width=48, depth=4, heads=3, classes=10, pool="mean", class_token=False, stem="cnn"
)

VARIANTS = {
    "tome": ToMeConfig(),
    "tome-deit-tiny": ToMeConfig(r=13, network=DEIT_TINY),
    "tome-deit-small": ToMeConfig(r=13, network=DEIT_SMALL),
    "tome-mae-base": ToMeConfig(r=16, network=MAE),
    "tome-mae-large": ToMeConfig(r=8, network=replace(MAE, width=1024, depth=24, heads=16)),
    "tome-mae-huge": ToMeConfig(r=7, network=replace(MAE, width=1280, depth=32, heads=16, patch=14)),
    "tome-tiny": ToMeConfig(r=6, network=SMALL),
}

SYSTEM = System("tome", ToMe, ToMeConfig, VARIANTS, keys=key_table, recognise=recognise, configure=configure)
