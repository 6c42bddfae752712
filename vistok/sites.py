"""Where a reducer can act inside a vision transformer: between attention and MLP of its pre-norm blocks.

    x -> norm -> q, k, v -> attention (+ log sizes) -> out -> + x -- reducer --> norm -> MLP -> + -> next block

Blocks are known by their layout, a row of names: ours, timm's (DINO's, DeiT's and MAE's too) and those of
`transformers` (ViT, DeiT, CLIP, SigLIP, DINOv2). A block's own modules are used as they are; only the order in which
they are called is written here, on PyTorch's fused attention.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vistok.errors import InputError
from vistok.nn.attention import attend
from vistok.reducer import Context, Reducer, Reduction


@dataclass(frozen=True)
class Layout:
    """Names of a block's parts, as paths below the block.

    qkv    the fused projection, or the three of q, k and v
    gains  layer scales: modules, or parameters that multiply
    drops  modules that leave branches out in training
    norms  over each head's queries and keys, where there are any
    """

    name: str
    norm1: str
    norm2: str
    qkv: tuple[str, ...]
    out: str
    heads: str
    mlp: str = "mlp"
    gains: tuple[str, str] = ("", "")
    drops: tuple[str, str] = ("", "")
    norms: tuple[str, str] = ("", "")
    foreign: tuple[str, ...] = ()  # parts that would make it another block, beside FIXED


# What makes a block one in which tokens have fixed neighbours or positions, in whatever layout.
FIXED = (
    *("window_size", "shift_size", "lambda_1"),
    *(
        f"{owner}.{name}"
        for owner in ("attn", "attention", "attention.attention", "self_attn")
        for name in ("relative_position_bias_table", "relative_position_bias", "rel_pos_h", "rope", "gate", "sr")
    ),
)
_SPLIT = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
LAYOUTS = (
    Layout(
        "vistok",
        "norm1",
        "norm2",
        ("attention.qkv",),
        "attention.out",
        "attention.heads",
        gains=("scale1", "scale2"),
        norms=("attention.q_norm", "attention.k_norm"),
        foreign=("cross",),
    ),
    Layout(
        "timm",
        "norm1",
        "norm2",
        ("attn.qkv",),
        "attn.proj",
        "attn.num_heads",
        gains=("ls1", "ls2"),
        drops=("drop_path1", "drop_path2"),
        norms=("attn.q_norm", "attn.k_norm"),
    ),
    Layout(
        "transformers ViT",
        "layernorm_before",
        "layernorm_after",
        _SPLIT,
        "attention.o_proj",
        "attention.num_attention_heads",
    ),
    Layout(
        "transformers CLIP",
        "layer_norm1",
        "layer_norm2",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.out_proj",
        "self_attn.num_heads",
    ),
    Layout(
        "transformers DINOv2",
        "norm1",
        "norm2",
        _SPLIT,
        "attention.o_proj",
        "attention.num_attention_heads",
        gains=("layer_scale1", "layer_scale2"),
        drops=("drop_path", "drop_path"),
    ),
)
SUPPORTED = (
    "vistok's own ViTs, timm's VisionTransformer (DeiT, MAE, DINO, DINOv2), and of transformers ViT, DeiT, CLIP's and "
    "SigLIP's vision models and DINOv2"
)


class BlockSite:
    """One pre-norm block with its layout. Raises nothing: ask `find_layout` first."""

    def __init__(self, block: nn.Module, layout: Layout) -> None:
        self.block, self.layout = block, layout

    def part(self, path: str) -> Any:
        """A part of the block by its path; None where there is none."""
        found: Any = self.block
        for name in path.split(".") if path else ():
            found = getattr(found, name, None)
        return None if found is self.block else found

    def attention(self, x: Tensor, sizes: Tensor | None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What attention adds to x (B, N, W), and the keys' mean over heads (B, N, head).

        `sizes` (B, N): a token counts so many times as a key. `mask` (B, N) bool: tokens that may be seen.
        """
        layout, heads = self.layout, int(self.part(self.layout.heads))
        x = self.part(layout.norm1)(x)
        if len(layout.qkv) == 1:
            q, k, v = self.part(layout.qkv[0])(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (self.part(path)(x).unflatten(-1, (heads, -1)).transpose(1, 2) for path in layout.qkv)
        keys = k.mean(1)
        for name, norm in zip("qk", (self.part(path) for path in layout.norms), strict=True):
            if norm is not None:
                q, k = (norm(q), k) if name == "q" else (q, norm(k))
        owner = self.part(layout.heads.rsplit(".", 1)[0])
        scale = next((float(getattr(owner, name)) for name in ("scale", "scaling") if getattr(owner, name, None)), None)
        bias = None if sizes is None else sizes.to(q.dtype).log()[:, None, None]  # (B, 1, 1, N)
        if mask is not None:
            allowed = mask[:, None, None]
            bias = allowed if bias is None else bias.masked_fill(~allowed, -torch.inf)
        out = self.part(layout.out)(attend(q, k, v, mask=bias, scale=scale))
        return self._branch(out, 0), keys

    def mlp(self, x: Tensor) -> Tensor:
        """What the MLP adds to x (B, N, W)."""
        return self._branch(self.part(self.layout.mlp)(self.part(self.layout.norm2)(x)), 1)

    def _branch(self, x: Tensor, which: int) -> Tensor:
        gain, drop = self.part(self.layout.gains[which]), self.part(self.layout.drops[which])
        if gain is not None:
            x = x * gain if isinstance(gain, Tensor) else gain(x)
        if drop is not None:
            return drop(x)
        skip = getattr(self.block, "skip", 0.0)  # ours
        if not (skip and self.block.training):
            return x
        return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - skip) / (1 - skip)


class Run:
    """One pass of a batch through a model's blocks with a reducer in them, and what became of the tokens.

    layers     number of blocks
    at         the blocks at which the reducer acts, all unless given
    protected  leading tokens that it leaves alone

    counts     tokens after each block that has run
    states     the Reduction of each place at which the reducer acted
    """

    def __init__(self, reducer: Reducer, layers: int, *, protected: int = 0, at: Sequence[int] | None = None) -> None:
        self.reducer, self.layers, self.protected = reducer, layers, protected
        self.at = tuple(range(layers)) if at is None else tuple(at)
        self.counts: list[int] = []
        self.states: list[Reduction] = []
        self.sizes: Tensor | None = None
        self.keep: Tensor | None = None

    def block(self, site: BlockSite, x: Tensor) -> Tensor:
        """The next block, on tokens (B, N, W): (B, M, W)."""
        layer = len(self.counts)
        attended, keys = site.attention(x, self.sizes if self.reducer.biased else None, self.keep)
        x = x + attended
        if layer in self.at:
            x = self._reduce(x, keys, layer)
        x = x + site.mlp(x)
        self.counts.append(x.shape[1])
        return x

    def restore(self, tokens: Tensor) -> Tensor:
        """Tokens (B, M, D) as they are now back to the length that went in, (B, N, D)."""
        for state in reversed(self.states):
            tokens = self.reducer.restore(tokens, state)
        return tokens

    def _reduce(self, x: Tensor, keys: Tensor, layer: int) -> Tensor:
        place = self.at.index(layer)
        context = Context(
            metric=keys,
            sizes=self.sizes,
            keep=self.keep,
            protected=self.protected,
            layer=place,
            layers=len(self.at),
        )
        reduce = self.reducer.reduced if self.states else self.reducer.reduce  # tokens are checked once a pass
        x, state = reduce(x, context)
        self.states.append(state)
        if state.sizes is not None:
            self.sizes = state.sizes
        elif self.sizes is not None:
            self.sizes = self.sizes.gather(1, state.index)
        self.keep = state.keep
        return x

    @cached_property
    def source(self) -> Tensor:
        """(B, N): the place, in what came out last, of each of the first tokens; -1 for one that was dropped."""
        if not self.states:
            raise InputError("nothing was reduced yet")
        first = self.states[0].index
        numbers = torch.arange(self.states[-1].count, device=first.device, dtype=torch.double) + 1
        return self.restore(numbers.expand(len(first), -1)[..., None])[..., 0].long() - 1


def through(blocks: Iterable[nn.Module], x: Tensor, run: Run) -> Tensor:
    """Tokens (B, N, W) through blocks of a known layout with the run's reducer in them; InputError for others."""
    for block in blocks:
        x = run.block(site_of(block), x)
    return x


def site_of(block: nn.Module) -> BlockSite:
    """The place in a block. Raises InputError where its layout is not known."""
    layout = find_layout(block)
    if layout is None:
        raise InputError(
            f"a {type(block).__name__} is no pre-norm block that a reducer could enter; known: {SUPPORTED}"
        )
    return BlockSite(block, layout)


def find_layout(block: nn.Module) -> Layout | None:
    """The layout that fits a module, None where none does."""
    for layout in LAYOUTS:
        site = BlockSite(block, layout)
        needed = (layout.norm1, layout.norm2, *layout.qkv, layout.out, layout.mlp)
        if all(isinstance(site.part(path), nn.Module) for path in needed) and site.part(layout.heads) is not None:
            if any(site.part(path) is not None for path in (*layout.foreign, *FIXED)):
                continue
            scaled = layout.gains[0] and site.part(layout.gains[0]) is not None
            if layout.name == "transformers DINOv2" and not scaled:
                continue
            return layout
    return None


__all__ = ["LAYOUTS", "SUPPORTED", "BlockSite", "Layout", "Run", "find_layout", "site_of", "through"]
