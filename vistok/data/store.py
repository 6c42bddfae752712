"""Token stores: a data set's tokens as a folder of Parquet shards with a manifest, readable by anything.

    STORE/manifest.json                    tokenizer by content hash, source, options, shards with their hashes
    STORE/tokens-00000-of-00003.parquet    one row per item, in the source's order
    STORE/quarantine.jsonl                 items that could not be read, once each (only if there are any)

    row: index  int64          place in the source
         id     string
         codes  list<int16|32|64>   flat, position first: (n, C) or (n,)     or    vectors list<float>   flat (n, D)
         length int32          tokens present; `keep` list<bool> beside it where an arbitrary subset is
         segments, canvas      JSON strings: the layout, and what the picture was before encoding
         label  int64, caption string     where the source has them

    store = TokenStore("cifar-tokens")
    rows = store[100:164]                  # rows.tokens, rows.ids, rows.labels, rows.captions

`datasets.load_dataset("parquet", data_files="STORE/*.parquet")` reads the same. `store_writer` writes stores.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vistok.errors import FormatError, InputError
from vistok.extras import import_extra
from vistok.layout import Canvas, Segment
from vistok.tokens import Source as MadeBy
from vistok.tokens import Tokens

VERSION = 1
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
FACTS = b"vistok"  # the key of the shards' schema metadata that holds JSON of ours
ROWS_PER_GROUP = 1024
CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Manifest:
    """What a store says about itself. Everything but the last four fields must agree when a store is resumed."""

    tokenizer: MadeBy
    source: dict[str, Any]  # kind, name, items, fingerprint, classes, labelled, captioned
    options: dict[str, Any]  # how pixels were prepared and encoded, as JSON values
    batch_size: int
    batches_per_shard: int
    complete: bool = False
    rows: int = 0
    quarantined: int = 0
    shards: tuple[dict[str, Any], ...] = field(default=())  # file, rows, first_batch, batches, bytes, sha256
    segments: list | None = None  # the layout where all rows share one

    def to_bytes(self) -> bytes:
        """The file, the same bytes for the same contents."""
        plain = {"vistok_store": VERSION, **asdict(self)}
        return (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read STORE/manifest.json. Raises FormatError if it is missing, damaged or newer than this vistok."""
        path = folder / MANIFEST
        try:
            plain = json.loads(path.read_bytes())
            version = plain.pop("vistok_store")
        except FileNotFoundError:
            raise FormatError(f"{folder} is not a token store: it has no {MANIFEST}") from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise FormatError(f"{path} is damaged or not a token store's manifest: {error}") from error
        if not isinstance(version, int) or version > VERSION:
            raise FormatError(f"{path} is of version {version}; this vistok reads up to {VERSION}: upgrade vistok")
        try:
            plain["tokenizer"] = MadeBy(**plain["tokenizer"])
            plain["shards"] = tuple(plain["shards"])
            return cls(**plain)
        except (KeyError, TypeError) as error:
            raise FormatError(f"{path} does not describe a token store: {error}") from error

    @property
    def items(self) -> int:
        """Items of the source, stored or quarantined."""
        return self.source["items"]

    @property
    def total_batches(self) -> int:
        """Batches that the source makes; the last may be smaller."""
        return -(-self.items // self.batch_size)

    @property
    def total_shards(self) -> int:
        """Shards that these make."""
        return -(-self.total_batches // self.batches_per_shard)

    def shard_name(self, number: int) -> str:
        """File name of a shard."""
        return f"tokens-{number:05d}-of-{self.total_shards:05d}.parquet"

    def batches_of(self, shard: int) -> range:
        """Batch numbers of a shard."""
        first = shard * self.batches_per_shard
        return range(first, min(first + self.batches_per_shard, self.total_batches))

    def items_of(self, batch: int) -> range:
        """Item numbers of a batch."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.items))


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a store. `tokens` is one Tokens, or a list with one per row where layouts differ."""

    tokens: Tokens | list[Tokens]
    ids: list[str]
    index: torch.Tensor  # long (B,), places in the source
    labels: torch.Tensor | None  # long (B,), -1 where an item has none
    captions: list[str] | None  # "" where an item has none

    def __len__(self) -> int:
        return len(self.ids)


class TokenStore:
    """Read a store: `store[i]`, `store[a:b]`, `store[[3, 1, 4]]` give Rows; `batches(n)` runs through all.

    Raises FormatError for a folder that is no store, is damaged, newer, or not finished (`partial=True` reads the
    shards that are there).
    """

    def __init__(self, path: str | Path, *, partial: bool = False) -> None:
        self._pq = import_extra("pyarrow.parquet", "data")
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        if not self.manifest.complete and not partial:
            raise FormatError(
                f"{path} is not finished; run the same `vistok encode` command again, or open it with partial=True"
            )
        self._files, self._groups, self._starts, total = [], [], [], 0
        for number in range(self.manifest.total_shards):
            file = self.path / self.manifest.shard_name(number)
            if not file.exists():
                if self.manifest.complete:
                    raise FormatError(f"{file} is missing; copy the store again")
                continue
            metadata = self._footer(file)
            self._files.append(file)
            for group in range(metadata.num_row_groups):
                self._groups.append((len(self._files) - 1, group))
                self._starts.append(total)
                total += metadata.row_group(group).num_rows
        if self.manifest.complete and total != self.manifest.rows:
            raise FormatError(f"{path} holds {total} rows where its manifest says {self.manifest.rows}")
        self._total = total
        self._cache: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return self._total

    def __repr__(self) -> str:
        return f"TokenStore({str(self.path)!r}, {len(self)} rows, by {self.manifest.tokenizer.name})"

    @property
    def made_by(self) -> MadeBy:
        """The tokenizer: name, weight hash, preprocessing, dtype."""
        return self.manifest.tokenizer

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels, where the source had them."""
        return tuple(self.manifest.source["classes"])

    @cached_property
    def ids(self) -> list[str]:
        """Ids of all rows, in order."""
        return [name for file in self._files for name in self._read(file, ["id"]).column("id").to_pylist()]

    @cached_property
    def index(self) -> list[int]:
        """Places in the source of all rows, in order."""
        return [place for file in self._files for place in self._read(file, ["index"]).column("index").to_pylist()]

    @property
    def quarantine(self) -> list[dict[str, Any]]:
        """Items that could not be read: {"index", "id", "error"} each."""
        return read_quarantine(self.path)

    def __getitem__(self, rows: "int | slice | Sequence[int] | torch.Tensor") -> Rows:
        if isinstance(rows, int):
            if not -len(self) <= rows < len(self):
                raise IndexError(f"row {rows} of {len(self)}")
            rows = [rows % len(self)]
        elif isinstance(rows, slice):
            rows = range(*rows.indices(len(self)))
        else:
            rows = [int(row) for row in rows]
            if any(not 0 <= row < len(self) for row in rows):
                raise IndexError(f"rows outside 0..{len(self) - 1}")
        return self._rows(rows)

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Rows]:
        """All rows from `start` on, `batch_size` at a time; the last may be fewer."""
        for first in range(start, len(self), batch_size):
            yield self[first : first + batch_size]

    def check(self) -> None:
        """Compare every shard's bytes with the manifest. Raises FormatError that names the first that differs."""
        for shard in self.manifest.shards:
            path = self.path / shard["file"]
            if path.stat().st_size != shard["bytes"] or hash_file(path) != shard["sha256"]:
                raise FormatError(f"{path} is damaged: its bytes are not those that the manifest lists")

    # -- inside --------------------------------------------------------------------------------------------------

    def _rows(self, rows: Sequence[int]) -> Rows:
        import pyarrow as pa

        if not rows:
            raise InputError("no rows asked for")
        places = np.searchsorted(self._starts, rows, side="right") - 1
        pieces, start = [], 0
        while start < len(rows):  # runs of rows in one row group
            stop = start + 1
            while stop < len(rows) and places[stop] == places[start]:
                stop += 1
            offsets = np.asarray(rows[start:stop]) - self._starts[places[start]]
            table = self._group(int(places[start]))
            pieces.append(
                table.slice(offsets[0], len(offsets)) if _consecutive(offsets) else table.take(pa.array(offsets))
            )
            start = stop
        return rows_of(pa.concat_tables(pieces) if len(pieces) > 1 else pieces[0], self.made_by)

    def _group(self, place: int) -> Any:
        if place in self._cache:
            self._cache.move_to_end(place)
            return self._cache[place]
        number, group = self._groups[place]
        self._cache[place] = table = self._read(self._files[number], group=group)
        while len(self._cache) > 1 and sum(kept.nbytes for kept in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return table

    def _read(self, path: Path, columns: list[str] | None = None, group: int | None = None) -> Any:
        try:
            with self._pq.ParquetFile(path) as file:
                if group is None:
                    return file.read(columns=columns)
                return file.read_row_group(group, columns=columns)
        except (OSError, ValueError) as error:
            raise damaged(path, error) from error

    def _footer(self, path: Path) -> Any:
        try:
            return self._pq.read_metadata(path)
        except (OSError, ValueError) as error:
            raise damaged(path, error) from error


# -- tables and tokens -----------------------------------------------------------------------------------------------


def table_of(
    parts: Sequence[tuple[Sequence[int], Tokens]],
    index: Sequence[int],
    ids: Sequence[str],
    labels: Sequence[int | None] | None,
    captions: Sequence[str | None] | None,
) -> Any:
    """An Arrow table of a batch. `parts` are (places in the batch, their Tokens), `index` ... belong to the batch."""
    import pyarrow as pa

    tables = []
    for places, tokens in parts:
        tokens = tokens.to("cpu")
        flat = tokens.data.detach().flatten(1)
        values: np.ndarray
        if tokens.codes is not None:
            name, values = "codes", flat.numpy().astype(code_type(tokens.segments))
        else:
            name, values = "vectors", flat.float().numpy()
        columns = {
            "index": pa.array([index[place] for place in places], pa.int64()),
            "id": pa.array([ids[place] for place in places], pa.string()),
            name: _lists(values),
            "length": pa.array(tokens.lengths.numpy(), pa.int32()),
        }
        if tokens.keep is not None:
            columns["keep"] = _lists(tokens.keep.numpy())
        columns["segments"] = pa.array([_segments_text(tokens.segments)] * len(tokens), pa.string())
        one = tokens.canvas[0] if tokens.canvas else None
        if all(canvas is one for canvas in tokens.canvas):
            texts = [_canvas_text(one) if one else None] * len(tokens)
        else:
            texts = [_canvas_text(canvas) for canvas in tokens.canvas]
        columns["canvas"] = pa.array(texts, pa.string())
        if labels is not None:
            columns["label"] = pa.array([labels[place] for place in places], pa.int64())
        if captions is not None:
            columns["caption"] = pa.array([captions[place] for place in places], pa.string())
        facts = {"columns": 0 if tokens.data.ndim == 2 else tokens.data.shape[2]}
        if tokens.vectors is not None:
            facts["dtype"] = str(tokens.vectors.dtype).removeprefix("torch.")  # type: ignore[assignment]
        tables.append(pa.table(columns).replace_schema_metadata({FACTS: json.dumps(facts).encode()}))
    return pa.concat_tables(tables) if tables else None


def rows_of(table: Any, made_by: MadeBy | None = None) -> Rows:
    """Rows from an Arrow table with a store's columns: the inverse of `table_of`."""
    facts = json.loads((table.schema.metadata or {}).get(FACTS, b"{}"))
    layouts = table.column("segments").to_pylist()
    name = "codes" if "codes" in table.schema.names else "vectors"
    sizes = np.diff(_offsets(table.column(name)))
    if len(set(layouts)) == 1 and len(np.unique(sizes)) == 1:
        tokens: Tokens | list[Tokens] = _tokens(table, facts, name, made_by)
    else:
        tokens = [_tokens(table.slice(row, 1), facts, name, made_by) for row in range(len(table))]
    return Rows(
        tokens,
        table.column("id").to_pylist(),
        torch.from_numpy(table.column("index").to_numpy().astype(np.int64)),
        _labels(table) if "label" in table.schema.names else None,
        [text or "" for text in table.column("caption").to_pylist()] if "caption" in table.schema.names else None,
    )


def _tokens(table: Any, facts: dict[str, Any], name: str, made_by: MadeBy | None) -> Tokens:
    segments = _segments(table.column("segments")[0].as_py())
    values = _values(table.column(name)).reshape(len(table), -1)
    width = facts.get("columns", 0)
    codes = vectors = keep = None
    if name == "codes":
        codes = torch.from_numpy(values.astype(np.int64))
        codes = codes.unflatten(1, (-1, width)) if width else codes
    else:
        vectors = torch.from_numpy(values.copy()).unflatten(1, (-1, width))
        vectors = vectors.to(getattr(torch, facts.get("dtype", "float32")))
    if "keep" in table.schema.names:
        keep = torch.from_numpy(_values(table.column("keep")).reshape(len(table), -1).copy())
    canvas = tuple(_canvas(text) for text in table.column("canvas").to_pylist() if text is not None)
    return Tokens(segments, codes, vectors, keep, canvas, made_by)


def code_type(segments: Sequence[Segment]) -> type:
    """The smallest signed integer that holds every code; signed, because -1 says that a code is absent."""
    largest = max(size for segment in segments for size in segment.codebooks)
    return np.int16 if largest <= 2**15 else np.int32 if largest <= 2**31 else np.int64


def _lists(values: np.ndarray) -> Any:
    """(B, n) as a list column, without a Python loop. Its inner field has the name that parquet gives it back with:

    a store's bytes must not tell whether rows came from memory or from a file.
    """
    import pyarrow as pa

    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    flat = pa.array(values.ravel())
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=pa.list_(pa.field("element", flat.type)))


def _offsets(column: Any) -> np.ndarray:
    lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    return np.concatenate([[0], np.cumsum(np.concatenate(lengths))])


def _values(column: Any) -> np.ndarray:
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def _labels(table: Any) -> torch.Tensor:
    return torch.tensor([-1 if label is None else label for label in table.column("label").to_pylist()])


@lru_cache(maxsize=4096)
def _canvas_text(canvas: Canvas) -> str:
    return json.dumps(canvas.to_json(), separators=(",", ":"))


@lru_cache(maxsize=4096)
def _canvas(text: str) -> Canvas:
    return Canvas.from_json(json.loads(text))


@lru_cache(maxsize=1024)
def _segments_text(segments: tuple[Segment, ...]) -> str:
    plain = [[part.name, list(part.shape), list(part.codebooks), part.dim] for part in segments]
    return json.dumps(plain, separators=(",", ":"))


@lru_cache(maxsize=1024)
def _segments(text: str) -> tuple[Segment, ...]:
    return tuple(Segment(name, tuple(shape), tuple(books), dim) for name, shape, books, dim in json.loads(text))


def _consecutive(offsets: np.ndarray) -> bool:
    return len(offsets) == 1 or bool((np.diff(offsets) == 1).all())


# -- files -----------------------------------------------------------------------------------------------------------


def read_quarantine(folder: Path) -> list[dict[str, Any]]:
    """The entries of STORE/quarantine.jsonl; none if there is no such file."""
    path = folder / QUARANTINE
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise FormatError(f"{path} is damaged: {error}") from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(path: Path, error: Exception) -> FormatError:
    """The error for a shard that cannot be read."""
    return FormatError(f"{path} is damaged or not a parquet file ({str(error).splitlines()[0]}); copy it again")
