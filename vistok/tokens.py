"""Tokens: what every tokenizer encodes to, every generator produces and every decoder takes.

    codes   long  (B, n) or (B, n, C)   indices; -1 where a segment has fewer codes than C, or a code was not sent
    vectors float (B, n, D)             continuous tokens
    keep    bool  (B, n)                which positions are there, when an arbitrary subset is

`n` is N, the layout's length, or less for a prefix. One `Tokens` has one layout; pictures of several layouts give a
list. A token file (`to_bytes`, `save`) carries the tokenizer's name and weight hash, the layout, the canvas of every
item and the dtype, so that it can be trusted years later; `docs/formats.md` describes it byte by byte.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok import bits
from vistok.errors import FormatError, InputError, MismatchError
from vistok.files import write_atomically
from vistok.layout import Canvas, Segment

MAGIC = b"VTOK"
VERSION = 2  # written where there is a keep mask; files without one are of version 1


@dataclass(frozen=True)
class Source:
    """Who made the tokens: a model's name, the hash of its weights, how pixels were prepared, the dtype it ran in."""

    name: str
    weights: str
    preprocessing: str = ""
    dtype: str = "float32"


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of tokens in one layout. Immutable; every method gives a new object that shares storage where it can."""

    segments: tuple[Segment, ...]
    codes: Tensor | None = None
    vectors: Tensor | None = None
    keep: Tensor | None = None
    canvas: tuple[Canvas, ...] = ()
    source: Source | None = None

    def __post_init__(self) -> None:
        if (self.codes is None) == (self.vectors is None):
            raise InputError("Tokens hold either codes or vectors")
        data = self.data
        if data.ndim not in ((2, 3) if self.codes is not None else (3,)):
            raise InputError(f"codes are (B, N) or (B, N, C) and vectors (B, N, D); got {tuple(data.shape)}")
        if self.codes is not None and self.codes.dtype != torch.long:
            raise InputError(f"codes are torch.long, got {self.codes.dtype}")
        if data.shape[1] > self.full_length:
            raise InputError(f"{data.shape[1]} tokens for a layout of {self.full_length}")
        if self.keep is not None and (self.keep.dtype != torch.bool or self.keep.shape != data.shape[:2]):
            raise InputError(f"keep is bool {tuple(data.shape[:2])}, got {self.keep.dtype} {tuple(self.keep.shape)}")
        if self.canvas and len(self.canvas) != data.shape[0]:
            raise InputError(f"{len(self.canvas)} canvases for {data.shape[0]} items")

    # -- what is in it -------------------------------------------------------------------------------------------

    @property
    def data(self) -> Tensor:
        """The codes, or the vectors of continuous tokens."""
        return self.codes if self.codes is not None else self.vectors  # type: ignore[return-value]

    @property
    def full_length(self) -> int:
        """N, the number of positions of the whole layout."""
        return sum(segment.count for segment in self.segments)

    @property
    def length(self) -> int:
        """n, the number of positions that these tokens span: N, or less for a prefix."""
        return self.data.shape[1]

    @property
    def lengths(self) -> Tensor:
        """Number of tokens present in each item, long (B,)."""
        if self.keep is not None:
            return self.keep.sum(1)
        return torch.full((len(self),), self.length, dtype=torch.long, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.data.device

    def __len__(self) -> int:
        return self.data.shape[0]

    def __repr__(self) -> str:
        kind = "codes" if self.codes is not None else "vectors"
        names = ", ".join(f"{segment.name} {'x'.join(map(str, segment.shape))}" for segment in self.segments)
        cut = f", first {self.length} of {self.full_length}" if self.length < self.full_length else ""
        return f"Tokens({len(self)} items, {kind} {tuple(self.data.shape)}, {names}{cut}, {self.device})"

    def __getitem__(self, key: "str | int | slice | Tensor | Sequence[int]") -> Any:
        """`tokens["name"]`: that segment's data as (B, *shape[, C or D]). An index or slice: those items as Tokens."""
        if isinstance(key, str):
            return self._segment(key)
        if isinstance(key, int):
            key = slice(key, key + 1) if key != -1 else slice(key, None)
        rows = (
            range(len(self))[key] if isinstance(key, slice) else torch.arange(len(self))[torch.as_tensor(key)].tolist()
        )
        index: Any = key if isinstance(key, slice) else torch.as_tensor(rows, dtype=torch.long, device=self.device)
        return replace(
            self,
            codes=None if self.codes is None else self.codes[index],
            vectors=None if self.vectors is None else self.vectors[index],
            keep=None if self.keep is None else self.keep[index],
            canvas=tuple(self.canvas[row] for row in rows) if self.canvas else (),
        )

    def __iter__(self) -> Iterator["Tokens"]:
        return (self[row] for row in range(len(self)))

    def _segment(self, name: str) -> Tensor:
        start = 0
        for segment in self.segments:
            stop = start + segment.count
            if segment.name == name:
                if stop > self.length:
                    raise InputError(f"segment {name!r} ends at {stop}, these tokens are a prefix of {self.length}")
                part = self.data[:, start:stop]
                if self.codes is not None and self.codes.ndim == 3:
                    part = part[..., : len(segment.codebooks)]
                return part.reshape(len(self), *segment.shape, *part.shape[2:])
            start = stop
        names = ", ".join(repr(segment.name) for segment in self.segments)
        raise InputError(f"no segment {name!r}; there are {names}")

    # -- parts and joins -----------------------------------------------------------------------------------------

    def prefix(self, length: int | Sequence[int] | Tensor) -> "Tokens":
        """The first `length` tokens of every item. Whether they decode alone is for the tokenizer to say.

        One length for each item gives a batch of mixed lengths, as long as the longest, whose `keep` says which are
        there.
        """
        if not isinstance(length, int):
            return self._mixed_prefix(torch.as_tensor(length, device=self.device))
        if not 1 <= length <= self.length:
            raise InputError(f"a prefix of {length} from {self.length} tokens; expected 1 to {self.length}")
        return replace(
            self,
            codes=None if self.codes is None else self.codes[:, :length],
            vectors=None if self.vectors is None else self.vectors[:, :length],
            keep=None if self.keep is None else self.keep[:, :length],
        )

    def _mixed_prefix(self, lengths: Tensor) -> "Tokens":
        if lengths.shape != (len(self),) or lengths.dtype.is_floating_point or len(self) == 0:
            raise InputError(f"{len(self)} items take one length, or as many; got {lengths.tolist()}")
        if int(lengths.min()) < 1:
            raise InputError(f"prefixes of {lengths.tolist()} tokens; expected at least 1")
        cut = self.prefix(int(lengths.max()))
        there = torch.arange(cut.length, device=self.device) < lengths[:, None]
        return replace(cut, keep=there if cut.keep is None else there & cut.keep)

    @staticmethod
    def cat(parts: Sequence["Tokens"]) -> "Tokens":
        """Join along the batch. All parts share layout, length and source, or MismatchError says which differs."""
        if not parts:
            raise InputError("nothing to concatenate")
        first = parts[0]
        for part in parts[1:]:
            for what in ("segments", "length", "source"):
                if getattr(part, what) != getattr(first, what):
                    raise MismatchError(f"tokens differ in {what}: {getattr(first, what)} and {getattr(part, what)}")
            if (part.keep is None) != (first.keep is None) or bool(part.canvas) != bool(first.canvas):
                raise MismatchError("some tokens have keep masks or canvases and others do not")
        return replace(
            first,
            codes=None if first.codes is None else torch.cat([part.codes for part in parts]),  # type: ignore[misc]
            vectors=None if first.vectors is None else torch.cat([part.vectors for part in parts]),  # type: ignore[misc]
            keep=None if first.keep is None else torch.cat([part.keep for part in parts]),  # type: ignore[misc]
            canvas=tuple(canvas for part in parts for canvas in part.canvas),
        )

    def to(self, device: "torch.device | str | None" = None, dtype: torch.dtype | None = None) -> "Tokens":
        """Move to a device; `dtype` applies to vectors alone."""
        return replace(
            self,
            codes=None if self.codes is None else self.codes.to(device),
            vectors=None if self.vectors is None else self.vectors.to(device, dtype),
            keep=None if self.keep is None else self.keep.to(device),
        )

    def equal(self, other: "Tokens") -> bool:
        """Same layout, masks, canvases, and values where there are any, whatever the device and the source."""
        return (
            self.segments == other.segments
            and self.canvas == other.canvas
            and (self.codes is None) == (other.codes is None)
            and (self.keep is None) == (other.keep is None)
            and self.data.shape == other.data.shape
            and (self.keep is None or torch.equal(self.keep.cpu(), other.keep.cpu()))  # type: ignore[union-attr]
            and torch.equal(self._there(), other._there())
        )

    # -- bits and files ------------------------------------------------------------------------------------------

    def bits(self) -> Tensor:
        """Stored bits of each item, long (B,): ceil(log2 K) per code present, the float width per vector entry.

        A keep mask costs one bit a position; codes that are -1 where they could have been sent make their segment
        one value wider, as in the token file. Headers are not counted.
        """
        per_position = torch.zeros(self.length, dtype=torch.long)
        for columns, first, last in self._columns():
            for column, size in columns:
                value_bits = bits.width(size + self._unsent(column, first, last))
                per_position[first:last] += value_bits
            if not columns:
                per_position[first:last] += self.data.shape[2] * self.data.element_size() * 8
        if self.keep is None:
            return per_position.sum().repeat(len(self))
        return (self.keep.cpu() * per_position).sum(1) + self.length

    def _columns(self) -> Iterator[tuple[list[tuple[int, int]], int, int]]:
        """Per segment within the prefix: its (code column, codebook size) pairs, first and last position."""
        start = 0
        for segment in self.segments:
            stop = min(start + segment.count, self.length)
            if stop > start:
                yield list(enumerate(segment.codebooks)), start, stop
            start += segment.count

    def _column(self, column: int, first: int, last: int) -> Tensor:
        return self.data[:, first:last] if self.data.ndim == 2 else self.data[:, first:last, column]

    def _there(self) -> Tensor:
        """The data on the CPU, of the positions that are there alone where `keep` says which."""
        return self.data.cpu() if self.keep is None else self.data.cpu()[self.keep.cpu()]

    def _values(self, column: int, first: int, last: int) -> Tensor:
        """Codes of a column as a file holds them: those that are there, item by item, on the CPU."""
        values = self._column(column, first, last).cpu()
        return values.flatten() if self.keep is None else values[self.keep[:, first:last].cpu()]

    def _unsent(self, column: int, first: int, last: int) -> int:
        """1 if codes of this column are -1 where they are there, else 0."""
        values = self._values(column, first, last)
        return int(values.numel() > 0 and bool((values < 0).any()))

    def to_bytes(self) -> bytes:
        """The token file: magic, version, header, bit-packed payload, CRC-32."""
        header: dict[str, Any] = {
            "segments": [[s.name, list(s.shape), list(s.codebooks), s.dim] for s in self.segments],
            "items": len(self),
            "length": self.length,
            "columns": 0 if self.data.ndim == 2 else self.data.shape[2],
            "keep": self.keep is not None,
        }
        if self.canvas:
            distinct = list(dict.fromkeys(self.canvas))
            header["canvas"] = [canvas.to_json() for canvas in distinct]
            if len(distinct) > 1:
                header["canvas_of"] = [distinct.index(canvas) for canvas in self.canvas]
        if self.source:
            header["source"] = [self.source.name, self.source.weights, self.source.preprocessing, self.source.dtype]
        payload = []
        if self.keep is not None:
            payload.append(bits.pack(self.keep.cpu().numpy(), 1))
        if self.vectors is not None:
            header["dtype"] = str(self.vectors.dtype).removeprefix("torch.")
            payload.append(self._there().detach().contiguous().view(torch.uint8).numpy().tobytes())
        else:
            header["unsent"] = []
            for columns, first, last in self._columns():
                for column, size in columns:
                    values = self._values(column, first, last).numpy()
                    unsent = self._unsent(column, first, last)
                    header["unsent"].append(unsent)
                    if values.size and values.max() >= size:
                        raise InputError(f"code {values.max()} is outside a codebook of {size}")
                    payload.append(bits.pack(values + unsent, bits.width(size + unsent)))
        packed = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
        body = b"".join(payload)
        version = 1 if self.keep is None else VERSION
        start = MAGIC + struct.pack("<HIQ", version, len(packed), len(body))
        whole = start + packed + body
        return whole + struct.pack("<I", zlib.crc32(whole))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Tokens":
        """Read a token file. Raises FormatError if it is cut short, damaged, too long, or newer than this."""
        if data[:4] != MAGIC:
            raise FormatError("this is not a token file (its first bytes are not 'VTOK')")
        if len(data) < _FIXED + 4:
            raise FormatError(f"the token file is cut short: {len(data)} bytes")
        version, header_size, body_size = struct.unpack("<HIQ", data[4:_FIXED])
        if version > VERSION:
            raise FormatError(
                f"the token file is of version {version}; this vistok reads up to {VERSION}: upgrade vistok"
            )
        expected = _FIXED + header_size + body_size + 4
        if len(data) != expected:
            how = "cut short" if len(data) < expected else "followed by other bytes"
            raise FormatError(f"the token file is {how}: {len(data)} bytes where {expected} were written")
        if zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
            raise FormatError("the token file is damaged: its checksum does not match")
        try:
            header = json.loads(zlib.decompress(data[_FIXED : _FIXED + header_size]))
            return cls._from_header(header, memoryview(data)[_FIXED + header_size : -4], version)
        except (KeyError, TypeError, ValueError, zlib.error) as error:  # a forged file whose checksum was made to match
            raise FormatError(f"the token file's header does not describe its contents: {error}") from error

    @classmethod
    def _from_header(cls, header: dict[str, Any], body: memoryview, version: int) -> "Tokens":
        segments = tuple(
            Segment(name, tuple(shape), tuple(books), dim) for name, shape, books, dim in header["segments"]
        )
        items, length, columns = header["items"], header["length"], header["columns"]
        offset = 0

        def take(size: int) -> memoryview:
            nonlocal offset
            offset += size
            return body[offset - size : offset]

        keep = None
        if header["keep"]:
            flags = bits.unpack(take(bits.packed_size(items * length, 1)), items * length, 1)
            keep = torch.from_numpy(flags.astype(bool)).reshape(items, length)
        stored = torch.ones(items, length, dtype=torch.bool) if keep is None or version == 1 else keep
        canvas: tuple[Canvas, ...] = ()
        if "canvas" in header:
            distinct = [Canvas.from_json(plain) for plain in header["canvas"]]
            canvas = (
                tuple(distinct[k] for k in header["canvas_of"]) if "canvas_of" in header else tuple(distinct * items)
            )
        source = Source(*header["source"]) if "source" in header else None
        codes = vectors = None
        if "dtype" in header:
            dtype = getattr(torch, header["dtype"])
            raw = np.frombuffer(take(int(stored.sum()) * columns * dtype.itemsize), dtype=np.uint8).copy()
            vectors = torch.zeros(items, length, columns, dtype=dtype)
            vectors[stored] = torch.from_numpy(raw).view(dtype).reshape(-1, columns)
        else:
            codes = torch.full((items, length, columns or 1), -1, dtype=torch.long)
            unsent_flags = iter(header["unsent"])
            start = 0
            for segment in segments:
                stop = min(start + segment.count, length)
                for column, size in enumerate(segment.codebooks if stop > start else ()):
                    part = stored[:, start:stop]
                    unsent, count = next(unsent_flags), int(part.sum())
                    value_bits = bits.width(size + unsent)
                    values = bits.unpack(take(bits.packed_size(count, value_bits)), count, value_bits) - unsent
                    codes[:, start:stop, column][part] = torch.from_numpy(values)
                start += segment.count
            codes = codes if columns else codes[..., 0]
        if offset != len(body):
            raise FormatError(f"the token file's payload is {len(body)} bytes where its header describes {offset}")
        return cls(segments, codes, vectors, keep, canvas, source)

    def save(self, path: str | os.PathLike) -> None:
        """Write a token file at once or not at all. Raises OutputError if it cannot be written."""
        write_atomically(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokens":
        """Read a token file. Raises FormatError with the file's name if it is damaged."""
        data = Path(path).read_bytes()
        try:
            return cls.from_bytes(data)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from error


_FIXED = 4 + struct.calcsize("<HIQ")
