"""Random numbers that belong to an item: drawn from its own seed, so they do not depend on the batch or the device."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class ItemNoise:
    """A stream of random numbers for each item, from its own seed: what an item gets depends on no other item."""

    def __init__(self, seeds: Sequence[int], device: "torch.device | str" = "cpu") -> None:
        self._generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self._device = device

    def uniforms(self, *shape: int) -> Tensor:
        """The next uniform numbers in [0, 1), float32 (B, *shape)."""
        return self._drawn(torch.rand, shape)

    def normals(self, *shape: int) -> Tensor:
        """The next standard normal numbers, float32 (B, *shape)."""
        return self._drawn(torch.randn, shape)

    def _drawn(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        drawn = [draw(shape, generator=generator) for generator in self._generators]
        return (torch.stack(drawn) if drawn else torch.zeros(0, *shape)).to(self._device)


def uniforms(seeds: Sequence[int], shape: Sequence[int], device: "torch.device | str" = "cpu") -> Tensor:
    """Uniform numbers in [0, 1), float32 (B, *shape), the first of each item's stream."""
    return ItemNoise(seeds, device).uniforms(*shape)


def normals(seeds: Sequence[int], shape: Sequence[int], device: "torch.device | str" = "cpu") -> Tensor:
    """Standard normal numbers, float32 (B, *shape), one generator per item."""
    return ItemNoise(seeds, device).normals(*shape)


def permutations(seeds: Sequence[int], length: int, device: "torch.device | str" = "cpu") -> Tensor:
    """A random order of 0..length-1 for each item, long (B, length)."""
    return uniforms(seeds, (length,)).argsort(dim=1, stable=True).to(device)
