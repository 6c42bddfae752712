"""ToMe's claim at small scale: merging similar tokens costs little, where leaving as many out costs more.

One classifier a seed, trained on all its 64 tokens. In the test, r tokens go in every block, between attention and MLP.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from vistok.evaluation.reproducing import Context
from vistok.evaluation.reproduction import Arm, Condition, Numbers, Quantity, Reproduction, of
from vistok.nn.classifier import Classifier, ClassifierConfig
from vistok.nn.flops import count_flops
from vistok.reducer import Reducer
from vistok.reducers.divprune import DivPrune, DivPruneConfig
from vistok.reducers.tome import ToMe, ToMeConfig
from vistok.reproductions._small_vit import Leaving, LeavingConfig, accuracy, classifier, logits, speedup, test_set

AMOUNTS = (4, 8, 12)
DEPTH, TOKENS, DRAWS = 4, 64, 2
VIT_S = ClassifierConfig()  # ViT-S/16 at 224 pixels


def same_work(r: int) -> int:
    """Tokens to keep from the first block on, for as many tokens in the MLPs as when r go in each of the blocks."""
    return round(TOKENS - r * (DEPTH + 1) / 2)


def every_block(seed: int, context: Context, *, make: Callable[[int, int], Reducer], draws: int = 1) -> Numbers:
    """Accuracy with r tokens fewer in every block; mean over draws."""
    net, test = classifier(seed, context), test_set(context)
    return {f"@{r}": sum(accuracy(net, test, make(r, draw)) for draw in range(draws)) / draws for r in AMOUNTS}


def once(seed: int, context: Context, *, make: Callable[[int, int], Reducer], draws: int = 1) -> Numbers:
    """Accuracy with `same_work(r)` tokens from the first block on."""
    net, test = classifier(seed, context), test_set(context)
    return {
        f"@{r}": sum(accuracy(net, test, make(same_work(r), draw), (0,)) for draw in range(draws)) / draws
        for r in AMOUNTS
    }


def whole(seed: int, context: Context) -> Numbers:
    """Accuracy on all tokens, under every r so that differences can be taken."""
    found = accuracy(classifier(seed, context), test_set(context), None)
    return {f"@{r}": found for r in AMOUNTS}


def merged(seed: int, context: Context) -> Numbers:
    """ToMe, its variants at r = 8, operations and speed."""
    net, test = classifier(seed, context), test_set(context)
    found = dict(every_block(seed, context, make=lambda r, _: ToMe(ToMeConfig(r=r))))
    for name, changes in (("without log sizes", {"proportional": False}), ("tokens compared", {"metric": "tokens"})):
        options: dict[str, Any] = {"r": 8, **changes}
        found[f"@8, {name}"] = accuracy(net, test, ToMe(ToMeConfig(**options)))
    pixels = test[0][:200].float() / 255
    flops = count_flops(logits, net, pixels, None)
    for r in AMOUNTS:
        reducer = ToMe(ToMeConfig(r=r))
        found[f"operations@{r}"] = count_flops(logits, net, pixels, reducer) / flops
        found[f"speed@{r}"] = speedup(net, pixels, reducer)
    torch.manual_seed(seed)
    large = Classifier(VIT_S).requires_grad_(False).eval()
    found["speed of ViT-S, r = 13"] = speedup(large, torch.rand(8, 3, *VIT_S.image), ToMe(ToMeConfig(r=13)))
    return found


def drop(arm: str, metric: str) -> Quantity:
    """Points of accuracy lost against the whole."""
    return Quantity((arm, "whole"), lambda found: found["whole"][metric] - found[arm][metric])


def saved(metric: str, arm: str, over: str) -> Quantity:
    """Points of accuracy of one arm over another."""

    def value(found: Mapping[str, Numbers]) -> float:
        return found[arm][metric] - found[over][metric]

    return Quantity((arm, over), value)


REPRODUCTION = Reproduction(
    slug="tome",
    title="ToMe: merging costs little, leaving out costs more",
    claim="a trained ViT keeps its accuracy when similar tokens are merged in every block, and runs faster for it",
    source="arXiv:2210.09461, tables 1 and 10",
    checked="CIFAR-10 at 32 pixels, 64 tokens, mean pool, four blocks, a short training; the paper's 196 tokens of 224 "
    "pixels are more redundant, so that the drop sets in later there. r of 4, 8 and 12 leave the MLPs 84, 69 and 53 % "
    "of their tokens; arms that choose once, in the first block, leave them as many. Speed is processor time, medians "
    "of passes that take turns, against fused attention without reduction: of the small network, and of a ViT-S/16 "
    "with random weights, batch 8. All but the rule's numbers are a report",
    baseline="whole",
    arms={
        "whole": Arm("all 64 tokens", whole, 4),
        "tome": Arm("ToMe, r in every block", merged, 0.7),
        "random": Arm(
            "r by chance in every block, 2 draws",
            partial(every_block, make=lambda r, draw: Leaving(LeavingConfig("random", r=r, draw=draw)), draws=DRAWS),
            0.3,
        ),
        "k-th": Arm(
            "r evenly spaced in every block",
            partial(every_block, make=lambda r, draw: Leaving(LeavingConfig("even", r=r))),
            0.1,
        ),
        "divprune once": Arm(
            "DivPrune in the first block",
            partial(once, make=lambda keep, draw: DivPrune(DivPruneConfig(keep=keep))),
            0.1,
        ),
        "random once": Arm(
            "by chance in the first block, 2 draws",
            partial(once, make=lambda keep, draw: Leaving(LeavingConfig("random", keep=keep, draw=draw)), draws=DRAWS),
            0.3,
        ),
        "k-th once": Arm(
            "evenly spaced in the first block",
            partial(once, make=lambda keep, draw: Leaving(LeavingConfig("even", keep=keep))),
            0.1,
        ),
    },
    rule=(
        Condition("points lost by merging, r = 8", drop("tome", "@8"), at_most=2.0),
        Condition("points over leaving out by chance, r = 12", saved("@12", "tome", "random"), at_least=3.0),
        Condition("speed of a ViT-S/16, r = 13", of("tome", "speed of ViT-S, r = 13"), at_least=1.4),
    ),
    steps=1200,
    batch=64,
    report=(
        *(f"@{r}" for r in AMOUNTS),
        "@8, without log sizes",
        "@8, tokens compared",
        *(f"operations@{r}" for r in AMOUNTS),
        *(f"speed@{r}" for r in AMOUNTS),
        "speed of ViT-S, r = 13",
    ),
    memory="1.5 GB",
)
