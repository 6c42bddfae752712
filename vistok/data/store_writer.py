"""Writing token stores exactly once: killed at any moment and run again, the store comes out bit for bit the same.

    batch k = items [k * batch_size, (k + 1) * batch_size) of the source, always
    shard j = batches [j * batches_per_shard, ...), written whole under a temporary name, then renamed

    add(batch) -> held in memory -> every SPILL_SECONDS a file in STORE/.parts -> all batches of a shard: the shard

What is done is read off the files that are there, never off a journal that could disagree with them: a shard or a
part either exists whole or not at all. Batches may come in any order and from any engine. The bytes depend only on
the rows: no times, no host, no order of arrival. quarantine.jsonl and the manifest are derived from the shards.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from vistok.data.store import (
    FACTS,
    MANIFEST,
    QUARANTINE,
    ROWS_PER_GROUP,
    Manifest,
    damaged,
    hash_file,
)
from vistok.errors import FormatError, MismatchError, OutputError
from vistok.extras import import_extra
from vistok.files import write_atomically

PARTS = ".parts"
LOCK = ".lock"
SPILL_SECONDS = 5.0


@dataclass(frozen=True)
class Done:
    """One encoded batch: an Arrow table of its rows (None if there are none) and its bad items."""

    batch: int
    table: Any
    bad: Sequence[dict[str, Any]] = ()  # {"index", "id", "error"}


class StoreWriter:
    """Writes or resumes the store at `path` that `plan` describes. Use it as a context manager.

    Raises MismatchError when the folder holds a store of another tokenizer, source or options; OutputError when it
    holds something else, another process writes it, or it cannot be written. What was done stays in every case.
    """

    def __init__(self, path: str | Path, plan: Manifest) -> None:
        self._pq = import_extra("pyarrow.parquet", "data")
        self.path, self.plan = Path(path), plan
        self.bad: dict[int, dict[str, Any]] = {}  # by index in the source
        self._held: dict[int, Done] = {}
        self._parts: dict[int, Path] = {}  # batch -> the part that holds it
        self._whole: set[int] = set()  # shards
        self._lock: IO | None = None
        self._spilled_at = time.monotonic()

    def __enter__(self) -> "StoreWriter":
        known = self._known()
        if known is not None:
            refuse_other(known, self.plan, self.path)
        self.complete = known is not None and known.complete
        if self.complete:
            self.plan = known  # type: ignore[assignment]
            return self
        self._lock = _lock(self.path)
        try:
            self._remove_leftovers()
            if known is None:
                write_atomically(self.path / MANIFEST, self.plan.to_bytes())
            self._survey()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            if self._lock is not None:
                self._spill()
        finally:
            self._unlock()

    @property
    def pending(self) -> list[int]:
        """Batches that are not stored yet, ascending."""
        if self.complete:
            return []
        return [
            batch
            for shard in range(self.plan.total_shards)
            if shard not in self._whole
            for batch in self.plan.batches_of(shard)
            if batch not in self._parts and batch not in self._held
        ]

    def add(self, done: Done) -> None:
        """Take an encoded batch; one that is there already is left as it is."""
        shard = done.batch // self.plan.batches_per_shard
        if done.batch in self._held or done.batch in self._parts or shard in self._whole:
            return
        self._held[done.batch] = done
        if done.bad:
            self._note(done.bad)
            self._write_quarantine()
        if all(batch in self._held or batch in self._parts for batch in self.plan.batches_of(shard)):
            self._write_shard(shard)
        elif time.monotonic() - self._spilled_at >= SPILL_SECONDS:
            self._spill()

    def finish(self) -> Manifest:
        """Write the final manifest once every batch is stored, and give it back."""
        if self.complete:
            return self.plan
        if self.pending:
            raise OutputError(f"{self.path}: {len(self.pending)} batches are still to be encoded")
        self._give_columns_to_empty_shards()
        shards, rows, layouts = [], 0, set[str]()
        for number in range(self.plan.total_shards):
            path = self.path / self.plan.shard_name(number)
            batches = self.plan.batches_of(number)
            try:
                layouts |= set(self._pq.read_table(path, columns=["segments"]).column("segments").unique().to_pylist())
                count = self._pq.read_metadata(path).num_rows
            except (OSError, ValueError) as error:
                raise damaged(path, error) from error
            rows += count
            shards.append(
                {
                    "file": path.name,
                    "rows": count,
                    "first_batch": batches.start,
                    "batches": len(batches),
                    "bytes": path.stat().st_size,
                    "sha256": hash_file(path),
                }
            )
        if rows + len(self.bad) != self.plan.items:
            raise FormatError(
                f"{self.path}: {rows} rows and {len(self.bad)} bad items, where the source has {self.plan.items}; "
                "a shard was exchanged: encode into a new folder"
            )
        self._write_quarantine()
        self.plan = replace(
            self.plan,
            complete=True,
            rows=rows,
            quarantined=len(self.bad),
            shards=tuple(shards),
            segments=json.loads(layouts.pop()) if len(layouts) == 1 else None,
        )
        self._remove_leftovers()
        shutil.rmtree(self.path / PARTS, ignore_errors=True)
        write_atomically(self.path / MANIFEST, self.plan.to_bytes())
        self.complete = True
        return self.plan

    # -- what is there -------------------------------------------------------------------------------------------

    def _known(self) -> Manifest | None:
        """The manifest of the store in the folder, None where the folder is free."""
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file; a store is a folder")
        if (self.path / MANIFEST).exists():
            return Manifest.read(self.path)
        others = [name for name in sorted(os.listdir(self.path)) if not _ours(name)] if self.path.is_dir() else []
        if others:
            raise OutputError(f"{self.path} holds other files ({others[0]}, ...); choose a new or an empty folder")
        return None

    def _survey(self) -> None:
        """Read off which shards and parts are whole, and which items are bad."""
        for number in range(self.plan.total_shards):
            path = self.path / self.plan.shard_name(number)
            if path.exists():
                self._note(self._facts(path)["bad"])
                self._whole.add(number)
        folder = self.path / PARTS
        for path in sorted(folder.glob("*.parquet")) if folder.is_dir() else []:
            try:
                facts = self._facts(path)
            except FormatError:
                path.unlink()  # encoded again
                continue
            batches = [b for b in facts["batches"] if b // self.plan.batches_per_shard not in self._whole]
            if not batches:
                path.unlink()  # the kill came between the shard and this
                continue
            self._note([entry for entry in facts["bad"] if entry["index"] // self.plan.batch_size in batches])
            self._parts |= dict.fromkeys(batches, path)
        self._write_quarantine()

    def _facts(self, path: Path) -> dict[str, Any]:
        try:
            facts = json.loads((self._pq.read_schema(path).metadata or {})[FACTS])
            return {"bad": facts["bad"], "batches": facts["batches"]}
        except (OSError, ValueError, KeyError) as error:
            raise damaged(path, error) from error

    def _note(self, bad: Sequence[dict[str, Any]]) -> None:
        self.bad |= {entry["index"]: entry for entry in bad}

    # -- files ---------------------------------------------------------------------------------------------------

    def _write_quarantine(self) -> None:
        path = self.path / QUARANTINE
        lines = [json.dumps(self.bad[index], ensure_ascii=False) + "\n" for index in sorted(self.bad)]
        content = "".join(lines).encode("utf-8", "backslashreplace")
        if lines and not (path.exists() and path.read_bytes() == content):
            write_atomically(path, content)
        elif not lines and path.exists():
            path.unlink()

    def _spill(self) -> None:
        """Write the held batches to one part."""
        self._spilled_at = time.monotonic()
        if not self._held:
            return
        batches = sorted(self._held)
        path = self.path / PARTS / f"{batches[0]:09d}.parquet"
        self._write_table(path, [self._held[batch].table for batch in batches], batches)
        self._parts |= dict.fromkeys(batches, path)
        self._held.clear()

    def _write_shard(self, shard: int) -> None:
        batches = self.plan.batches_of(shard)
        tables = [self._held[batch].table for batch in batches if batch in self._held]
        parts = sorted({self._parts[batch] for batch in batches if batch in self._parts})
        first, last = self.plan.items_of(batches[0])[0], self.plan.items_of(batches[-1])[-1]
        for part in parts:
            tables.append(_between(self._read(part), first, last))
        self._write_table(self.path / self.plan.shard_name(shard), tables, batches)
        self._whole.add(shard)
        for batch in batches:
            self._held.pop(batch, None)
            self._parts.pop(batch, None)
        for part in parts:
            if part not in self._parts.values():
                part.unlink(missing_ok=True)

    def _write_table(self, path: Path, tables: Sequence[Any], batches: Sequence[int]) -> None:
        import pyarrow as pa

        tables = [table for table in tables if table is not None and len(table)]
        known = json.loads(tables[0].schema.metadata[FACTS]) if tables else {}
        span = set(batches)
        bad = [self.bad[index] for index in sorted(self.bad) if index // self.plan.batch_size in span]
        facts = {key: known[key] for key in ("columns", "dtype") if key in known} | {
            "batches": list(batches),
            "bad": bad,
        }
        if tables:
            tables.sort(key=lambda table: table.column("index")[0].as_py())
            table = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
            if not _ascending(table.column("index").to_numpy()):  # parts of batches that came in disorder
                table = table.sort_by("index")
        else:
            table = pa.schema([("index", pa.int64()), ("id", pa.string()), ("segments", pa.string())]).empty_table()
        self._write(path, table.combine_chunks(), facts)

    def _write(self, path: Path, table: Any, facts: dict[str, Any]) -> None:
        table = table.replace_schema_metadata({FACTS: json.dumps(facts, ensure_ascii=False).encode()})

        def write(temporary: Path) -> None:
            self._pq.write_table(table, temporary, row_group_size=ROWS_PER_GROUP, compression="zstd")

        write_atomically(path, write)

    def _give_columns_to_empty_shards(self) -> None:
        """A shard of bad items alone gets the columns of the others, so that readers of many files see one schema."""
        paths = [self.path / self.plan.shard_name(number) for number in range(self.plan.total_shards)]
        empty = [path for path in paths if self._pq.read_metadata(path).num_rows == 0]
        full = next((path for path in paths if path not in empty), None)
        for path in empty if full else ():
            self._write(path, self._pq.read_schema(full).empty_table(), self._facts(path))

    def _read(self, path: Path) -> Any:
        try:
            return self._pq.read_table(path)
        except (OSError, ValueError) as error:
            raise damaged(path, error) from error

    def _remove_leftovers(self) -> None:
        """Temporary files of a process that was killed while it wrote them."""
        for folder in (self.path, self.path / PARTS):
            for path in folder.glob(".*.tmp") if folder.is_dir() else ():
                path.unlink(missing_ok=True)

    def _unlock(self) -> None:
        if self._lock is not None:
            _let_go(self._lock, self.path / LOCK)
            self._lock = None


def refuse_other(known: Manifest, wanted: Manifest, path: Path) -> None:
    """Raise MismatchError when a store was begun by another command than the one that `wanted` describes."""

    def refuse(what: str, there: Any, here: Any) -> None:
        raise MismatchError(
            f"{path} is a store of another {what}: {there}, now {here}; "
            "give the same command to resume it, or another folder"
        )

    if known.tokenizer.weights != wanted.tokenizer.weights:
        refuse("tokenizer", _named(known.tokenizer), _named(wanted.tokenizer))
    for field in ("preprocessing", "dtype"):
        there, here = getattr(known.tokenizer, field), getattr(wanted.tokenizer, field)
        if there != here:
            refuse(f"tokenizer {field}", there, here)
    if known.source["fingerprint"] != wanted.source["fingerprint"]:
        there, here = (f"{s['name']} ({s['kind']}, {s['items']} items)" for s in (known.source, wanted.source))
        refuse("source, or its source has changed", there, here)
    for field in ("batch_size", "batches_per_shard"):
        if getattr(known, field) != getattr(wanted, field):
            refuse(field, getattr(known, field), getattr(wanted, field))
    for key in known.options | wanted.options:
        if known.options.get(key) != wanted.options.get(key):
            refuse(f"option {key}", known.options.get(key), wanted.options.get(key))


def holds_store(path: Path) -> bool:
    """Whether there is a store in this folder, whole or begun."""
    return (Path(path) / MANIFEST).exists()


def remove_store(path: Path) -> None:
    """Delete a store's files, and nothing else in its folder. Raises MismatchError where there is no store."""
    Manifest.read(path)
    for name in os.listdir(path):
        if name == PARTS:
            shutil.rmtree(path / name)
        elif name != MANIFEST and _ours(name):
            (path / name).unlink()
    (path / MANIFEST).unlink()  # last: a folder that still has it is still known as a store


def _named(made_by: Any) -> str:
    return f"{made_by.name!r} (weights {made_by.weights[:8]})"


def _ours(name: str) -> bool:
    shard = name.startswith("tokens-") and name.endswith(".parquet")
    return shard or name in (MANIFEST, QUARANTINE, PARTS, LOCK) or (name.startswith(".") and name.endswith(".tmp"))


def _ascending(index: Any) -> bool:
    return bool((index[1:] > index[:-1]).all())


def _between(table: Any, first: int, last: int) -> Any:
    import pyarrow.compute as pc

    index = table.column("index")
    return table.filter(pc.and_(pc.greater_equal(index, first), pc.less_equal(index, last)))


def _lock(folder: Path) -> IO:
    """Hold the folder for this process; the system lets go of it when the process ends, however that happens."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a")  # noqa: SIM115
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from error
    try:
        try:
            import fcntl
        except ImportError:  # Windows
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise OutputError(
            f"{folder} is being written by another process; wait for it or choose another folder"
        ) from error
    if (folder / LOCK).exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
        return file
    file.close()  # the one before us removed its lock file between our opening and our locking it
    return _lock(folder)


def _let_go(file: IO, path: Path) -> None:
    with contextlib.suppress(OSError):  # Windows removes no open file
        path.unlink()
    file.close()
    with contextlib.suppress(OSError):
        if os.name == "nt":
            path.unlink()
