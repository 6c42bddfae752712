"""TokBench's claim at small scale: small text is lost first, and PSNR does not tell.

    scene with a word --autoencoder--> rebuilt --RapidOCR on the word's box--> read right, or not, by height of the word
          \\--noise, or blur, to the same PSNR ---------^

    continuous   f = 8, 16 numbers a position      vq   f = 8, one of 1024 codes      vq-16   f = 16, one of 1024 codes

The same CNN and the same steps for all. As in the benchmark, words that the reader misreads on the original are left
out, and the mean is that of the three bins. Where the bins lie is chosen before anything is compared: the first of
three ranges of heights at which a `vq` of another seed reads a fifth of the words, so that no arm is at the floor.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.evaluation.readers import Reader, build_reader
from vistok.evaluation.reproducing import Context
from vistok.evaluation.reproduction import Arm, Condition, Numbers, Quantity, Reproduction, difference, of
from vistok.evaluation.tokbench import binned
from vistok.metrics.psnr import psnr
from vistok.metrics.text import reading
from vistok.reproductions._scenes import Scene, SceneConfig, bits, held_out_scenes, read, rebuilt, trained, usage
from vistok.reproductions._small import shared

WORDS, READER = 300, "rapidocr"
RANGES = ((10, 20, 30, 40), (16, 26, 36, 48), (24, 32, 40, 48))  # edges of small, medium and large, px of the font
ENOUGH, CHOOSING_WORDS, CHOOSING_SEED = 0.2, 60, 1000
NAMES = ("small", "medium", "large")
F8: dict[str, Any] = {"widths": (32, 64, 64), "blocks": (0, 1, 1)}
F16: dict[str, Any] = {"widths": (32, 64, 64, 64), "blocks": (0, 1, 1, 1)}


def edges(context: Context) -> tuple[int, ...]:
    """Edges of the bins, chosen once for all arms and seeds, as the module's docstring says."""

    def make() -> dict[str, Tensor]:
        tokenizer, reader = trained(SceneConfig(**F8), CHOOSING_SEED, context), build_reader(READER)
        for chosen in RANGES:
            scenes = held_out_scenes(context, CHOOSING_WORDS, (chosen[0], chosen[-1]))
            whole = rebuilt(tokenizer, torch.stack([one.pixels for one in scenes]))
            reached = scores(reader, scenes, whole, chosen)["t-acc"]
            context.tell(f"words of {chosen[0]} to {chosen[-1]} px: T-ACC {reached:.3f}")
            if reached >= ENOUGH:
                break
        return {"edges": torch.tensor(chosen)}

    return tuple(shared(context, "edges", make)["edges"].tolist())


def arm(seed: int, context: Context, *, settings: dict[str, Any], degraded: bool = False) -> Mapping[str, float]:
    """Train an autoencoder and read its scenes; with `degraded`, also the originals at its PSNR with noise or blur."""
    places, reader = edges(context), build_reader(READER)
    scenes = held_out_scenes(context, WORDS, (places[0], places[-1]))
    tokenizer = trained(SceneConfig(**settings), seed, context)
    original = torch.stack([one.pixels for one in scenes])
    right = [one.word == seen for one, seen in zip(scenes, read(reader, scenes, original), strict=True)]
    kept = [one for one, good in zip(scenes, right, strict=True) if good]
    original = original[torch.tensor(right)]
    whole = rebuilt(tokenizer, original)
    found = scores(reader, kept, whole, places) | {
        "psnr": float(psnr(whole, original).mean()),
        "kept": len(kept) / len(scenes),
        "smallest": float(places[0]),
        "bits": bits(tokenizer, original),
        "usage": usage(tokenizer, original),
    }
    if degraded:
        for name, change in (("noise", noisy), ("blur", blurred)):
            altered = at_psnr(original, found["psnr"], change)
            found[f"{name}_psnr"] = float(psnr(altered, original).mean())
            found[f"{name}_t-acc"] = scores(reader, kept, altered, places)["t-acc"]
    return found


def scores(reader: Reader, scenes: list[Scene], pixels: Tensor, places: tuple[int, ...]) -> dict[str, float]:
    """T-ACC and T-NED, "t-acc_small" to "t-acc_large" by height, and the means of the three bins."""
    pairs = [reading(one.word, seen) for one, seen in zip(scenes, read(reader, scenes, pixels), strict=True)]
    bounds = tuple(map(float, places))
    accuracy = binned([(one.height, float(how.raw)) for one, how in zip(scenes, pairs, strict=True)], bounds)
    close = binned([(one.height, 1 - how.raw_ned) for one, how in zip(scenes, pairs, strict=True)], bounds)
    by_size = {f"t-acc_{name}": value for name, value in zip(NAMES, accuracy.bins, strict=True)}
    return {"t-acc": fmean(accuracy.bins), "t-ned": fmean(close.bins)} | by_size


def noisy(pixels: Tensor, strength: float) -> Tensor:
    """Float pixels (n, 3, S, S) in [0, 1] with Gaussian noise, drawn alike for every strength."""
    return pixels + strength * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))


def blurred(pixels: Tensor, strength: float) -> Tensor:
    """Float pixels (n, 3, S, S) blurred by a Gaussian of `strength` * 10 pixels."""
    places = torch.arange(-20, 21)
    kernel = torch.softmax(-0.5 * (places / max(10 * strength, 1e-3)) ** 2, 0)
    channels = pixels.flatten(0, 1)[:, None]
    channels = F.conv2d(F.pad(channels, (20, 20, 0, 0), mode="reflect"), kernel[None, None, None, :])
    channels = F.conv2d(F.pad(channels, (0, 0, 20, 20), mode="reflect"), kernel[None, None, :, None])
    return channels[:, 0].unflatten(0, pixels.shape[:2])


def at_psnr(pixels: Tensor, wanted: float, change: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Pictures, uint8, changed by as much as brings them to a mean PSNR of `wanted` dB, within 0.05 where that goes.

    The strength is found on the first hundred, by bisection; then all are changed by it.
    """
    low, high = 0.0, 0.5
    some = pixels[:100]
    for _ in range(14):
        middle = (low + high) / 2
        reached = float(psnr(changed(some, middle, change), some).mean())
        low, high = (middle, high) if reached > wanted else (low, middle)
    return changed(pixels, (low + high) / 2, change)


def changed(pixels: Tensor, strength: float, change: Callable[[Tensor, float], Tensor]) -> Tensor:
    """uint8 to uint8."""
    return (change(pixels.float() / 255, strength).clamp(0, 1) * 255).round().to(torch.uint8)


def largest_rise(name: str) -> Quantity:
    """By how much an arm's T-ACC is higher in a smaller bin than in the next larger one, at most."""

    def value(found: Mapping[str, Numbers]) -> float:
        bins = [found[name][f"t-acc_{size}"] for size in NAMES]
        return max(small - large for small, large in pairwise(bins))

    return Quantity((name,), value)


ARMS = {
    "continuous": Arm("f = 8, 16 numbers a position", partial(arm, settings={**F8, "bottleneck": "continuous"}), 1.2),
    "vq": Arm("f = 8, 1024 codes", partial(arm, settings=F8, degraded=True), 1.5),
    "vq-16": Arm("f = 16, 1024 codes", partial(arm, settings=F16), 1.2),
}

REPRODUCTION = Reproduction(
    slug="tokbench",
    title="TokBench: small text is lost first",
    claim="text is lost the more, the smaller it is, with discrete codes and with larger f, and PSNR does not show it",
    source="arXiv:2505.18142",
    checked="words of four random letters on 128 px photographs, the smallest of `smallest` px, through autoencoders "
    "trained here on squared error alone; read by RapidOCR, where the paper has PARSeq. Faces and video are not "
    "checked. A reader may bear noise better than blur: blurred originals of equal PSNR are reported beside noisy "
    "ones. Discrete arms have 10 bits a position, the continuous one 16 numbers, so that its lead is one of rate too, "
    "as the paper's is",
    baseline="continuous",
    arms=ARMS,
    rule=(
        Condition("share of words read right on the originals", of("continuous", "kept"), at_least=0.85),
        *(Condition(f"rise of T-ACC towards smaller words, {name}", largest_rise(name), at_most=0.03) for name in ARMS),
        Condition("T-ACC, continuous minus VQ", difference("t-acc", "continuous", minus="vq"), at_least=0.1),
        Condition("T-ACC, f = 8 minus f = 16", difference("t-acc", "vq", minus="vq-16"), at_least=0.05),
        Condition(
            "T-ACC of originals with noise at VQ's PSNR, minus VQ's",
            Quantity(("vq",), lambda found: found["vq"]["noise_t-acc"] - found["vq"]["t-acc"]),
            at_least=0.1,
        ),
    ),
    steps=1000,
    batch=16,
    report=(
        *("psnr", "t-acc", *(f"t-acc_{name}" for name in NAMES), "t-ned"),
        *("noise_t-acc", "blur_t-acc", "bits", "smallest"),
    ),
    train="imagenet-samples/train",
    test="imagenet-samples/val",
)
