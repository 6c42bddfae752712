"""Tokens of one picture changed by hand: all of a segment at once, or a single token, to see what they carry.

tokens --shuffle, repeat, ..--> tokens      each segment keeps codes of its own codebook
tokens --one position------> tokens         its code set, drawn anew, or a bit of it flipped
"""

from dataclasses import replace

import torch

from vistok.errors import InputError
from vistok.layout import Segment
from vistok.tokens import Tokens

EDITS = ("as they are", "shuffle", "repeat the first", "mean picture", "swap halves")
ACTIONS = ("set", "randomise", "flip a bit")


def edited(tokens: Tokens, edit: str, seed: int = 0) -> Tokens:
    """Tokens of one picture, edited within every segment, so that each keeps the codes of its own codebook.

    shuffle: put in a random order. repeat the first: everywhere the segment's first token. mean picture: the segment's
    most frequent code, or its mean vector. swap halves: the last half before the first.
    """
    if edit not in EDITS:
        raise InputError(f"no edit {edit!r}; there are {', '.join(EDITS)}")
    data = tokens.data.clone()
    rng, start = torch.Generator().manual_seed(seed), 0
    for segment in tokens.segments:
        stop = min(start + segment.count, data.shape[1])
        part = data[:, start:stop]
        if edit == "shuffle":
            data[:, start:stop] = part[:, torch.randperm(stop - start, generator=rng)]
        elif edit == "repeat the first":
            data[:, start:stop] = part[:, :1]
        elif edit == "mean picture":
            data[:, start:stop] = part.mode(1, keepdim=True).values if tokens.codes is not None else part.mean(1, True)
        elif edit == "swap halves":
            data[:, start:stop] = part.roll((stop - start) // 2, 1)
        start = stop
    return replace(tokens, codes=data) if tokens.codes is not None else replace(tokens, vectors=data)


def with_token(
    tokens: Tokens, position: int, action: str, *, value: float = 0, column: int = 0, seed: int = 0
) -> Tokens:
    """Tokens of one picture with the token at `position` of the sequence changed.

    set: its code becomes `value`, of a continuous token the number in `column`. randomise: another code of the
    codebook, each equally likely; of a continuous token a vector with the segment's means and deviations. flip a bit:
    bit `value` of the code's number, 0 the lowest. column: which of several codes (factors, dimensions, bits).
    Raises InputError for what is not there: a position, a column, a code, a bit, an action.
    """
    segment, start = segment_at(tokens, position)
    if action not in ACTIONS:
        raise InputError(f"no action {action!r}; there are {', '.join(ACTIONS)}")
    data, rng = tokens.data.clone(), torch.Generator().manual_seed(seed)
    columns = len(segment.codebooks) or int(segment.dim or 0)
    if not 0 <= column < columns:
        raise InputError(f"no column {column}: tokens of {segment.name} have {columns}, from 0 on")
    if tokens.codes is None:
        if action == "flip a bit":
            raise InputError("continuous tokens have no bits; set a number of one, or randomise it")
        if action == "set":
            data[0, position, column] = value
        else:
            part = data[0, start : start + segment.count]
            noise = torch.randn(part.shape[1], generator=rng, dtype=torch.float32).to(part)
            data[0, position] = part.mean(0) + part.std(0, correction=0) * noise
        return replace(tokens, vectors=data)
    where = (0, position) if data.ndim == 2 else (0, position, column)
    data[where] = _code(int(data[where]), segment.codebooks[column], action, int(value), rng)
    return replace(tokens, codes=data)


def _code(code: int, size: int, action: str, value: int, rng: torch.Generator) -> int:
    """Another code of a codebook of `size`; see `with_token`."""
    if action == "randomise":
        if size < 2:
            raise InputError("a codebook of one code has no other")
        return (code + int(torch.randint(1, size, (), generator=rng))) % size
    if action == "set":
        if not 0 <= value < size:
            raise InputError(f"no code {value} in a codebook of {size}")
        return value
    bits = (size - 1).bit_length()
    if not 0 <= value < bits or code ^ (1 << value) >= size:
        raise InputError(f"no bit {value} to flip in code {code} of a codebook of {size}, which has {bits} bits")
    return code ^ (1 << value)


def position_at(tokens: Tokens, size: tuple[int, int], x: float, y: float) -> int:
    """The position in the sequence of the token drawn at pixel (x, y) of the map of a picture of `size` (H, W).

    Raises InputError where tokens have no place, or the pixel is outside.
    """
    grid = grid_of(tokens)
    if grid is None:
        raise InputError("these tokens have no place in the picture; name one by its number")
    if not (0 <= x < size[1] and 0 <= y < size[0]):
        raise InputError(f"pixel ({x:g}, {y:g}) is outside a picture of {size[1]} x {size[0]}")
    segment, start = grid
    rows, columns = segment.shape
    return start + int(y * rows / size[0]) * columns + int(x * columns / size[1])


def grid_of(tokens: Tokens) -> tuple[Segment, int] | None:
    """The last segment that is a grid and wholly there, and its first position. None where tokens have no place."""
    if tokens.canvas[0].pieces > 1:
        return None
    best, start = None, 0
    for segment in tokens.segments:
        if len(segment.shape) == 2 and start + segment.count <= tokens.length:
            best = segment, start
        start += segment.count
    return best


def segment_at(tokens: Tokens, position: int) -> tuple[Segment, int]:
    """The segment of a position, and its first one. Raises InputError for a position that is not there."""
    if not 0 <= position < tokens.length:
        raise InputError(f"no token {position}; there are {tokens.length}, from 0 on")
    if tokens.keep is not None and not bool(tokens.keep[0, position]):
        raise InputError(f"token {position} of this picture is left out by its tokenizer")
    start = 0
    for segment in tokens.segments:
        if position < start + segment.count:
            break
        start += segment.count
    return segment, start
