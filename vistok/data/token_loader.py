"""Batches of tokens from a store: what generators learn from when pictures were encoded beforehand.

    STORE --once--> all codes in their narrow type (n, N[, C]), or vectors (n, N, D), in memory, with labels, captions
    batch(step): place p = step * batch_size + j -> epoch p // n, row permutation(seed + epoch)[p % n]

As `PixelLoader`, a batch is a pure function of store, seed and step. How pictures were cropped or mirrored was decided
when they were encoded.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vistok.data.items import Item, Source
from vistok.data.store import MANIFEST, TokenStore, code_type
from vistok.errors import InputError
from vistok.layout import Segment
from vistok.tokens import Source as MadeBy
from vistok.tokens import Tokens

AT_ONCE = 8192  # rows that are read together


def is_store(path: Any) -> bool:
    """Whether `path` is the folder of a token store."""
    return isinstance(path, (str, Path)) and (Path(path) / MANIFEST).is_file()


class StoreSource(Source):
    """The rows of a finished store, or some of them. Their tokens are read once, when they are asked for.

    Raises FormatError as `TokenStore`; InputError for rows whose tokens differ in layout or are not all there.
    """

    kind = "store"

    def __init__(self, store: "TokenStore | str | Path", rows: "Sequence[int] | np.ndarray | None" = None) -> None:
        self.store = store if isinstance(store, TokenStore) else TokenStore(store)
        about = self.store.manifest.source
        self.name, self.classes = str(about["name"]), tuple(about["classes"])
        self.labelled, self.captioned = bool(about["labelled"]), bool(about["captioned"])
        self.rows = np.arange(len(self.store)) if rows is None else np.asarray(rows)
        self._whole: StoreSource = self

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def made_by(self) -> MadeBy:
        """The tokenizer."""
        return self.store.made_by

    def item(self, index: int) -> Item:
        """Raises InputError: there are no pictures here."""
        raise InputError(
            f"{self.store.path} is a token store: it holds tokens of {self.made_by.name!r} and no pictures; "
            "generators train on it, everything else wants what it was made from"
        )

    def chosen(self, indices: Sequence[int]) -> "StoreSource":
        """Some of these rows; the tokens in memory are shared."""
        part = StoreSource(self.store, self.rows[np.asarray(indices, dtype=np.int64)])
        part._whole = self._whole
        return part

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """Rows as a training batch: "tokens" (Tokens), "id" list, and, where the store has them, "label" long (b,) (-1
        for none) and "caption" list ("" for none).
        """
        whole, rows = self._whole, self.rows[np.asarray(indices, dtype=np.int64)]
        segments, data, ids, labels, captions = whole._contents_of_rows
        values = torch.from_numpy(data[rows])
        codes = None if values.is_floating_point() else values.long()
        vectors = values if values.is_floating_point() else None
        batch: dict[str, Any] = {
            "tokens": Tokens(segments, codes=codes, vectors=vectors, source=self.made_by),
            "id": [ids[row] for row in rows],
        }
        if labels is not None:
            batch["label"] = torch.from_numpy(labels[rows])
        if captions is not None:
            batch["caption"] = [captions[row] for row in rows]
        return batch

    @cached_property
    def _contents_of_rows(
        self,
    ) -> tuple[tuple[Segment, ...], np.ndarray, list[str], np.ndarray | None, list[str] | None]:
        store = self.store
        if not len(store):
            raise InputError(f"{store.path} has no rows")
        first = store[0].tokens
        assert isinstance(first, Tokens)
        segments, length = first.segments, sum(segment.count for segment in first.segments)
        parts, ids, labels, captions = [], [], [], []
        for rows in store.batches(AT_ONCE):
            each = [rows.tokens] if isinstance(rows.tokens, Tokens) else rows.tokens
            if any(tokens.segments != segments for tokens in each):
                raise InputError(
                    f"{store.path} holds tokens of several layouts, a generator learns one: encode pictures of one size"
                )
            lengths = torch.cat([tokens.lengths for tokens in each])
            if int(lengths.min()) < length:
                row = int((lengths < length).nonzero()[0])
                raise InputError(
                    f"{store.path}: {rows.ids[row]} has {int(lengths[row])} of {length} tokens; a generator learns "
                    "whole sequences: encode without a prefix"
                )
            tokens = each[0]  # all rows, where none is shorter or of another layout
            kind = code_type(segments) if tokens.codes is not None else np.float32
            parts.append(tokens.data.float().numpy() if kind == np.float32 else tokens.data.numpy().astype(kind))
            ids += rows.ids
            labels += [] if rows.labels is None else [rows.labels.numpy()]
            captions += rows.captions or []
        return (
            segments,
            np.concatenate(parts),
            ids,
            np.concatenate(labels) if labels else None,
            captions or None,
        )

    def _contents(self) -> Iterator[str]:
        for shard in self.store.manifest.shards:
            yield f"{shard['file']} {shard['sha256']}"
        if len(self.rows) != len(self.store):
            yield f"{self.rows.tolist()}"


class TokenLoader:
    """Batches of a store's rows; `rank` of `world` gets its share of the global `batch_size`."""

    def __init__(self, source: StoreSource, *, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        if batch_size < 1 or batch_size % world or not 0 <= rank < world:
            raise InputError(f"batch_size={batch_size} must divide by world={world}, and rank={rank} lie below it")
        if not 0 <= seed < 2**31:
            raise InputError(f"seed={seed}; expected 0 to 2**31 - 1")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        share = batch_size // world
        self._places = np.arange(rank * share, (rank + 1) * share)
        self.bad: dict[str, str] = {}  # rows are there or the store is damaged
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    @property
    def steps_per_epoch(self) -> float:
        """Batches in one pass over the store."""
        return len(self.source) / self.batch_size

    def batch(self, step: int) -> dict[str, Any]:
        """Batch number `step`, as `StoreSource.batch` gives it."""
        epochs, starts = np.divmod(step * self.batch_size + self._places, len(self.source))
        return self.source.batch([self._permutation(int(e))[s] for e, s in zip(epochs, starts, strict=True)])

    def batches(self, start_step: int = 0) -> Iterator[dict[str, Any]]:
        """Batches `start_step`, `start_step` + 1, ... without end."""
        step = start_step
        while True:
            yield self.batch(step)
            step += 1

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        return np.random.RandomState(self.seed + epoch).permutation(len(self.source))
