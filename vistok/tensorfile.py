"""Safetensors files in one pass: read straight into a model's own memory, checked on the way.

    8 bytes: length of the header | header, JSON: name -> dtype, shape, offsets | the tensors' bytes, without gaps

A cryptographic hash of the weights takes longer than reading them, so the files of model folders carry a checksum that
runs at the speed of memory: of every tensor, the sums of its 64-bit words in 512 columns, and SHA-256 over those sums
and the header. It finds damage and exchanged files. Identity is the SHA-256 fingerprint, which is made when weights are
written and then belongs to the file that has this checksum.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from vistok.errors import FormatError, InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
COLUMNS = 512  # 64-bit words in one row of the checksum
CHUNK = 1 << 18  # bytes read at once: they are summed while a core's cache holds them
LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type, shape and the bytes it occupies, counted from the file's start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def entries(path: Path) -> list[Entry]:
    """What a safetensors file holds, in the order of its bytes.

    Raises FormatError if it is missing, cut short, too long, or its header does not describe its bytes exactly.
    """
    with _open(path) as file:
        return _read_header(file, path)[0]


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """All tensors, in memory of their own, and the file's checksum. Raises FormatError as `entries` does."""
    tensors = {entry.name: torch.empty(entry.shape, dtype=entry.dtype) for entry in entries(path)}
    return tensors, read_into(path, tensors)


def metadata(path: Path) -> dict[str, str]:
    """What the file's writer put beside the tensors, as text by name. Raises FormatError as `entries` does."""
    with _open(path) as file:
        _, header = _read_header(file, path)
    found = json.loads(header).get("__metadata__") or {}
    return {str(name): value for name, value in found.items() if isinstance(value, str)}


def read_into(path: Path, targets: Mapping[str, Tensor]) -> str:
    """Fill `targets`, which has every name of the file in its shape, and return the file's checksum.

    A contiguous CPU tensor of the file's dtype is read in place; others through one temporary tensor at a time.
    """
    with _open(path) as file:
        found, header = _read_header(file, path)
        digest = hashlib.sha256(header)
        for entry in found:
            target = targets[entry.name].detach()
            direct = target.device.type == "cpu" and target.dtype == entry.dtype and target.is_contiguous()
            place = target if direct else torch.empty(entry.shape, dtype=entry.dtype)
            digest.update(_read_bytes(file, _as_bytes(place), path))
            if not direct:
                target.copy_(place)
    return digest.hexdigest()[:32]


def write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, one tensor in memory at a time, and return its checksum.

    Raises InputError for a type that the format does not have.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in NAMES:
            raise InputError(f"{name} has type {tensor.dtype}, which safetensors files do not hold")
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256(text)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            content = _as_bytes(tensors[name].detach().cpu().contiguous())
            digest.update(_column_sums(content))
            file.write(content.data)
    return digest.hexdigest()[:32]


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb", buffering=0)  # type: ignore[return-value]
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist") from None


def _read_header(file: BinaryIO, path: Path) -> tuple[list[Entry], bytes]:
    total = os.fstat(file.fileno()).st_size
    size = int.from_bytes(file.read(8), "little")
    if total < 8 or size > LARGEST_HEADER or 8 + size > total:
        raise FormatError(f"{path} is damaged or not a safetensors file: its header would be {size} bytes of {total}")
    header = file.read(size)
    try:
        plain = json.loads(header)
        found = sorted(_parse(plain, 8 + size), key=lambda entry: (entry.start, entry.stop))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} is damaged or not a safetensors file: {error}") from error
    end = 8 + size
    for entry in found:
        if entry.start != end or entry.stop - entry.start != prod(entry.shape) * entry.dtype.itemsize:
            raise FormatError(f"{path} is damaged: the bytes of {entry.name} are not where its header says")
        end = entry.stop
    if end != total:
        how = "cut short" if total < end else "followed by other bytes"
        raise FormatError(f"{path} is {how}: {total} bytes where its header describes {end}")
    return found, header


def _parse(plain: dict, base: int) -> Iterator[Entry]:
    for name, fields in plain.items():
        if name == "__metadata__":
            continue
        if fields["dtype"] not in DTYPES:
            raise ValueError(f"{name} has the unknown type {fields['dtype']!r}")
        start, stop = fields["data_offsets"]
        shape = tuple(fields["shape"])
        if any(not isinstance(number, int) or number < 0 for number in (*shape, start, stop)):
            raise ValueError(f"{name} has an impossible shape or place")
        yield Entry(name, DTYPES[fields["dtype"]], shape, base + start, base + stop)


def _as_bytes(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)


def _read_bytes(file: BinaryIO, place: np.ndarray, path: Path) -> bytes:
    """Fill `place` and return its column sums."""
    view = place.data
    sums = np.zeros(COLUMNS, np.uint64)
    for start in range(0, len(place), CHUNK):
        stop = done = start
        stop = min(start + CHUNK, len(place))
        while done < stop:
            count = file.readinto(view[done:stop])  # type: ignore[attr-defined]
            if not count:
                raise FormatError(f"{path} is cut short")
            done += count
        sums += _sums(place[start:stop])
    return sums.tobytes()


def _column_sums(content: np.ndarray) -> bytes:
    sums = np.zeros(COLUMNS, np.uint64)
    for start in range(0, len(content), CHUNK):
        sums += _sums(content[start : start + CHUNK])
    return sums.tobytes()


def _sums(chunk: np.ndarray) -> np.ndarray:
    """Sums modulo 2^64 of the columns of `chunk`, laid out in rows of 512 words; the last row is filled with zeros."""
    row = COLUMNS * 8
    whole = len(chunk) // row * row
    sums = chunk[:whole].view(np.uint64).reshape(-1, COLUMNS).sum(0, dtype=np.uint64)
    if whole < len(chunk):
        rest = np.zeros(row, np.uint8)
        rest[: len(chunk) - whole] = chunk[whole:]
        sums += rest.view(np.uint64)
    return sums
