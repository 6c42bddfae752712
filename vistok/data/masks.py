"""Segmentation masks in the usual files: index PNGs, and the run lengths of COCO annotations; boxes of masks and back.

A mask is bool (H, W) as an array, several are (K, H, W). Tokenizers of masks take them as tensors (K, 1, H, W):

    tokens = tok.encode(as_pixels(read_index(path).values()))
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vistok.errors import FormatError, InputError
from vistok.files import write_atomically

MAX_INDEX = 65535


def read_index(path: str | Path | Image.Image, *, void: int | None = None) -> dict[int, np.ndarray]:
    """The masks of an index PNG (palette, 8 or 16 bits gray), by index; 0 is background, `void` is left out (255 in
    Pascal VOC).

    A picture of zeros and 255 alone is one mask, with the index 255. Raises FormatError for a file that is no picture,
    or has colours instead of indices.
    """
    try:
        image = path if isinstance(path, Image.Image) else Image.open(path)
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise FormatError(f"{path} cannot be read as a picture: {error}") from error
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        raise FormatError(f"{path} has colours ({image.mode}), not indices; convert it to a palette or gray PNG first")
    indices = np.asarray(image)
    return {int(index): indices == index for index in np.unique(indices) if index not in (0, void)}


def write_index(path: str | Path, masks: Mapping[int, np.ndarray], *, overlap: bool = False) -> None:
    """Write masks (H, W), bool, as an index PNG: 8 bits with a palette of distinct colours, 16 bits gray above 255.

    Raises InputError for masks that overlap (unless `overlap`: then later ones lie on top), for sizes that differ and
    for indices outside 1..65535.
    """
    shapes = {np.shape(mask) for mask in masks.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise InputError(f"masks of shapes {sorted(shapes)}; expected at least one, all of one (H, W)")
    if any(not 1 <= index <= MAX_INDEX for index in masks):
        raise InputError(f"indices {sorted(masks)}; expected 1..{MAX_INDEX}, 0 is the background")
    wide = max(masks) > 255
    indices = np.zeros(next(iter(shapes)), np.uint16 if wide else np.uint8)
    for index, mask in masks.items():
        chosen = np.asarray(mask, bool)
        if not overlap and indices[chosen].any():
            raise InputError(f"mask {index} overlaps another, which one index a pixel cannot say; see overlap=True")
        indices[chosen] = index
    image = Image.fromarray(indices)
    if not wide:
        image.putpalette(_palette())
    from io import BytesIO

    buffer = BytesIO()
    image.save(buffer, "PNG")
    write_atomically(Path(path), buffer.getvalue())


def as_pixels(masks: Iterable[np.ndarray]) -> Tensor:
    """Masks (H, W) of one size as float (K, 1, H, W) of zeros and ones. Raises InputError where there are none."""
    stacked = [np.asarray(mask, bool) for mask in masks]
    if not stacked or len({mask.shape for mask in stacked}) > 1:
        raise InputError(f"masks of shapes {[mask.shape for mask in stacked]}; expected at least one, all of one size")
    return torch.from_numpy(np.stack(stacked)).float()[:, None]


# -- COCO's run lengths ----------------------------------------------------------------------------------------------


def to_rle(mask: np.ndarray, *, compressed: bool = True) -> dict[str, Any]:
    """A mask (H, W) as COCO has it: {"size": [H, W], "counts": text, or a list if not `compressed`}.

    Runs count down the columns, zeros first.
    """
    flat = np.asarray(mask, bool).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], changes, [len(flat)]])).tolist()
    if len(flat) and flat[0]:
        counts = [0, *counts]
    return {"size": [int(side) for side in mask.shape], "counts": _pack(counts) if compressed else counts}


def from_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """The mask (H, W) of a COCO annotation's run lengths, compressed or not. Raises FormatError where they are torn."""
    try:
        height, width = (int(side) for side in rle["size"])
        counts = rle["counts"]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"no COCO run lengths: expected 'size' [H, W] and 'counts', got {rle!r:.80}") from error
    if isinstance(counts, (str, bytes)):
        counts = _unpack(counts if isinstance(counts, bytes) else counts.encode("latin-1"))
    counts = np.asarray(counts, dtype=np.int64)
    if height < 0 or width < 0 or (counts < 0).any() or counts.sum() != height * width:
        raise FormatError(f"run lengths of {int(counts.sum())} pixels, for a mask of {height}x{width}: cut or damaged")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def _pack(counts: Sequence[int]) -> str:
    """COCO's text: each count as the difference to the one two before, in 5 bits a character, lowest first."""
    text = bytearray()
    for place, count in enumerate(counts):
        rest = count - counts[place - 2] if place > 2 else count
        more = True
        while more:
            low = rest & 31
            rest >>= 5
            more = rest != (-1 if low & 16 else 0)
            text.append((low | 32 if more else low) + 48)
    return text.decode("ascii")


def _unpack(text: bytes) -> list[int]:
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = character - 48
        if not 0 <= bits < 64:
            raise FormatError(f"run lengths hold the character {chr(character)!r}, which COCO's text does not have")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise FormatError("run lengths end in the middle of a number: the text is cut")
    return counts


# -- boxes -----------------------------------------------------------------------------------------------------------


def boxes_of(masks: Tensor) -> Tensor:
    """Boxes (B, 4), left, top, right, bottom in pixels with right and bottom exclusive, of masks (B, 1, H, W).

    Values of at least 0.5 count. A mask without any gives zeros.
    """
    there = masks[:, 0] >= 0.5
    columns, rows = there.any(1), there.any(2)

    def span(line: Tensor) -> tuple[Tensor, Tensor]:
        length = line.shape[1]
        first, last = line.int().argmax(1), length - line.flip(1).int().argmax(1)
        return first, torch.where(line.any(1), last, 0)

    (left, right), (top, bottom) = span(columns), span(rows)
    return torch.stack([left, top, right, bottom], 1)


def from_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Filled masks (B, 1, H, W) of boxes (B, 4) as `boxes_of` gives them. `size` is (H, W)."""
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise InputError(f"boxes of shape {tuple(boxes.shape)}; expected (B, 4): left, top, right, bottom")
    y = torch.arange(size[0], device=boxes.device)[None, :, None] + 0.5
    x = torch.arange(size[1], device=boxes.device)[None, None, :] + 0.5
    left, top, right, bottom = (side[:, None, None] for side in boxes.float().unbind(1))
    return ((x >= left) & (x < right) & (y >= top) & (y < bottom)).float()[:, None]


def _palette() -> list[int]:
    """Colours whose indices differ in few bits look different, as Pascal VOC has them: bits dealt to R, G, B."""
    colours = []
    for index in range(256):
        red = green = blue = 0
        for place in range(8):
            red |= (index >> (3 * place) & 1) << (7 - place)
            green |= (index >> (3 * place + 1) & 1) << (7 - place)
            blue |= (index >> (3 * place + 2) & 1) << (7 - place)
        colours += [red, green, blue]
    return colours
