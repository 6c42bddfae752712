"""Two processes that each see half of a batch have the adversarial losses, and LeCAM's memory, of the whole."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vistok.losses.adversarial import AdversarialLoss
from vistok.losses.patchgan import PatchDiscriminator

STEPS = 3


def pixels(seed: int) -> torch.Tensor:
    return torch.rand(STEPS, 6, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def build() -> AdversarialLoss:
    torch.manual_seed(0)
    judge = AdversarialLoss(PatchDiscriminator(width=4, layers=2), lecam=0.5, lecam_decay=0.5, weight=1.0)
    with torch.no_grad():
        for parameter in judge.parameters():
            parameter.mul_(5)  # so that logits are large enough for LeCAM to matter
    return judge


def play(share: slice) -> dict[str, torch.Tensor]:
    """Losses of both sides, averaged over processes, and what the judge remembers afterwards."""
    judge, found, world = build(), {}, dist.get_world_size() if dist.is_initialized() else 1
    layer = torch.nn.Parameter(torch.tensor(0.7))
    for step, (real, fake) in enumerate(zip(pixels(1)[:, share], pixels(2)[:, share], strict=True)):
        image = fake * layer
        losses = {
            "generator": judge.generator_loss(image, (image - real).square().mean(), layer, step),
            "discriminator": judge.discriminator_loss(real, image, step),
            "lecam": judge.terms["lecam"],
        }
        for name, value in losses.items():
            value = value.detach().clone()
            if world > 1:
                dist.all_reduce(value)
            found[f"{name} {step}"] = value / world
    return found | {name: value for name, value in judge.state_dict().items() if value.is_floating_point()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(play(slice(3 * rank, 3 * rank + 3)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    whole = play(slice(0, 6))
    assert whole["lecam 1"] > 0
    for rank in range(2):
        part = torch.load(tmp_path / f"{rank}.pt")
        for name, expected in whole.items():
            torch.testing.assert_close(part[name], expected, rtol=1e-4, atol=1e-6, msg=name)
