"""Rates of the schedules, and which parameters weight decay leaves alone."""

import pytest
import torch
from torch import nn

from vistok.training.optimizer import build_optimizer, learning_rate, undecayed
from vistok.training.recipe import OptimizerSection


def test_the_linear_schedule_is_flat_and_then_falls():
    section = OptimizerSection(lr=2.0, warmup=10, schedule="linear", final=0.1)
    rates = [learning_rate(section, step, 110) for step in (0, 9, 10, 15, 62, 109)]
    assert rates[:4] == [0.2, 2.0, 2.0, 2.0]
    assert rates[4] == pytest.approx(2 * (0.1 + 0.9 * 0.48 / 0.95))
    assert rates[5] == pytest.approx(0.2, abs=0.02)


def test_what_a_model_names_does_not_decay():
    class Model(nn.Module):
        undecayed = ("places", "*.gains")

        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.ones(3, 2))
            self.inner = nn.Linear(2, 2)
            self.inner.gains = nn.Parameter(torch.ones(1, 2))

    model = Model()
    groups = build_optimizer(
        model.parameters(), OptimizerSection(lr=1.0, weight_decay=0.1), undecayed(model)
    ).param_groups
    names = {id(value): name for name, value in model.named_parameters()}
    found = [(group["weight_decay"], {names[id(p)] for p in group["params"]}) for group in groups]
    assert found == [(0.1, {"inner.weight"}), (0.0, {"places", "inner.gains", "inner.bias"})]
