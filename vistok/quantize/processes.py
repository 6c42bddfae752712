"""Agreement between processes: the only place where the quantizers talk to `torch.distributed`.

Codebook statistics are sums over the batch. Summed over all processes they are the same bits on every rank, so buffers
that start equal stay equal. Without an initialised process group every function here is the identity.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in `range(world_size())`."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place where there are several; no gradient flows through it."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def max_over_processes(tensor: Tensor) -> Tensor:
    """The elementwise maximum over all processes, in place where there are several; no gradient."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def mean_over_processes(total: Tensor, count: int) -> Tensor:
    """Mean over the items of all processes, from this process's sum `total` over its `count` items.

    The gradient is scaled so that averaging gradients over processes, as DistributedDataParallel does, gives the
    gradient of the global mean, also when processes hold different numbers of items.
    """
    if world_size() == 1:
        return total / max(count, 1)
    items = sum_over_processes(total.new_tensor([count], dtype=torch.float64))
    return _GlobalMean.apply(total, items.clamp(min=1).to(total.dtype))


class _GlobalMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, items: Tensor) -> Tensor:
        ctx.save_for_backward(items)
        return sum_over_processes(total.clone()) / items

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (items,) = ctx.saved_tensors
        return grad * (world_size() / items), None


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
