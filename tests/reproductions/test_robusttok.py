"""The reproduction of RobustTok: its rule, what it measures, and that it runs to the end."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.reproductions.test_bits_factors_dimensions import labelled as labelled
from vistok.evaluation.reproducing import reproduce
from vistok.evaluation.reproduction import find, judged
from vistok.reproductions import robusttok
from vistok.reproductions.robusttok import Small, examine
from vistok.tokenizers.robusttok import Perturbation

GOOD = {
    "perturbed": {"mse": 0.0105, "excess": 0.002, "frechet": 0.9},
    "plain": {"mse": 0.01, "excess": 0.003, "frechet": 1.0},
}
BAD = [("perturbed", "excess", 0.0028), ("perturbed", "mse", 0.012), ("perturbed", "frechet", 0.99)]


def verdict(second):
    return judged(find("robusttok"), {arm: {0: values, 1: second[arm]} for arm, values in GOOD.items()})


def test_what_is_shown():
    assert verdict(GOOD)["verdict"] == "shown"


@pytest.mark.parametrize(("arm", "metric", "value"), BAD, ids=lambda part: str(part))
def test_one_seed_is_enough_to_refute(arm, metric, value):
    changed = copy.deepcopy(GOOD)
    changed[arm][metric] = value
    found = verdict(changed)
    assert found["verdict"] == "not shown"
    assert sum(not condition["holds"] for condition in found["rule"]) == 1


def test_arms_differ_by_the_exchange_alone():
    pixels = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    losses = []
    for rule in (Perturbation(share=0.5, strength=12), Perturbation(share=0.5, strength=1), None):
        torch.manual_seed(0)
        model = Small(rule)
        losses.append(model.loss({"pixels": pixels}, 0, torch.Generator().manual_seed(1)))
    exchanged, still, plain = ({name: value.item() for name, value in terms.items()} for terms in losses)
    assert exchanged["commitment"] == plain["commitment"]
    assert exchanged["squared"] != plain["squared"]
    assert still["squared"] == pytest.approx(plain["squared"], rel=1e-5)


def test_numbers_of_an_arm():
    torch.manual_seed(0)
    model = Small(None).eval()
    found = examine(model, torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8))
    assert set(found) == {"mse", "excess", "excess_uniform", "swap"}
    assert 0 < found["swap"] < 1


@pytest.mark.slow
def test_it_runs_to_the_end(labelled, monkeypatch, tmp_path):
    for name, value in {"TEACHER_STEPS": 2, "TEST_ITEMS": 12, "SAMPLES": 250, "GENERATOR_STEPS": 2}.items():
        monkeypatch.setattr(robusttok, name, value)
    found = find("robusttok")
    result = reproduce(replace(found, steps=2, batch=16), labelled, tmp_path / "run")
    assert result["verdict"] in ("shown", "not shown")
    assert set(result["report"]) <= set(result["arms"]["plain"]["numbers"])
