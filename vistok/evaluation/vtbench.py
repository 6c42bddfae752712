"""VTBench's protocol (arXiv:2505.13439): its preprocessing, and its metrics as released and as they should be.

    picture --Preprocess--> tensor --model--> tensor --to_picture--> 8 bits --stretched to 256--> PSNR, SSIM, ..

The released script has three slips, kept here under their own names so that its numbers can be had, each with a twin:
PSNR is one error over the whole set with an inferred range (`vtbench_psnr`; `psnr` is the mean per picture), SSIM takes
its range from each batch (`vtbench_ssim`), and LPIPS gets [0, 1] where it expects [-1, 1] (`Lpips(signed=False)`). Its
WER counts characters (`vistok.metrics.text`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import log10
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vistok.data.images import is_image_name
from vistok.errors import InputError
from vistok.metrics.psnr import psnr
from vistok.metrics.ssim import VARIANTS, SsimVariant, check, similarity, ssim
from vistok.metrics.text import character_error_rate, vtbench_word_error_rate, word_error_rate
from vistok.tokenizer import Tokenizer

SIDE = 256  # at which the released script compares


@dataclass(frozen=True)
class Preprocess:
    """How a picture goes to a model.

    target       a square's side, (width, height), or a negative number for the picture's own size
    lock_ratio   keep the ratio of the sides, else stretch
    center_crop  fill the target and cut the middle out; with `padding` instead, fit into it on black
    standardize  [-1, 1], else [0, 1]
    """

    target: int | tuple[int, int] = 512
    lock_ratio: bool = True
    center_crop: bool = True
    padding: bool = False
    standardize: bool = True

    def __call__(self, image: Image.Image) -> Tensor:
        """A picture to float32 (3, H, W)."""
        image = image.convert("RGB")
        values = torch.from_numpy(np.asarray(self._sized(image)).copy()).permute(2, 0, 1).float() / 255
        return values * 2 - 1 if self.standardize else values

    def _sized(self, image: Image.Image) -> Image.Image:
        if isinstance(self.target, tuple):
            width, height = self.target
        else:
            width, height = image.size if self.target < 0 else (self.target, self.target)
        if not self.lock_ratio:
            return image.resize((width, height), Image.Resampling.LANCZOS)
        ratios = width / image.width, height / image.height
        scale = max(ratios) if self.center_crop else min(ratios) if self.padding else 1.0
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        if self.center_crop:
            left, top = (image.width - width) // 2, (image.height - height) // 2
            return image.crop((left, top, left + width, top + height))
        if self.padding:
            canvas = Image.new("RGB", (width, height))
            canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
            return canvas
        return image

    def to_picture(self, pixels: Tensor) -> Image.Image:
        """Float (3, H, W) back to a picture: clamped, and cut off to 8 bits."""
        unit = (pixels.clamp(-1, 1) + 1) / 2 if self.standardize else pixels.clamp(0, 1)
        return Image.fromarray((unit * 255).permute(1, 2, 0).to(torch.uint8).numpy())


def stretched(image: Image.Image, side: int = SIDE) -> Tensor:
    """A picture stretched to a square, bilinear with antialias on 8 bits: float32 (3, side, side) in [0, 1]."""
    resized = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255


class SetPsnr:
    """`vtbench_psnr`: one squared error over the whole set, and the range that its originals happen to have."""

    def __init__(self) -> None:
        self._error, self._count, self._low, self._high = 0.0, 0, 0.0, 0.0

    def update(self, rebuilt: Tensor, original: Tensor) -> None:
        """Add pictures (B, 3, H, W) in [0, 1]."""
        self._error += float((rebuilt.double() - original.double()).square().sum())
        self._count += original.numel()
        self._low, self._high = min(self._low, float(original.min())), max(self._high, float(original.max()))

    @property
    def value(self) -> float:
        """In dB."""
        return 10 * log10((self._high - self._low) ** 2 * self._count / self._error) if self._error else float("inf")


def vtbench_ssim(batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean over pictures of torchmetrics' SSIM with the range of each batch (rebuilt, original): depends on batches."""
    values: list[Tensor] = []
    base = VARIANTS["torchmetrics"]
    for rebuilt, original in batches:
        spread = max(float(part.max() - part.min()) for part in (rebuilt, original))
        variant = SsimVariant(base.window, base.size, base.sigma, base.border, base.sample, spread, base.clamp)
        check(rebuilt, original, base.size // 2 + 1)
        values.append(similarity(rebuilt, original, variant)[0].mean(1))
    return float(torch.cat(values).mean())


# -- on pictures -------------------------------------------------------------------------------------------------------

# Folder of a task -> which of the three it is. Pictures may lie below it in any depth.
TASKS = {
    "task1-imagenet": "reconstruction",
    "task1-high-resolution": "reconstruction",
    "task1-varying-resolution": "reconstruction",
    "task2-detail-preservation": "detail",
    "task3-movie-posters": "text",
    "task3-arxiv-abstracts": "text",
    "task3-multilingual": "text",
}
PageReader = Callable[[np.ndarray], str]


@dataclass(frozen=True)
class TaskResult:
    """One task of one tokenizer: values by name. Those with `vtbench_` are the released script's.

    psnr, ssim          means over pictures at the preprocessed size; ssim is torchmetrics' with a range of 1
    vtbench_psnr, _ssim stretched to 256 pixels, with the released script's ranges
    cer, wer, vtbench_wer  of what is read in the reconstruction against what is read in the original
    cer_true, cer_floor    against the known text where it is known: of the reconstruction, and of the original
    """

    task: str
    kind: str
    pictures: int
    values: dict[str, float]


def tasks(folder: Path) -> dict[str, list[Path]]:
    """The pictures of every task in a folder laid out as DIR/task1-imagenet/.., by the task's name.

    Raises InputError where no task's folder is there, naming them.
    """
    found = {name: sorted(p for p in (folder / name).rglob("*") if is_image_name(p)) for name in TASKS}
    found = {name: paths for name, paths in found.items() if paths}
    if not found:
        raise InputError(f"{folder} has no pictures in any of {', '.join(TASKS)}")
    return found


def run_task(
    tokenizer: Tokenizer,
    name: str,
    pictures: Iterable[tuple[Image.Image, str | None]],
    *,
    preprocess: Preprocess | None = None,
    page_reader: PageReader | None = None,
    batch: int = 8,
    progress: Callable[[int], None] | None = None,
) -> TaskResult:
    """Rebuild the pictures of a task, each with its text where that is known, and score them.

    preprocess: as the model is fed, the middle square at its own size by default. page_reader: a picture to its text;
    without it a text task has no error rates. batch: of `vtbench_ssim`. Raises InputError without pictures.
    """
    how = preprocess or Preprocess(min(tokenizer.spec.size), standardize=False)
    kind = TASKS.get(name, "reconstruction")
    psnrs, ssims, small, read = [], [], [], []
    for number, (image, text) in enumerate(pictures):
        original = how.to_picture(how(image))
        pixels = tokenizer.decode(tokenizer.encode(original), dtype=torch.uint8)[0].permute(1, 2, 0).cpu().numpy()
        rebuilt = Image.fromarray(pixels)
        a, b = (torch.from_numpy(np.asarray(one).copy()).permute(2, 0, 1)[None] for one in (rebuilt, original))
        psnrs.append(float(psnr(a, b)[0]))
        ssims.append(float(ssim(a, b, "torchmetrics")[0]))
        small.append((stretched(rebuilt), stretched(original)))
        if page_reader is not None and kind == "text":
            read.append((page_reader(np.asarray(original)), page_reader(pixels), text))
        if progress is not None:
            progress(number + 1)
    if not small:
        raise InputError(f"no pictures for {name}")
    whole, batches = SetPsnr(), []
    for start in range(0, len(small), batch):
        pair = tuple(torch.stack([pair[side] for pair in small[start : start + batch]]) for side in (0, 1))
        whole.update(*pair)
        batches.append(pair)
    finite = [value for value in psnrs if value != float("inf")]
    values = {
        "psnr": fmean(finite) if finite else float("inf"),
        "ssim": fmean(ssims),
        "vtbench_psnr": whole.value,
        "vtbench_ssim": vtbench_ssim(batches),  # type: ignore[arg-type]
    }
    if read:
        seen = [(original, rebuilt) for original, rebuilt, _ in read]
        values |= {
            "cer": character_error_rate(seen).value,
            "wer": word_error_rate(seen).value,
            "vtbench_wer": vtbench_word_error_rate(seen).value,
        }
        known = [(text, original, rebuilt) for original, rebuilt, text in read if text is not None]
        if known:
            values["cer_true"] = character_error_rate([(text, rebuilt) for text, _, rebuilt in known]).value
            values["cer_floor"] = character_error_rate([(text, original) for text, original, _ in known]).value
    return TaskResult(name, kind, len(small), values)
