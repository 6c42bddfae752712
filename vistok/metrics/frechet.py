"""The Frechet distance between two sets of features, each taken as a Gaussian (arXiv:1706.08500).

    d = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)),  in float64, on whatever features it is given

No root of a matrix is taken: with any R such that R^T R = C_a, the trace of the root is the sum of the roots of the
eigenvalues of R C_b R^T. R is the Cholesky factor of either covariance; few rows of features are such a factor
themselves; and where neither is at hand (statistics of fewer rows than columns) it is made of eigenvectors.

The papers' tools differ in how they take the root (scipy's sqrtm, eigenvalues of the product, singular values), which
changes nothing above rounding, and in the features, which changes much: see `vistok.metrics.extractors`.
"""

import torch
from torch import Tensor

from vistok.errors import InputError
from vistok.metrics.moments import Gaussian, gaussian


def frechet_distance(a: Tensor | Gaussian, b: Tensor | Gaussian) -> float:
    """Distance of two sets: features (n, W), or the `Gaussian` of such. Unit: that of the features, squared.

    Raises InputError for other shapes, for widths that differ and for fewer than two rows.
    """
    widths = [part.width if isinstance(part, Gaussian) else part.shape[-1] if part.ndim == 2 else -1 for part in (a, b)]
    if widths[0] != widths[1] or -1 in widths or min(_count(a), _count(b)) < 2:
        raise InputError(f"{_told(a)} and {_told(b)}; expected two sets of features of one width, of at least two rows")
    one, other = _Spread(a), _Spread(b)
    root = one.root()
    if root is None:
        one, other = other, one
        root = one.root()
    if root is None:
        root = one.eigenroot()
    shared = torch.linalg.eigvalsh(other.within(root)).clamp_min(0).sqrt().sum()
    return float((one.mean - other.mean).square().sum() + one.trace + other.trace - 2 * shared)


class _Spread:
    """A mean with a covariance, which is kept as few centred rows where there are fewer of them than columns."""

    def __init__(self, part: Tensor | Gaussian) -> None:
        self.rows: Tensor | None = None
        self.covariance: Tensor | None = None
        if isinstance(part, Tensor) and len(part) <= part.shape[1]:
            wide = part.detach().double()
            self.mean = wide.mean(0)
            self.rows = (wide - self.mean) / (len(wide) - 1) ** 0.5
            self.trace = self.rows.square().sum()
        else:
            found = part if isinstance(part, Gaussian) else gaussian(part)
            self.mean, self.covariance = found.mean, found.covariance
            self.trace = self.covariance.diagonal().sum()

    def root(self) -> Tensor | None:
        """R (r, W) with R^T R the covariance, where it is cheap."""
        if self.covariance is None:
            return self.rows
        factor, failed = torch.linalg.cholesky_ex(self.covariance, upper=True)
        return None if failed else factor

    def eigenroot(self) -> Tensor:
        """The same of any covariance; what is below rounding is left out."""
        assert self.covariance is not None
        values, vectors = torch.linalg.eigh(self.covariance)
        kept = values > values[-1].clamp_min(0) * 1e-14
        return (vectors[:, kept] * values[kept].sqrt()).T

    def within(self, root: Tensor) -> Tensor:
        """R C R^T of this covariance C, (r, r)."""
        if self.rows is not None:
            seen = root @ self.rows.T
            return seen @ seen.T
        assert self.covariance is not None
        return root @ self.covariance @ root.T


def _count(part: Tensor | Gaussian) -> int:
    return part.count if isinstance(part, Gaussian) else len(part)


def _told(part: Tensor | Gaussian) -> str:
    if isinstance(part, Gaussian):
        return f"statistics of {part.count} rows {part.width} wide"
    return f"features of shape {tuple(part.shape)}"
