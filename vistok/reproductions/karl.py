"""KARL's claim at small scale: one pass decides as well as a search how many tokens a picture needs.

    karl     two calls a step; told an error, it says which of its 16 tokens are needed
    search   the same network without condition and halting, its tail dropped at random (One-D-Piece), two steps for
             each of karl's, since each has one call; tested by the shortest prefix that reaches the error, of 16

CIFAR-10, pixels without a base tokenizer, 16 continuous tokens of 4 numbers, absolute error alone. First weights are
scaled to the width, in both arms.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vistok
from vistok.evaluation.reproducing import Context
from vistok.evaluation.reproduction import Arm, Condition, Reproduction, of
from vistok.nn.query_vit import ViTSize
from vistok.registry import System, register
from vistok.tokenizers._karl_network import BINS
from vistok.tokenizers.karl import KARL, KARLConfig

SIZE = ViTSize(64, 3, 4)
TOKENS = 16
CONFIG = KARLConfig(
    SIZE, SIZE, tokens=TOKENS, budgets=tuple(range(2, TOKENS + 1, 2)), rows=TOKENS, token_dim=4, quantized=False,
    base="pixels", image_size=32, patch=8, table=4, halting=64, init_std=0.02 * (512 / 64) ** 0.5,
)  # fmt: skip
# What the halting terms weigh in training. At their full weight a net of this width never looks at its tokens. Chosen
# on training pictures: of 1, 0.02 and 0.002 the largest at which the absolute error begins to fall.
HALTING = 0.002
RECIPE: dict[str, Any] = {
    "data": {"size": 32},
    "optimizer": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.95], "warmup": 100, "final": 0.05, "clip": 3.0},
    "train": {"ema": None},
}
TESTED, AT_ONCE = 1000, 200
WANTED = 4  # bins that are tested
STEPS = 2000


class Searched(KARL):
    """The same network as One-D-Piece has it: never told an error, never halting, its tail dropped in training."""

    system = "karl-searched"

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        pixels = self.prepare(batch["pixels"])
        length = int(torch.randint(1, TOKENS + 1, (1,), generator=rng, device=rng.device))
        seen = self.base.latent(pixels)
        latent = self.encoder(pixels, seen, pixels.new_zeros(len(pixels)), TOKENS)
        return self.base.distil(self.decoder(latent.tokens[:, :length]), seen, pixels)


@torch.no_grad()
def prefix_errors(model: KARL, pixels: Tensor) -> Tensor:
    """Mean absolute error of each picture (n, 3, 32, 32) from each prefix, (n, 16)."""
    found = []
    for part in pixels.split(AT_ONCE):
        images = model.prepare(part)
        vectors = model.encode(part, quality=0.0).vectors
        errors = [(model.reconstruct(vectors[:, :k]).clamp(0, 1) - images).abs() for k in range(1, TOKENS + 1)]
        found.append(torch.stack([error.flatten(1).mean(1) for error in errors], 1))
    return torch.cat(found)


def shortest(errors: Tensor, wanted: float) -> Tensor:
    """How many tokens (n,) the search takes: the first prefix that reaches the error, all where none does."""
    reached = errors <= wanted
    reached[:, -1] = True
    return reached.int().argmax(1) + 1


def bins_between(errors: Tensor) -> list[int]:
    """Indices of four bins that lie between the search's median error at all tokens and at two, spread evenly."""
    low, high = float(errors[:, -1].median()), float(errors[:, 1].median())
    inside = [index for index, value in enumerate(BINS) if low <= value <= high]
    if len(inside) < WANTED:  # the nearest ones, so that a run is judged and not lost
        middle = int(np.argmin([abs(value - (low + high) / 2) for value in BINS]))
        first = max(0, min(middle - 1, len(BINS) - WANTED))
        return list(range(first, first + WANTED))
    return [inside[round(place * (len(inside) - 1) / (WANTED - 1))] for place in range(WANTED)]


def searched(seed: int, context: Context) -> Mapping[str, float]:
    """Train the baseline; its errors at every length, and what KARL will be asked for."""
    model = context.train({"model": {"name": "karl-searched"}, **RECIPE})
    pixels, _ = context.test_pixels(32, TESTED)
    errors = prefix_errors(model, pixels)
    found = {f"error@{k}": float(errors[:, k - 1].mean()) for k in (1, 2, 4, 8, 16)}
    return found | {f"bin{place}": float(index) for place, index in enumerate(bins_between(errors))}


def adaptive(seed: int, context: Context) -> Mapping[str, float]:
    """Train KARL; ask it for the four errors, and compare with the search of the same seed, trained before."""
    weights = dict.fromkeys(("active_estimate", "active_halting", "halt_halting"), HALTING)
    model = context.train({"model": {"name": "karl-adaptive"}, "loss": weights, **RECIPE})
    baseline: Any = vistok.load(context.folder.parent / "search" / "model" / "model")
    pixels, _ = context.test_pixels(32, TESTED)
    errors = prefix_errors(baseline, pixels)
    found: dict[str, float] = {}
    kept_of, worst = [], 0.0
    for place, index in enumerate(bins_between(errors)):
        kept, error = asked(model, pixels, BINS[index])
        kept_of.append(kept)
        budget = float(kept.float().mean())
        rival = _at_mean_length(errors, budget)
        worst = max(worst, float(error.mean()) / rival)
        found |= {f"wanted{place}": BINS[index], f"kept{place}": budget, f"error{place}": float(error.mean())}
        found |= {f"search{place}": rival, f"rank{place}": spearman(kept, errors[:, 3])}
    means = [float(kept.float().mean()) for kept in kept_of]
    found["rise"] = max(later - earlier for earlier, later in pairwise(means))
    found["fall"] = means[0] - means[-1]
    found["rank"] = min(found["rank1"], found["rank2"])
    found["error over search"] = worst
    found["counts"] = float(len(torch.cat(kept_of).unique()))
    return found


@torch.no_grad()
def asked(model: KARL, pixels: Tensor, wanted: float) -> tuple[Tensor, Tensor]:
    """Tokens kept (n,) and errors (n,) in one pass."""
    kept, errors = [], []
    for part in pixels.split(AT_ONCE):
        tokens = model.encode(part, quality=wanted)
        kept.append(tokens.lengths)
        errors.append((model.decode(tokens) - part.float() / 255).abs().flatten(1).mean(1))
    return torch.cat(kept), torch.cat(errors)


def _at_mean_length(errors: Tensor, budget: float) -> float:
    """The search's mean error where its error is tuned so that it takes `budget` tokens in the mean."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if float(shortest(errors, middle).float().mean()) > budget else (low, middle)
    lengths = shortest(errors, high)
    return float(errors.gather(1, lengths[:, None] - 1).mean())


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two (n,), ties sharing their mean rank; 0 where one is constant."""
    ranks = []
    for values in (a, b):
        _, inverse, counts = values.double().unique(return_inverse=True, return_counts=True)
        ends = counts.cumsum(0).double()
        ranks.append((ends - (counts - 1) / 2)[inverse])
    spread = torch.stack([rank - rank.mean() for rank in ranks])
    norm = spread.norm(dim=1).prod()
    return float(spread.prod(0).sum() / norm) if norm > 0 else 0.0


register(System("karl-adaptive", KARL, KARLConfig, {"karl-adaptive": CONFIG}))
register(System("karl-searched", Searched, KARLConfig, {"karl-searched": CONFIG}))

REPRODUCTION = Reproduction(
    slug="karl",
    title="KARL: one pass decides as well as a search",
    claim="told the error that is wanted, one pass keeps as many tokens as a search over prefixes takes, more for "
    "pictures that are harder, at the same error",
    source="arXiv:2507.07995, sections 3 and 4",
    checked="CIFAR-10 without a base tokenizer, 16 continuous tokens of 4 numbers, mean absolute error alone; LPIPS, "
    "rFID and people's ratings of complexity are not checked. Four wanted errors between the search's medians at 16 "
    "and at 2 tokens. Void with fewer than 3 distinct numbers of tokens, for then halting has collapsed; errors below "
    "what can be reached say nothing. Halting weighs 0.002 in training: at its full weight a net this narrow predicts "
    "one picture for all, and 12 tokens",
    baseline="search",
    arms={
        "search": Arm("tail drop, the shortest prefix that does; one call a step", searched, 8, steps=2 * STEPS),
        "karl": Arm("one pass that halts what is not needed; two calls a step", adaptive, 8),
    },
    rule=(
        Condition("rise of the mean number of tokens with the wanted error, the most", of("karl", "rise"), at_most=0.0),
        Condition("fall of it from the smallest to the largest wanted error", of("karl", "fall"), at_least=3.0),
        Condition("rank correlation of tokens and difficulty at the middle errors", of("karl", "rank"), at_least=0.3),
        Condition("error over the search's at the same length, the most", of("karl", "error over search"), at_most=1.1),
        Condition("valid: distinct numbers of tokens", of("karl", "counts"), at_least=3),
    ),
    steps=STEPS,
    batch=64,
    report=(
        "error@2", "error@16", "wanted0", "kept0", "error0", "search0", "wanted3", "kept3", "error3", "search3", "rank",
    ),
)  # fmt: skip
