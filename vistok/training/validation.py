"""Held-out pictures: how they are chosen, PSNR on them, and sample grids."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.data.items import Item, Source
from vistok.data.loader import center_crop
from vistok.data.sources import open_source
from vistok.errors import VistokError
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


def read_crops(source: Source, size: int, limit: int) -> Tensor:
    """Centre crops of the first readable pictures, uint8 (n, 3, size, size), n <= `limit`."""
    crops: list[np.ndarray] = []
    for item in source:
        if len(crops) == limit:
            break
        try:
            crops.append(center_crop(item.image, size))
        except VistokError:
            continue
    if not crops:
        return torch.empty(0, 3, size, size, dtype=torch.uint8)
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


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


def sample_grid(tokenizer: Any, pixels: Tensor) -> Tensor:
    """Originals above, then reconstructions from ever longer prefixes: uint8 (3, rows * (S + 2), n * (S + 2))."""
    batch = pixels[:SHOWN]
    tokens = tokenizer.encode(batch)
    rows = [batch]
    for length in _lengths(tokenizer, batch, tokens):
        shorter = tokens if length == tokens.length else tokens.prefix(length)
        rows.append(tokenizer.decode(shorter, dtype=torch.uint8).cpu())
    framed = torch.nn.functional.pad(torch.stack(rows), (0, 2, 0, 2), value=255)  # (rows, n, 3, S + 2, S + 2)
    return framed.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)


def _lengths(tokenizer: Any, batch: Tensor, tokens: Any) -> list[int]:
    size = tuple(batch.shape[-2:])
    if not tokenizer.spec.sizes.legal(size):
        return [tokens.length]
    return prefix_lengths(tokenizer.spec.at(size).prefixes)
