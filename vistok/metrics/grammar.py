"""A probabilistic context-free grammar of token sequences, learned by the inside algorithm (after arXiv:1906.10225).

    S -> A,  A -> B C,  T -> w:  inside scores of all spans, short to long, in logs --> log p(sentence)

Nonterminals, preterminals and words have embeddings; rule scores are made of those, so that a large codebook costs no
table of its own. This is the neural grammar of Kim, Dyer and Rush without its sentence vector. Spans of one length are
computed at once.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import InputError


class Grammar(nn.Module):
    """N nonterminals, T preterminals, K words; `forward` gives log p(sentence) (B,) of sentences (B, L), L >= 2."""

    def __init__(self, words: int, nonterminals: int = 10, preterminals: int = 20, width: int = 64) -> None:
        super().__init__()
        self.nonterminals, self.preterminals = nonterminals, preterminals
        self.symbols = nn.Parameter(torch.randn(nonterminals + preterminals, width) / width**0.5)
        self.start = nn.Parameter(torch.randn(width) / width**0.5)
        self.root, self.word = _Residual(width), _Residual(width)
        self.rule = nn.Linear(width, (nonterminals + preterminals) ** 2)
        self.root_head = nn.Linear(width, nonterminals)
        self.word_head = nn.Linear(width, words)

    def rules(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log probabilities: of roots (N,), of pairs (N, N + T, N + T), of words (T, K)."""
        heads, tails = self.symbols[: self.nonterminals], self.symbols[self.nonterminals :]
        both = self.nonterminals + self.preterminals
        return (
            self.root_head(self.root(self.start)).log_softmax(-1),
            self.rule(heads).log_softmax(-1).unflatten(-1, (both, both)),
            self.word_head(self.word(tails)).log_softmax(-1),
        )

    def forward(self, sentences: Tensor) -> Tensor:
        """Log probabilities, natural. Raises InputError for sentences of one word."""
        return inside(sentences, *self.rules())


def inside(sentences: Tensor, root: Tensor, pairs: Tensor, words: Tensor) -> Tensor:
    """log p (B,) of sentences (B, L) under S -> A (N,), A -> B C (N, N + T, N + T) and T -> w (T, K), all in logs."""
    length = sentences.shape[1]
    if length < 2:
        raise InputError("a sentence of this grammar has at least two words")
    nonterminals, both = pairs.shape[0], pairs.shape[1]
    impossible = -math.inf
    # scores[w][:, i]: span of w words from i, over all symbols; a word is a preterminal, a longer span a nonterminal
    leaf = F.pad(words.T[sentences], (nonterminals, 0), value=impossible)  # (B, L, N + T)
    scores: list[Tensor] = [leaf]
    rule = pairs.exp()
    for width in range(2, length + 1):
        starts = length - width + 1
        left = torch.stack([scores[cut - 1][:, :starts] for cut in range(1, width)], 2)  # (B, starts, cuts, N + T)
        right = torch.stack([scores[width - cut - 1][:, cut : cut + starts] for cut in range(1, width)], 2)
        tops = left.amax(-1), right.amax(-1)
        peak = (tops[0] + tops[1]).amax(-1)  # (B, starts), subtracted before the exponential
        a = (left - tops[0][..., None]).exp()
        b = (right - tops[1][..., None]).exp() * (tops[0] + tops[1] - peak[..., None]).exp()[..., None]
        together = torch.einsum("bscl,bscr->bslr", a, b)  # sums over the cuts
        found = torch.einsum("bslr,nlr->bsn", together, rule).clamp_min(1e-37).log() + peak[..., None]
        scores.append(F.pad(found, (0, both - nonterminals), value=impossible))
    return (scores[-1][:, 0, :nonterminals] + root).logsumexp(-1)


def fit_grammar(
    train: Sequence[np.ndarray],
    test: Sequence[np.ndarray],
    words: int,
    *,
    nonterminals: int = 10,
    preterminals: int = 20,
    epochs: int = 10,
    batch: int = 16,
    lr: float = 3e-3,
    seed: int = 0,
) -> tuple[Grammar, float]:
    """Learn a grammar of sentences of one length, and the perplexity per token of held-out ones.

    Adam (0.75, 0.999), the gradient's norm at most 3, as the paper trains. Raises InputError for lengths that differ.
    """
    if len({len(sentence) for sentence in (*train, *test)}) != 1:
        raise InputError("sentences of one length: cut them to windows first")
    rows, held = (torch.as_tensor(np.stack(list(part)), dtype=torch.long) for part in (train, test))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grammar = Grammar(words, nonterminals, preterminals)
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(grammar.parameters(), lr=lr, betas=(0.75, 0.999))
    for _ in range(epochs):
        for part in torch.randperm(len(rows), generator=rng).split(batch):
            optimizer.zero_grad()
            (-grammar(rows[part]).mean() / rows.shape[1]).backward()
            nn.utils.clip_grad_norm_(grammar.parameters(), 3.0)
            optimizer.step()
    with torch.no_grad():
        scored = torch.cat([grammar(part) for part in held.split(batch)])
    return grammar, float((-scored.sum() / held.numel()).exp())


class _Residual(nn.Module):
    """Two residual layers, as the paper's rule networks have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return x
