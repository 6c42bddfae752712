"""The inside algorithm against all derivations, and a grammar that learns an order."""

from functools import cache

import numpy as np
import pytest
import torch

from vistok.errors import InputError
from vistok.metrics.grammar import Grammar, fit_grammar, inside


def brute_force(sentence, root, pairs, words):
    """The sum over all trees, by recursion over spans and symbols."""
    nonterminals, both = pairs.shape[0], pairs.shape[1]

    @cache
    def span(low, high, symbol):
        if high - low == 1:
            return 0.0 if symbol < nonterminals else float(words[symbol - nonterminals, sentence[low]])
        if symbol >= nonterminals:
            return 0.0
        return sum(
            float(pairs[symbol, left, right]) * span(low, cut, left) * span(cut, high, right)
            for cut in range(low + 1, high)
            for left in range(both)
            for right in range(both)
        )

    return sum(float(root[symbol]) * span(0, len(sentence), symbol) for symbol in range(nonterminals))


@pytest.mark.parametrize("length", [2, 3, 6])
def test_inside_is_the_sum_over_trees(length):
    torch.manual_seed(0)
    root, pairs, words = (
        torch.randn(2).softmax(0),
        torch.randn(2, 25).softmax(1).view(2, 5, 5),
        torch.randn(3, 4).softmax(1),
    )
    sentences = torch.randint(0, 4, (3, length))
    found = inside(sentences, root.log(), pairs.log(), words.log())
    wanted = [brute_force(tuple(row.tolist()), root, pairs, words) for row in sentences]
    np.testing.assert_allclose(found.exp(), wanted, rtol=1e-4)


def test_probabilities_of_all_sentences_of_a_length_stay_below_one():
    torch.manual_seed(0)
    grammar = Grammar(3, 3, 4)
    rows = torch.cartesian_prod(*[torch.arange(3)] * 4)
    assert 0 < grammar(rows).exp().sum().item() < 1
    with pytest.raises(InputError, match="two words"):
        grammar(rows[:, :1])


def test_it_learns():
    rng = np.random.default_rng(0)
    # x y x y with x in 0..3 and y in 4..7: half the words are impossible at each place
    sentences = list(np.stack([rng.integers(0, 4, 120), rng.integers(4, 8, 120)] * 2, 1))
    _, before = fit_grammar(sentences[:100], sentences[100:], 8, nonterminals=4, preterminals=4, epochs=0)
    _, after = fit_grammar(sentences[:100], sentences[100:], 8, nonterminals=4, preterminals=4, epochs=25, lr=1e-2)
    assert after < 0.7 * before
    with pytest.raises(InputError, match="one length"):
        fit_grammar(sentences, [np.arange(3)], 8)
