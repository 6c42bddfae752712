"""Mean and covariance of features that come in batches, in bounded memory and double precision.

    features (n, W), batch by batch --Moments--> count, mean (W,), covariance (W, W)

Sums are taken about the first row, so that a large common offset costs no digits; parts that were counted by several
processes are merged with `+`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.errors import InputError


@dataclass(frozen=True)
class Gaussian:
    """What a Frechet distance looks at: mean (W,) and covariance (W, W), float64, of `count` rows."""

    count: int
    mean: Tensor
    covariance: Tensor

    @property
    def width(self) -> int:
        """W."""
        return len(self.mean)


class Moments:
    """Streaming mean and covariance; W^2 numbers are kept, whatever the number of rows."""

    def __init__(self) -> None:
        self.count = 0
        self._origin: Tensor | None = None  # (W,)
        self._sum: Tensor | None = None  # of rows - origin
        self._squares: Tensor | None = None  # of their outer products

    def update(self, features: Tensor) -> None:
        """Add rows (n, W). Raises InputError for another shape or width, and for values that are not finite."""
        if features.ndim != 2:
            raise InputError(f"features of shape {tuple(features.shape)}; expected (n, W)")
        if not len(features):
            return
        if not bool(features.isfinite().all()):
            raise InputError("features that are not finite: a picture or the extractor is broken")
        rows = features.detach().double()
        if self._origin is None or self._sum is None or self._squares is None:
            width = rows.shape[1]
            self._origin = rows[0].clone()
            self._sum, self._squares = rows.new_zeros(width), rows.new_zeros(width, width)
        elif rows.shape[1] != len(self._origin):
            raise InputError(f"features {rows.shape[1]} wide after ones {len(self._origin)} wide")
        rows = rows - self._origin
        self.count += len(rows)
        self._sum += rows.sum(0)
        self._squares.addmm_(rows.T, rows)

    def __add__(self, other: "Moments") -> "Moments":
        """Both together, as if one had seen all rows."""
        if self._origin is None or self._sum is None or self._squares is None:
            return other
        merged = Moments()
        merged.count, merged._origin = self.count, self._origin
        merged._sum, merged._squares = self._sum.clone(), self._squares.clone()
        if other._origin is not None and other._sum is not None and other._squares is not None:
            shift = other._origin - self._origin
            cross = torch.outer(other._sum, shift)
            merged.count += other.count
            merged._sum += other._sum + other.count * shift
            merged._squares += other._squares + cross + cross.T + other.count * torch.outer(shift, shift)
        return merged

    def gaussian(self) -> Gaussian:
        """Mean and sample covariance (n - 1). Raises InputError for fewer than two rows."""
        if self._origin is None or self._sum is None or self._squares is None or self.count < 2:
            raise InputError(f"{self.count} rows of features; a covariance needs at least two")
        mean = self._sum / self.count
        covariance = (self._squares - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Gaussian(self.count, self._origin + mean, (covariance + covariance.T) / 2)


def gaussian(features: Tensor) -> Gaussian:
    """Mean and covariance of features (n, W) that are there at once."""
    moments = Moments()
    moments.update(features)
    return moments.gaussian()
