"""Processes that train together: their number, and sums over all of them.

The same bits reach every rank, so buffers that start equal stay equal. Without an initialised process group every
function here is the identity. Works wherever the group's backend does: gloo on CPUs, NCCL on GPUs.
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


def part() -> None:
    """Leave the group, as the last thing that a program does; NCCL warns of those that do not."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


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


def shared_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, through which gradients flow: each process gets the sum of all their gradients.

    Every process must run the same backward passes in the same order. May be differentiated twice.
    """
    return _SharedSum.apply(tensor) if world_size() > 1 else tensor


def mean_over_processes(total: Tensor, count: int) -> Tensor:
    """Mean over the items of all processes, from this process's sum `total` over its `count` items.

    The gradient is scaled so that averaging gradients over processes, as DistributedDataParallel does, gives the
    gradient of the global mean, also when processes hold different numbers of items.
    """
    if world_size() == 1:
        return total / max(count, 1)
    items = sum_over_processes(total.new_tensor([count], dtype=torch.float64))
    return _GlobalMean.apply(total, items.clamp(min=1).to(total.dtype))


class _SharedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return sum_over_processes(tensor.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _SharedSum.apply(grad)


class _GlobalMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, items: Tensor) -> Tensor:
        ctx.save_for_backward(items)
        return sum_over_processes(total.clone()) / items

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (items,) = ctx.saved_tensors
        return grad * (world_size() / items), None
