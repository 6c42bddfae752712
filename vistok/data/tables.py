"""Pictures in tables: Hugging Face parquet files, and anything that the `datasets` library opens.

Columns are found by meaning: the image is a struct {bytes, path} or a binary column, the label an integer column, the
caption a string column (or a list of strings, of which the first counts), by the names below.
"""

import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistok.data.items import Item, Source, within
from vistok.data.remote import AnyPath, RemotePath
from vistok.errors import FormatError, InputError
from vistok.extras import import_extra

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "image_bytes")
LABELS = ("label", "labels", "class_id", "cls", "class", "fine_label")
CAPTIONS = ("caption", "captions", "text", "txt", "prompt")
CACHE_BYTES = 512 * 2**20


class ParquetSource(Source):
    """Rows of parquet files; ids are `file/row`. Row groups are read when asked for and the last ones are kept.

    At most `cache_bytes` of compressed pictures are held. Shuffled access to more than that reads a row group for
    almost every item: give a `datasets` id then, which maps its rows into memory.
    """

    kind = "parquet"

    def __init__(
        self,
        paths: Sequence[AnyPath],
        root: AnyPath,
        max_pixels: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        import_extra("pyarrow.parquet", "data")
        self.name = paths[0].stem if len(paths) == 1 else root.name
        self._paths, self._root, self._max_pixels, self._cache_bytes = list(paths), root, max_pixels, cache_bytes
        self._shards = [within(path, root) for path in self._paths]
        self._groups: list[tuple[int, int]] = []  # file, row group
        self._starts: list[int] = []  # first item of each group
        self._firsts: list[int] = []  # first item of each file
        total, schema = 0, None
        for number, path in enumerate(self._paths):
            try:
                with _opened(path) as file:
                    schema = schema or file.schema_arrow
                    missing = set(_columns(schema, path)) - set(file.schema_arrow.names)
                    if missing:
                        raise FormatError(f"{path} has no column {missing.pop()!r}, which {self._paths[0]} has")
                    self._firsts.append(total)
                    for group in range(file.num_row_groups):
                        rows = file.metadata.row_group(group).num_rows
                        if rows:
                            self._groups.append((number, group))
                            self._starts.append(total)
                        total += rows
            except (OSError, ValueError) as error:
                if isinstance(error, FormatError):
                    raise
                raise FormatError(f"{path} is not a parquet file or is damaged: {_line(error)}") from error
        if not total:
            raise InputError(f"{paths[0]} holds no rows")
        self._total = total
        self._columns = _columns(schema, paths[0])
        self._image, label, caption = _roles(schema, paths[0])
        self._label, self._caption = label, caption
        self.labelled, self.captioned = label is not None, caption is not None
        self.classes = _class_names(schema, label)
        self.__setstate__({})

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._cache: OrderedDict[int, _Rows] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._total

    def item(self, index: int) -> Item:
        place = bisect_right(self._starts, index) - 1
        number = self._groups[place][0]
        row = index - self._starts[place]
        name = f"{self._shards[number]}/{index - self._firsts[number]:06d}"
        item = Item(name, lambda: self._picture(place, row), max_pixels=self._max_pixels)
        if self.labelled or self.captioned:
            rows = self._rows(place)
            item.label = rows.labels[row] if rows.labels else None
            item.caption = _first_text(rows.captions[row]) if rows.captions else None
        return item

    def _picture(self, place: int, row: int) -> bytes | Path:
        rows = self._rows(place)
        data = rows.pictures[row].as_py()
        if data is not None:
            return data
        path = rows.paths[row].as_py() if rows.paths is not None else None
        if not path:
            raise FormatError(f"row {row} of row group {self._groups[place][1]} holds no picture")
        beside = self._paths[self._groups[place][0]].parent / path
        return beside.read_bytes() if isinstance(beside, RemotePath) else beside

    def _rows(self, place: int) -> "_Rows":
        """The columns of a row group, read once. What is cached is found without waiting for readers of others."""
        rows = self._cache.get(place)
        if rows is not None:
            return rows
        with self._lock:
            if place not in self._cache:
                self._cache[place] = self._read(*self._groups[place])
                while len(self._cache) > 1 and sum(kept.bytes for kept in self._cache.values()) > self._cache_bytes:
                    self._cache.popitem(last=False)
            return self._cache[place]

    def _read(self, number: int, group: int) -> "_Rows":
        import pyarrow as pa

        try:
            with _opened(self._paths[number]) as file:
                table = file.read_row_group(group, columns=self._columns, use_threads=False)
        except (OSError, ValueError) as error:
            raise FormatError(f"{self._paths[number].name}, row group {group}: {_line(error)}") from error
        pictures, paths = table.column(self._image).combine_chunks(), None
        if pa.types.is_struct(pictures.type):
            if pictures.type.get_field_index("path") >= 0:
                paths = pictures.field("path")
            pictures = pictures.field("bytes")
        return _Rows(
            pictures,
            paths,
            table.column(self._label).to_pylist() if self._label else None,
            table.column(self._caption).to_pylist() if self._caption else None,
            table.nbytes,
        )

    def _contents(self) -> Iterator[str]:
        for path in self._paths:
            yield f"{within(path, self._root)} {path.stat().st_size}"
        yield " ".join(self._columns)


@contextmanager
def _opened(path: AnyPath) -> Iterator[Any]:
    """A ParquetFile: mapped into memory, or behind a URL, where a row group's columns are asked for together."""
    import pyarrow.parquet as pq

    if isinstance(path, RemotePath):
        with path.open("rb") as remote, pq.ParquetFile(remote, pre_buffer=True) as file:
            yield file
    else:
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file


@dataclass(frozen=True)
class _Rows:
    """A row group taken apart: Arrow arrays of encoded pictures and of paths, lists of labels and captions."""

    pictures: Any
    paths: Any
    labels: list[int | None] | None
    captions: list[Any] | None
    bytes: int


class DatasetsSource(Source):
    """A split of a dataset that the `datasets` library opens; ids are `split/row`."""

    kind = "datasets"

    def __init__(self, dataset: Any, name: str, split: str, max_pixels: int | None = None) -> None:
        datasets = import_extra("datasets", "data")
        features = dataset.features
        images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
        if not images:
            raise InputError(f"{name} has no image column; its columns: {', '.join(features)}")
        if not len(dataset):
            raise InputError(f"{name} holds no rows")
        self.name, self._split, self._max_pixels = name, split, max_pixels
        self._image = images[0]
        self._data = dataset.cast_column(self._image, datasets.Image(decode=False))
        integers = [c for c in features if getattr(features[c], "dtype", "") in ("int64", "int32", "int16", "int8")]
        self._label = _named(LABELS, integers) or next(
            (column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)), None
        )
        self._caption = _named(CAPTIONS, list(features))
        self.labelled, self.captioned = self._label is not None, self._caption is not None
        self.classes = tuple(getattr(features[self._label], "names", ())) if self._label else ()
        wanted = [column for column in (self._image, self._label, self._caption) if column]
        self._data = self._data.select_columns(wanted)

    @classmethod
    def load(cls, text: str, max_pixels: int | None = None) -> "DatasetsSource":
        """Open `name[:config][:split]` from the Hub or the local cache; the split is `train` unless given."""
        datasets = import_extra("datasets", "data")
        name, *rest = text.split(":")
        split = rest[-1] if rest else "train"
        try:
            dataset = datasets.load_dataset(name, *rest[:-1], split=split)
        except Exception as error:  # network, unknown names, missing splits: each its own family of errors
            raise InputError(
                f"{text} is neither a path here nor a dataset that can be opened "
                f"({type(error).__name__}: {_line(error)}); expected name[:config][:split]"
            ) from error
        return cls(dataset, name, split, max_pixels)

    @classmethod
    def load_from_disk(cls, root: Path, max_pixels: int | None = None) -> "DatasetsSource":
        """Open what `Dataset.save_to_disk` wrote; of several splits, `train`."""
        datasets = import_extra("datasets", "data")
        try:
            dataset = datasets.load_from_disk(str(root))
        except Exception as error:
            raise FormatError(f"{root} is not a saved dataset or is damaged: {_line(error)}") from error
        split = "data"
        if isinstance(dataset, dict):
            split = "train" if "train" in dataset else next(iter(dataset))
            dataset = dataset[split]
        return cls(dataset, root.name, split, max_pixels)

    def __len__(self) -> int:
        return len(self._data)

    def item(self, index: int) -> Item:
        row = self._data[index]
        return Item(
            f"{self._split}/{index:06d}",
            lambda: _encoded(row[self._image], Path(), f"row {index}"),
            row[self._label] if self._label else None,
            _first_text(row[self._caption]) if self._caption else None,
            self._max_pixels,
        )

    def _contents(self) -> Iterator[str]:
        yield f"{self.name} {self._split}"
        for index in range(0, len(self), max(len(self) // 64, 1)):  # a sample: the library's own fingerprint of the
            picture = self._data[index][self._image] or {}  # whole changes with its version
            yield f"{index} {len(picture.get('bytes') or b'')} {Path(picture.get('path') or '').name}"


def _roles(schema: Any, path: AnyPath) -> tuple[str, str | None, str | None]:
    """Names of the image, label and caption columns of an Arrow schema."""
    import pyarrow.types as types

    def pictures(field: Any) -> bool:
        if types.is_struct(field.type):
            return field.type.get_field_index("bytes") >= 0
        return types.is_binary(field.type) or types.is_large_binary(field.type)

    held = [field.name for field in schema if pictures(field)]
    image = _named(IMAGES, held) or (held[0] if held else None)
    if image is None:
        raise FormatError(
            f"{path} has no image column (a struct of bytes and path, or binary); its columns: {schema.names}"
        )
    label = _named(LABELS, [field.name for field in schema if types.is_integer(field.type)])
    texts = [
        field.name
        for field in schema
        if types.is_string(field.type) or types.is_large_string(field.type) or types.is_list(field.type)
    ]
    return image, label, _named(CAPTIONS, texts)


def _columns(schema: Any, path: AnyPath) -> list[str]:
    return [name for name in _roles(schema, path) if name is not None]


def _named(known: Sequence[str], present: Sequence[str]) -> str | None:
    return next((name for name in known if name in present), None)


def _class_names(schema: Any, label: str | None) -> tuple[str, ...]:
    """Class names from the features that `datasets` leaves in the schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _encoded(value: Any, folder: Path, where: str) -> bytes | Path:
    """A picture's bytes, or its path where the table holds only that."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict) and value.get("bytes") is not None:
        return value["bytes"]
    if isinstance(value, dict) and value.get("path"):
        return folder / value["path"]
    raise FormatError(f"{where} holds no picture")


def _first_text(value: Any) -> str | None:
    if isinstance(value, list):
        value = value[0] if value else None
    return None if value is None else str(value)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
