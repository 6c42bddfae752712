"""Corpora of pictures and of text, and what `vistok bench language` says of them."""

import json

import numpy as np
import pytest
import torch

import vistok
from tests.cli.test_eval import run
from tests.data.pictures import folder
from vistok.errors import InputError
from vistok.evaluation.language import Corpus, controls, describe, picture_corpora, python_words, text_corpus


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    where = tmp_path_factory.mktemp("pictures")
    folder(where, 12, (64, 64))
    return where


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return vistok.create("vq-vae-tiny")


def test_codes_become_sentences_row_by_row(pictures, tokenizer):
    (corpus,) = picture_corpora(tokenizer, pictures, size=32, batch=5)
    assert corpus.grid == (8, 8)
    assert len(corpus.sentences) == 12
    from vistok.data.sources import open_source
    from vistok.evaluation.protocols import evaluation_crop

    third = evaluation_crop(open_source(pictures)[2].image, 32)
    assert np.array_equal(corpus.sentences[2], tokenizer.encode(third[None]).codes[0].numpy())
    columns, snake = corpus.read("column"), corpus.read("snake")
    assert np.array_equal(columns.sentences[0], corpus.sentences[0].reshape(8, 8).T.ravel())
    assert np.array_equal(snake.sentences[0][8:16], corpus.sentences[0][15:7:-1])
    with pytest.raises(InputError, match="column"):
        corpus.read("diagonal")


def test_segments_are_languages_of_their_own(pictures):
    corpora = picture_corpora(vistok.create("strata-tiny"), pictures, size=64)
    assert [corpus.name.split()[-1] for corpus in corpora] == ["level0:0", "level1:0", "level2:0"]
    assert len({corpus.tokens for corpus in corpora}) == 2


def test_text():
    words = ["a", "b", "a", "c", "a", "d"] * 20
    corpus = text_corpus(words, 60, 6, 3)
    assert len(corpus.sentences) == 10
    assert corpus.sentences[0].tolist()[0] == 0
    assert set(np.concatenate(corpus.sentences)) == {0, 1, 2}
    with pytest.raises(InputError, match="fewer than"):
        text_corpus(words, 1000, 5, 3)
    english = python_words()
    assert len(english) > 200_000
    assert english.count("the") > 5000


def test_statistics_tell_a_law_from_chance():
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, 65)
    corpus = Corpus("law", 64, list(rng.choice(64, (60, 64), p=p / p.sum())), (8, 8))
    found, (even, _, within, across) = describe(corpus, top=50), (describe(one, top=50) for one in controls(corpus))
    assert found.frequency[0].exponent > even.frequency[0].exponent + 0.5
    assert even.share > 0.98 > found.share
    assert abs(even.code.huffman) < 0.03 < found.code.huffman
    assert within.bits == pytest.approx(found.bits)
    assert across.order == pytest.approx(1, abs=0.1)
    with pytest.raises(InputError, match="ten"):
        describe(Corpus("few", 64, corpus.sentences[:5]))


def test_command(capsys, pictures, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "model")
    words = ["bench", "language", "-m", tmp_path / "model", "--data", pictures, "--size", 32]
    told = run(capsys, *words).out
    assert "English" in told
    assert "shuffled" in told
    found = json.loads(run(capsys, *words, "--json").out)["languages"]
    assert [one["tokens"] for one in found] == [768] * len(found)
    assert len(found) == 7
    assert "no benchmark" in run(capsys, "bench", "langage", "--data", pictures, code=1).err
    assert "--data" in run(capsys, "bench", "language", code=1).err
