"""Batches of sequences of different lengths, computed without padding where that costs: row by row.

    padded (B, M, W)  <->  rows (T, W)      T = B * lead + the sum of the lengths

What acts on one position at a time (norms, linear maps, MLPs) works on rows; attention alone pads, for as long as it
takes. The first `lead` positions, which every item has (a grid to fill in), come first among the rows, item by item;
then come the other positions that are there, item by item. So a batch of mixed lengths costs what its tokens cost.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.errors import InputError


@dataclass(frozen=True, eq=False)
class Ragged:
    """Where the rows of a batch stand in the padded one.

    shape   (B, M) of the padded batch
    lead    positions that every item has
    index   long (T,): the place of each row in the padded batch, laid flat
    mask    what attention may see, (B, 1, 1, M): bool, or float, added to the logits
    """

    shape: tuple[int, int]
    lead: int
    index: Tensor
    mask: Tensor

    @property
    def leading(self) -> int:
        """Number of leading rows, B * lead."""
        return self.shape[0] * self.lead

    @property
    def items(self) -> Tensor:
        """The item that each row after the leading ones belongs to, long (T - B * lead,)."""
        return self.index[self.leading :] // self.shape[1]

    def rows(self, padded: Tensor) -> Tensor:
        """(B, M, ..) to (T, ..)."""
        return padded.flatten(0, 1).index_select(0, self.index)

    def padded(self, rows: Tensor) -> Tensor:
        """(T, ..) to (B, M, ..), zero where nothing is."""
        empty = rows.new_zeros(self.shape[0] * self.shape[1], *rows.shape[1:])
        return empty.index_copy(0, self.index, rows).unflatten(0, self.shape)


def ragged(lengths: Tensor, lead: int = 0, bias: Tensor | None = None) -> Ragged:
    """The layout of items with `lead` positions and `lengths` (B,) more each.

    `bias` (B, M) float, M = lead + the longest, is added to attention's logits for those positions.
    """
    longest = int(lengths.max()) if len(lengths) else 0
    place = torch.arange(lead + longest, device=lengths.device)
    there = place < lead + lengths[:, None]
    first, rest = there.clone(), there.clone()
    first[:, lead:] = False
    rest[:, :lead] = False
    index = torch.cat([first.flatten().nonzero()[:, 0], rest.flatten().nonzero()[:, 0]])
    mask = there if bias is None else bias.masked_fill(~there, -torch.inf)
    return Ragged((len(lengths), lead + longest), lead, index, mask[:, None, None])


def compact(sequence: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The positions of (B, N, ..) that `keep` (B, N) marks, moved to the front in their order, and their numbers (B,).

    The result is as long as the item with the most; what follows an item's own is of no meaning.
    """
    if keep.shape != sequence.shape[:2] or keep.dtype != torch.bool:
        raise InputError(f"keep is bool {tuple(sequence.shape[:2])}, got {keep.dtype} {tuple(keep.shape)}")
    lengths = keep.sum(1)
    order = torch.argsort(~keep, dim=1, stable=True)[:, : int(lengths.max()) if len(keep) else 0]
    return sequence[torch.arange(len(keep), device=keep.device)[:, None], order], lengths
