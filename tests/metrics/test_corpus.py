"""Corpus statistics on texts whose law is known."""

import numpy as np
import pytest

from vistok.errors import InputError
from vistok.metrics.alignment import embeddings, procrustes_residual
from vistok.metrics.corpus import (
    benford,
    compression,
    entropy,
    huffman_lengths,
    innovation,
    ngrams,
    perplexities,
    yule_simon,
    zipf,
)
from vistok.metrics.granularity import cell_labels, granularity


def draw(p, images=200, length=256, seed=0):
    rng = np.random.default_rng(seed)
    return list(rng.choice(len(p), (images, length), p=p / p.sum()))


def powers(a, size=512):
    return np.arange(1, size + 1) ** -float(a)


@pytest.mark.parametrize("a", [0.5, 1.0, 1.3])
def test_zipf_finds_its_exponent(a):
    found = zipf(ngrams(draw(powers(a), 400), 1), 100)
    assert found.exponent == pytest.approx(a, abs=0.05)
    assert found.likelihood_exponent == pytest.approx(a, abs=0.05)
    assert found.r2 > 0.97
    assert abs(found.lognormal_gain) < 0.003


def test_zipf_mandelbrot_and_lognormal_on_exact_counts():
    rank = np.arange(1, 301)
    found = zipf(1e7 / (rank + 20.0) ** 1.5)
    assert found.mandelbrot[0] == pytest.approx(1.5, abs=0.15)
    assert found.mandelbrot[1] == pytest.approx(20, rel=0.3)
    assert found.lognormal_gain > 0.01, "a bent curve is told from a straight one"
    with pytest.raises(InputError, match="three"):
        zipf(np.array([3, 1]))


def test_ngrams_do_not_cross_sentences():
    assert ngrams([np.array([1, 2, 1, 2]), np.array([2, 2])], 2).tolist() == [2, 1, 1]
    with pytest.raises(InputError, match="3 tokens"):
        ngrams([np.array([1, 2])], 3)


def test_benford_and_yule():
    shares, divergence = benford(2.0 ** np.arange(0, 300))
    assert shares.sum() == pytest.approx(1)
    assert divergence < 0.02
    assert benford(np.full(100, 7))[1] == pytest.approx(-np.log(np.log10(1 + 1 / 7)))
    rng = np.random.default_rng(0)
    waiting = rng.exponential(size=20_000) / 1.7
    assert yule_simon(rng.geometric(np.exp(-waiting))) == pytest.approx(1.7, rel=0.05)


def test_entropy_and_huffman():
    assert entropy(np.ones(1024)) == pytest.approx(10)
    assert huffman_lengths(np.array([4, 2, 1, 1])).tolist() == [1, 2, 3, 3]
    assert huffman_lengths(np.array([5])).tolist() == [1]
    counts = np.random.default_rng(0).integers(1, 1000, 300)
    bits = (huffman_lengths(counts) * counts).sum() / counts.sum()
    assert entropy(counts) <= bits < entropy(counts) + 1
    assert (2.0 ** -huffman_lengths(counts)).sum() == pytest.approx(1), "a full prefix code"


def test_uniform_codes_do_not_compress_and_a_skewed_text_does():
    even = compression(draw(np.ones(512)), 512)
    assert even.huffman == pytest.approx(0, abs=0.01)
    assert even.zlib < 0
    assert compression(draw(powers(1.5)), 512).huffman > 0.3


def test_innovation():
    fast, slow = innovation(draw(np.ones(200))), innovation(draw(powers(1.2, 5000)))
    assert fast.exponent < slow.exponent
    assert fast.to99 < slow.to90
    assert slow.points[-1][1] == len(np.unique(np.concatenate(draw(powers(1.2, 5000)))))
    with pytest.raises(InputError):
        innovation([np.arange(4)])


def test_bigrams_see_order():
    rng = np.random.default_rng(0)
    walk = [(rng.integers(64) + np.cumsum(rng.integers(-1, 2, 300))) % 64 for _ in range(60)]
    unigram, bigram = perplexities(walk[:50], walk[50:], 64)
    assert bigram == pytest.approx(3, rel=0.15)
    assert unigram == pytest.approx(64, rel=0.1)
    mixed = list(rng.permutation(np.concatenate(walk)).reshape(60, 300))
    shuffled = perplexities(mixed[:50], mixed[50:], 64)
    assert shuffled[1] / shuffled[0] > 0.8


def test_granularity():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, (20, 8, 8))
    exact = granularity(labels * 3 + rng.integers(0, 3, labels.shape), labels)
    assert exact.purity == 1
    assert exact.information_ratio > 50
    chance = granularity(rng.integers(0, 18, labels.shape), labels)
    assert abs(chance.information_above) < 0.01
    assert abs(chance.purity_above) < 0.03
    maps = labels.repeat(4, 1).repeat(4, 2)
    assert np.array_equal(cell_labels(maps, 8, 8), labels)
    assert granularity(labels, maps).information == pytest.approx(1)
    with pytest.raises(InputError, match="no cell"):
        granularity(labels, np.full_like(labels, -1))
    with pytest.raises(InputError, match="under a grid"):
        granularity(labels, labels[:, :4])


def test_alignment():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(50, 8))
    turned = a @ np.linalg.qr(rng.normal(size=(8, 8)))[0] * 3 + 2
    assert procrustes_residual(a, turned) == pytest.approx(0, abs=1e-9)
    assert procrustes_residual(a, rng.normal(size=(50, 8))) > 0.8
    walk = [(rng.integers(50) + np.cumsum(rng.integers(-1, 2, 200))) % 50 for _ in range(80)]
    halves = [embeddings(part, dim=8) for part in (walk[:40], walk[40:])]
    assert halves[0].shape == (50, 8)
    # neighbours on the circle keep company: their vectors are closer than those of codes far apart
    everything = embeddings(walk, dim=8)
    order = np.argsort(-np.unique(np.concatenate(walk), return_counts=True)[1], kind="stable")
    vectors = everything[np.argsort(order)]
    near = (vectors * np.roll(vectors, 1, 0)).sum(1).mean()
    far = (vectors * np.roll(vectors, 25, 0)).sum(1).mean()
    assert near > far + 0.3
