"""Corpus statistics of token streams: are a tokenizer's codes used as words are? (arXiv:2411.05001)

    codes (N, L): N images, each a sentence of L codes, read row by row --n-gram counts--> the laws of word frequency

Zipf (frequency against rank), Benford (first digits of counts), Yule-Simon (how many types occur k times), Heaps (new
types as the text grows), entropy, Huffman's code and the perplexity of bigrams. n-grams do not cross images. The
paper's code is not public: the fits below are ours, and each says what it minimises and over which ranks. All is
natural log unless bits are said.
"""

import heapq
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vistok.errors import InputError

Array = np.ndarray


def ngrams(sentences: Sequence[Array], n: int) -> Array:
    """Counts of the n-grams that occur, descending. Sentences are 1D integer arrays; none is crossed."""
    windows = [np.lib.stride_tricks.sliding_window_view(s, n) for s in map(np.asarray, sentences) if len(s) >= n]
    if not windows:
        raise InputError(f"no sentence has {n} tokens")
    _, counts = np.unique(np.concatenate(windows), axis=0, return_counts=True)
    return np.sort(counts)[::-1]


# -- frequency ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Zipf:
    """f(r) = C r^-a. `exponent` a by least squares of log f on log r over `ranks`, `r2` the explained variance.

    likelihood_exponent  a by maximum likelihood over the same ranks
    mandelbrot           (a, b) of C / (r + b)^a, least squares in logs over a grid of b
    lognormal_gain       log likelihood per token of a log-normal frequency curve above that of Zipf's, on these ranks
    """

    exponent: float
    r2: float
    ranks: tuple[int, int]
    likelihood_exponent: float
    mandelbrot: tuple[float, float]
    lognormal_gain: float


def zipf(counts: Array, top: int = 300) -> Zipf:
    """Fit the `top` most frequent types of descending counts. Raises InputError for fewer than three types."""
    counts = np.asarray(counts, dtype=np.float64)[:top]
    if len(counts) < 3 or counts[-1] <= 0:
        raise InputError(f"{len(counts)} types with counts; Zipf's law needs at least three")
    rank = np.arange(1, len(counts) + 1)
    x, y = np.log(rank), np.log(counts)
    slope, r2 = _line(x, y)
    shifts = np.concatenate([[0.0], np.geomspace(0.1, 10 * len(counts), 60)])
    errors = []
    for shift in shifts:
        a, _ = _line(np.log(rank + shift), y)
        fitted = a * np.log(rank + shift)
        errors.append(np.square(y - fitted - (y - fitted).mean()).sum())
    best = int(np.argmin(errors))
    likelihood, exponent = _power_likelihood(counts, x)
    return Zipf(
        exponent=-slope,
        r2=r2,
        ranks=(1, len(counts)),
        likelihood_exponent=exponent,
        mandelbrot=(-_line(np.log(rank + shifts[best]), y)[0], float(shifts[best])),
        lognormal_gain=_lognormal_likelihood(counts, x) - likelihood,
    )


def benford(counts: Array) -> tuple[Array, float]:
    """Shares (9,) of the first digits 1..9 of counts, and their divergence KL(shares || log10(1 + 1/d)) in nats."""
    digits = np.array([int(str(int(count))[0]) for count in counts])
    shares = np.bincount(digits, minlength=10)[1:10] / len(digits)
    law = np.log10(1 + 1 / np.arange(1, 10))
    present = shares > 0
    return shares, float((shares[present] * np.log(shares[present] / law[present])).sum())


def yule_simon(counts: Array, steps: int = 500) -> float:
    """rho of p(k) = rho B(k, rho + 1), the chance of a type to occur k times, by maximum likelihood.

    The derivative of the likelihood vanishes at rho = types / sum of (psi(k + rho + 1) - psi(rho + 1)), iterated.
    """
    levels, types = np.unique(np.asarray(counts, dtype=np.float64), return_counts=True)
    if not len(levels):
        raise InputError("no types with counts")
    rho = 1.0
    for _ in range(steps):
        fresh = types.sum() / (types * (_digamma(levels + rho + 1) - _digamma(rho + 1))).sum()
        if abs(fresh - rho) < 1e-12 * rho:
            break
        rho = float(fresh)
    return rho


# -- innovation --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Innovation:
    """V(n) = c n^b, the types after n tokens, least squares in logs over `points`, a mean over orders of sentences.

    to90, to99  sentences until 90 and 99 % of all types that occur have occurred
    points      (tokens, types), as many as the curve was read at
    """

    exponent: float
    constant: float
    to90: float
    to99: float
    points: list[tuple[int, float]]


def innovation(sentences: Sequence[Array], orders: int = 5, seed: int = 0, points: int = 40) -> Innovation:
    """Heaps' law of sentences, in `orders` random orders. Raises InputError for fewer than two sentences."""
    if len(sentences) < 2:
        raise InputError(f"{len(sentences)} sentences; the growth of a vocabulary needs at least two")
    rng = np.random.default_rng(seed)
    total = sum(map(len, sentences))
    at = np.unique(np.geomspace(max(1, total // 1000), total, points).astype(int))
    curve, reached = np.zeros(len(at)), np.zeros(2)
    for _ in range(orders):
        order = rng.permutation(len(sentences))
        stream = np.concatenate([sentences[place] for place in order])
        first = np.zeros(total, dtype=bool)
        first[np.unique(stream, return_index=True)[1]] = True
        types = np.cumsum(first)
        curve += types[at - 1] / orders
        ends = np.cumsum([len(sentences[place]) for place in order])
        for index, share in enumerate((0.9, 0.99)):
            reached[index] += (1 + np.searchsorted(types[ends - 1], share * types[-1])) / orders
    exponent, _ = _line(np.log(at), np.log(curve))
    constant = float(np.exp(np.mean(np.log(curve) - exponent * np.log(at))))
    return Innovation(
        exponent, constant, float(reached[0]), float(reached[1]), list(zip(at.tolist(), curve.tolist(), strict=True))
    )


# -- information -------------------------------------------------------------------------------------------------------


def entropy(counts: Array) -> float:
    """Bits per token of a distribution given by counts."""
    p = np.asarray(counts, dtype=np.float64)
    p = p[p > 0] / p.sum()
    return float(-(p * np.log2(p)).sum())


def huffman_lengths(counts: Array) -> Array:
    """Bits of each type in a Huffman code of its counts, which must be above 0; one type alone takes 1 bit."""
    counts = np.asarray(counts)
    lengths = np.zeros(len(counts), dtype=np.int64)
    if len(counts) == 1:
        return lengths + 1
    heap: list[tuple[int, int, list[int]]] = [(int(count), place, [place]) for place, count in enumerate(counts)]
    heapq.heapify(heap)
    while len(heap) > 1:
        one, other = heapq.heappop(heap), heapq.heappop(heap)
        members = one[2] + other[2]
        lengths[members] += 1
        heapq.heappush(heap, (one[0] + other[0], one[1], members))
    return lengths


@dataclass(frozen=True)
class Compression:
    """How much shorter codes get, 1 - bits per token over `reference`, by Huffman's code and by zlib on the stream."""

    huffman_bits: float
    reference: float
    huffman: float
    zlib: float


def compression(sentences: Sequence[Array], size: int) -> Compression:
    """Of codes of a codebook of `size`; the reference is log2 of it."""
    stream = np.concatenate(list(sentences))
    counts = np.unique(stream, return_counts=True)[1]
    bits = float((huffman_lengths(counts) * counts).sum() / counts.sum())
    reference = float(np.log2(size))
    # zlib sees bytes: two a token where one does not hold the codebook
    packed = stream.astype(np.uint8 if size <= 256 else np.uint16 if size <= 65536 else np.uint32).tobytes()
    squeezed = 8 * len(zlib.compress(packed, 9)) / len(stream)
    return Compression(bits, reference, 1 - bits / reference, 1 - squeezed / reference)


def perplexities(train: Sequence[Array], test: Sequence[Array], size: int) -> tuple[float, float]:
    """Of held-out sentences: unigrams (add-one smoothed), and bigrams interpolated with them.

    The weight of the bigrams is the one of 0.05, .., 0.95 that fits the last tenth of `train` best.
    """
    if len(train) < 2 or not test:
        raise InputError(f"{len(train)} sentences to count and {len(test)} to test; expected at least two and one")
    held = max(1, len(train) // 10)
    weights = np.linspace(0.05, 0.95, 19)
    fitted = _Bigrams(train[:-held], size)
    best = max(weights, key=lambda weight: fitted.score(train[-held:], weight)[1])
    unigram, bigram = _Bigrams(train, size).score(test, best)
    return float(np.exp(-unigram)), float(np.exp(-bigram))


class _Bigrams:
    """Counts of pairs, and the mean log probability of sentences under them."""

    def __init__(self, sentences: Sequence[Array], size: int) -> None:
        self.size = size
        stream = np.concatenate(list(sentences))
        self.single = (np.bincount(stream, minlength=size) + 1) / (len(stream) + size)
        pairs = np.concatenate([s[:-1].astype(np.int64) * size + s[1:] for s in sentences])
        self.keys, self.counts = np.unique(pairs, return_counts=True)
        self.before = np.bincount(np.concatenate([s[:-1] for s in sentences]), minlength=size)

    def score(self, sentences: Sequence[Array], weight: float) -> tuple[float, float]:
        first = np.concatenate([s[:-1] for s in sentences]).astype(np.int64)
        second = np.concatenate([s[1:] for s in sentences])
        keys = first * self.size + second
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        seen = np.where(self.keys[place] == keys, self.counts[place], 0)
        given = np.divide(seen, self.before[first], out=np.zeros(len(keys)), where=self.before[first] > 0)
        single = self.single[second]
        mixed = np.where(self.before[first] > 0, weight * given + (1 - weight) * single, single)
        return float(np.log(single).mean()), float(np.log(mixed).mean())


# -- inside ------------------------------------------------------------------------------------------------------------


def _line(x: Array, y: Array) -> tuple[float, float]:
    """Slope of the least-squares line, and its R^2."""
    dx, dy = x - x.mean(), y - y.mean()
    spread = (dy**2).sum()
    slope = (dx * dy).sum() / (dx**2).sum()
    return float(slope), float(1 - ((dy - slope * dx) ** 2).sum() / spread) if spread > 0 else 1.0


def _power_likelihood(counts: Array, log_rank: Array) -> tuple[float, float]:
    """Largest mean log likelihood of p(r) ~ r^-a over the ranks, and its a: Newton's steps, the problem is concave."""
    wanted, a = float((counts * log_rank).sum() / counts.sum()), 1.0
    for _ in range(100):
        p = np.exp(-a * log_rank)
        p /= p.sum()
        mean = float((p * log_rank).sum())
        step = (mean - wanted) / max(float((p * log_rank**2).sum()) - mean**2, 1e-12)
        a += float(np.clip(step, -1, 1))
        if abs(step) < 1e-10:
            break
    p = np.exp(-a * log_rank)
    return float(-a * wanted - np.log(p.sum())), a


def _lognormal_likelihood(counts: Array, log_rank: Array) -> float:
    """The same of log p(r) = quadratic in log r, which is a log-normal curve, by Newton's steps on two coefficients."""
    share = counts / counts.sum()
    features = np.stack([log_rank, log_rank**2])
    wanted, theta = features @ share, np.array([-1.0, 0.0])
    for _ in range(200):
        logits = theta @ features
        p = np.exp(logits - logits.max())
        p /= p.sum()
        mean = features @ p
        step = np.linalg.solve((features * p) @ features.T - np.outer(mean, mean) + 1e-9 * np.eye(2), wanted - mean)
        theta = theta + step * min(1.0, 1.0 / max(1e-12, np.abs(step).max()))
        if np.abs(step).max() < 1e-9:
            break
    logits = theta @ features
    return float(theta @ wanted - np.log(np.exp(logits - logits.max()).sum()) - logits.max())


def _digamma(values: Array | float) -> Array:
    import torch

    return torch.special.digamma(torch.as_tensor(values, dtype=torch.float64)).numpy()
