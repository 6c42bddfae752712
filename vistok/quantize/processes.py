"""Agreement between processes on codebooks: rows drawn from all of them, and the best of what they offer.

Codebook statistics are sums over the batch. Summed over all processes they are the same bits on every rank, so buffers
that start equal stay equal. Without an initialised process group every function here is the identity.
"""

import torch
from torch import Tensor

from vistok.processes import max_over_processes as max_over_processes
from vistok.processes import mean_over_processes as mean_over_processes
from vistok.processes import rank as rank
from vistok.processes import sum_over_processes as sum_over_processes
from vistok.processes import world_size as world_size


def draw_rows(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows drawn from the rows (M, D) of all processes together, the same on every rank.

    `generator` (CPU) must be in the same state everywhere. Draws without replacement where there are enough rows.
    Each row comes from the one process that owns it, added to zeros from the others, which is exact.
    """
    sizes = torch.zeros(world_size(), dtype=torch.long, device=rows.device)
    sizes[rank()] = len(rows)
    ends = sum_over_processes(sizes).cumsum(0).tolist()
    if ends[-1] >= count:
        picked = torch.randperm(ends[-1], generator=generator)[:count]
    else:
        picked = torch.randint(max(ends[-1], 1), (count,), generator=generator)
    local = picked.to(rows.device) - (ends[rank()] - len(rows))
    mine = (local >= 0) & (local < len(rows))
    drawn = rows.new_zeros(count, rows.shape[1])
    drawn[mine] = rows[local[mine]]
    return sum_over_processes(drawn)


def pick_best(scores: Tensor, vectors: Tensor) -> Tensor:
    """Row k of `vectors` (K, D) from the process whose `scores` (K,) is highest there; the lowest rank wins ties."""
    if world_size() == 1:
        return vectors
    best = max_over_processes(scores.clone())
    claim = torch.where(scores == best, world_size() - rank(), 0)
    mine = max_over_processes(claim.clone()) == world_size() - rank()
    return sum_over_processes(torch.where(mine[:, None], vectors, torch.zeros_like(vectors)))
