"""Random numbers that belong to an item: drawn from its own seed, so they do not depend on the batch or the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def uniforms(seeds: Sequence[int], shape: Sequence[int], device: "torch.device | str" = "cpu") -> Tensor:
    """Uniform numbers in [0, 1), float32 (B, *shape), one generator per item."""
    drawn = [torch.rand(tuple(shape), generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return (torch.stack(drawn) if drawn else torch.zeros(0, *shape)).to(device)


def permutations(seeds: Sequence[int], length: int, device: "torch.device | str" = "cpu") -> Tensor:
    """A random order of 0..length-1 for each item, long (B, length)."""
    return uniforms(seeds, (length,)).argsort(dim=1, stable=True).to(device)
