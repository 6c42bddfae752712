"""Means over a data set that arrives in batches, in float64."""

import math

from torch import Tensor


class Mean:
    """Mean and standard deviation of all values seen (Chan's update: no large sums of squares).

    An infinite value, as the PSNR of equal pictures, makes the mean infinite: that is what it is.
    """

    def __init__(self) -> None:
        self.count, self._total, self._spread = 0, 0.0, 0.0

    def update(self, values: Tensor) -> None:
        """Add every value of a tensor."""
        if not values.numel():
            return
        fresh = values.detach().double().flatten().cpu()
        count, total = fresh.numel(), float(fresh.sum())
        if self.count:
            gap = total / count - self._total / self.count
            self._spread += gap * gap * self.count * count / (self.count + count)
        self._spread += float((fresh - total / count).square().sum())
        self.count, self._total = self.count + count, self._total + total

    @property
    def mean(self) -> float | None:
        """The mean; None where nothing was added."""
        return self._total / self.count if self.count else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation of the values themselves (n, not n - 1); None where nothing was added."""
        return math.sqrt(self._spread / self.count) if self.count else None
