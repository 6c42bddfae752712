"""FlexTok's mechanism at small scale: with nested dropout one model with a flow decoder serves every prefix, in order.

    nested      8 registers, a random number of them dropped in training
    whole       the same without dropout; its prefixes are decoded with the mask token and, where that is better, with
                zeros for the tokens that are missing
    two tokens  trained with 2 registers alone, the first seed only

CIFAR-10 at 16x16 in pixel space; all are decoded from the same noise in 10 steps without guidance.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.evaluation.reproducing import Context
from vistok.evaluation.reproduction import Arm, Condition, Quantity, Reproduction, of, ratio
from vistok.layout import Sizes
from vistok.registry import System, register
from vistok.reproductions._small import probe
from vistok.tokenizers._flextok_network import TrunkSize
from vistok.tokenizers.flextok import VARIANTS, FlexTok, FlexTokConfig

ENCODER, DECODER = (TrunkSize(96, depth, 32, 32**-0.5) for depth in (3, 4))
CONFIG = replace(
    VARIANTS["flextok-tiny"], encoder=ENCODER, decoder=DECODER, registers=8, levels=(8, 5, 5, 5), size=(16, 16),
    patch=4, grid=(4, 4), steps=10, guidance=1.0, null_dropout=0.0,
)  # fmt: skip
RECIPE: dict[str, Any] = {
    "data": {"size": 32},
    "optimizer": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.99], "warmup": 100, "final": 0.05},
    "train": {"ema": None},
}
LENGTHS = (1, 2, 4, 8)
TESTED, PROBED, AT_ONCE = 1000, 5000, 200


class Halved(FlexTok):
    """FlexTok of 16x16 pictures that takes and gives those of CIFAR-10, twice as large: 2x2 pixels are averaged, and
    repeated in the end.
    """

    system = "flextok-halved"

    def __init__(self, config: FlexTokConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        size = 2 * config.size[0], 2 * config.size[1]
        self.spec = replace(self.spec, size=size, sizes=Sizes(only=(size,)))

    def prepare(self, pixels: Tensor) -> Tensor:
        return F.avg_pool2d(super().prepare(pixels), 2)

    def detokenize(self, *args: Any, **conditions: Any) -> Tensor:  # type: ignore[override]
        return F.interpolate(super().detokenize(*args, **conditions), scale_factor=2, mode="nearest")


class Whole(Halved):
    """Without nested dropout: the decoder always has all tokens."""

    system = "flextok-whole"

    def draw_lengths(self, count: int, rng: torch.Generator) -> Tensor:
        return torch.full((count,), self.config.registers)


@torch.no_grad()
def errors(tokenizer: FlexTok, pixels: Tensor, lengths: tuple[int, ...], zeros: bool) -> dict[str, float]:
    """Mean squared error from each prefix, of uint8 (n, 3, 32, 32); "mse@other": all tokens of another picture.

    `zeros`: missing tokens may also be zero vectors, and the better of both counts.
    """
    sums: dict[str, float] = {}
    count = tokenizer.config.registers
    for start in range(0, len(pixels), AT_ONCE):
        given = pixels[start : start + AT_ONCE]
        part = tokenizer.prepare(given)
        noise = torch.randn(len(part), *tokenizer.config.latent, generator=torch.Generator().manual_seed(start))
        vectors = tokenizer.quantizer.decode(tokenizer.encode(given).codes)

        def error(known: Tensor, lengths: Tensor | None = None, part: Tensor = part, noise: Tensor = noise) -> float:
            image = tokenizer.vae.decode(tokenizer.sample(known, noise, lengths)).clamp(0, 1)
            return float((image - part).square().mean()) * len(part) / len(pixels)

        found = {f"mask@{k}": error(vectors[:, :k]) for k in lengths}
        if zeros:
            found |= {f"zero@{k}": error(F.pad(vectors[:, :k], (0, 0, 0, count - k))) for k in lengths}
        found["mse@other"] = error(vectors.roll(1, 0))
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value
    best = {f"mse@{k}": min(sums[f"mask@{k}"], sums.get(f"zero@{k}", sums[f"mask@{k}"])) for k in lengths}
    return best | {"mse@other": sums["mse@other"]}


def trained(seed: int, context: Context, *, name: str, zeros: bool = False) -> Mapping[str, float]:
    """Train a variant; its errors at every length it has, and what a linear probe reads in its first two tokens."""
    model = context.train({"model": {"name": name}, **RECIPE})
    pixels, labels = context.test_pixels(32, TESTED)
    lengths = tuple(k for k in LENGTHS if k <= model.config.registers)
    found = errors(model, pixels, lengths, zeros)
    found["other over own"] = found["mse@other"] / found[f"mse@{lengths[-1]}"]
    drops = [1 - found[f"mse@{2 * k}"] / found[f"mse@{k}"] for k in lengths if 2 * k in lengths]
    return found | {"smallest fall": min(drops), "probe": _probe(model, context, pixels, labels)}


def _probe(model: FlexTok, context: Context, pixels: Tensor, labels: Tensor) -> float:
    def features(images: Tensor) -> Tensor:
        parts = [model.embed(model.encode(part))[:, :2] for part in images.split(AT_ONCE)]
        return torch.cat(parts).flatten(1).float()

    seen, classes = context.train_pixels(32, PROBED)
    return probe(features(seen), classes, features(pixels), labels)


def _gain(found: Mapping[str, Mapping[str, float]]) -> float:
    return 1 - found["nested"]["mse@2"] / found["whole"]["mse@2"]


register(System("flextok-halved", Halved, FlexTokConfig, {"flextok-halved": CONFIG}))
register(System("flextok-whole", Whole, FlexTokConfig, {"flextok-whole": CONFIG}))
register(System("flextok-two", Whole, FlexTokConfig, {"flextok-two": replace(CONFIG, registers=2)}))

REPRODUCTION = Reproduction(
    slug="flextok",
    title="FlexTok: one model for every prefix",
    claim="with nested dropout one model with a flow decoder serves every prefix length, in order and about as well as "
    "a model trained for that length; without it prefixes are useless",
    source="arXiv:2502.13967, sections 3 and 4",
    checked="CIFAR-10 averaged to 16x16, in pixel space, 8 tokens of 1000 codes, squared error from the same noise. "
    "The headline, gFID on ImageNet with a generator, is not checked: it needs both and an Inception network. Void "
    "where a picture decoded from another one's tokens is not 1.5 times as far off: tokens are not listened to then",
    baseline="whole",
    arms={
        "nested": Arm("a random number of tokens dropped", partial(trained, name="flextok-halved"), 8),
        "whole": Arm("all tokens, always", partial(trained, name="flextok-whole", zeros=True), 8),
        "two tokens": Arm("2 tokens, always", partial(trained, name="flextok-two"), 8, seeds=1),
    },
    rule=(
        Condition("error that falls at every doubling, the least share", of("nested", "smallest fall"), at_least=0.03),
        Condition("share of the error of whole that is saved at 2 tokens", Quantity(("nested", "whole"), _gain), 0.25),
        Condition("error over that of whole at 8 tokens", ratio("mse@8", "nested", over="whole"), at_most=1.15),
        Condition("error over that of two tokens at 2", ratio("mse@2", "nested", over="two tokens"), at_most=1.15),
        Condition("valid: error with another's tokens over one's own, nested", of("nested", "other over own"), 1.5),
        Condition("valid: error with another's tokens over one's own, whole", of("whole", "other over own"), 1.5),
    ),
    steps=3000,
    batch=64,
    report=("mse@1", "mse@2", "mse@4", "mse@8", "mse@other", "probe"),
)
