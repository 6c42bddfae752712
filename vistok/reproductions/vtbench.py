"""VTBench's claim at small scale: discrete tokenizers fall behind continuous ones, most in fine detail and text.

    photographs, fine patterns, scenes with a word --autoencoder--> rebuilt --> PSNR, steerable distance, CER

    continuous   16 numbers a position      vq   one of 1024 codes      fsq   one of 8 x 5 x 5 x 5

The same CNN of f = 8 and the same steps for all, trained on photographs with words, never on patterns. Photographs and
patterns go through `vistok.evaluation.vtbench`, which `vistok bench vtbench` runs; the distance is that of
`vistok.losses.perceptual`, steerable, which needs no weights, in place of LPIPS.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from vistok.data.samples import patterns
from vistok.evaluation.readers import build_reader
from vistok.evaluation.reproducing import Context
from vistok.evaluation.reproduction import Arm, Condition, Numbers, Quantity, Reproduction
from vistok.evaluation.vtbench import Preprocess, run_task
from vistok.losses.perceptual import build_perceptual
from vistok.metrics.psnr import psnr
from vistok.metrics.text import character_error_rate
from vistok.pixels import from_pil, to_pil
from vistok.reproductions._scenes import (
    SIDE,
    SceneConfig,
    SceneTokenizer,
    Unrounded,
    bits,
    held_out_scenes,
    read,
    rebuilt,
    trained,
    usage,
)

NATURAL, PATTERNS, WORDS, READER = 100, 200, 240, "rapidocr"
DISCRETE = ("vq", "fsq")
HOW = Preprocess(SIDE, standardize=False)


def arm(seed: int, context: Context, *, bottleneck: str) -> Mapping[str, float]:
    """Train an autoencoder, and score it on photographs, patterns and words."""
    tokenizer = trained(SceneConfig(bottleneck=bottleneck), seed, context)  # type: ignore[arg-type]
    natural = context.test_pixels(SIDE, NATURAL)[0]
    fine = torch.cat([from_pil(picture) for picture in patterns(PATTERNS, SIDE)])
    found = {"bits": bits(tokenizer, natural), "usage": usage(tokenizer, natural)}
    for name, task, pixels in (("natural", "task1-imagenet", natural), ("patterns", "task2-detail-preservation", fine)):
        pictures = [(to_pil(one[None]), None) for one in pixels]
        values = run_task(tokenizer, task, pictures, preprocess=HOW).values
        found |= {f"{name}_psnr": values["psnr"], f"{name}_ssim": values["ssim"]}
        found[f"{name}_distance"] = distance(rebuilt(tokenizer, pixels), pixels)
    scenes, reader = held_out_scenes(context, WORDS, (16, 48)), build_reader(READER)
    original = torch.stack([one.pixels for one in scenes])
    whole = rebuilt(tokenizer, original)
    seen = (read(reader, scenes, original), read(reader, scenes, whole))
    found |= {
        "words_psnr": float(psnr(whole, original).mean()),
        "cer": character_error_rate(zip(*seen, strict=True)).value,
        "cer_true": character_error_rate((one.word, text) for one, text in zip(scenes, seen[1], strict=True)).value,
        "cer_floor": character_error_rate((one.word, text) for one, text in zip(scenes, seen[0], strict=True)).value,
    }
    if isinstance(tokenizer.quantizer, Unrounded):
        found["natural_psnr_2_bits"] = float(psnr(coarse(tokenizer, natural), natural).mean())
    return found


@torch.no_grad()
def distance(pixels: Tensor, original: Tensor) -> float:
    """Mean steerable distance of pictures, uint8 (n, 3, S, S)."""
    judge = build_perceptual("steerable")
    parts = zip(pixels.split(50), original.split(50), strict=True)
    return float(torch.cat([judge(a.float() / 255, b.float() / 255) for a, b in parts]).mean())


@torch.no_grad()
def coarse(tokenizer: SceneTokenizer, pixels: Tensor) -> Tensor:
    """Pictures through the continuous autoencoder with 2 bits for each of its numbers."""
    assert isinstance(tokenizer.quantizer, Unrounded)
    found = []
    for part in pixels.split(50):
        z = tokenizer.encoder(part.float() / 255)
        vectors = tokenizer.quantizer.rounded(z.flatten(2).transpose(1, 2))
        found.append(tokenizer.decoder(vectors.transpose(1, 2).unflatten(2, z.shape[2:])).clamp(0, 1))
    return (torch.cat(found) * 255).round().to(torch.uint8)


def lead(metric: str) -> Quantity:
    """A metric of the continuous arm minus the better discrete one's."""
    return _of_all(lambda found: found["continuous"][metric] - max(found[name][metric] for name in DISCRETE))


def closeness(metric: str) -> Quantity:
    """A distance of the continuous arm over the better discrete one's."""
    return _of_all(lambda found: found["continuous"][metric] / min(found[name][metric] for name in DISCRETE))


def _of_all(value: Callable[[Mapping[str, Numbers]], float]) -> Quantity:
    return Quantity(("continuous", *DISCRETE), value)


def widening(found: Mapping[str, Numbers]) -> float:
    """How much larger the lead in PSNR is on patterns or on words, where it is larger, than on photographs."""
    gaps = {name: lead(f"{name}_psnr").value(found) for name in ("natural", "patterns", "words")}
    return max(gaps["patterns"], gaps["words"]) - gaps["natural"]


REPRODUCTION = Reproduction(
    slug="vtbench",
    title="VTBench: what discrete codes lose",
    claim="discrete tokenizers fall behind continuous ones in reconstruction, and more in fine detail and text",
    source="arXiv:2505.13439",
    checked="100 photographs, 200 fine patterns and 240 words of four random letters, 16 to 48 px high, at 128 px, "
    "through autoencoders trained here on squared error alone. LPIPS and FID are not checked, a distance of oriented "
    "filters stands in; words are read by RapidOCR in boxes that are known, where the paper has a language model read "
    "whole pages. Discrete arms have 10 bits a position, the continuous one 16 numbers: its PSNR with 2 bits a number, "
    "32 a position, is reported",
    baseline="continuous",
    arms={
        "continuous": Arm("16 numbers a position", partial(arm, bottleneck="continuous"), 1.2),
        "vq": Arm("1024 codes", partial(arm, bottleneck="vq"), 1.2),
        "fsq": Arm("8 x 5 x 5 x 5 codes of FSQ", partial(arm, bottleneck="fsq"), 1.2),
    },
    rule=(
        Condition("dB over the better discrete one, photographs", lead("natural_psnr"), at_least=1.0),
        Condition("dB over the better discrete one, patterns", lead("patterns_psnr"), at_least=1.0),
        Condition("distance over the better discrete one's, photographs", closeness("natural_distance"), at_most=0.9),
        Condition("distance over the better discrete one's, patterns", closeness("patterns_distance"), at_most=0.9),
        Condition(
            "CER of the better discrete one, minus the continuous one's",
            _of_all(lambda found: min(found[name]["cer"] for name in DISCRETE) - found["continuous"]["cer"]),
            at_least=0.1,
        ),
        Condition("dB of lead on patterns or words, over that on photographs", _of_all(widening), at_least=0.5),
    ),
    steps=1000,
    batch=16,
    report=(
        "natural_psnr", "patterns_psnr", "words_psnr", "natural_distance", "patterns_distance",
        "cer", "cer_true", "usage", "bits", "natural_psnr_2_bits",
    ),
    train="imagenet-samples/train",
    test="imagenet-samples/val",
)  # fmt: skip
