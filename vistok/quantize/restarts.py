"""Rows of a codebook that nothing chooses any more, replaced by latents of the batch."""

import torch
from torch import Tensor

from vistok.quantize.processes import draw_rows


@torch.no_grad()
def restart(codebook: Tensor, counts: Tensor, below: float, rows: Tensor, seed: int) -> tuple[Tensor, Tensor] | None:
    """Overwrite the rows of `codebook` (K, D) whose averaged `counts` (K,) are `below` by some of `rows` (M, D).

    They are drawn by `seed`, alike in all processes, and their counts become `below`. Gives which rows and what they
    are now; None where none was.
    """
    dead = (counts < below).nonzero().flatten()
    if len(dead) == 0:
        return None
    fresh = draw_rows(rows, len(dead), torch.Generator().manual_seed(seed)).to(codebook.dtype)
    codebook.data[dead] = fresh
    counts[dead] = below
    return dead, fresh
