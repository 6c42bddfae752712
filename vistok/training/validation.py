"""Held-out pictures: how they are chosen, PSNR or a generator's loss on them, and sample grids."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.data.clips import ClipItem
from vistok.data.items import Item, Source
from vistok.data.loader import center_crop
from vistok.data.sources import open_source
from vistok.errors import VistokError
from vistok.generator import Generator
from vistok.metrics.psnr import psnr

SHOWN = 8  # pictures in a grid
AT_ONCE = 8  # pictures per call of the model


class Chosen(Source):
    """Some items of another source, by index."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.kind, self.name, self.classes = source.kind, source.name, source.classes
        self.labelled, self.captioned = source.labelled, source.captioned
        self._source, self._indices = source, list(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def item(self, index: int) -> Item:
        """Item `index` of the chosen ones."""
        return self._source.item(self._indices[index])

    def _contents(self) -> Iterator[str]:
        yield f"{self._indices} of {self._source.fingerprint}"


def split(source: Source, validation: int | str) -> tuple[Source, Source | None]:
    """The pictures to train on and those to validate on: a source of their own, or evenly spread ones held out.

    At most a tenth of the pictures is held out, so fewer than ten leave nothing to validate on.
    """
    if isinstance(validation, str):
        return source, open_source(validation)
    count = min(validation, len(source) // 10)
    if count == 0:
        return source, None
    held = {(2 * index + 1) * len(source) // (2 * count) for index in range(count)}
    return Chosen(source, [i for i in range(len(source)) if i not in held]), Chosen(source, sorted(held))


def read_crops(source: Source, size: int, limit: int) -> tuple[Tensor, Tensor]:
    """Centre crops of the first readable pictures, uint8 (n, 3, size, size), n <= `limit`, and their labels (n,).

    Of clips, the picture in the middle. A label is -1 where a picture has none.
    """
    crops: list[np.ndarray] = []
    labels: list[int] = []
    for item in source:
        if len(crops) == limit:
            break
        try:
            crops.append(center_crop(item.middle if isinstance(item, ClipItem) else item.image, size))
        except VistokError:
            continue
        labels.append(-1 if item.label is None else item.label)
    if not crops:
        return torch.empty(0, 3, size, size, dtype=torch.uint8), torch.empty(0, dtype=torch.long)
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def prefix_lengths(prefixes: Sequence[int], most: int = 4) -> list[int]:
    """Up to `most` of the prefix lengths that decode, spread evenly, the last one always."""
    if len(prefixes) <= most:
        return list(prefixes)
    return sorted({prefixes[(len(prefixes) - 1) * (index + 1) // most] for index in range(most)})


def measure(tokenizer: Any, pixels: Tensor) -> dict[str, float]:
    """Mean PSNR in dB of reconstructions of uint8 (n, 3, S, S): `psnr` of all tokens, `psnr@k` of shorter prefixes."""
    values: dict[str, list[Tensor]] = {}
    for start in range(0, len(pixels), AT_ONCE):
        batch = pixels[start : start + AT_ONCE]
        tokens = tokenizer.encode(batch)
        for length in _lengths(tokenizer, batch, tokens):
            name = "psnr" if length == tokens.length else f"psnr@{length}"
            shorter = tokens if length == tokens.length else tokens.prefix(length)
            values.setdefault(name, []).append(psnr(tokenizer.decode(shorter, dtype=torch.uint8).cpu(), batch))
    means = {name: float(torch.cat(parts).mean()) for name, parts in values.items()}
    return {"psnr": means.pop("psnr"), **means}


def generator_loss(generator: Generator, pixels: Tensor, labels: Tensor) -> dict[str, float]:
    """The loss on uint8 (n, 3, S, S) and their labels (n,), in evaluation mode, with the same random numbers always."""
    training, totals = generator.training, []
    generator.eval()
    with torch.no_grad():
        for start in range(0, len(pixels), AT_ONCE):
            batch = {"pixels": pixels[start : start + AT_ONCE], "label": labels[start : start + AT_ONCE]}
            rng = torch.Generator(generator.device).manual_seed(start)
            terms = generator.loss(batch, 0, rng)
            totals.append(len(batch["pixels"]) * float(torch.stack(list(terms.values())).sum()))
    generator.train(training)
    return {"loss": sum(totals) / len(pixels)}


def generated_grid(generator: Generator) -> Tensor:
    """Two pictures of each of the first classes (or as many without one): uint8 (3, 2 * (S + 2), n * (S + 2))."""
    count = min(SHOWN, generator.classes or SHOWN)
    conditions = None if generator.classes is None else list(range(count)) * 2
    assert generator.tokenizer is not None
    pictures = generator.tokenizer.decode(generator.generate(conditions, count=2 * count), dtype=torch.uint8)
    return _framed(pictures.cpu().unflatten(0, (2, count)))


def sample_grid(tokenizer: Any, pixels: Tensor) -> Tensor:
    """Originals above, then reconstructions from ever longer prefixes: uint8 (3, rows * (S + 2), n * (S + 2))."""
    batch = pixels[:SHOWN]
    tokens = tokenizer.encode(batch)
    rows = [batch]
    for length in _lengths(tokenizer, batch, tokens):
        shorter = tokens if length == tokens.length else tokens.prefix(length)
        rows.append(tokenizer.decode(shorter, dtype=torch.uint8).cpu())
    return _framed(torch.stack(rows))


def _framed(rows: Tensor) -> Tensor:
    framed = torch.nn.functional.pad(rows, (0, 2, 0, 2), value=255)  # (rows, n, 3, S + 2, S + 2)
    return framed.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)


def _lengths(tokenizer: Any, batch: Tensor, tokens: Any) -> list[int]:
    size = tuple(batch.shape[-2:])
    if not tokenizer.spec.sizes.legal(size):
        return [tokens.length]
    return prefix_lengths(tokenizer.spec.at(size).prefixes)
