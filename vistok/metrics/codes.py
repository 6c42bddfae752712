"""Which codes a tokenizer uses over a whole data set, per segment and per code at a position.

usage       share of the codebook that occurs at least once
perplexity  exp(entropy): how many codes, equally used, would say as much
entropy     in bits per code: what an ideal coder that knows the frequencies alone would spend

All three depend on the number of pictures: a codebook of 16,384 cannot be full after ten pictures of 256 codes, so
`counted` belongs beside them.
"""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from vistok.errors import InputError
from vistok.layout import Segment
from vistok.quantize.usage import CodeUsage
from vistok.tokens import Tokens


@dataclass(frozen=True)
class CodebookUse:
    """One codebook's row. `usage` is None for a codebook too large to count, the others also where nothing was."""

    segment: str
    column: int
    size: int
    counted: int
    usage: float | None
    perplexity: float | None
    entropy: float | None


class CodeStatistics:
    """Streaming counts: `update` with every batch of tokens, then `rows`. Memory is one count per code."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, tuple[int, ...]], CodeUsage] = {}

    def update(self, tokens: Tokens) -> None:
        """Count the codes that are there. Continuous tokens have none and count nothing."""
        if tokens.codes is None:
            return
        start = 0
        for segment in tokens.segments:
            stop = min(start + segment.count, tokens.length)
            if stop > start and segment.codebooks:
                self._usage(segment, tokens.device).update(_present(tokens, segment, start, stop))
            start += segment.count

    def _usage(self, segment: Segment, device: torch.device) -> CodeUsage:
        key = (segment.name, segment.codebooks)
        if key not in self._counts:
            self._counts[key] = CodeUsage(segment.codebooks).to(device)
        return self._counts[key]

    def rows(self) -> list[CodebookUse]:
        """One row per segment and code column, in the layout's order. Raises InputError where nothing was counted."""
        found = []
        for (name, codebooks), usage in self._counts.items():
            if not usage.tracked:
                found += [CodebookUse(name, c, size, 0, None, None, None) for c, size in enumerate(codebooks)]
                continue
            counts = usage.counts[:-1].split(list(codebooks))
            found += [_use(name, column, part) for column, part in enumerate(counts)]
        if not found:
            raise InputError("no codes were counted: update with discrete tokens first")
        return found

    def counts(self) -> list[Tensor]:
        """Counts (K,) of every codebook that is counted, in the order of `rows`; empty for one too large to count."""
        found: list[Tensor] = []
        for (_, codebooks), usage in self._counts.items():
            parts = usage.counts[:-1].split(list(codebooks)) if usage.tracked else [torch.zeros(0)] * len(codebooks)
            found += [part.long().cpu() for part in parts]
        return found


def _use(segment: str, column: int, counts: Tensor) -> CodebookUse:
    counted = int(counts.sum())
    if not counted:
        return CodebookUse(segment, column, len(counts), 0, 0.0, None, None)
    shares = counts.double() / counted
    entropy = float(torch.special.entr(shares).sum()) / log(2)
    return CodebookUse(segment, column, len(counts), counted, float((counts > 0).double().mean()), 2**entropy, entropy)


def _present(tokens: Tokens, segment: Segment, start: int, stop: int) -> Tensor:
    assert tokens.codes is not None
    codes = tokens.codes[:, start:stop]
    if codes.ndim == 3:
        codes = codes[..., : len(segment.codebooks)]
        codes = codes[..., 0] if len(segment.codebooks) == 1 else codes
    if tokens.keep is not None:
        keep = tokens.keep[:, start:stop]
        codes = codes.masked_fill(~(keep if codes.ndim == 2 else keep[..., None]), -1)
    return codes
