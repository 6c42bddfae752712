"""The contract of reducers: many tokens -> fewer, or less work for them, inside a ViT, a VLM or a video DiT.

    tokens (B, N, D), Context --reduce--> tokens (B, M, D), Reduction --restore--> (B, N, D), where a dense map exists

Three kinds:

    map        selection, merging, pooling, clustering: N tokens become M (ToMe, DivPrune)
    route      tokens leave early, skip a block or are dropped from a layer on: `reduce` gives those that go on, the
               Reduction holds the others, `restore` puts both together
    attention  all tokens stay and `attend` replaces the attention: sparse patterns

A system sets `kind` and `places`, and defines `reduce`, `restore` and `plan` (or `attend`). It knows no model:
`vistok.applied.reduce` puts it into one. What was published as a whole network (trained with its reducer, or with
weights of the reducer's own) has it as `network`, and `forward(pixels)` runs it. Bad input is refused here, once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vistok.errors import InputError
from vistok.model import Model

Kind = Literal["map", "route", "attention"]
Place = Literal["block", "prompt"]


@dataclass(frozen=True)
class Context:
    """What a reducer may look at beside the tokens (B, N, D). A place gives what it has; the rest is None.

    metric     (B, N, C) what tokens are compared by: in a ViT's block the keys, averaged over heads
    sizes      (B, N) how many of the first tokens each stands for
    keep       (B, N) bool, which tokens are there, where items have different numbers
    attention  (B, N) attention that each token receives, from the class token or on average
    protected  so many leading tokens (class, distillation, registers) stay as they are
    grid       rows and columns of the tokens after the protected ones, while they still are a grid
    layer, layers   which place this is, from 0, of how many
    time       of a diffusion process, from 1 (noise) to 0
    """

    metric: Tensor | None = None
    sizes: Tensor | None = None
    keep: Tensor | None = None
    attention: Tensor | None = None
    protected: int = 0
    grid: tuple[int, int] | None = None
    layer: int = 0
    layers: int = 1
    time: float | None = None


@dataclass(frozen=True)
class Reduction:
    """What became of N tokens. Systems add what their `restore` needs.

    length  N
    index   (B, M) where each token that is left stood among the N; of a merged token, one of its members
    sizes   (B, M) how many of the first tokens each stands for; None where that is no question (selection)
    keep    (B, M) bool, which are there, where items keep different numbers; None where all are
    """

    length: int
    index: Tensor
    sizes: Tensor | None = None
    keep: Tensor | None = None

    @property
    def count(self) -> int:
        """M."""
        return self.index.shape[1]


class Reducer(Model):
    """Base of all reducers; see the module's docstring.

    kind      map, route or attention
    places    where it can act: "block" (inside a ViT's blocks, between attention and MLP), "prompt" (visual tokens on
              their way into a language model)
    once      whether it acts at a single block of the user's choice; else at all of them
    biased    whether a token that stands for s others counts s times as a key: log s is added to its logits
    network   the whole network it was published in, or None
    """

    role: ClassVar[str] = "reducer"
    kind: ClassVar[Kind] = "map"
    places: ClassVar[tuple[Place, ...]] = ("block",)
    once: ClassVar[bool] = False
    biased: bool = False

    def __init__(self, config: Any, name: str | None = None) -> None:
        super().__init__(config, name)
        self.network: nn.Module | None = None

    # -- for users -----------------------------------------------------------------------------------------------

    def reduce(self, tokens: Tensor, context: Context | None = None) -> tuple[Tensor, Reduction]:
        """Tokens (B, N, D) to (B, M, D), and what `restore` needs. Systems define `reduced`.

        Raises InputError for another shape, NaN or infinite tokens, a context that does not fit, or a plan that would
        keep no token or more than there are.
        """
        context = context or Context()
        check_tokens(tokens, context, self.name)
        return self.reduced(tokens, context)

    def restore(self, tokens: Tensor, state: Reduction) -> Tensor:
        """Reduced tokens (B, M, D') back to (B, N, D'), in the order in which they were. Systems define it."""
        raise TypeError(f"{type(self).__name__} has no dense map to restore")

    def plan(self, tokens: int, layers: int = 1, *, protected: int = 0) -> tuple[int, ...]:
        """How many of `tokens` (protected ones included) are left after each of `layers` places. Systems define it.

        Raises InputError where none would be left, or more were asked for than there are.
        """
        raise TypeError(f"{type(self).__name__} does not say how many tokens stay")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context | None = None) -> Tensor:
        """Attention of (B, heads, N, head), for the kind "attention": (B, heads, N, head). Systems define it."""
        raise TypeError(f"{type(self).__name__} is of kind {self.kind!r}: it leaves the attention as it is")

    # -- for systems ---------------------------------------------------------------------------------------------

    def reduced(self, tokens: Tensor, context: Context) -> tuple[Tensor, Reduction]:
        """`reduce` on checked tokens. Systems define it."""
        raise TypeError(f"{type(self).__name__} is of kind {self.kind!r}: it does not change the tokens")


def check_tokens(tokens: Tensor, context: Context, name: str) -> None:
    """Raise InputError for tokens that no reducer can take, or a context of another shape."""
    if tokens.ndim != 3 or not tokens.is_floating_point() or 0 in tokens.shape:
        raise InputError(f"{name}: tokens {tuple(tokens.shape)} of {tokens.dtype}; expected float (B, N, D), none 0")
    batch, length = tokens.shape[:2]
    for field, wanted in (("metric", 3), ("sizes", 2), ("keep", 2), ("attention", 2)):
        given = getattr(context, field)
        if given is not None and (given.ndim != wanted or tuple(given.shape[:2]) != (batch, length)):
            raise InputError(
                f"{name}: context.{field} {tuple(given.shape)} for tokens {tuple(tokens.shape)}; "
                f"expected ({batch}, {length}{', C' if wanted == 3 else ''})"
            )
    if not 0 <= context.protected <= length:
        raise InputError(f"{name}: {context.protected} protected tokens of {length}")
    for what, given in (("tokens", tokens), ("context.metric", context.metric)):
        if given is not None and not bool(torch.isfinite(given.detach().sum())):
            present = torch.isfinite(given).all(-1)
            if context.keep is not None:
                present = present | ~context.keep
            if not bool(present.all()):
                item, position = (int(one) for one in (~present).nonzero()[0])
                raise InputError(f"{name}: {what} hold NaN or infinite values, first in item {item} at {position}")


def check_count(kept: int, length: int, name: str) -> int:
    """`kept` of `length` tokens, if that can be. Raises InputError."""
    if kept < 1:
        raise InputError(f"{name} would keep {kept} of {length} tokens; expected at least 1")
    if kept > length:
        raise InputError(f"{name} would keep {kept} of {length} tokens; there are no more than {length}")
    return kept


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, M) of (B, N, D): (B, M, D), as one copy of whole rows."""
    batch, length = tokens.shape[:2]
    return tokens.reshape(batch * length, -1).index_select(0, flat(index, length)).unflatten(0, index.shape)


def flat(index: Tensor, length: int) -> Tensor:
    """Positions (B, M) of N-long items as row numbers of all items, one after the other: (B * M,)."""
    offsets = torch.arange(len(index), device=index.device)[:, None] * length
    return (index + offsets).flatten()


def scatter(tokens: Tensor, index: Tensor, length: int) -> Tensor:
    """The inverse of `take`: rows (B, M, D) at `index` of a map (B, N, D) that holds 0 elsewhere."""
    out = tokens.new_zeros(len(tokens) * length, tokens.shape[-1])
    out = out.index_copy(0, flat(index, length), tokens.flatten(0, 1))
    return out.unflatten(0, (len(tokens), length))


def by_layer(amount: int | Sequence[int], layers: int, inflect: float = 0.0) -> tuple[int, ...]:
    """An amount for each of `layers`: a list is filled up with 0, a number is the same everywhere.

    With `inflect`, a number goes linearly from amount (1 - inflect) to amount (1 + inflect), rounded down: -1 falls
    from twice the amount to 0, +1 rises from 0 to twice (arXiv:2210.09461, appendix A).
    """
    if not isinstance(amount, int):
        return (*(int(one) for one in amount), *[0] * layers)[:layers]
    first = int(amount * (1 - inflect))
    if not inflect:
        return (amount,) * layers
    rise = (2 * amount - 2 * first) / max(layers - 1, 1)
    return tuple(int(first + rise * layer) for layer in range(layers))
