"""Which tokens are alike: nearest neighbours between two halves of a sequence, for `tome`'s bipartite matching.

    sources (B, n, C), destinations (B, m, C), unit vectors -> of every source the largest product (B, n), and whose

The n x m products are never held in one piece: they are taken in parts that stay in a core's cache. Where a CPU
multiplies in bfloat16 many times faster, those products leave only the sources near the cut to be decided in float32.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vistok.reducer import take

AT_ONCE = {"cpu": 1 << 18}  # numbers of the similarity matrix that are held at a time: they stay in a core's cache
ELSEWHERE = 1 << 26
EPS = 1e-12  # the least norm that a token is divided by
SCREENED = 1 << 20  # numbers of it in bfloat16 that are held at a time
DOUBT = 2**-8 + 2**-9 + 2**-13  # of a product of unit vectors in bfloat16: both rounded, the sum rounded, and some room


def similarity(sources: Tensor, destinations: Tensor, protected: int) -> Tensor:
    """Of every source (B, n, C) to its nearest destination (B, m, C): (B, n).

    A protected source has none; protected destinations are left out by the caller. Which one it is is asked for later,
    of those sources alone that are merged: a largest value is found much faster than its place.
    """
    found = torch.empty(sources.shape[:2], dtype=sources.dtype, device=sources.device)
    others = destinations.mT
    batch, length, width = len(sources), sources.shape[1], others.shape[-1]
    at_once = max(AT_ONCE.get(sources.device.type, ELSEWHERE) // max(width, 1), 1)
    items, rows = min(max(at_once // max(length, 1), 1), batch), min(at_once, length)
    room = sources.new_empty(items * rows * width)  # taken once: fresh memory costs more than what is written there
    for item in range(0, batch, items):
        for row in range(0, length, rows):
            part = sources[item : item + items, row : row + rows]
            products = room[: part.shape[0] * part.shape[1] * width].view(*part.shape[:2], width)
            torch.bmm(part, others[item : item + items], out=products)
            torch.amax(products, -1, out=found[item : item + items, row : row + rows])
    found[:, : (protected + 1) // 2] = -torch.inf
    return found


def screens(metric: Tensor, r: int) -> bool:
    """Whether it pays: many tokens, few of them merged, and a CPU that multiplies much faster in bfloat16."""
    quick = metric.device.type == "cpu" and metric.dtype == torch.float32 and bool(_capabilities().get("amx_bf16"))
    return quick and metric.shape[1] >= 1024 and 0 < r < metric.shape[1] // 8


@cache
def _capabilities() -> Mapping[str, Any]:
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def screened(metric: Tensor, norms: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor] | None:
    """The r sources among `metric` (B, N, C) that are nearest to a destination, and which that is: (B, r) each.

    All products are taken in bfloat16 first, whose error has a bound for unit vectors. Sources that the bound leaves in
    doubt are decided in float32, so that the choice is that of float32. None where most are in doubt, or where a source
    is unlike all destinations.
    """
    sources = metric[:, ::2]
    batch, length = sources.shape[:2]
    others = metric[:, 1::2][:, protected // 2 :] / norms[:, 1::2][:, protected // 2 :]
    rough = torch.empty_like(sources, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    torch.div(sources, norms[:, ::2], out=rough)
    narrow, width = others.bfloat16().mT, others.shape[1]
    found = torch.empty(batch, length, dtype=torch.int16)
    items = min(max(AT_ONCE["cpu"] // (length * width), 1), batch)
    rows = min(max(SCREENED // width, 1), length)
    room = rough.new_empty(items * rows * width)  # taken once: fresh memory costs more than what is written there
    for item in range(0, batch, items):
        for row in range(0, length, rows):
            part = rough[item : item + items, row : row + rows]
            products = room[: part.shape[0] * part.shape[1] * width].view(*part.shape[:2], width)
            torch.bmm(part, narrow[item : item + items], out=products)
            # above 0 they are in the order of their bits, which a CPU compares faster; below 0 they are not
            torch.amax(products.view(torch.int16), -1, out=found[item : item + items, row : row + rows])
    first = (protected + 1) // 2
    if bool((found[:, first:] < 0).any()):
        return None
    best = found.view(torch.bfloat16).float()
    best[:, :first] = -torch.inf
    threshold = best.topk(r, dim=-1).values[:, -1:] - 2 * DOUBT
    doubtful = int((best >= threshold).sum(1).max())
    if doubtful > length // 2:
        return None
    candidates = best.topk(doubtful, dim=-1, sorted=False).indices
    value, whose = nearest(take(sources, candidates) / take(norms[:, ::2], candidates), others)
    places = value.topk(r, dim=-1).indices
    return candidates.gather(1, places), whose.gather(1, places)


def nearest(tokens: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """For every token (B, n, C) its product with the nearest of the others (B, m, C), and that one's number: (B, n)."""
    items = max(AT_ONCE.get(tokens.device.type, ELSEWHERE) // max(tokens.shape[1] * others.shape[1], 1), 1)
    pairs = zip(tokens.split(items), others.split(items), strict=True)
    values, numbers = zip(*((one @ two.mT).max(-1) for one, two in pairs), strict=True)
    return torch.cat(values), torch.cat(numbers)


def others_than(chosen: Tensor, length: int) -> Tensor:
    """The positions below `length` that are not in `chosen` (B, r), in order: (B, length - r)."""
    free = torch.ones(len(chosen), length, dtype=torch.bool, device=chosen.device).scatter_(1, chosen, False)
    left = length - chosen.shape[1]
    place = torch.where(free, free.cumsum(-1) - 1, left)
    numbers = torch.arange(length, device=chosen.device).expand(len(chosen), -1)
    return numbers.new_empty(len(chosen), left + 1).scatter_(1, place, numbers)[:, :left]
