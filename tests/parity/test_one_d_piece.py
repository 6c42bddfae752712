"""One-D-Piece against its authors' numbers: whole sequences, prefixes, and training with a dropped tail."""

import re

import torch

from tests.parity.cases import Case, assert_close, parametrize
from tests.parity.titok_case import as_sequence, check_decoding, check_encoding, check_logits, check_proxy_loss, load
from vistok.tokenizers.one_d_piece import OneDPiece


@parametrize("one-d-piece", kinds=("tokenizer",))
def test_tokenizer(case: Case) -> None:
    model, io = load(case, OneDPiece), case.io
    with torch.no_grad():
        check_encoding(model, io)
        check_decoding(model, io)
        if "stage1_reconstruction_loss" in io:
            check_proxy_loss(model, io)


@parametrize("one-d-piece", kinds=("tokenizer",))
def test_prefixes(case: Case) -> None:
    model, io = load(case, OneDPiece), case.io
    lengths = sorted({int(found[1]) for name in io if (found := re.match(r"prefix(\d+)_", name))})
    tokens, vectors = model.encode(io["image"]), as_sequence(io["quantized"])
    with torch.no_grad():
        for length in lengths:
            if f"prefix{length}_decoder_logits" in io:
                expected = io[f"prefix{length}_decoder_logits"]
                check_logits(model, vectors[:, :length], expected, f"logits of {length}")
            if f"prefix{length}_reconstruction" in io:
                expected = io[f"prefix{length}_reconstruction"]
                assert_close(model.reconstruct(vectors[:, :length]), expected, name=f"prefix of {length}")
                decoded = model.decode(tokens.prefix(length))
                assert_close(decoded, expected.clamp(0, 1), name=f"decode of {length}", scale=1)


@parametrize("one-d-piece", kinds=("tokenizer",))
def test_training_drops_the_tail(case: Case) -> None:
    """The authors' stored end index, reached through our own draw: a seed is searched that gives it."""
    model, io = load(case, OneDPiece), case.io
    runs = sorted(name.removesuffix("_end_index") for name in io if name.endswith("_end_index"))
    model.train()
    for run in runs:
        end = int(io[f"{run}_end_index"])
        with torch.no_grad():
            vectors = model.shorten(model.quantize(io["image"]).vectors, generator_that_draws(model, end))
            assert vectors.shape[1] == end
            assert_close(model.reconstruct(vectors), io[f"{run}_reconstruction"], name=f"{run}_reconstruction")
            terms = model.loss({"pixels": io["image"]}, 0, generator_that_draws(model, end))
        expected = (io[f"{run}_reconstruction"] - io["image"]).square().mean()
        assert_close(terms["reconstruction"], expected, name=f"{run} loss")


def generator_that_draws(model: OneDPiece, end: int) -> torch.Generator:
    row = torch.zeros(1, model.config.tokens, 1)
    for seed in range(10_000):
        if model.shorten(row, torch.Generator().manual_seed(seed)).shape[1] == end:
            return torch.Generator().manual_seed(seed)
    raise AssertionError(f"no seed draws {end}")
