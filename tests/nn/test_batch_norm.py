"""Statistics shared by processes: two halves of a batch are normalised, and learn, as the whole would."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from vistok.losses.patchgan import ClipDiscriminator, PatchDiscriminator
from vistok.nn.batch_norm import ActNorm, SharedBatchNorm


def test_alone_it_is_pytorchs():
    ours, theirs = SharedBatchNorm(3), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert SharedBatchNorm(3)(torch.randn(2, 3, 4, 5, 6)).shape == (2, 3, 4, 5, 6)
    with pytest.raises(ValueError, match="B, C"):
        ours(torch.ones(3))


def test_act_norm_begins_with_its_first_batch():
    norm = ActNorm(3)
    x = torch.randn(4, 3, 8, 8) * torch.tensor([1.0, 5.0, 0.1])[:, None, None] + 3
    y = norm(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    again = ActNorm(3)
    again.load_state_dict(norm.state_dict())
    assert torch.equal(again(x + 7), norm(x + 7))


def judge() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(
        [
            PatchDiscriminator(width=4, layers=2),
            PatchDiscriminator(width=4, layers=2, norm="act"),
            ClipDiscriminator(width=4),
        ]
    )


def pixels() -> torch.Tensor:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def learn(nets: nn.ModuleList, x: torch.Tensor, weight: float) -> dict[str, torch.Tensor]:
    """Gradients of mean relu(1 - D) over the global batch, `weight` of it here, and a gradient penalty."""
    found = {}
    for net in nets:
        leaf = x.clone().requires_grad_()
        logits = net(leaf)
        (slope,) = torch.autograd.grad(logits.sum(), leaf, create_graph=True)
        (torch.relu(1 - logits).mean() * weight + slope.square().sum() / 6).backward()
    for name, parameter in nets.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return found


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    nets, mine = judge(), (slice(0, 4), slice(4, 6))[rank]
    gradients = learn(nets, pixels()[mine], (4 / 6, 2 / 6)[rank])
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    torch.save({"gradients": gradients, "state": nets.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_uneven_processes_are_one(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    nets = judge()
    gradients = learn(nets, pixels(), 1.0)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for rank in range(2):
        held = torch.load(tmp_path / f"{rank}.pt")
        for name, expected in nets.state_dict().items():
            torch.testing.assert_close(held["state"][name], expected, rtol=1e-4, atol=1e-5, msg=name)
        for name, expected in gradients.items():  # that of a bias before a norm is 0 but for rounding
            torch.testing.assert_close(held["gradients"][name], expected, rtol=1e-3, atol=1e-5 * largest, msg=name)
