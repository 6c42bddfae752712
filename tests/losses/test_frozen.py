"""Frozen nets leave no trace in checkpoints, and their gradient is taken once."""

import torch
from torch import nn

from vistok.losses.frozen import Frozen, at_once


class Net(Frozen):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 1)
        self.register_buffer("table", torch.ones(2))
        self.freeze()


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.own = Net(), nn.Linear(2, 2)


def test_state_dicts_skip_it_and_load_strictly():
    holder = Holder()
    assert set(holder.state_dict()) == {"own.weight", "own.bias"}
    other = Holder()
    before = other.net.inner.weight.clone()
    other.load_state_dict(holder.state_dict())
    assert torch.equal(other.net.inner.weight, before)
    assert torch.equal(other.own.weight, holder.own.weight)
    assert not holder.train().net.training


def test_the_judge_runs_backward_once():
    calls = []

    def judge(x):
        x.register_hook(lambda grad: calls.append(1))
        return x.square().sum(1)

    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    value = at_once(x, judge)
    assert value.tolist() == [5.0, 25.0]
    first = torch.autograd.grad(value.sum(), x, retain_graph=True)[0]
    second = torch.autograd.grad((value * torch.tensor([1.0, 2.0])).sum(), x)[0]
    assert len(calls) == 1
    assert torch.equal(first, 2 * x)
    assert torch.equal(second, 2 * x * torch.tensor([[1.0], [2.0]]))
    with torch.no_grad():
        assert at_once(x, judge_plain).tolist() == [5.0, 25.0]


def judge_plain(x):
    return x.square().sum(1)
