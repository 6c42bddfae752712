"""Whether two languages' tokens keep the same company: co-occurrence embeddings, rotated onto each other (2411.05001).

    sentences --windows--> positive pointwise mutual information --SVD--> embeddings (types, D) --Procrustes--> residual

The paper's embeddings and distance are not public. Tokens of two languages have no dictionary, so types are matched by
rank of frequency; the residual of a language's two halves is what it is to be measured against.
"""

from collections.abc import Sequence

import numpy as np

from vistok.errors import InputError


def embeddings(sentences: Sequence[np.ndarray], types: int = 1000, dim: int = 64, window: int = 5) -> np.ndarray:
    """Vectors (types, dim), unit length, of the most frequent types, by frequency; fewer where there are fewer.

    Counts within `window` tokens either way, positive PMI, the leading singular vectors times root singular values.
    """
    values, counts = np.unique(np.concatenate(list(sentences)), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:types]
    kept = values[order]
    place = np.full(int(values.max()) + 1, -1)
    place[kept] = np.arange(len(kept))
    table = np.zeros((len(kept), len(kept)))
    for sentence in sentences:
        codes = place[np.asarray(sentence)]
        for distance in range(1, min(window, len(codes) - 1) + 1):
            first, second = codes[:-distance], codes[distance:]
            both = (first >= 0) & (second >= 0)
            np.add.at(table, (first[both], second[both]), 1.0)
    table += table.T
    total = table.sum()
    if not total:
        raise InputError("no two tokens occur together; give longer sentences")
    share = table.sum(1) / total
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log(table / total / np.outer(share, share))
    left, singular, _ = np.linalg.svd(np.where(np.isfinite(pmi), np.maximum(pmi, 0), 0), hermitian=True)
    vectors = left[:, :dim] * np.sqrt(singular[:dim])
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def procrustes_residual(first: np.ndarray, second: np.ndarray) -> float:
    """What is left of the distance after the best rotation of one set (n, D) onto the other: 0 for rotated copies.

    Both are centred and of unit Frobenius norm, so that the residual lies in [0, 2]; that of unrelated sets is near 2.
    The longer set is cut to the length of the shorter one. Raises InputError for widths that differ.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise InputError(f"embeddings of {first.shape} and {second.shape}; expected two sets of one width")
    count = min(len(first), len(second))
    a, b = (part[:count] - part[:count].mean(0) for part in (first, second))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return float(max(0.0, 2 - 2 * np.linalg.svd(a.T @ b, compute_uv=False).sum()))
