"""LlamaGen's reproduction: the rival learns, its vectors are codes again, arms give what the rule asks for."""

import pytest
import torch

import vistok
from tests.reproductions.test_bits_factors_dimensions import labelled as labelled
from vistok.evaluation.reproducing import Context
from vistok.evaluation.reproduction import judged
from vistok.reproductions import _generation
from vistok.reproductions import llamagen as reproduction
from vistok.reproductions.llamagen import REPRODUCTION, SmallDiT, flow_codes, flow_vectors


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return vistok.create("vq-vae-small", codebook_size=16)


def test_vectors_of_codes_are_those_codes_again(tokenizer):
    codes = torch.arange(16).repeat(8)[None, :64]
    vectors = flow_vectors(tokenizer, codes)
    assert vectors.shape == (1, 64, 8)
    assert vectors.square().mean() == pytest.approx(1, abs=1e-4)
    assert torch.equal(flow_codes(tokenizer, vectors), codes)


def test_the_rival_learns_and_samples_by_item():
    torch.manual_seed(0)
    model, rng = SmallDiT(32), torch.Generator().manual_seed(0)
    optimizer, totals = torch.optim.AdamW(model.parameters(), 3e-3), []
    vectors, labels = torch.ones(16, 64, 8), torch.arange(16) % 10
    for _ in range(60):
        total = model.loss(vectors, labels, rng)["squared"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert sum(totals[-10:]) < 0.7 * sum(totals[:10])
    together = model.sample(torch.tensor([1, 2]), 1.5, [5, 6])
    assert together.shape == (2, 64, 8)
    torch.testing.assert_close(together[1:], model.sample(torch.tensor([2]), 1.5, [6]), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_every_arm_gives_what_the_rule_asks_for(labelled, tmp_path, monkeypatch):
    small = {"TOKENIZER_STEPS": 2, "JUDGE_STEPS": 2, "SAMPLES": 20, "TEST_ITEMS": 20, "DEPTH": 1, "FLOW_STEPS": 3}
    for name, value in small.items():
        monkeypatch.setattr(reproduction, name, value)
    monkeypatch.setitem(_generation.trained_judge.__kwdefaults__, "batch", 16)
    monkeypatch.setattr(REPRODUCTION.__class__, "steps_of", lambda self, arm: 2)
    numbers = {}
    for arm in REPRODUCTION.arms:
        context = Context(REPRODUCTION, labelled, tmp_path, arm, 0, None)
        context.batch = 8
        numbers[arm] = {0: REPRODUCTION.arms[arm].run(0, context)}
    assert numbers["gpt"][0]["parameters"] > numbers["small"][0]["parameters"]
    found = judged(REPRODUCTION, numbers)
    assert all(len(condition["values"]) == 1 for condition in found["rule"])
