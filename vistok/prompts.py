"""Where a reducer can act before a language model: on the visual tokens in its prompt (LLaVA and its kin).

    text embeddings, visual tokens in their places (B, L, D)
      -- the visual tokens of every picture: (P, N, D) -- reducer --> (P, M, D), back into their places
      -- what was dropped is cut out, rows are padded to the longest again --> (B, L', D), mask (B, L')

Text is never touched. Positions count what is left, as the language model would by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vistok.errors import InputError, MismatchError
from vistok.reducer import Context, Reducer, Reduction, check_tokens, take


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts.

    embeds     (B, L, D) what the language model reads
    mask       (B, L) 1 where there is a token, 0 for padding
    visual     (B, L) bool, which are visual tokens
    lengths    visual tokens of every picture, one after the other through the batch
    positions  (B, L) where each stood before pruning, -1 for padding; None before
    """

    embeds: Tensor
    mask: Tensor
    visual: Tensor
    lengths: Sequence[int]
    positions: Tensor | None = None

    @property
    def position_ids(self) -> Tensor:
        """(B, L): 0, 1, 2 ... over what is there, padding left out."""
        return (self.mask.long().cumsum(-1) - 1).clamp(min=0)


def splice(embeds: Tensor, mask: Tensor, visual: Tensor, features: Sequence[Tensor]) -> Prompt:
    """Text embeddings (B, L, D) with the features (n, D) of every picture in the places that `visual` marks.

    Raises MismatchError where there are not as many places as features.
    """
    places, found = int(visual.sum()), sum(len(one) for one in features)
    if places != found:
        raise MismatchError(
            f"{places} image tokens in the prompt, {found} visual tokens of {len(features)} pictures: "
            "the processor and the model must agree on how many tokens a picture has"
        )
    joined = torch.cat(list(features)).to(embeds)
    return Prompt(embeds.masked_scatter(visual[..., None], joined), mask, visual, [len(one) for one in features])


def prune(
    reducer: Reducer, prompt: Prompt, side: Literal["left", "right"] | None = None
) -> tuple[Prompt, list[Reduction]]:
    """The prompts with their visual tokens reduced, every picture by itself; and what became of the pictures.

    `side`: where short rows are padded; as the batch was unless given, right where it was not. All pictures are one
    batch: the list holds one Reduction for all of them. Raises InputError for what the reducer refuses.
    """
    if 0 in prompt.lengths or not prompt.lengths:
        raise InputError(f"pictures of {list(prompt.lengths)} visual tokens; expected at least 1 each")
    batch, length, dim = prompt.embeds.shape
    places = prompt.visual.flatten().nonzero()[:, 0]
    counts = torch.tensor(list(prompt.lengths), device=places.device)
    longest = int(counts.max())
    steps = torch.arange(longest, device=places.device)
    there = steps < counts[:, None]
    starts = counts.cumsum(0) - counts
    where = places[(starts[:, None] + steps).clamp(max=len(places) - 1)].masked_fill(~there, 0)  # (P, N) in B * L
    flat = prompt.embeds.reshape(batch * length, dim)
    tokens = flat[where]
    context = Context(keep=None if bool(there.all()) else there)
    check_tokens(tokens, context, reducer.name)
    kept, state = reducer.reduced(tokens, context)

    order = state.index.argsort(-1)  # in the order in which they stood
    index, kept = state.index.gather(1, order), take(kept, order)
    present = torch.ones_like(index, dtype=torch.bool) if state.keep is None else state.keep.gather(1, order)
    left = where.gather(1, index)[present]
    flat = flat.index_copy(0, left, kept[present].to(flat.dtype))
    stays = (prompt.mask.bool() & ~prompt.visual).flatten()
    stays[left] = True
    stays = stays.view(batch, length)

    side = side or ("left" if not bool(prompt.mask[:, 0].all()) else "right")
    new = int(stays.sum(1).max())
    rows = stays.long().argsort(dim=-1, descending=side == "right", stable=True)
    rows = rows[:, -new:] if side == "left" else rows[:, :new]
    mask = stays.gather(1, rows)
    embeds = take(flat.view(batch, length, dim), rows) * mask[..., None]
    visual = prompt.visual.gather(1, rows) & mask
    lengths = present.sum(1).tolist()
    positions = rows.masked_fill(~mask, -1)
    return Prompt(embeds, mask.to(prompt.mask.dtype), visual, lengths, positions), [state]
