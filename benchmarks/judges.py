"""What it saves to take a judge's gradient at once: a generator's step beside the same step on an ordinary graph.

    python benchmarks/judges.py [--size 64] [--batch 4] [--rounds 5]

LPIPS-VGG of full size (random weights, which cost what trained ones do) and PatchGAN judge the output of a small CNN,
with the adaptive weight of VQGAN. By hand: both stay in the graph, so that the adaptive weight and the backward pass
each go through them. Both are measured in turns, by processor time; the best round counts. Memory is what the graph
holds when the forward pass is done, weights left out. Writes benchmarks/results/judges.json.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor, nn

from vistok.losses.adversarial import AdversarialLoss, adaptive_weight, generator_hinge
from vistok.losses.discriminators import build_discriminator
from vistok.losses.perceptual import Lpips

RESULT = Path(__file__).parent / "results" / "judges.json"
WIDTHS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)}
WIDTHS |= {17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lpips, judge = Lpips("vgg", _vgg()), build_discriminator("patchgan").train()
    adversary = AdversarialLoss(judge)
    net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 3, 3, padding=1))
    pixels = torch.rand(given.batch, 3, given.size, given.size)
    last = net[2].weight

    def at_once(image: Tensor) -> Tensor:
        rebuilt = (image - pixels).square().mean() + lpips(image, pixels).mean()
        return rebuilt + adversary.generator_loss(image, rebuilt, last, 0)

    def by_hand(image: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = lpips.features(pixels)
        rebuilt = (image - pixels).square().mean() + lpips.compare(lpips.features(image), wanted).mean()
        term = generator_hinge(judge(image))
        return rebuilt + 0.8 * adaptive_weight(rebuilt, term, last) * term

    ways: dict[str, Callable[[Tensor], Tensor]] = {"by_hand": by_hand, "at_once": at_once}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    memory: dict[str, float] = {}
    for _ in range(given.rounds):
        for way, loss in ways.items():
            judge.zero_grad(set_to_none=True)
            net.zero_grad(set_to_none=True)
            begun = time.process_time()
            loss(net(pixels)).backward()
            seconds[way].append(time.process_time() - begun)
    for way, loss in ways.items():
        memory[way] = _held(loss, net, pixels)
    found = {
        "size": given.size,
        "batch": given.batch,
        "seconds": {way: min(times) for way, times in seconds.items()},
        "megabytes": memory,
        "time_ratio": min(seconds["at_once"]) / min(seconds["by_hand"]),
        "memory_ratio": memory["at_once"] / memory["by_hand"],
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


class _Box:
    """A tensor that a graph holds, for as long as it holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _held(loss: Callable[[Tensor], Tensor], net: nn.Module, pixels: Tensor) -> float:
    """MB that the graph holds when the forward pass is done, weights left out."""
    boxes: WeakSet[_Box] = WeakSet()

    def pack(tensor: Tensor) -> _Box:
        box = _Box(tensor)
        boxes.add(box)
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        total = loss(net(pixels))
    gc.collect()
    storages = {
        box.tensor.untyped_storage().data_ptr(): box.tensor.untyped_storage().nbytes()
        for box in boxes
        if not isinstance(box.tensor, nn.Parameter)
    }
    assert total.requires_grad
    return sum(storages.values()) / 1e6


def _vgg() -> dict[str, Tensor]:
    levels = (64, 128, 256, 512, 512)
    state = {f"lin{level}.model.1.weight": torch.rand(1, width, 1, 1) for level, width in enumerate(levels)}
    for index, (entering, leaving) in WIDTHS.items():
        state[f"features.{index}.weight"] = torch.randn(leaving, entering, 3, 3) * (2 / (9 * entering)) ** 0.5
        state[f"features.{index}.bias"] = torch.zeros(leaving)
    return state


if __name__ == "__main__":
    main()
