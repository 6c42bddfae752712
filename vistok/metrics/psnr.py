"""Peak signal-to-noise ratio, as the field reports it: per picture on 8-bit values, averaged in decibels."""

import torch
from torch import Tensor

from vistok.errors import InputError
from vistok.pixels import as_float, as_uint8


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """10 log10(255^2 / MSE) per picture, float64 (B,), in dB; infinite for equal pictures.

    Takes (B, C, H, W), uint8 or float in [0, 1] (rounded to 8 bits, as when written to a file).
    Raises InputError for different shapes.
    """
    if first.shape != second.shape or first.ndim != 4:
        raise InputError(f"pixels of shapes {tuple(first.shape)} and {tuple(second.shape)}; expected two (B, C, H, W)")
    difference = as_uint8(first).to(torch.int32) - as_uint8(second).to(torch.int32)
    error = difference.square_().flatten(1).double().mean(1)
    return 10 * torch.log10(255.0**2 / error)


def batch_psnr(first: Tensor, second: Tensor) -> Tensor:
    """-10 log10 of one mean squared error over the whole batch, float64 scalar, in dB: LARP, torchmetrics.

    Takes float in [0, 1] as it is, or uint8, of one shape (B, C, H, W). Lower than the mean of `psnr`, because the
    worst picture weighs most. Raises InputError for different shapes.
    """
    if first.shape != second.shape:
        raise InputError(f"pixels of shapes {tuple(first.shape)} and {tuple(second.shape)}; expected the same")
    difference = as_float(first, torch.float64) - as_float(second, torch.float64)
    return -10 * torch.log10(difference.square_().mean())
