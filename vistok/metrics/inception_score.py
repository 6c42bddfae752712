"""The Inception score: exp of the mean divergence between what a classifier says of an image and of all (1606.03498).

    logits (n, K) -> softmax in float64 -> splits -> exp(mean KL(p(y | x) || p(y))) -> mean, deviation over the splits

Variants in use differ in splits, order and logits: `VARIANTS`. Scores of different variants are not comparable.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vistok.errors import InputError, UnknownNameError, nearest


@dataclass(frozen=True)
class Splits:
    """How logits are divided.

    number   so many nearly equal parts; None: parts of `size`, in order, the last one as long as it comes
    shuffle  seed of a random order beforehand (numpy's RandomState), None for the order they came in
    floor    added inside the logarithm
    """

    number: int | None = 10
    size: int | None = None
    shuffle: int | None = None
    floor: float = 0.0


VARIANTS = {
    "torch-fidelity": Splits(number=10, shuffle=2020),  # on logits without the bias
    "adm": Splits(number=None, size=5000),  # on logits without the bias; its mean alone is reported
    "1d-tokenizer": Splits(number=1, floor=1e-16),
}


def inception_score(logits: Tensor, variant: str | Splits = "torch-fidelity") -> tuple[float, float]:
    """Mean and population deviation over the splits, of logits (n, K). At least 1, at most K.

    Raises InputError for another shape or fewer rows than splits, UnknownNameError for an unknown variant.
    """
    if isinstance(variant, str) and variant not in VARIANTS:
        raise UnknownNameError(
            f"no Inception score {variant!r}{nearest(variant, list(VARIANTS)) or f'; {list(VARIANTS)}'}"
        )
    splits = VARIANTS[variant] if isinstance(variant, str) else variant
    count = len(logits)
    if logits.ndim != 2 or count < (splits.number or 1):
        raise InputError(
            f"logits of shape {tuple(logits.shape)}; expected (n, K) with n of at least {splits.number or 1}"
        )
    rows = logits.detach().double()
    if splits.shuffle is not None:
        rows = rows[torch.from_numpy(np.random.RandomState(splits.shuffle).permutation(count)).to(rows.device)]
    if splits.number is None:
        edges = [*range(0, count, splits.size or count), count]
    else:
        edges = [part * count // splits.number for part in range(splits.number + 1)]
    scores = torch.stack([_score(rows[low:high], splits.floor) for low, high in pairwise(edges)])
    return float(scores.mean()), float(scores.std(correction=0))


def _score(logits: Tensor, floor: float) -> Tensor:
    p = logits.softmax(1)
    marginal = p.mean(0)
    if floor:
        return (p * ((p + floor).log() - (marginal + floor).log())).sum(1).mean().exp()
    # a share that underflows counts nothing: 0 log 0 = 0
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, marginal)).sum(1).mean().exp()
