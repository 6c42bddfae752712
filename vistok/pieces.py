"""Items in pieces: what belongs to which item when tiles and windows are encoded one by one, and joined again.

A picture's tiles, and a clip's windows, go through a model as items of their own: (B, ...) is (B * pieces, ...) there.
Their tokens are laid out position first, (n, pieces), so that a prefix holds the most important tokens of every piece.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vistok.errors import InputError

AT_ONCE = 16


def per_item_seeds(seed: int | Sequence[int], items: int) -> list[int]:
    """One seed per item: an int serves every item, so that an item's noise does not depend on its batch."""
    if isinstance(seed, int):
        return [seed] * items
    if len(seed) != items:
        raise InputError(f"{len(seed)} seeds for {items} items")
    return list(seed)


def pick(value: Any, rows: list[int], items: int) -> Any:
    """The entries of a per-item condition that belong to `rows`; anything else serves all items as it is."""
    if not _is_per_item(value, items) or len(rows) == items:
        return value
    return value[rows] if isinstance(value, Tensor) else [value[row] for row in rows]


def groups(total: int, pieces: int, seeds: list[int], conditions: dict[str, Any]) -> Iterator[tuple[slice, list, dict]]:
    """Slices of `total` pieces, few enough to go at once, each with its seeds and conditions."""
    repeated = {name: _repeat(value, pieces) for name, value in conditions.items()}
    for start in range(0, total, AT_ONCE):
        part = slice(start, min(start + AT_ONCE, total))
        chosen = {name: _slice(value, part) for name, value in repeated.items()}
        yield part, [seeds[piece // pieces] for piece in range(part.start, part.stop)], chosen


def interleave(parts: Sequence[Tensor | None], pieces: int) -> Tensor | None:
    """Tokens of pieces, (B * pieces, n, ...) in parts, to (B, n * pieces, ...), position first."""
    if parts[0] is None:
        return None
    data = torch.cat(parts)  # type: ignore[arg-type]
    return data.unflatten(0, (-1, pieces)).transpose(1, 2).flatten(1, 2)


def separate(data: Tensor | None, pieces: int) -> Tensor | None:
    """Inverse of `interleave`."""
    return None if data is None else data.unflatten(1, (-1, pieces)).transpose(1, 2).flatten(0, 1)


def _is_per_item(value: Any, items: int) -> bool:
    return (
        isinstance(value, (list, tuple, Tensor))
        and len(value) == items
        and not (isinstance(value, Tensor) and value.ndim == 0)
    )


def _repeat(value: Any, pieces: int) -> Any:
    if isinstance(value, Tensor) and value.ndim:
        return value.repeat_interleave(pieces, 0)
    return [item for item in value for _ in range(pieces)] if isinstance(value, (list, tuple)) else value


def _slice(value: Any, part: slice) -> Any:
    return value[part] if isinstance(value, (list, tuple, Tensor)) else value
