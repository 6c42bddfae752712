"""Is a store what its source and its tokenizer make? Hashes of all shards, and a sample encoded again."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vistok.data.items import Source
from vistok.data.store import TokenStore, rows_of
from vistok.errors import FormatError
from vistok.scale.encode import BatchEncoder, EncodeOptions
from vistok.tokenizer import Tokenizer
from vistok.tokens import Tokens

BATCHES = 4


@dataclass(frozen=True)
class Verification:
    """A sample of a store, encoded again. `wrong` are ids whose tokens are not those stored."""

    items: int
    share_differing: float  # of all codes compared (of vectors: relative error)
    wrong: tuple[str, ...]


def verify_store(
    path: str | Path, source: Source, tokenizer: Tokenizer, options: EncodeOptions, batches: int = BATCHES
) -> Verification:
    """Check every shard's bytes against the manifest, then encode some batches again and compare.

    On the machine that wrote the store the codes are equal. Other kernels round otherwise and may flip a code here
    and there; an item is wrong when more than one in twenty of its codes differ (vectors: by more than 1 % of their
    norm). Raises FormatError for damaged shards or when items are missing or doubled.
    """
    store = TokenStore(path)
    store.check()
    manifest = store.manifest
    bad = {entry["index"] for entry in store.quarantine}
    chosen = np.random.RandomState(0).permutation(manifest.total_batches)[:batches]
    encoder = BatchEncoder(source, tokenizer, options)
    row_of = {int(index): row for row, index in enumerate(store.index)}
    if len(row_of) != len(store) or row_of.keys() & bad or len(row_of) + len(bad) != manifest.items:
        raise FormatError(f"{path}: items are missing or doubled")
    compared, differing, items, wrong = 0, 0.0, 0, []
    for encoded in encoder.run(sorted(int(batch) for batch in chosen), manifest):
        done = encoded.done()
        if done.table is None:
            continue
        again = rows_of(done.table, tokenizer.source)
        there = store[[row_of[int(index)] for index in again.index if int(index) in row_of]]
        if there.ids != again.ids:
            wrong += sorted(set(there.ids) ^ set(again.ids))
            continue
        for name, one, two in zip(again.ids, _singly(there.tokens), _singly(again.tokens), strict=True):
            items += 1
            share = _difference(one, two)
            compared += 1
            differing += share
            if share > (0.05 if one.codes is not None else 0.01):
                wrong.append(name)
    return Verification(items, differing / max(compared, 1), tuple(wrong))


def _singly(tokens: Tokens | list[Tokens]) -> Iterator[Tokens]:
    return iter(tokens)


def _difference(one: Tokens, two: Tokens) -> float:
    if one.segments != two.segments or one.data.shape != two.data.shape or one.canvas != two.canvas:
        return 1.0
    if one.codes is not None and two.codes is not None:
        return float((one.codes != two.codes).float().mean())
    return float((one.data.float() - two.data.float()).norm() / two.data.float().norm().clamp_min(1e-12))
