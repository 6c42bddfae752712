"""OmniTokenizer's claim at small scale: pictures first, then pictures and clips, beats training on clips alone.

    images first   half of the steps on photographs; weights for later frames from the first frame's; the rest in turn
    clips alone    every step on clips
    joint          photographs and clips in turn from the start

Few clips (ten, of a few seconds) and many photographs (800), as the paper has it at its scale. 64 pixels, 5 frames,
1024 codes; batches of 16 photographs or 8 clips, so that every batch has 1024 tokens.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vistok
from vistok.data.clips import ClipItem, ClipLoader, ClipSource
from vistok.data.items import Source
from vistok.data.loader import PixelLoader, center_crop
from vistok.data.sources import open_source
from vistok.evaluation.reproducing import Context
from vistok.evaluation.reproduction import Arm, Condition, Reproduction, difference, of
from vistok.reproductions._small import fit
from vistok.tokenizers.omnitokenizer import OmniTokenizer

SIZE, FRAMES, CLIPS_AT_ONCE = 64, 5, 8
SCALE = (0.2, 1.0)
HELD_OUT = (  # scenes that no other clip shows
    "bolt-multi-size-detection", "fruit-and-vegetable-detection", "person-bicycle-car-detection",
    "store-aisle-detection", "worker-zone-detection",
)  # fmt: skip
WINDOWS, MOVING = 8, 0.1  # tested of a clip; change since the first frame from which on a pixel counts as moving
PHOTOGRAPHS = 100


def sources(root: Path) -> Mapping[str, Source]:
    """Photographs to train and to test on, and the clips, in two parts whose scenes differ."""
    folder = root / "clips"
    files = [item.id for item in ClipSource.below(folder)]
    held = [file for file in files if Path(file).stem in HELD_OUT] or files[:1]
    return {
        "train": open_source(root / "imagenet-samples" / "train"),
        "test": open_source(root / "imagenet-samples" / "val"),
        "clips": ClipSource(folder, [file for file in files if file not in held]),
        "held-out clips": ClipSource(folder, held),
    }


def batches(kind: str, model: OmniTokenizer, context: Context, seed: int) -> Iterator[dict[str, Any]]:
    """What an arm trains on, step by step."""
    options: dict[str, Any] = {"size": SIZE, "scale": SCALE, "workers": 0, "seed": seed}
    pictures = PixelLoader(context.data.train, batch_size=context.batch, **options)
    clips = ClipLoader(context.data.others["clips"], frames=FRAMES, batch_size=CLIPS_AT_ONCE, **options)
    first = context.steps // 2 if kind == "images first" else 0
    for step in range(first):
        yield pictures.batch(step)
    if first:
        model.started()  # weights for later frames follow from the first frame's
    for step in count():
        if kind == "clips alone":
            yield clips.batch(step)
        else:
            yield (pictures if step % 2 == 0 else clips).batch(first + step // 2)


def windows(source: Source, each: int) -> Tensor:
    """Windows spread evenly over every clip, uint8 (n, 3, FRAMES, SIZE, SIZE)."""
    from PIL import Image

    found = []
    for item in source:
        assert isinstance(item, ClipItem)
        frames = item.frames()
        for start in np.linspace(0, len(frames) - FRAMES, each).astype(int):
            cut = [center_crop(Image.fromarray(frame), SIZE) for frame in frames[start : start + FRAMES]]
            found.append(torch.from_numpy(np.stack(cut)).permute(3, 0, 1, 2))
    return torch.stack(found)


@torch.no_grad()
def quality(model: OmniTokenizer, pixels: Tensor) -> dict[str, float]:
    """Mean PSNR in dB of uint8 pictures or windows; of windows also over what moves ("moving"); codes in use."""
    values, moving, codes = [], [], []
    for part in pixels.split(20):
        tokens = model.encode(part)
        assert tokens.codes is not None
        codes.append(tokens.codes.unique())
        target = part.float() / 255
        error = (model.decode(tokens) - target).square()
        values.append(-10 * error.flatten(1).mean(1).log10())
        if part.ndim == 5:
            changed = (target - target[:, :, :1]).abs().amax(1, keepdim=True) > MOVING
            moving.append((error * changed).sum((0, 1, 2, 3, 4)) / (3 * changed.sum()).clamp_min(1))
    found = {"psnr": float(torch.cat(values).mean()), "codes": float(len(torch.cat(codes).unique()))}
    return found | ({"moving": float(-10 * torch.stack(moving).mean().log10())} if moving else {})


def measured(seed: int, context: Context, *, kind: str) -> dict[str, float]:
    """Train one arm; PSNR on held-out clips, on clips it has seen, and on photographs."""
    torch.manual_seed(seed)
    model = vistok.create("omnitokenizer-clips")
    assert isinstance(model, OmniTokenizer)
    data = batches(kind, model, context, seed)
    model.initialise(batches(kind, model, context, seed), torch.Generator().manual_seed(seed))
    fit(model, model.loss, data, context.steps, lr=1e-3, seed=seed, tell=context.tell)
    photographs, _ = context.test_pixels(SIZE, PHOTOGRAPHS)
    held_out = quality(model, windows(context.data.others["held-out clips"], WINDOWS))
    one = photographs[:8]
    alike = torch.equal(model.encode(one).codes, model.encode(one[:, :, None]).codes)
    return {
        "clips": held_out["psnr"],
        "moving": held_out["moving"],
        "seen clips": quality(model, windows(context.data.others["clips"], 2))["psnr"],
        "photographs": quality(model, photographs)["psnr"],
        "codes": held_out["codes"],
        "picture is a clip": float(alike),
    }


REPRODUCTION = Reproduction(
    slug="omnitokenizer",
    title="OmniTokenizer: pictures first, then pictures and clips",
    claim="training on pictures first, then on pictures and clips in turn, rebuilds clips better than training on "
    "clips alone, at equal steps, where clips are few and pictures many",
    source="arXiv:2406.09399, sections 3.2 and 4.3",
    checked="64 pixels and 5 frames, ten clips of real scenes and 800 photographs, L1 and the codebook's loss alone, "
    "no discriminators; PSNR on windows of five clips whose scenes are not among the ten. 600 steps, so that it takes "
    "minutes: arms are compared long before they converge. rFID and rFVD need far more data. Backgrounds stand still, "
    "so PSNR on moving pixels is reported too; that on the clips that were seen tells what was learnt by heart",
    baseline="clips alone",
    arms={
        "clips alone": Arm("every batch of clips", partial(measured, kind="clips alone"), 3.5),
        "images first": Arm(
            "half of the steps on photographs, then both in turn", partial(measured, kind="images first"), 3.5
        ),
        "joint": Arm("photographs and clips in turn from the start", partial(measured, kind="joint"), 3.5),
    },
    rule=(
        Condition(
            "dB on held-out clips over clips alone", difference("clips", "images first", "clips alone"), at_least=0.5
        ),
        Condition(
            "dB on photographs over clips alone", difference("photographs", "images first", "clips alone"), at_least=2
        ),
        Condition("dB on held-out clips over joint", difference("clips", "images first", "joint"), at_least=-0.3),
        Condition("dB on photographs over joint", difference("photographs", "images first", "joint"), at_least=-0.3),
        Condition(
            "a picture's codes are those of a clip of one frame", of("images first", "picture is a clip"), at_least=1
        ),
    ),
    steps=600,
    batch=16,
    report=("clips", "moving", "seen clips", "photographs", "codes"),
    train="imagenet-samples/train",
    test="imagenet-samples/val",
    also=("clips",),
    sources=sources,
)
