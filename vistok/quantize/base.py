"""The small surface of all quantizers: a latent in; vectors, codes and losses out; codes back to vectors, exactly.

    z (B, N, D) -> forward -> Quantized: vectors (B, N, D), codes (B, N) or (B, N, C), losses {term: scalar}
    z (B, N, D) -> encode  -> codes      codes -> decode -> vectors (B, N, D)

Channels are last. Arithmetic is float32 (float64 for float64 input) whatever autocast says.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from vistok.errors import ConfigError, InputError, nearest
from vistok.quantize.usage import CodeUsage


@dataclass
class Quantized:
    """What a quantizer gives.

    vectors  (B, N, D): what the decoder reads; its gradient reaches the latent the way the quantizer defines
    codes    long (B, N), or (B, N, C) with several codes per position; -1 where a code was dropped; None if continuous
    losses   the terms of the training loss, weighted: their sum is what is added to it
    stats    numbers worth logging, detached, unweighted
    """

    vectors: Tensor
    codes: Tensor | None
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module):
    """Base of all quantizers: checks, precision and usage counts around what a subclass computes.

    A subclass defines `_quantize(z) -> Quantized`, `_encode(z) -> codes` and `_decode(codes) -> vectors`.

    dim        D, the length of a vector
    codebooks  sizes of the codes at one position: (K,) for one, (K1, .., KC) for several, () where continuous
    usage      counts of the codes that `forward` gave since `usage.reset()`
    """

    dim: int
    codebooks: tuple[int, ...]

    def __init__(self, dim: int, codebooks: Sequence[int]):
        super().__init__()
        self.dim = positive("dim", dim)
        self.codebooks = tuple(positive("codebook size", size) for size in codebooks)
        self.usage = CodeUsage(self.codebooks)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize `z` (B, N, D); in training mode, update the statistics that live in buffers.

        Vectors have the dtype of `z`, float32 under autocast. Raises InputError for another shape or
        dtype, and on a CPU for NaN or infinity (elsewhere the check would wait for the device).
        """
        with _full_precision(z):
            out = self._quantize(self._checked(z))
        if out.codes is not None and not torch.compiler.is_compiling():
            self.usage.update(out.codes)
        out.vectors = out.vectors.to(self._dtype_out(z))
        return out

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Codes of `z` (B, N, D): long (B, N) or (B, N, C). Changes no statistics."""
        with _full_precision(z):
            return self._encode(self._checked(z))

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (B, N, D) of `codes` (B, N) or (B, N, C), exactly those that `forward` gave.

        They have the dtype of the quantizer's weights, float32 where it has none. Gradients reach a learned codebook.
        Raises InputError for a wrong shape, dtype or a code outside its codebook.
        """
        self._check_codes(codes)
        with _full_precision(codes):
            return self._decode(codes).to(self._stored_dtype())

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebooks={_short(self.codebooks)}"

    input_dim_factor = 1  # a Gaussian's moments have two numbers per dimension
    allows_absent = False  # whether -1 is a legal code

    def _quantize(self, z: Tensor) -> Quantized:
        raise TypeError(f"{type(self).__name__} must define _quantize")

    def _encode(self, z: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define _encode")

    def _decode(self, codes: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define _decode")

    def _checked(self, z: Tensor) -> Tensor:
        width = self.dim * self.input_dim_factor
        if z.ndim != 3 or z.shape[-1] != width:
            raise InputError(
                f"{type(self).__name__} takes a latent of shape (B, N, {width}), got {tuple(z.shape)}; "
                "bring a map to it with rearrange(z, 'b d h w -> b (h w) d')"
            )
        if not z.is_floating_point():
            raise InputError(f"{type(self).__name__} takes a floating-point latent, got {z.dtype}")
        check_finite(z)
        return z if z.dtype == torch.float64 else z.float()

    def _dtype_out(self, z: Tensor) -> torch.dtype:
        return torch.float32 if torch.is_autocast_enabled(z.device.type) and z.dtype != torch.float64 else z.dtype

    def _stored_dtype(self) -> torch.dtype:
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
        return torch.float32

    def _check_codes(self, codes: Tensor) -> None:
        several = len(self.codebooks) > 1
        wanted = f"(B, N, {len(self.codebooks)})" if several else "(B, N)"
        if codes.ndim != 2 + several or (several and codes.shape[-1] != len(self.codebooks)):
            raise InputError(f"{type(self).__name__} takes codes of shape {wanted}, got {tuple(codes.shape)}")
        check_range(codes, self.codebooks, lowest=-1 if self.allows_absent else 0)


class Projection(nn.Linear):
    """A linear map in the precision of its input, whatever dtype its weights are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def check_finite(z: Tensor) -> None:
    """Raise InputError for NaN or infinite `z`, on a CPU only: one pass there, a wait for the device elsewhere."""
    if z.device.type == "cpu" and z.numel() and not torch.isfinite(torch.stack(torch.aminmax(z.detach()))).all():
        raise InputError(
            "the latent holds NaN or infinity; look at the encoder's weights, its input or the learning rate"
        )


def check_range(codes: Tensor, codebooks: Sequence[int], lowest: int = 0) -> None:
    """Raise InputError unless `codes` are integers with each column in lowest..K-1 of its codebook."""
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise InputError(f"codes are integers, got {codes.dtype}")
    if codes.numel() == 0 or torch.compiler.is_compiling():
        return
    columns = codes.reshape(-1, len(codebooks))
    low, high = columns.amin(0).tolist(), columns.amax(0).tolist()
    for column, (least, most, size) in enumerate(zip(low, high, codebooks, strict=True)):
        if least < lowest or most >= size:
            which = f" of codebook {column}" if len(codebooks) > 1 else ""
            raise InputError(f"codes{which} span {least}..{most}, legal are {lowest}..{size - 1}")


def positive(name: str, value: Any) -> int:
    """`value` as an int, or ConfigError unless it is a whole number of at least 1."""
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)


def within(name: str, value: float, low: float = 0.0, high: float = float("inf")) -> float:
    """`value` as a float, or ConfigError unless it is finite and in low..high."""
    if not isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name} must be in {low:g}..{high:g}, got {value!r}")
    return float(value)


def one_of(name: str, value: Any, legal: Iterable[Any]) -> Any:
    """`value`, or ConfigError that names the legal ones."""
    legal = tuple(legal)
    if value not in legal:
        words = ", ".join(repr(option) for option in legal)
        raise ConfigError(f"{name} must be one of {words}, got {value!r}{nearest(str(value), [str(w) for w in legal])}")
    return value


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean of (a - b)^2; 0 for empty tensors, where a plain mean is NaN."""
    return (a - b).square().sum() / max(a.numel(), 1)


def _full_precision(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)


def _short(sizes: tuple[int, ...]) -> str:
    return str(sizes) if len(sizes) <= 4 else f"({sizes[0]}, .., {sizes[-1]}; {len(sizes)} codes)"
