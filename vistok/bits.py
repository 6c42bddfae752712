"""Integers to bits and back: the packing under token files and stores. Plain NumPy, no loop over values."""

import numpy as np

from vistok.errors import FormatError


def width(size: int) -> int:
    """Bits that an index into `size` values takes: ceil(log2 size), 0 for a single value."""
    return max(size - 1, 0).bit_length()


def pack(values: np.ndarray, bits: int) -> bytes:
    """Pack non-negative integers below 2**bits, most significant bit first, padded with zeros to a whole byte."""
    if bits == 0:
        return b""
    flat = np.ascontiguousarray(values, dtype=np.int64).ravel()
    if flat.size and (flat.min() < 0 or flat.max() >> bits):
        raise ValueError(f"values span {flat.min()}..{flat.max()}, which {bits} bits do not hold")
    out = []
    for start in range(0, flat.size, _CHUNK):  # bounds the memory of the bit matrix; _CHUNK is a multiple of 8
        chunk = flat[start : start + _CHUNK]
        matrix = (chunk[:, None] >> np.arange(bits - 1, -1, -1)) & 1
        out.append(np.packbits(matrix.astype(np.uint8)).tobytes())
    return b"".join(out)


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take once packed."""
    return (count * bits + 7) // 8


def unpack(data: bytes | memoryview, count: int, bits: int) -> np.ndarray:
    """Inverse of `pack`: `count` integers as int64. Raises FormatError when `data` has another length."""
    if len(data) != packed_size(count, bits):
        raise FormatError(f"{len(data)} bytes cannot hold {count} values of {bits} bits each")
    if bits == 0:
        return np.zeros(count, dtype=np.int64)
    raw = np.frombuffer(data, dtype=np.uint8)
    powers = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    out = np.empty(count, dtype=np.int64)
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        chunk = np.unpackbits(raw[start * bits // 8 : packed_size(stop, bits)], count=(stop - start) * bits)
        out[start:stop] = chunk.reshape(-1, bits) @ powers
    return out


_CHUNK = 1 << 16
