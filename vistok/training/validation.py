"""Held-out pictures or tokens: how they are chosen, PSNR or a generator's loss on them, and sample grids."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.data.clips import ClipItem
from vistok.data.items import Item, Source
from vistok.data.loader import center_crop
from vistok.data.sources import open_source
from vistok.data.token_loader import StoreSource, is_store
from vistok.errors import InputError, VistokError
from vistok.generator import Generator
from vistok.metrics.psnr import psnr
from vistok.pixels import tiled

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


def open_data(where: Any) -> Source:
    """What a run learns from: pictures, as `open_source` takes them, or the folder of a token store."""
    return StoreSource(where) if is_store(where) else open_source(where)


def split(source: Source, validation: int | str) -> tuple[Source, Source | None]:
    """The items to train on and those to validate on: a source of their own, or evenly spread ones held out.

    At most a tenth of the items is held out, so fewer than ten leave nothing to validate on. Raises InputError where
    one of them is a token store and the other is not.
    """
    if isinstance(validation, str):
        other = open_data(validation)
        if isinstance(other, StoreSource) != isinstance(source, StoreSource):
            raise InputError(
                f"data.validation={validation}: tokens and pictures; give a store with a store, or a number"
            )
        return source, other
    count = min(validation, len(source) // 10)
    if count == 0:
        return source, None
    held = {(2 * index + 1) * len(source) // (2 * count) for index in range(count)}
    rest = [index for index in range(len(source)) if index not in held]
    if isinstance(source, StoreSource):
        return source.chosen(rest), source.chosen(sorted(held))
    return Chosen(source, rest), Chosen(source, sorted(held))


def read_crops(source: Source, size: int, limit: int) -> tuple[Tensor, Tensor]:
    """Centre crops of the first readable pictures, uint8 (n, 3, size, size), n <= `limit`, and their labels (n,).

    Of clips, the picture in the middle. A label is -1 where a picture has none.
    """
    held = read_held(source, size, limit)
    return held["pixels"], held["label"]


def read_held(source: Source, size: int, limit: int) -> dict[str, Any]:
    """A batch of the first items, n <= `limit`: "pixels" and "label" as `read_crops` has them, a list "caption" where
    the source has captions; of a token store as `StoreSource.batch` has it.
    """
    if isinstance(source, StoreSource):
        return source.batch(range(min(limit, len(source))))
    crops: list[np.ndarray] = []
    labels: list[int] = []
    captions: list[str] = []
    for item in source:
        if len(crops) == limit:
            break
        try:
            crops.append(center_crop(item.middle if isinstance(item, ClipItem) else item.image, size))
        except VistokError:
            continue
        labels.append(-1 if item.label is None else item.label)
        captions.append(item.caption or "")
    pixels = torch.empty(0, 3, size, size, dtype=torch.uint8)
    if crops:
        pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
    held = {"pixels": pixels, "label": torch.tensor(labels, dtype=torch.long)}
    return held | {"caption": captions} if source.captioned else held


def prefix_lengths(prefixes: Sequence[int], most: int = 4) -> list[int]:
    """Up to `most` of the prefix lengths that decode, spread evenly, the last one always."""
    if len(prefixes) <= most:
        return list(prefixes)
    return sorted({prefixes[(len(prefixes) - 1) * (index + 1) // most] for index in range(most)})


def measure(tokenizer: Any, pixels: Tensor) -> dict[str, float]:
    """Mean PSNR in dB of reconstructions of uint8 (n, 3, S, S): `psnr` of all tokens, `psnr@k` of shorter prefixes.

    Of tokenizers of masks, the first channel's.
    """
    values: dict[str, list[Tensor]] = {}
    for start in range(0, len(pixels), AT_ONCE):
        batch = pixels[start : start + AT_ONCE, : tokenizer.input_channels]
        tokens = tokenizer.encode(batch)
        for length in _lengths(tokenizer, batch, tokens):
            name = "psnr" if length == tokens.length else f"psnr@{length}"
            shorter = tokens if length == tokens.length else tokens.prefix(length)
            values.setdefault(name, []).append(psnr(tokenizer.decode(shorter, dtype=torch.uint8).cpu(), batch))
    means = {name: float(torch.cat(parts).mean()) for name, parts in values.items()}
    return {"psnr": means.pop("psnr"), **means}


def generator_loss(generator: Generator, held: dict[str, Any]) -> dict[str, float]:
    """The loss on a batch of held-out items, in evaluation mode, with the same random numbers always."""
    training, totals, count = generator.training, [], len(next(iter(held.values())))
    generator.eval()
    with torch.no_grad():
        for start in range(0, count, AT_ONCE):
            batch = {key: value[start : start + AT_ONCE] for key, value in held.items()}
            rng = torch.Generator(generator.device).manual_seed(start)
            terms = generator.loss(batch, 0, rng)
            totals.append(min(AT_ONCE, count - start) * float(torch.stack(list(terms.values())).sum()))
    generator.train(training)
    return {"loss": sum(totals) / count}


def generated_grid(generator: Generator, captions: Sequence[str] = ()) -> Tensor:
    """Two pictures of each of the first classes, or captions (or as many without): uint8 (3, 2 * (S + 2), n * (S + 2)).

    The generator has its tokenizer attached.
    """
    count = min(SHOWN, generator.classes or len(captions) or SHOWN)
    conditions = list(captions[:count]) * 2 or None if generator.classes is None else list(range(count)) * 2
    assert generator.tokenizer is not None
    tokens = generator.generate(conditions, count=2 * count)
    told: dict[str, Any] = {"text": conditions or ""} if "text" in generator.tokenizer.spec.needs.decode else {}
    pictures = generator.tokenizer.decode(tokens, dtype=torch.uint8, **told)
    return tiled(pictures.cpu(), count)


def sample_grid(tokenizer: Any, pixels: Tensor) -> Tensor:
    """Originals above, then reconstructions from ever longer prefixes: uint8 (3, rows * (S + 2), n * (S + 2))."""
    batch = pixels[:SHOWN, : tokenizer.input_channels]
    tokens = tokenizer.encode(batch)
    rows = [batch]
    for length in _lengths(tokenizer, batch, tokens):
        shorter = tokens if length == tokens.length else tokens.prefix(length)
        rows.append(tokenizer.decode(shorter, dtype=torch.uint8).cpu())
    return tiled(torch.cat(rows).expand(-1, 3, -1, -1), len(batch))


def _lengths(tokenizer: Any, batch: Tensor, tokens: Any) -> list[int]:
    size = tuple(batch.shape[-2:])
    if not tokenizer.spec.sizes.legal(size):
        return [tokens.length]
    return prefix_lengths(tokenizer.spec.at(size).prefixes)
