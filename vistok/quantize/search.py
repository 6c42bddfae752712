"""Nearest codebook row of each vector, without ever holding the N x K distances.

    z (M, D), codebook (K, D)  ->  codes (M,)

|z - e|^2 = |z|^2 - 2 (z.e - |e|^2 / 2), so the nearest row is the one with the highest score z.e - |e|^2 / 2. The bias
is one more column of the matrix product. Scores are made in blocks that stay in the processor's cache, and are read
there twice at most: `amax` over groups of rows runs at vector speed where `argmax` does not, so argmax sees only the
maxima of the groups and then the one group that won.
"""

from typing import Literal

import torch
from torch import Tensor

from vistok.quantize.base import check_finite

Metric = Literal["l2", "dot"]

GROUP = 64  # codes per group of the first pass


def nearest(z: Tensor, codebook: Tensor, metric: Metric = "l2") -> Tensor:
    """Index (M,) of the row of `codebook` (K, D) nearest to each row of `z` (M, D); the first of equal ones.

    `metric` "dot" takes the highest inner product instead (the nearest by angle where the rows have unit length).
    No gradient. Raises InputError for NaN or infinity in `z` on a CPU; elsewhere the check would wait for the device.
    """
    return nearest_with_score(z, codebook, metric)[0]


@torch.no_grad()
def nearest_with_score(z: Tensor, codebook: Tensor, metric: Metric = "l2") -> tuple[Tensor, Tensor]:
    """As `nearest`, with the score of the winner (M,): its inner product with z, or minus its squared distance / 2."""
    count = len(z)
    codes = torch.empty(count, dtype=torch.long, device=z.device)
    best = torch.empty(count, dtype=z.dtype, device=z.device)
    if count == 0:
        return codes, best
    check_finite(z)
    shift = codebook.mean(0) if metric == "l2" else None  # centred, |e|^2 is small and cancels less
    table, block = _table(codebook if shift is None else codebook - shift, metric)
    rows = _rows(z, block)
    ones = z.new_ones(rows, 1)
    scores = z.new_empty(rows, block)
    for start in range(0, count, rows):
        part = z[start : start + rows]
        if shift is not None:
            part = part - shift
        part = torch.cat([part, ones[: len(part)]], 1)
        view = scores[: len(part)]
        code, winner = codes[start : start + rows], best[start : start + rows]
        for first in range(0, table.shape[1], block):
            columns = table[:, first : first + block]
            found, value = _best_of_block(torch.mm(part, columns, out=view[:, : columns.shape[1]]))
            found += first
            if first == 0:
                code, winner = found, value
            else:
                better = value > winner
                code, winner = torch.where(better, found, code), torch.where(better, value, winner)
        codes[start : start + rows] = code
        if metric == "l2":
            winner = winner - part[:, :-1].square().sum(1) / 2
        best[start : start + rows] = winner
    return codes, best


def _table(codebook: Tensor, metric: Metric) -> tuple[Tensor, int]:
    """(D + 1, K padded to whole groups) with the bias as its last row, and the width of a block of columns."""
    size, dim = codebook.shape
    block = 4096 if codebook.device.type == "cpu" else 1 << 15
    padded = -(-size // GROUP) * GROUP
    table = codebook.new_zeros(dim + 1, padded)
    table[:dim, :size] = codebook.T
    if metric == "l2":
        table[dim, :size] = codebook.square().sum(1) / -2
    table[dim, size:] = -torch.inf
    return table, min(block, padded)


def _rows(z: Tensor, block: int) -> int:
    """Rows whose block of scores takes 8 MiB, about the cache of a CPU, or 256 MiB of an accelerator's memory."""
    budget = (1 << 21) if z.device.type == "cpu" else (1 << 26)
    return min(max(budget // block, 64), len(z))


def _best_of_block(scores: Tensor) -> tuple[Tensor, Tensor]:
    """First index and value of the highest score in each row of (R, whole groups)."""
    groups = scores.unflatten(1, (-1, GROUP))
    value, group = groups.amax(2).max(1)
    inside = groups[torch.arange(len(scores), device=scores.device), group].argmax(1)
    return group * GROUP + inside, value
