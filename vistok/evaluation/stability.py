"""How many codes change where nothing of the picture does: with the batch, the precision, the device, the tiling.

    pictures, each encoded alone in float32 = the reference
             --in batches, in bf16, on the GPU, as tiles--> the share of codes that differ from it

A latent that lies between two codes flips on the last bit, and kernels round differently for every shape. Generators
and token stores built from one setting are then read in another. `Tokenizer.encode(batch_invariant=True)` takes the
batch out of it; what it costs in speed stands in the result.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.data.items import Source
from vistok.data.sources import Where, open_source
from vistok.errors import InputError, VistokError
from vistok.evaluation.protocols import evaluation_crop
from vistok.tokenizer import Tokenizer
from vistok.tokens import Tokens

BATCHES = (2, 3, 8, 16)


@dataclass(frozen=True)
class Flips:
    """One setting: the share of codes that differ from the reference, and that of pictures with any such code.

    by_segment  the first for every segment. seconds: per picture, of encoding alone.
    """

    setting: str
    codes: float
    pictures: float
    by_segment: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Stability:
    """What `stability` gives. `invariant_cost`: time of the batch-invariant mode over that of the largest batch."""

    model: str
    weights: str
    pictures: int
    size: int
    rows: list[Flips]
    invariant_cost: float

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def stability(
    tokenizer: Tokenizer,
    data: Source | Where,
    *,
    size: int | None = None,
    limit: int = 64,
    batches: Sequence[int] = BATCHES,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    devices: Sequence[str] | None = None,
) -> Stability:
    """Encode the first `limit` pictures, centre crops of `size` (the model's own), in every setting.

    devices: those of this machine if None. Raises InputError for continuous tokens, or where no picture can be read.
    """
    if any(not segment.codebooks for segment in tokenizer.spec.segments):
        raise InputError(f"{tokenizer.name} has continuous tokens, which do not flip; give one with codes")
    side = size or min(tokenizer.spec.size)
    pixels = _pixels(open_source(data), side, limit)
    largest = max(batches)
    reference, _ = _timed(lambda: tokenizer.encode(pixels, batch_invariant=True))
    again, alone = _timed(lambda: tokenizer.encode(pixels, batch_invariant=True))
    rows = [_flips("alone again", again, reference, alone)]
    times = {}
    for batch in batches:
        parts, times[batch] = _timed(lambda batch=batch: _in_batches(tokenizer, pixels, batch))  # type: ignore[misc]
        rows.append(_flips(f"batches of {batch}", parts, reference, times[batch]))
    mixed = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    shuffled, seconds = _timed(lambda: tokenizer.encode(pixels[mixed], batch_invariant=True))
    rows.append(_flips("batch-invariant, in another order", shuffled[mixed.argsort()], reference, seconds))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        other, seconds = _timed(lambda: tokenizer.encode(pixels, batch_invariant=True))
        rows.append(_flips(f"{torch.get_num_threads()} threads instead of {threads}", other, reference, seconds))
    finally:
        torch.set_num_threads(threads)
    if tokenizer.spec.sizes.padded((2 * side, 2 * side)) is None:
        rows.append(_tiled(tokenizer, pixels, reference))
    for dtype in dtypes:
        model = copy.deepcopy(tokenizer).to(dtype)
        found, seconds = _timed(lambda model=model: _in_batches(model, pixels, largest))  # type: ignore[misc]
        rows.append(_flips(str(dtype).removeprefix("torch."), found, reference, seconds))
    for device in _devices() if devices is None else devices:
        model = copy.deepcopy(tokenizer).to(device)
        found, seconds = _timed(lambda model=model: _in_batches(model, pixels, largest))  # type: ignore[misc]
        rows.append(_flips(device, found.to("cpu"), reference, seconds))
    return Stability(tokenizer.name, tokenizer.fingerprint, len(pixels), side, rows, alone / times[largest])


def _flips(setting: str, found: Tokens, reference: Tokens, seconds: float) -> Flips:
    assert found.codes is not None
    assert reference.codes is not None
    differ = found.codes.cpu() != reference.codes.cpu()
    flat = differ.flatten(2).any(2) if differ.ndim == 3 else differ
    start, parts = 0, {}
    for segment in reference.segments:
        part = differ[:, start : start + segment.count]
        parts[segment.name], start = float(part.double().mean()), start + segment.count
    return Flips(
        setting, float(differ.double().mean()), float(flat.any(1).double().mean()), parts, seconds / len(found)
    )


def _tiled(tokenizer: Tokenizer, pixels: Tensor, reference: Tokens) -> Flips:
    """Four pictures put together and cut into tiles again, against each alone."""
    count = len(pixels) // 4
    if not count:
        raise InputError("four pictures at least are needed to look at tiles")
    large = pixels[: 4 * count].unflatten(0, (count, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    started = time.perf_counter()
    found = tokenizer.encode(large, on_size="tile", batch_invariant=True)
    seconds = (time.perf_counter() - started) / 4
    assert found.codes is not None
    assert reference.codes is not None
    # the tile grid is the last axis of every position: (count, N * 4[, C]), tiles row by row
    codes = found.codes.unflatten(1, (-1, 4)).transpose(1, 2).flatten(0, 1)
    alone = reference[: 4 * count]
    return _flips("tiles of a larger picture", Tokens(alone.segments, codes=codes, canvas=alone.canvas), alone, seconds)


def _in_batches(tokenizer: Tokenizer, pixels: Tensor, batch: int) -> Tokens:
    return Tokens.cat([tokenizer.encode(part) for part in pixels.split(batch)])


def _timed(encode: Callable[[], Any]) -> tuple[Tokens, float]:
    started = time.perf_counter()
    found = encode()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, time.perf_counter() - started


def _devices() -> list[str]:
    return ["cuda"] if torch.cuda.is_available() else []


def _pixels(source: Source, side: int, limit: int) -> Tensor:
    found = []
    for item in source:
        try:
            found.append(evaluation_crop(item.image, side))
        except VistokError:
            continue
        if len(found) == limit:
            break
    if not found:
        raise InputError(f"not one picture of {source.name} can be read")
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()
