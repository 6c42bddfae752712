"""DivPrune: keeps the visual tokens that are most unlike each other, without training.

DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, arXiv:2503.02175 (CVPR 2025). The authors'
code is vbdi/divprune.

    visual tokens (B, N, D), on their way into the language model
      d(i, j) = 1 - cos(x_i, x_j)
      first: the token whose nearest other is farthest; then, M - 1 times: the one farthest from all that are chosen
      --> (B, M, D), in the order in which they stood

That is the greedy answer to the max-min diversity problem: choose M tokens so that the smallest distance between two
of them is as large as it can be. Importance and the question asked play no part. Distances are taken in float32,
whatever the tokens are: in half precision they tie.

The authors' code works on one picture. Here a batch is one: M steps of work N each, for all pictures at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.errors import ConfigError, InputError
from vistok.reducer import Context, Reducer, Reduction, check_count, scatter, take
from vistok.registry import System

MATRICES = 1 << 27  # distances (float32) that are held at a time: 512 MiB
BLOCKS, ROWS = 6, 192  # a matrix is symmetric: below the diagonal's blocks, of so many rows at least, it is copied


@dataclass(frozen=True)
class DivPruneConfig:
    """Settings.

    ratio    share of the visual tokens that is kept, rounded to the nearest even number at a half
    keep     their number instead
    repeats  as in the authors' code, a token may be chosen twice where fewer than M differ; the sequence is then
             shorter than M. Else the first of those that are left is taken
    """

    ratio: float = 0.098
    keep: int | None = None
    repeats: bool = False
    version: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"ratio {self.ratio}; the share of tokens that is kept is above 0 and at most 1")
        if self.keep is not None and self.keep < 1:
            raise ConfigError(f"keep {self.keep}; expected at least 1 token")


@dataclass(frozen=True, kw_only=True)
class Selected(Reduction):
    """`index` (B, M) ascending; `order` (B, M): the same in the order of selection, -1 where an item has fewer."""

    order: Tensor


def distances(tokens: Tensor) -> Tensor:
    """1 - cosine of all pairs of (B, N, D): float32 (B, N, N). Raises InputError for a token that is 0 everywhere."""
    tokens = tokens.float()
    batch, length = tokens.shape[:2]
    out = torch.empty(batch, length, length, device=tokens.device)
    rows = max(-(-length // BLOCKS), ROWS) if tokens.device.type == "cpu" else max(length, 1)
    starts = range(0, length, rows)
    for start in starts:
        torch.bmm(tokens[:, start : start + rows], tokens[:, start:].mT, out=out[:, start : start + rows, start:])
    squares = out.diagonal(dim1=1, dim2=2)  # what a token makes with itself: no second reading of the tokens
    if not bool(squares.all()):
        item, position = (int(one) for one in (squares == 0).nonzero()[0])
        raise InputError(
            f"token {position} of item {item} is 0 everywhere and has no direction: leave padding out of `keep`"
        )
    inverse = squares.sqrt().reciprocal_()[..., None]  # scaling products is less work than scaling tokens
    for start in starts:
        end = start + rows
        products = out[:, start:end, start:]
        products.mul_(inverse[:, start:end]).mul_(inverse[:, start:].mT)
        torch.sub(1, products, out=products)
        out[:, end:, start:end] = out[:, start:end, end:].mT
    return out


def select(tokens: Tensor, counts: Tensor | int, *, keep: Tensor | None = None, repeats: bool = False) -> Tensor:
    """The tokens of (B, N, D) that are most unlike each other, long (B, M), in the order of selection.

    `counts` is M, or a number for each item (B,), whose rows then end with -1. `keep` (B, N) bool says which tokens
    there are. Of equal scores the first wins. Work and memory grow with N squared.
    """
    batch, length = tokens.shape[:2]
    each = torch.as_tensor(counts, device=tokens.device).expand(batch)
    if keep is not None:  # what is absent may hold anything
        tokens = torch.where(keep[..., None], tokens, torch.ones_like(tokens))
    at_once = max(MATRICES // (length * length), 1)
    parts = range(0, batch, at_once)
    steps = int(each.max())
    chosen = torch.cat(
        [
            _choose(
                distances(tokens[start : start + at_once]),
                steps,
                None if keep is None else keep[start : start + at_once],
                repeats,
            )
            for start in parts
        ]
    )
    return chosen.masked_fill(torch.arange(steps, device=chosen.device) >= each[:, None], -1)


def _choose(apart: Tensor, steps: int, keep: Tensor | None, repeats: bool) -> Tensor:
    batch, length = apart.shape[:2]
    if keep is not None:
        apart.masked_fill_(~keep[:, None], torch.inf)
    diagonal = apart.diagonal(dim1=1, dim2=2)
    own = diagonal.clone()
    diagonal.fill_(torch.inf)
    score = apart.amin(-1)  # to the nearest other
    diagonal.copy_(own)
    if length == 1:
        score.zero_()
    rows, base = apart.view(batch * length, length), torch.arange(batch, device=apart.device) * length
    absent = -torch.inf
    if keep is not None:
        score.masked_fill_(~keep, absent)
    chosen = torch.empty(batch, steps, dtype=torch.long, device=apart.device)
    for step in range(steps):
        pick = score.max(-1).indices
        chosen[:, step] = pick
        found = rows.index_select(0, base + pick)
        if step == 0:
            score = found if keep is None else found.masked_fill(~keep, absent)
        else:
            torch.minimum(score, found, out=score)
        if not repeats:
            score.scatter_(1, pick[:, None], absent)
    return chosen


class DivPrune(Reducer):
    """See the module's docstring. In a ViT it acts once, after a block of the user's choice."""

    system = "divprune"
    places = ("prompt", "block")
    once = True

    def plan(self, tokens: int, layers: int = 1, *, protected: int = 0) -> tuple[int, ...]:
        """Tokens after each of `layers` places. Raises InputError for none to keep, or more than there are."""
        planned = []
        for _ in range(layers):
            tokens = protected + self.count(tokens - protected)
            planned.append(tokens)
        return tuple(planned)

    def count(self, length: int) -> int:
        """M for N = `length` visual tokens. Raises InputError for none to keep, or more than there are."""
        wanted = self.config.keep
        return check_count(round(self.config.ratio * length) if wanted is None else wanted, length, self.name)

    def reduced(self, tokens: Tensor, context: Context) -> tuple[Tensor, Selected]:
        """Select once; protected tokens stay and play no part, and what `context.keep` leaves out is not there."""
        first, keep = context.protected, context.keep
        visual = tokens[:, first:]
        keep = None if keep is None else keep[:, first:]
        batch, length = visual.shape[:2]
        lengths = [length] * batch if keep is None else keep.sum(1).tolist()
        counts = torch.tensor([self.count(int(one)) for one in lengths], device=tokens.device)
        with torch.no_grad():
            order = select(visual, counts, keep=keep, repeats=self.config.repeats)
        index, there = _sorted(order, length)
        places = torch.arange(first, device=tokens.device).expand(batch, -1)
        index = torch.cat([places, index + first], 1)
        present = None
        if not bool(there.all()):
            present = torch.cat([torch.ones_like(places, dtype=torch.bool), there], 1)
        order = torch.where(order < 0, order, order + first)
        return take(tokens, index), Selected(tokens.shape[1], index, keep=present, order=order)

    def restore(self, tokens: Tensor, state: Reduction) -> Tensor:
        """(B, M, D) to (B, N, D): tokens where they stood, 0 where one was dropped."""
        if state.keep is None:
            return scatter(tokens, state.index, state.length)
        spare = state.index.masked_fill(~state.keep, state.length)
        return scatter(tokens, spare, state.length + 1)[:, :-1]


def _sorted(order: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Chosen positions (B, M) ascending, each once, and which of them are there; those that are not stand last."""
    found = order.masked_fill(order < 0, length).sort(-1).values
    again = torch.zeros_like(found, dtype=torch.bool)
    again[:, 1:] = found[:, 1:] == found[:, :-1]
    found = found.masked_fill(again, length).sort(-1).values
    there = found < length
    longest = int(there.sum(1).max())
    return found.masked_fill(~there, 0)[:, :longest], there[:, :longest]


VARIANTS = {"divprune": DivPruneConfig(), "divprune-tiny": DivPruneConfig(ratio=0.25)}

SYSTEM = System("divprune", DivPrune, DivPruneConfig, VARIANTS)
