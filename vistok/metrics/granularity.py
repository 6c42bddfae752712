"""What codes stand for: whole objects, their parts, or neither (arXiv:2411.05001).

    codes (N, h, w), labels (N, H, W) --majority label under each cell--> table (K, L) --> purity, mutual information

Both rise with the number of rare codes alone, so each is reported above its mean over permutations of the labels.
"""

from dataclasses import dataclass

import numpy as np

from vistok.errors import InputError


@dataclass(frozen=True)
class Granularity:
    """How well codes tell labels.

    purity       share of tokens whose label is their code's most frequent one
    information  normalised mutual information of codes and labels, 0 to 1
    *_above      the value minus its mean over permuted labels; `*_ratio`: that difference over their deviation
    """

    purity: float
    purity_above: float
    information: float
    information_above: float
    information_ratio: float


def cell_labels(labels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The most frequent label (N, rows, columns) under every cell of label maps (N, H, W); the smaller one of equals.

    Raises InputError where the maps are smaller than the grid.
    """
    count, height, width = labels.shape
    if height < rows or width < columns:
        raise InputError(f"label maps of {height} x {width} under a grid of {rows} x {columns} cells")
    values, codes = np.unique(labels, return_inverse=True)
    codes = codes.reshape(labels.shape)
    row = np.arange(height) * rows // height
    column = np.arange(width) * columns // width
    cell = (np.arange(count)[:, None, None] * rows + row[:, None]) * columns + column
    votes = np.bincount((cell * len(values) + codes).ravel(), minlength=count * rows * columns * len(values))
    return values[votes.reshape(count, rows, columns, len(values)).argmax(-1)]


def granularity(codes: np.ndarray, labels: np.ndarray, permutations: int = 20, seed: int = 0) -> Granularity:
    """Of codes (N, h, w) and label maps (N, H, W), or labels already of the codes' shape; negative labels do not count.

    Raises InputError where nothing is labelled.
    """
    if codes.ndim != 3 or labels.ndim != 3 or len(codes) != len(labels):
        raise InputError(f"codes {codes.shape} and labels {labels.shape}; expected (N, h, w) and (N, H, W)")
    under = labels if labels.shape == codes.shape else cell_labels(labels, *codes.shape[1:])
    known = under >= 0
    if not known.any():
        raise InputError("no cell has a label of at least 0")
    token = np.unique(codes[known], return_inverse=True)[1]
    label = np.unique(under[known], return_inverse=True)[1]
    purity, information = _scores(token, label)
    rng = np.random.default_rng(seed)
    chance = np.array([_scores(token, rng.permutation(label)) for _ in range(permutations)])
    mean, deviation = chance.mean(0), chance.std(0)
    return Granularity(
        purity,
        purity - mean[0],
        information,
        information - mean[1],
        float((information - mean[1]) / max(deviation[1], 1e-12)),
    )


def _scores(token: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    tokens, labels = token.max() + 1, label.max() + 1
    table = np.bincount(token * labels + label, minlength=tokens * labels).reshape(tokens, labels) / len(token)
    p, q = table.sum(1), table.sum(0)
    joint, a, b = (-(part[part > 0] * np.log(part[part > 0])).sum() for part in (table, p, q))
    return float(table.max(1).sum()), float(2 * (a + b - joint) / (a + b)) if a + b > 0 else 0.0
