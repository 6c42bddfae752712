"""Codes that other projects' scripts left on disk, as Tokens and as stores.

    llamagen   CODES/<number>.npy   int64 (1, augmentations, N), LABELS/<number>.npy (1,) in the sibling folder
                                    `*_labels` of `*_codes`; augmentations: the crop and its mirror, or ten crops
    jsonl      one object a line    {"class_id": int, "tokens": [int, ...]} (1d-tokenizer's TiTok and RAR caches; the
                                    `.json` lists of its single processes too)
    4m         CLASS/<name>.npy     int16 (crops, N), class folders below a modality's folder; indices of 32768 and
                                    more wrapped around when they were saved

    codes = open_codes("imagenet256_codes")
    import_store(codes, "store", tokenizer=vistok.load("llamagen-vq-16"))       # or layout=grid_layout(...)

These files say nothing of the model that made them: what comes in is trusted to be of the tokenizer that is named.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from vistok.data.loader import allowed_bad
from vistok.data.store import Manifest, table_of
from vistok.data.store_writer import Done, StoreWriter
from vistok.errors import FormatError, InputError
from vistok.layout import Canvas, Segment, Size
from vistok.tokens import Source as MadeBy
from vistok.tokens import Tokens

if TYPE_CHECKING:
    from vistok.tokenizer import Tokenizer

Format = Literal["llamagen", "jsonl", "4m"]
BATCH = 1024
SHARD_BATCHES = 8


@dataclass(frozen=True)
class CodeItem:
    """The codes of one picture (or of one crop of it), int64 (N,), with its id and label."""

    id: str
    codes: np.ndarray
    label: int | None = None


@dataclass(frozen=True)
class Layout:
    """What codes mean: their segments, the picture they stand for, and who made them (None if nobody says)."""

    segments: tuple[Segment, ...]
    canvas: Canvas
    made_by: MadeBy | None = None


class CodeSource(ABC):
    """Codes on disk, item by item."""

    kind: str
    name: str
    labelled: bool = False
    classes: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def item(self, index: int) -> CodeItem:
        """One item. Raises FormatError for a file that is damaged or holds something else."""

    @abstractmethod
    def name_of(self, index: int) -> str:
        """The id of an item, whether it can be read or not."""

    @abstractmethod
    def _contents(self) -> Iterator[str]: ...

    def __iter__(self) -> Iterator[CodeItem]:
        return (self.item(index) for index in range(len(self)))

    @cached_property
    def fingerprint(self) -> str:
        """Hash over what is there: names, sizes, order."""
        digest = hashlib.sha256(f"{self.kind} {len(self)}\n".encode())
        for line in self._contents():
            digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
        return digest.hexdigest()[:32]

    def tokens(self, indices: Sequence[int], layout: Layout) -> Tokens:
        """Items as one Tokens. Raises FormatError when a code lies outside its codebook or their number is wrong."""
        return _tokens([self.item(index) for index in indices], layout)


class ArrayCodes(CodeSource):
    """`.npy` files that hold several crops each; ids are `file/crop`, or `file` where there is one."""

    def __init__(self, kind: str, root: Path, files: list[Path]) -> None:
        self.kind, self.name, self._root, self._files = kind, root.name, root, files
        self._firsts, total = [], 0  # number of the first item of each file
        for file in files:
            self._firsts.append(total)
            total += _crops(file)
        self._total = total
        if kind == "4m" and all(file.parent != root for file in files):
            self.classes = tuple(sorted({file.relative_to(root).parts[0] for file in files}))
            self.labelled = True
        if kind == "llamagen" and root.name.endswith("_codes"):
            self._labels: Path | None = root.with_name(root.name.removesuffix("_codes") + "_labels")
            self.labelled = self._labels.is_dir()

    def __len__(self) -> int:
        return self._total

    def name_of(self, index: int) -> str:
        file, crop = self._place(index)
        name = file.relative_to(self._root).with_suffix("").as_posix()
        alone = self._count(index) == 1
        return name if alone else f"{name}/{crop}"

    def item(self, index: int) -> CodeItem:
        file, crop = self._place(index)
        array = _load(file)
        rows = array.reshape(-1, array.shape[-1])
        if array.dtype == np.int16:
            rows = rows.view(np.uint16)
        return CodeItem(self.name_of(index), rows[crop].astype(np.int64), self._label(file))

    def _place(self, index: int) -> tuple[Path, int]:
        number = bisect_right(self._firsts, index) - 1
        return self._files[number], index - self._firsts[number]

    def _count(self, index: int) -> int:
        number = bisect_right(self._firsts, index) - 1
        following = self._firsts[number + 1] if number + 1 < len(self._firsts) else self._total
        return following - self._firsts[number]

    def _label(self, file: Path) -> int | None:
        if self.kind == "4m":
            return self.classes.index(file.relative_to(self._root).parts[0]) if self.labelled else None
        if not self.labelled or self._labels is None:
            return None
        path = self._labels / file.relative_to(self._root)
        return int(_load(path).reshape(-1)[0])

    def _contents(self) -> Iterator[str]:
        for file in self._files:
            yield f"{file.relative_to(self._root).as_posix()} {file.stat().st_size}"


class LineCodes(CodeSource):
    """JSON lines of `tokens` and `class_id`; ids are the file's name and the line."""

    kind = "jsonl"
    labelled = True

    def __init__(self, path: Path) -> None:
        self.name, self._path = path.stem, path
        self._lines: list[int] = []  # where each line begins
        self._list: list[Any] | None = None
        with open(path, "rb") as file:
            if file.read(1) == b"[":  # what a single process of pretokenization left
                self._list = _json(path.read_bytes(), path.name)
                return
            file.seek(0)
            start = 0
            for line in file:
                if line.strip():
                    self._lines.append(start)
                start += len(line)
        if not self._lines:
            raise InputError(f"{path} is empty; expected lines of JSON with `tokens`")

    def __len__(self) -> int:
        return len(self._lines) if self._list is None else len(self._list)

    def name_of(self, index: int) -> str:
        return f"{self.name}/{index:07d}"

    def item(self, index: int) -> CodeItem:
        where = f"{self._path.name}, item {index}"
        if self._list is not None:
            plain = self._list[index]
        else:
            with open(self._path, "rb") as file:
                file.seek(self._lines[index])
                plain = _json(file.readline(), where)
        try:
            codes = np.asarray(plain["tokens"])
            if codes.ndim != 1 or codes.dtype.kind != "i":
                raise ValueError("`tokens` is not a list of integers")
            return CodeItem(self.name_of(index), codes.astype(np.int64), plain.get("class_id"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{where}: expected an object with `tokens` and `class_id` ({error})") from error

    def _contents(self) -> Iterator[str]:
        yield f"{self._path.name} {self._path.stat().st_size}"


def open_codes(where: str | Path, format: Format | None = None) -> CodeSource:
    """Open what another project saved; the format is told from the files where it is not given.

    Raises InputError when there is nothing of the kind, FormatError for damaged files.
    """
    path = Path(where)
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_file():
        if format not in (None, "jsonl"):
            raise InputError(f"{path} is a file; {format} codes are a folder of .npy files")
        return LineCodes(path)
    if format == "jsonl":
        raise InputError(f"{path} is a folder; expected a .jsonl file")
    inner = [folder for folder in sorted(path.glob("*_codes")) if folder.is_dir()]
    if len(inner) == 1:
        path = inner[0]
    files = sorted(path.rglob("*.npy"), key=lambda file: (file.parent, _natural(file.stem)))
    if not files:
        raise InputError(f"{path} holds no .npy files; expected LlamaGen's or 4M's codes, or a .jsonl file")
    if format is None:
        format = "4m" if _load(files[0]).dtype == np.int16 else "llamagen"
    return ArrayCodes(format, path, files)


def grid_layout(codebook: int, count: int, patch: int = 16, made_by: MadeBy | None = None) -> Layout:
    """A square grid of `count` codes, each for `patch` x `patch` pixels (LlamaGen 16 or 8, 4M 16)."""
    side = math.isqrt(count)
    if side * side != count:
        raise InputError(f"{count} codes are no square grid; give sequence_layout(...) or the tokenizer")
    return Layout((Segment("grid", (side, side), (codebook,)),), Canvas((side * patch, side * patch)), made_by)


def sequence_layout(codebook: int, count: int, size: Size = (256, 256), made_by: MadeBy | None = None) -> Layout:
    """A 1D sequence of `count` codes for a picture of `size` (TiTok)."""
    return Layout((Segment("latent", (count,), (codebook,)),), Canvas(size), made_by)


def layout_of(tokenizer: "Tokenizer", count: int) -> Layout:
    """The layout in which this tokenizer has `count` codes an item: its own size, or the square size that gives them.

    Raises InputError when there is none.
    """
    spec, sizes = tokenizer.spec, tokenizer.spec.sizes
    step = math.lcm(sizes.multiple, 1)
    squares = [(side, side) for side in range(step, (sizes.maximum or 2048) + 1, step)]
    for size in (spec.size, *(sizes.only or squares)):
        if sizes.legal(size) and spec.at(size).length == count:
            return Layout(spec.at(size).segments, Canvas(size), tokenizer.source)
    raise InputError(f"{tokenizer.name} has {spec.length} codes at {spec.size}, and at no square size {count}")


def import_store(
    codes: CodeSource,
    path: str | Path,
    *,
    tokenizer: "Tokenizer | None" = None,
    layout: Layout | None = None,
    max_bad: int | None = None,
) -> Manifest:
    """Write a store from imported codes, exactly once as `vistok encode` does, and give back its manifest.

    Give the `tokenizer` that made them, or a `layout` (whose `made_by` may be None: such a store decodes with no
    model until somebody says which). Raises InputError when more than `max_bad` items are unreadable.
    """
    if (tokenizer is None) == (layout is None):
        raise InputError("give either the tokenizer that made the codes, or their layout")
    if layout is None:
        layout = layout_of(tokenizer, len(_first_readable(codes).codes))  # type: ignore[arg-type]
    plan = Manifest(
        tokenizer=layout.made_by or MadeBy("unknown", "unknown"),
        source={
            "kind": codes.kind,
            "name": codes.name,
            "items": len(codes),
            "fingerprint": codes.fingerprint,
            "classes": list(codes.classes),
            "labelled": codes.labelled,
            "captioned": False,
        },
        options={"imported": codes.kind},
        batch_size=BATCH,
        batches_per_shard=SHARD_BATCHES,
    )
    allowed = allowed_bad(len(codes), max_bad)
    with StoreWriter(path, plan) as writer:
        for batch in writer.pending:
            writer.add(_batch(codes, batch, plan.items_of(batch), layout))
            if len(writer.bad) > allowed:
                first = writer.bad[min(writer.bad)]["error"]
                raise InputError(f"{len(writer.bad)} unreadable items, more than the {allowed} allowed; first: {first}")
        return writer.finish()


def _batch(codes: CodeSource, batch: int, span: range, layout: Layout) -> Done:
    items, places, bad = [], [], []
    for place, index in enumerate(span):
        try:
            item = codes.item(index)
            _tokens([item], layout)
        except FormatError as error:
            bad.append({"index": index, "id": codes.name_of(index), "error": str(error)})
            continue
        items.append(item)
        places.append(place)
    labels: list[int | None] = [None] * len(span)
    names = [""] * len(span)
    for place, item in zip(places, items, strict=True):
        labels[place], names[place] = item.label, item.id
    parts = [(places, _tokens(items, layout))] if items else []
    return Done(batch, table_of(parts, list(span), names, labels if codes.labelled else None, None), bad)


def _tokens(items: Sequence[CodeItem], layout: Layout) -> Tokens:
    count = sum(segment.count for segment in layout.segments)
    for item in items:
        if len(item.codes) != count:
            raise FormatError(f"{item.id} has {len(item.codes)} codes; expected {count}")
        start = 0
        for segment in layout.segments:
            part = item.codes[start : start + segment.count]
            if part.min() < 0 or part.max() >= segment.codebooks[0]:
                raise FormatError(
                    f"{item.id} holds codes {part.min()}..{part.max()}, outside a codebook of {segment.codebooks[0]}"
                )
            start += segment.count
    codes = torch.from_numpy(np.stack([item.codes for item in items]))
    return Tokens(layout.segments, codes, canvas=(layout.canvas,) * len(items), source=layout.made_by)


def _first_readable(codes: CodeSource) -> CodeItem:
    error: FormatError | None = None
    for index in range(len(codes)):
        try:
            return codes.item(index)
        except FormatError as raised:
            error = error or raised
    raise error or InputError(f"{codes.name} holds no items")


def _crops(file: Path) -> int:
    """How many items a file holds, from its header; a damaged one counts as one, which turns out bad later."""
    try:
        with open(file, "rb") as opened:
            version = np.lib.format.read_magic(opened)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape = read(opened)[0]
    except (OSError, ValueError, EOFError):
        return 1
    return max(math.prod(shape[:-1]), 1)


def _load(file: Path) -> np.ndarray:
    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise FormatError(f"{file.name} is not a .npy file of numbers, or is damaged: {error}") from error
    if array.dtype.kind not in "iu" or array.ndim == 0 or not array.size:
        raise FormatError(f"{file.name} holds {array.dtype} {array.shape}; expected integers (crops, N)")
    return array


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise FormatError(f"{where} is not JSON: {error}") from error


def _natural(stem: str) -> tuple[int, str]:
    """Numbered files in the order of their numbers."""
    return (int(stem), "") if stem.isdigit() else (-1, stem)
