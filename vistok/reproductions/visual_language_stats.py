"""What sets a tokenizer's codes apart from words, at small scale: frequency, entropy, compression, innovation, order.

    photographs, 128 px -> small VQ tokenizer -> 16 x 16 codes, read row by row: 900 sentences of 256 tokens
    English of as many tokens: the manual and docstrings that come with Python

Frequencies are compared over 512 types, so that the text's rare words are one type; innovation takes its whole
vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vistok.evaluation.language import Corpus, controls, describe, picture_corpora, python_words, text_corpus
from vistok.evaluation.reproducing import Context
from vistok.evaluation.reproduction import Arm, Condition, Quantity, Reproduction, difference, of
from vistok.metrics.corpus import perplexities

SIZE, SIDE, GRID = 512, 128, (16, 16)
LENGTH, SENTENCES, EARLY = 256, 900, 100
RECIPE: dict[str, Any] = {
    "model": {
        "name": "vq-vae-small",
        "widths": [32, 64, 64],
        "blocks": [0, 0, 2],
        "code_dim": 16,
        "metric": "l2",
        "codebook_size": SIZE,
        "resolution": SIDE,
    },
    "data": {"size": SIDE, "scale": [0.5, 1.0], "flip": True},
    "optimizer": {"name": "adam", "lr": 1e-3, "warmup": 25, "final": 0.1},
    "train": {"ema": None, "channels_last": True},
}


def visual(seed: int, context: Context) -> Mapping[str, float]:
    """The codes of all photographs, by a tokenizer trained on those of the training half."""
    tokenizer = context.train(RECIPE)
    parts = [picture_corpora(tokenizer, half, size=SIDE)[0] for half in (context.data.train, context.data.test)]
    corpus = Corpus("visual", SIZE, [row for part in parts for row in part.sentences], GRID)
    found = numbers(corpus, corpus, seed)
    within = controls(corpus, seed)[2]
    return found | {"shuffled_order": ordered(within, seed), "column_order": ordered(corpus.read("column"), seed)}


def text(seed: int, context: Context) -> Mapping[str, float]:
    """English of as many tokens."""
    words, tokens = python_words(), LENGTH * SENTENCES
    whole = text_corpus(words, tokens, LENGTH, tokens)
    return numbers(text_corpus(words, tokens, LENGTH, SIZE), whole, seed)


def numbers(corpus: Corpus, whole: Corpus, seed: int) -> dict[str, float]:
    """What the rule looks at; `whole` has the vocabulary uncut."""
    found = describe(corpus, seed=seed)
    order = np.random.default_rng(seed).permutation(len(whole.sentences))[:EARLY]
    early = len(np.unique(np.concatenate([whole.sentences[place] for place in order])))
    return {
        "zipf": found.frequency[0].exponent,
        "entropy_share": found.share,
        "huffman": found.code.huffman,
        "early_types": early / len(np.unique(np.concatenate(whole.sentences))),
        "order": ordered(corpus, seed),
        "bigram_perplexity": found.bigram_perplexity,
        "usage": found.types / corpus.size,
    }


def ordered(corpus: Corpus, seed: int) -> float:
    """Held-out bigram over unigram perplexity, a tenth of the sentences, drawn at random, held out."""
    rows = [corpus.sentences[place] for place in np.random.default_rng(seed).permutation(len(corpus.sentences))]
    cut = len(rows) // 10
    unigram, bigram = perplexities(rows[cut:], rows[:cut], corpus.size)
    return bigram / unigram


REPRODUCTION = Reproduction(
    slug="visual-language-stats",
    title="The language of visual tokens: no words",
    claim="codes of images follow flatter frequency laws than words, use their alphabet more evenly, hardly compress, "
    "and show nearly all of their types within a hundred images",
    source="Analyzing The Language of Visual Tokens, arXiv:2411.05001",
    checked="900 photographs at 128 px through a VQ tokenizer trained here, 512 codes, read row by row, against the "
    "English manual and docstrings of Python, of as many tokens; no captions, no segmentation masks, no grammar. A "
    "codebook that is not in use would lower the visual entropy, so usage is reported; order is also read column by "
    "column, since a row is no sentence",
    baseline="text",
    arms={
        "visual": Arm("codes of photographs, row by row", visual, 3),
        "text": Arm("English words, the 511 most frequent and one for all others", text, 1),
    },
    rule=(
        Condition("Zipf exponent of text, 300 ranks", of("text", "zipf"), at_least=0.8, at_most=1.2),
        Condition("Zipf exponent of codes", of("visual", "zipf"), at_most=0.7),
        Condition(
            "entropy over log2 K, codes minus text", difference("entropy_share", "visual", minus="text"), at_least=0.1
        ),
        Condition("Huffman reduction, text minus codes", difference("huffman", "text", minus="visual"), at_least=0.1),
        Condition("types seen within 100 images", of("visual", "early_types"), at_least=0.95),
        Condition("types seen within as much text", of("text", "early_types"), at_most=0.6),
        Condition("order, codes minus text", difference("order", "visual", minus="text"), at_least=0.0),
        Condition("order of codes", of("visual", "order"), at_most=1.0),
        Condition("order of codes shuffled within images", of("visual", "shuffled_order"), at_least=1.0),
        Condition(
            "bigram perplexity, codes over text",
            Quantity(
                ("visual", "text"),
                lambda found: found["visual"]["bigram_perplexity"] / found["text"]["bigram_perplexity"],
            ),
            at_least=2.0,
        ),
    ),
    steps=500,
    batch=16,
    report=("zipf", "entropy_share", "huffman", "early_types", "order", "bigram_perplexity", "usage"),
    train="imagenet-samples/train",
    test="imagenet-samples/val",
    seeds=3,
)
