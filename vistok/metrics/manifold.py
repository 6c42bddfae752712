"""Fidelity and variety apart: how much of what was generated lies near real images, and the other way round.

Every set is taken as the union of balls around its points that reach to the k-th neighbour in the same set.

    precision  share of generated points inside any real ball          (arXiv:1904.06991)
    recall     share of real points inside any generated ball
    density    how many real balls a generated point lies in, over k   (arXiv:2002.09797)
    coverage   share of real balls with a generated point in them

Distances are taken in blocks: memory is that of a block, not of all pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.errors import InputError


@dataclass(frozen=True)
class Manifolds:
    """The four shares; density may be above 1."""

    precision: float
    recall: float
    density: float
    coverage: float

    @property
    def f_score(self) -> float:
        """2 P R / (P + R) of precision and recall."""
        return 2 * self.precision * self.recall / max(1e-5, self.precision + self.recall)


@torch.no_grad()
def manifolds(generated: Tensor, real: Tensor, neighbours: int = 3, block: int = 2048) -> Manifolds:
    """Precision, recall, density and coverage of features (n, W) and (m, W).

    `neighbours`: k; papers take 3 for precision and recall, 5 for density and coverage. float32 distances, as the
    published tools compute them, float64 where features are. Raises InputError for shapes, or k not below both sizes.
    """
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise InputError(f"features of {tuple(generated.shape)} and {tuple(real.shape)}; expected (n, W) and (m, W)")
    if not 1 <= neighbours < min(len(generated), len(real)):
        raise InputError(f"{neighbours} neighbours among {len(generated)} and {len(real)} points")
    radius_real, radius_generated = _radii(real, neighbours, block), _radii(generated, neighbours, block)
    inside, balls = [], []
    covered_real = torch.zeros(len(real), dtype=torch.bool, device=real.device)  # has a generated point in its ball
    recalled = torch.zeros_like(covered_real)  # lies in a generated ball
    for part, radius in zip(generated.split(block), radius_generated.split(block), strict=True):
        distance = torch.cdist(part, real)
        within = distance <= radius_real[None]
        inside.append(within.any(1))
        balls.append(within.sum(1))
        covered_real |= within.any(0)
        recalled |= (distance <= radius[:, None]).any(0)
    return Manifolds(
        precision=float(torch.cat(inside).double().mean()),
        recall=float(recalled.double().mean()),
        density=float(torch.cat(balls).double().mean() / neighbours),
        coverage=float(covered_real.double().mean()),
    )


def _radii(points: Tensor, neighbours: int, block: int) -> Tensor:
    """Distance of each point (n, W) to its k-th neighbour, itself left out: (n,)."""
    return torch.cat([torch.cdist(part, points).kthvalue(neighbours + 1, dim=1).values for part in points.split(block)])
