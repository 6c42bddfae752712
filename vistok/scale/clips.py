"""Clips of a data set through a tokenizer, and back into files, one window of frames in memory at a time.

    file ── PyAV, a thread ahead ──> windows (1, 3, t, H, W) ── encode_windows ──> Tokens of one clip
    Tokens ── decode_windows ──> windows ── PyAV ──> FILE.mp4, whole or not at all

What remains of a window are its tokens. A clip whose file is damaged gives none: its beginning is not taken for it.
"""

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vistok.data.clips import ClipItem
from vistok.data.items import Item, Source
from vistok.data.loader import center_crop
from vistok.data.readahead import ahead
from vistok.data.video import open_clip, write_clip
from vistok.errors import FormatError, InputError, VistokError
from vistok.layout import Canvas
from vistok.pixels import OnSize
from vistok.tokenizer import Tokenizer
from vistok.tokens import Tokens

Parts = list[tuple[list[int], Tokens]]


def encode_clip(
    tokenizer: Tokenizer, item: Item, *, on_size: OnSize = "pad", crop: int | None = None, seed: int = 0
) -> Tokens:
    """The tokens of one clip. `crop`: the middle square of each frame, scaled to this side.

    Raises FormatError for a damaged clip, InputError for a size or frame count that does not fit, or for a picture.
    """
    if not isinstance(item, ClipItem):
        raise InputError(f"{item.id} is a picture, where clips are wanted")
    clip = item.clip
    cut = partial(center_crop, size=crop) if crop else None
    with closing(ahead(clip.windows(tokenizer.spec.window, cut))) as windows:
        return tokenizer.encode_windows(windows, rate=clip.rate, on_size=on_size, seed=seed)


def encode_clips(
    source: Source, span: Sequence[int], tokenizer: Tokenizer, *, on_size: OnSize, crop: int | None, seed: int
) -> tuple[list[Item], Parts, list[dict[str, Any]]]:
    """These items of a source: the items, (places, their tokens), and what could not be encoded and why."""
    items = [source[index] for index in span]
    parts: Parts = []
    bad: list[dict[str, Any]] = []
    for place, (index, item) in enumerate(zip(span, items, strict=True)):
        try:
            tokens = encode_clip(tokenizer, item, on_size=on_size, crop=crop, seed=seed + index)
        except (FormatError, InputError) as error:
            told = str(error).replace(str(getattr(item, "path", item.id)), item.id)  # a store names no place
            told = told if item.id in told else f"{item.id}: {told}"
            bad.append({"index": index, "id": item.id, "error": told})
        else:
            parts.append(([place], tokens))
    return items, parts, bad


def decode_clip(tokenizer: Tokenizer, tokens: Tokens, file: Path) -> None:
    """Write the tokens of one clip as a file of its size, frame count and rate."""
    rate = tokens.canvas[0].rate if tokens.canvas else None
    write_clip(file, tokenizer.decode_windows(tokens, dtype=torch.uint8), rate=rate)


def is_whole_clip(file: Path, canvas: Canvas | None) -> bool:
    """Whether a file is there, decodes to its end and has as many frames as its canvas says."""
    if not file.exists():
        return False
    try:
        count = sum(1 for _ in open_clip(file).frames())
    except VistokError:
        return False
    return canvas is None or count == canvas.frames
