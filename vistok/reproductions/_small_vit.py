"""A small classifier of CIFAR-10 for what is done to its tokens: 32 pixels, 64 tokens, their mean is classified.

It is trained once a seed, on all its tokens. `accuracy` tests it with a reducer in its blocks, between attention and
MLP; `Leaving` leaves tokens out by chance or by place, which is what choosing well has to beat.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.evaluation.reproducing import Context
from vistok.nn.classifier import Classifier, ClassifierConfig
from vistok.reducer import Context as Place
from vistok.reducer import Reducer, Reduction, by_layer, take
from vistok.reproductions._small import batches, fit, shared
from vistok.sites import Run, through

CONFIG = ClassifierConfig(
    image=(32, 32),
    patch=4,
    width=64,
    depth=4,
    heads=2,
    classes=10,
    pool="mean",
    class_token=False,
    stem="cnn",
    mean=(0.491, 0.482, 0.447),
    std=(0.247, 0.243, 0.262),
)
TRAINED, TESTED, AT_ONCE = 50_000, 2000, 250


def classifier(seed: int, context: Context) -> Classifier:
    """The classifier of this seed, frozen; the first arm that asks trains it, within the budget."""

    def make() -> dict[str, Tensor]:
        torch.manual_seed(seed)
        net = Classifier(CONFIG)

        def loss(batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
            return {"cross_entropy": F.cross_entropy(net(net.normed(_shifted(batch["pixels"], rng))), batch["label"])}

        pixels, labels = context.train_pixels(32, TRAINED)
        context.tell(f"classifier of seed {seed}: {context.steps} steps")
        fit(
            net,
            loss,
            batches(pixels, labels, context.batch, seed),
            context.steps,
            seed=seed,
            tell=context.tell,
        )
        return net.state_dict()

    net = Classifier(CONFIG)
    net.load_state_dict(shared(context, f"classifier-{seed}", make))
    return net.requires_grad_(False).eval()


def _shifted(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """The batch moved by up to 4 pixels each way, edges repeated."""
    down, across = torch.randint(9, (2,), generator=rng).tolist()
    return F.pad(pixels, (4, 4, 4, 4), mode="replicate")[..., down : down + 32, across : across + 32]


def test_set(context: Context) -> tuple[Tensor, Tensor]:
    """The first test pictures, uint8, and their labels."""
    return context.test_pixels(32, TESTED)


@torch.no_grad()
def accuracy(
    net: Classifier, test: tuple[Tensor, Tensor], reducer: Reducer | None, at: Sequence[int] | None = None
) -> float:
    """Percent of the test pictures that get the right class, with a reducer in the blocks (those at `at`)."""
    right = 0
    for part, wanted in zip(*(half.split(AT_ONCE) for half in test), strict=True):
        right += int(logits(net, part.float() / 255, reducer, at).argmax(1).eq(wanted).sum())
    return 100 * right / len(test[0])


def logits(net: Classifier, pixels: Tensor, reducer: Reducer | None, at: Sequence[int] | None = None) -> Tensor:
    """(B, classes) of pixels in [0, 1]; without a reducer the network as it is, on fused attention."""
    if reducer is None:
        return net(net.normed(pixels))
    run = Run(reducer, len(net.blocks), protected=net.config.prefix, at=at)
    x = through(net.blocks, net.embed(net.normed(pixels)), run)
    return net.classify(x, run.sizes)


@torch.no_grad()
def speedup(net: Classifier, pixels: Tensor, reducer: Reducer, passes: int = 5) -> float:
    """How many times as fast a pass is with the reducer as without it: medians of passes that take turns."""
    runs: dict[str, Callable[[], Tensor]] = {
        "without": lambda: logits(net, pixels, None),
        "with": lambda: logits(net, pixels, reducer),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(passes + 1):
        for name, run in runs.items():
            begun = time.process_time()
            run()
            if turn:  # the first pass warms up
                times[name].append(time.process_time() - begun)
    return median(times["without"]) / median(times["with"])


@dataclass(frozen=True)
class LeavingConfig:
    """`keep` tokens, or `r` fewer at every place; by chance (`draw` seeds it), or evenly spaced."""

    how: Literal["random", "even"] = "random"
    r: int = 0
    keep: int | None = None
    draw: int = 0


class Leaving(Reducer):
    """Leaves tokens out without looking at them."""

    system = "leaving"
    config: LeavingConfig

    def reduced(self, tokens: Tensor, context: Place) -> tuple[Tensor, Reduction]:
        batch, length = tokens.shape[:2]
        config = self.config
        left = length - by_layer(config.r, context.layers)[context.layer] if config.keep is None else config.keep
        if config.how == "random":
            rng = torch.Generator().manual_seed(1000 * config.draw + context.layer)
            index = torch.rand(batch, length, generator=rng).argsort(1)[:, :left].sort(1).values
        else:
            index = torch.linspace(0, length - 1, left).round().long().expand(batch, -1)
        return take(tokens, index), Reduction(length, index)
