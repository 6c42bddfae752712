"""Visual tokens as citizens of a language model: one flat vocabulary for all codebooks, and the way back.

    Tokens of segments, codes (B, N[, C])  --ids-->  ids (B, M)  --codes-->  codes (B, N[, C])

    ids:  0 .. text-1 | codebook 0 | codebook 1 | ..  | named extras (classes, begin, end)
          room for a text model's own tokens, which keep their numbers

A position with several codes becomes several places of the sequence, one after another, so M is the sum over segments
of positions times codes. Every place has its own range of ids (`ranges`); `mask` turns that into logit masks, and
whatever a masked model writes decodes. Nothing here has weights or asks which tokenizer it is: segments say it all.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vistok.errors import ConfigError, InputError, MismatchError, nearest
from vistok.layout import Segment, TokenSpec
from vistok.tokens import Source, Tokens


class Vocabulary:
    """The ids of all codes of a layout.

    segments  the layout, of discrete tokens
    text      how many ids, from 0 on, belong to a text model
    extras    name -> how many ids it has, after the codes: {"class": 1001, "begin": 1}
    share     codebooks of the same size at the same column share their ids, where segments are drawn from one codebook
              (VAR's scales, residual levels); otherwise each segment's columns have ids of their own

    Raises ConfigError for continuous segments and impossible numbers.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        *,
        text: int = 0,
        extras: Mapping[str, int] | None = None,
        share: bool = False,
    ) -> None:
        self.segments, self.text = tuple(segments), text
        continuous = [segment.name for segment in self.segments if not segment.codebooks]
        if continuous or not self.segments:
            raise ConfigError(f"a vocabulary has discrete segments; {continuous or 'none'} have no codebook")
        if text < 0 or any(count < 1 for count in (extras or {}).values()):
            raise ConfigError(f"text={text} and extras={dict(extras or {})}; expected numbers of ids")
        offsets: dict[tuple[int, ...], int] = {}
        size = text
        starts: list[int] = []  # of every place of the sequence
        sizes: list[int] = []
        for number, segment in enumerate(self.segments):
            columns = []
            for column, books in enumerate(segment.codebooks):
                key = (column, books) if share else (number, column, books)
                if key not in offsets:
                    offsets[key], size = size, size + books
                columns.append(offsets[key])
            starts += columns * segment.count
            sizes += list(segment.codebooks) * segment.count
        self._starts, self._sizes = torch.tensor(starts), torch.tensor(sizes)
        self._extras: dict[str, range] = {}
        for name, count in (extras or {}).items():
            self._extras[name] = range(size, size + count)
            size += count
        self.size = size
        widest = max(len(segment.codebooks) for segment in self.segments)
        per_position = [len(segment.codebooks) for segment in self.segments for _ in range(segment.count)]
        counts = torch.tensor(per_position)
        self._first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])  # the place where each position begins
        self._there = torch.arange(widest) < counts[:, None]  # (N, C)
        self._columns = widest

    # -- what is where -------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """M, places of the sequence."""
        return len(self._starts)

    @property
    def uniform(self) -> bool:
        """Whether every place takes every id: one codebook, nothing else. Nothing has to be masked then."""
        return self.size == int(self._sizes[0]) and bool((self._starts == 0).all())

    def ids_of(self, name: str) -> range:
        """The ids of an extra, or of "text". Raises InputError that names the nearest ones."""
        known = {"text": range(self.text), **self._extras}
        if name not in known:
            raise InputError(f"no ids called {name!r}{nearest(name, list(known)) or f'; known: {sorted(known)}'}")
        return known[name]

    def places(self, positions: int) -> int:
        """How many places the first `positions` tokens take."""
        return int(self._first[positions])

    def ranges(self) -> list[tuple[int, int]]:
        """First id and the one after the last of every place."""
        return list(zip(self._starts.tolist(), (self._starts + self._sizes).tolist(), strict=True))

    def mask(self, start: int = 0, stop: int | None = None, device: "torch.device | str" = "cpu") -> Tensor:
        """Which ids the places start..stop-1 take, bool (n, size). Raises InputError for places beyond the sequence."""
        stop = self.length if stop is None else stop
        if not 0 <= start <= stop <= self.length:
            raise InputError(f"places {start}..{stop} of a sequence of {self.length}")
        ids = torch.arange(self.size, device=device)
        low = self._starts[start:stop, None].to(device)
        return (ids >= low) & (ids < low + self._sizes[start:stop, None].to(device))

    # -- there and back ------------------------------------------------------------------------------------------

    def ids(self, tokens: Tokens | Tensor) -> Tensor:
        """Ids (B, m) of tokens, or of their codes (B, n[, C]); a prefix gives the prefix of the sequence.

        Raises MismatchError for tokens of another layout, InputError for codes out of range or not there.
        """
        if isinstance(tokens, Tokens):
            if tokens.segments != self.segments:
                raise MismatchError("these tokens have another layout than the vocabulary")
            if tokens.keep is not None:
                raise InputError("tokens with a keep mask have no place in a sequence; give a prefix, or all")
            tokens = tokens.data
        if tokens.is_floating_point():
            raise InputError("continuous tokens have no ids")
        codes = tokens if tokens.ndim == 3 else tokens[..., None]
        count, columns = codes.shape[1:]
        if count > len(self._there) or columns != self._columns:
            raise MismatchError(
                f"codes {tuple(tokens.shape)} for {len(self._there)} positions of {self._columns} codes at most"
            )
        there, places = self._there[:count].to(codes.device), self.places(count)
        flat = codes[:, there]
        sizes = self._sizes[:places].to(codes.device)
        if bool(((flat < 0) | (flat >= sizes)).any()):
            raise InputError(f"codes from {int(flat.min())} to {int(flat.max())}; every place has its own codebook")
        return flat + self._starts[:places].to(codes.device)

    def codes(self, ids: Tensor) -> Tensor:
        """Codes (B, n[, C]), -1 where a segment has fewer than C, of ids (B, m) that end with a whole position.

        Raises InputError, which names the first wrong place, for an id of another codebook.
        """
        places = ids.shape[1]
        ends = (self._first == places).nonzero()
        if not len(ends):
            raise InputError(f"{places} ids end within a position, or beyond the {self.length} of the sequence")
        count = int(ends[0])
        flat = ids - self._starts[:places].to(ids.device)
        wrong = (flat < 0) | (flat >= self._sizes[:places].to(ids.device))
        if bool(wrong.any()):
            item, place = wrong.nonzero()[0].tolist()
            low, high = self.ranges()[place]
            raise InputError(f"id {int(ids[item, place])} at place {place} of item {item}; expected {low}..{high - 1}")
        codes = ids.new_full((len(ids), count, self._columns), -1)
        codes[:, self._there[:count].to(ids.device)] = flat
        return codes[..., 0] if self._columns == 1 else codes

    def tokens(self, ids: Tensor, spec: TokenSpec | None = None, source: Source | None = None) -> Tokens:
        """`codes` as Tokens that a tokenizer decodes: `spec` says their canvas, `source` whose they are."""
        canvas = () if spec is None else (spec.canvas,) * len(ids)
        return Tokens(self.segments, codes=self.codes(ids), canvas=canvas, source=source)


class PlaceMask:
    """Keeps a language model to the ids of each place; what it lets pass always decodes.

    Called with ids (B, n) so far and logits (B, size), as a LogitsProcessor of the transformers library is, it gives
    the logits with -inf where an id has no business. `start` is the length of the prompt before the first place;
    places beyond the last one are left alone.
    """

    def __init__(self, vocabulary: Vocabulary, start: int) -> None:
        self.start, self._ranges, self._size = start, vocabulary.ranges(), vocabulary.size

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        place = ids.shape[1] - self.start
        if place < 0:
            raise InputError(f"{ids.shape[1]} ids where the prompt has {self.start}")
        if place >= len(self._ranges):
            return logits
        if logits.shape[-1] < self._size:
            raise MismatchError(f"logits over {logits.shape[-1]} ids, the vocabulary has {self._size}")
        low, high = self._ranges[place]
        masked = torch.full_like(logits, -torch.inf)
        masked[..., low:high] = logits[..., low:high]
        return masked
