"""The language of a tokenizer's codes beside a natural one: what `vistok bench language` prints (arXiv:2411.05001).

    pictures --crop, encode--> codes (N, rows, columns) --row by row--> sentences --> the statistics of `metrics.corpus`
    words of a text ---------------------------------------------------> sentences --> the same

Every statistic stands beside those of controls: codes drawn evenly, by Zipf's law, and the corpus with its tokens
shuffled within an image and across all of them. The paper's own code is not public; ours are fixed definitions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from vistok.data.items import Source
from vistok.data.sources import Where, open_source
from vistok.errors import InputError, VistokError
from vistok.evaluation.protocols import evaluation_crop
from vistok.metrics.corpus import (
    Compression,
    Innovation,
    Zipf,
    benford,
    compression,
    entropy,
    innovation,
    ngrams,
    perplexities,
    yule_simon,
    zipf,
)
from vistok.tokenizer import Tokenizer

TOP, LONGEST = 300, 4
LINES = ("row", "column", "snake")  # ways to read a grid as a sentence


@dataclass(frozen=True)
class Corpus:
    """Sentences of codes 0..size - 1, by name; `grid` (rows, columns) where they are pictures read row by row."""

    name: str
    size: int
    sentences: list[np.ndarray]
    grid: tuple[int, int] | None = None

    @property
    def tokens(self) -> int:
        """Tokens in all sentences."""
        return sum(map(len, self.sentences))

    def read(self, line: str) -> "Corpus":
        """The same pictures read another way. Raises InputError where there is no grid, or no such way."""
        if self.grid is None or line not in LINES:
            raise InputError(f"{self.name} read by {line!r}; expected a corpus of grids and one of {', '.join(LINES)}")
        grids = np.stack(self.sentences).reshape(-1, *self.grid)
        if line == "column":
            grids = grids.transpose(0, 2, 1)
        if line == "snake":
            grids = grids.copy()
            grids[:, 1::2] = grids[:, 1::2, ::-1]
        return Corpus(f"{self.name}, {line}", self.size, list(grids.reshape(len(grids), -1)), None)


@dataclass(frozen=True)
class Language:
    """Statistics of a corpus; see `vistok.metrics.corpus` for each.

    frequency    of the n-grams, n = 1..4
    digits       Benford: divergence of the first digits of unigram counts
    bits         entropy of single tokens, and `share` of the log2 of the codebook
    growth       Heaps
    order        held-out bigram perplexity over held-out unigram perplexity: 1 where order says nothing
    """

    name: str
    size: int
    sentences: int
    tokens: int
    types: int
    frequency: list[Zipf]
    digits: float
    yule: float
    bits: float
    share: float
    code: Compression
    growth: Innovation
    unigram_perplexity: float
    bigram_perplexity: float

    @property
    def order(self) -> float:
        """See above."""
        return self.bigram_perplexity / self.unigram_perplexity

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"order": self.order}


def describe(corpus: Corpus, *, top: int = TOP, seed: int = 0, held_out: float = 0.1) -> Language:
    """The statistics of a corpus. Raises InputError for fewer than ten sentences."""
    if len(corpus.sentences) < 10:
        raise InputError(f"{corpus.name} has {len(corpus.sentences)} sentences; its statistics need at least ten")
    counts = ngrams(corpus.sentences, 1)
    cut = max(1, round(held_out * len(corpus.sentences)))
    unigram, bigram = perplexities(corpus.sentences[:-cut], corpus.sentences[-cut:], corpus.size)
    bits = entropy(counts)
    return Language(
        name=corpus.name,
        size=corpus.size,
        sentences=len(corpus.sentences),
        tokens=corpus.tokens,
        types=len(counts),
        frequency=[zipf(ngrams(corpus.sentences, n), top) for n in range(1, LONGEST + 1)],
        digits=benford(counts)[1],
        yule=yule_simon(counts),
        bits=bits,
        share=bits / float(np.log2(corpus.size)),
        code=compression(corpus.sentences, corpus.size),
        growth=innovation(corpus.sentences, seed=seed),
        unigram_perplexity=unigram,
        bigram_perplexity=bigram,
    )


# -- corpora -----------------------------------------------------------------------------------------------------------


def picture_corpora(
    tokenizer: Tokenizer, data: Source | Where, *, size: int | None = None, limit: int | None = None, batch: int = 16
) -> list[Corpus]:
    """A corpus for every code column of every segment, of centre crops; pictures that cannot be read are left out.

    `size`: side of the crop, the model's own if None. Raises InputError for continuous tokens, or where nothing reads.
    """
    source = open_source(data)
    source = source if limit is None else source.first(limit)
    side = size or min(tokenizer.spec.size)
    spec = tokenizer.spec.at((side, side))
    if any(not segment.codebooks for segment in spec.segments):
        raise InputError(f"{tokenizer.name} has continuous tokens, which are no language; give one with codes")
    found = []
    for group in _groups(_crops(source, side), batch):
        codes = tokenizer.encode(np.stack(group)).codes
        assert codes is not None
        found.append((codes if codes.ndim == 3 else codes[..., None]).cpu().numpy())
    if not found:
        raise InputError(f"not one picture of {source.name} can be read")
    rows, start, corpora = np.concatenate(found), 0, []
    for segment in spec.segments:
        for column, book in enumerate(segment.codebooks):
            several = len(spec.segments) > 1 or len(segment.codebooks) > 1
            name = f"{tokenizer.name} {segment.name}:{column}" if several else tokenizer.name
            shape = segment.shape
            grid = (int(np.prod(shape[:-1])), shape[-1]) if len(shape) > 1 else None
            corpora.append(Corpus(name, book, list(rows[:, start : start + segment.count, column]), grid))
        start += segment.count
    return corpora


def text_corpus(words: Sequence[str], tokens: int, length: int, size: int, name: str = "text") -> Corpus:
    """A text of `tokens` words cut to sentences of `length`: the `size` - 1 most frequent words, the others as one.

    Raises InputError where the text is shorter.
    """
    if len(words) < tokens:
        raise InputError(f"{name} has {len(words)} words, fewer than the {tokens} tokens that it is compared with")
    taken = np.asarray(words[: tokens // length * length])
    types, codes, counts = np.unique(taken, return_inverse=True, return_counts=True)
    place = np.full(len(types), size - 1)
    kept = np.argsort(-counts, kind="stable")[: size - 1]
    place[kept] = np.arange(len(kept))
    return Corpus(name, size, list(place[codes].reshape(-1, length)))


@cache
def python_words() -> list[str]:
    """About 300,000 lower-case words and signs of English: the manual and the docstrings that come with Python."""
    import ast
    import re
    import sysconfig
    from pathlib import Path
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError):
            continue
        holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, holders)]
    return re.findall(r"[a-z']+|[^\sa-z]", "\n".join(texts).lower())


def controls(corpus: Corpus, seed: int = 0) -> list[Corpus]:
    """Corpora of the same shape: codes drawn evenly, by Zipf's law, shuffled within each image, and across all."""
    rng = np.random.default_rng(seed)
    count, length = len(corpus.sentences), len(corpus.sentences[0])
    law = 1 / np.arange(1, corpus.size + 1)
    stacked = np.stack(corpus.sentences)
    drawn = {
        "evenly drawn": rng.integers(0, corpus.size, (count, length)),
        "drawn by Zipf's law": rng.choice(corpus.size, (count, length), p=law / law.sum()),
        "shuffled within images": rng.permuted(stacked, axis=1),
        "shuffled across images": rng.permutation(stacked.ravel()).reshape(count, length),
    }
    return [Corpus(f"{corpus.name}, {name}", corpus.size, list(rows)) for name, rows in drawn.items()]


# -- inside ------------------------------------------------------------------------------------------------------------


def _crops(source: Source, side: int) -> Iterator[np.ndarray]:
    for item in source:
        try:
            yield evaluation_crop(item.image, side)
        except VistokError:
            continue


def _groups(rows: Iterator[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    group: list[np.ndarray] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
