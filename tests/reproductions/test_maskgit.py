"""MaskGIT's reproduction: its rule, and its parts on a few pictures."""

import copy

import pytest
import torch

from vistok.evaluation.reproduction import find, judged
from vistok.reproductions import maskgit

GOOD = {
    "bits": {"nll": 300.0, "parameters": 100.0, "usage": 0.99},
    "embedding": {"nll": 300.0, "parameters": 101.0, "usage": 0.99},
    "confidence": {"fd": 9.0},
    "random order": {"fd": 10.0},
}


def verdict(changed):
    return judged(find("maskgit"), {arm: {0: GOOD[arm], 1: changed[arm]} for arm in GOOD})


def test_what_is_shown():
    assert verdict(GOOD)["verdict"] == "shown"


@pytest.mark.parametrize(
    ("arm", "metric", "value"),
    [("bits", "nll", 302.0), ("bits", "usage", 0.8), ("bits", "parameters", 102.0), ("confidence", "fd", 9.8)],
)
def test_one_seed_is_enough_to_refute(arm, metric, value):
    changed = copy.deepcopy(GOOD)
    changed[arm][metric] = value
    found = verdict(changed)
    assert found["verdict"] == "not shown"
    assert sum(not condition["holds"] for condition in found["rule"]) == 1


def test_arms_differ_in_what_they_read_alone():
    bits, table = maskgit.generator(0, "bits"), maskgit.generator(0, "embedding")
    assert sum(p.numel() for p in bits.parameters()) < sum(p.numel() for p in table.parameters())
    assert [block.mlp.expand.weight.shape for block in bits.blocks] == [
        block.mlp.expand.weight.shape for block in table.blocks
    ]
    assert bits.spec.segments == table.spec.segments == maskgit.BitVQVAE().spec.at((32, 32)).segments


def test_nll_of_a_model_that_knows_nothing_is_its_number_of_masked_bits():
    model = maskgit.generator(0, "bits")
    torch.nn.init.zeros_(model.predict.project.weight)
    found = {"codes": torch.randint(0, 1024, (20, 64)), "labels": torch.arange(20) % 10}
    assert maskgit.masked_nll(model, found, 0.5) == pytest.approx(0.5 * 64 * 10, rel=1e-5)


def test_the_bits_train():
    torch.manual_seed(0)
    tokenizer = maskgit.BitVQVAE().train()
    terms = tokenizer.loss({"pixels": torch.rand(2, 3, 32, 32)}, 0, torch.Generator())
    assert terms.keys() == {"reconstruction", "commitment", "entropy"}
    tokens = tokenizer.eval().encode(torch.rand(2, 3, 32, 32))
    assert tokenizer.decode(tokens).shape == (2, 3, 32, 32)
    assert tokens.codes.shape == (2, 64)
