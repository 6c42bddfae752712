"""TokBench's scores: how much of text and faces survives a tokenizer, by their size in the picture (arXiv:2505.18142).

    instances (ratio, score) --bins by relative size--> mean of each bin --> the unweighted mean of the bins

A setting is the side at which pictures are rebuilt; bins are half-open and instances below the first edge do not count.
An empty bin is NaN, and so is then the mean.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import nan
from statistics import fmean

from vistok.errors import UnknownNameError, nearest

TEXT_EDGES: dict[str, tuple[float, ...]] = {
    "256": (0.02, 0.03, 0.04, 1.0),
    "512": (0.01, 0.02, 0.03, 1.0),
    "1024": (0.005, 0.01, 0.02, 1.0),
}
FACE_EDGES: dict[str, tuple[float, ...]] = {
    "256": (0.0, 0.1, 0.2, 1.0),
    "512": (0.0, 0.05, 0.2, 1.0),
    "1024": (0.0, 0.05, 0.1, 1.0),
}


@dataclass(frozen=True)
class TextInstance:
    """A word: its relative size, whether it was read right, and 1 - its normalised edit distance."""

    ratio: float
    accuracy: float
    ned: float


@dataclass(frozen=True)
class FaceInstance:
    """A face: its relative size, and the cosine of its embedding to the original's."""

    ratio: float
    similarity: float


@dataclass(frozen=True)
class Binned:
    """Means by size, small to large, how many instances each has, and the mean of the means.

    `overall` is the plain mean of all instances, those below the first edge among them.
    """

    edges: tuple[float, ...]
    bins: tuple[float, ...]
    counts: tuple[int, ...]
    mean: float
    overall: float


def score_text(instances: Iterable[TextInstance], setting: str) -> dict[str, Binned]:
    """T-ACC and T-NED of the words of all sets together. Raises UnknownNameError for an unknown setting."""
    edges, found = _edges(TEXT_EDGES, setting), list(instances)
    return {
        "t-acc": _binned([(one.ratio, one.accuracy) for one in found], edges),
        "t-ned": _binned([(one.ratio, one.ned) for one in found], edges),
    }


def score_faces(instances: Iterable[FaceInstance], setting: str) -> dict[str, Binned]:
    """F-Sim of faces. Raises UnknownNameError for an unknown setting."""
    return {"f-sim": _binned([(one.ratio, one.similarity) for one in instances], _edges(FACE_EDGES, setting))}


def _binned(scores: list[tuple[float, float]], edges: tuple[float, ...]) -> Binned:
    parts = [[s for ratio, s in scores if low <= ratio < high] for low, high in pairwise(edges)]
    means = tuple(fmean(part) if part else nan for part in parts)
    return Binned(edges, means, tuple(map(len, parts)), fmean(means), fmean(s for _, s in scores) if scores else nan)


def _edges(table: dict[str, tuple[float, ...]], setting: str) -> tuple[float, ...]:
    if setting not in table:
        raise UnknownNameError(f"no setting {setting!r}{nearest(setting, list(table)) or f'; there are {list(table)}'}")
    return table[setting]
