"""pFID: the Frechet distance of images decoded from perturbed codes, how well a tokenizer bears a generator's mistakes.

    images -> latents, codes -> for every (rate, strength) of a grid: some codes exchanged for near neighbours of their
        latents -> decoded -> 8 bits -> features -> distance to the features of the originals;  pFID = their mean

Source: RobustTok (arXiv:2503.08354). The paper's own grid was not published with its code: rates 0.9 .. 0.5 and
neighbourhoods of 200, 280 and 360 codes are what is recalled of it, every image is perturbed, and the mean is that of
the fifteen distances. A result says its grid. FID proper takes Inception features; here the features are an argument.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from vistok.errors import InputError
from vistok.layout import TokenSpec
from vistok.metrics.frechet import frechet_distance
from vistok.quantize import VectorQuantizer
from vistok.quantize.perturbation import neighbours
from vistok.tokenizer import TokenData, Tokenizer

RATES, STRENGTHS = (0.9, 0.8, 0.7, 0.6, 0.5), (200, 280, 360)
Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PerturbedDistance:
    """What `pfid` gives.

    mean   pFID, the mean over `grid`
    clean  the same distance of images decoded from their ordinary codes (rFID on the same features)
    grid   (rate, strength, distance) of every setting
    items  number of images
    """

    mean: float
    clean: float
    grid: tuple[tuple[float, int, float], ...]
    items: int


@torch.no_grad()
def pfid(
    tokenizer: Tokenizer,
    images: Iterable[Tensor],
    features: Features,
    *,
    rates: Sequence[float] = RATES,
    strengths: Sequence[int] = STRENGTHS,
    average: Callable[[Sequence[float]], float] = fmean,
    seed: int = 0,
) -> PerturbedDistance:
    """pFID of a tokenizer with one `VectorQuantizer`, on batches of images (B, 3, H, W) of a legal size.

    images     uint8, or float in [0, 1]
    features   pixels (B, 3, H, W), uint8, to (B, W)
    average    of the distances over the grid
    seed       of the draws, which belong to an image's place in the sequence and not to its batch

    Features are kept, (images, W) for every setting of the grid. Raises InputError for a tokenizer without codes from
    one codebook, and for neighbourhoods larger than it.
    """
    quantizer = getattr(tokenizer, "quantizer", None)
    if not isinstance(quantizer, VectorQuantizer):
        raise InputError(f"pFID exchanges codes of one codebook; {tokenizer.name} has no VectorQuantizer")
    if not rates or not strengths or max(strengths) > quantizer.codebooks[0] or min(strengths) < 1:
        raise InputError(
            f"neighbourhoods of {tuple(strengths)} codes in a codebook of {quantizer.codebooks[0]}; "
            "pFID needs rates, and strengths from 1 to the codebook's size"
        )
    settings = [(rate, strength) for rate in rates for strength in strengths]
    real: list[Tensor] = []
    clean: list[Tensor] = []
    found: list[list[Tensor]] = [[] for _ in settings]
    count = 0
    with tokenizer.inference():
        for batch in images:
            pixels = tokenizer.prepare(batch)
            spec = tokenizer.spec.at((pixels.shape[-2], pixels.shape[-1]))
            latent = tokenizer.encoder(pixels)  # type: ignore[operator]
            latent = latent.flatten(2).transpose(1, 2) if latent.ndim == 4 else latent
            codes = quantizer.encode(latent)
            real.append(features(_eight_bit(pixels)).cpu())
            clean.append(features(_decoded(tokenizer, codes, spec)).cpu())
            near = _neighbours(quantizer, latent, max(strengths))  # (B, N, most)
            chance, place = _draws(range(count, count + len(codes)), codes.shape[1], seed, codes.device)
            for index, (rate, strength) in enumerate(settings):
                rank = (place * strength).long()
                moved = near.gather(2, rank[..., None])[..., 0]
                mixed = torch.where((chance <= rate) & (rank > 0), moved, codes)
                found[index].append(features(_decoded(tokenizer, mixed, spec)).cpu())
            count += len(codes)
    if count < 2:
        raise InputError(f"{count} images; a Frechet distance needs at least two")
    originals = torch.cat(real)
    distances = [frechet_distance(torch.cat(parts), originals) for parts in found]
    grid = tuple((rate, strength, value) for (rate, strength), value in zip(settings, distances, strict=True))
    return PerturbedDistance(average(distances), frechet_distance(torch.cat(clean), originals), grid, count)


def _neighbours(quantizer: VectorQuantizer, latent: Tensor, count: int) -> Tensor:
    rows = latent.flatten(0, 1).float()
    if quantizer.metric == "cosine":
        rows = torch.nn.functional.normalize(rows, dim=1)
    return neighbours(rows, quantizer.table().float(), count).unflatten(0, latent.shape[:2])


def _draws(items: range, length: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two uniform numbers for every token of every image, alike in all settings: (B, N) each."""
    drawn = [
        torch.rand(2, length, generator=torch.Generator().manual_seed((seed * 1_000_003 + item) % 2**63))
        for item in items
    ]
    chance, place = torch.stack(drawn).to(device).unbind(1)
    return chance, place


def _decoded(tokenizer: Tokenizer, codes: Tensor, spec: TokenSpec) -> Tensor:
    data = TokenData(codes=codes)
    return _eight_bit(tokenizer.detokenize(data, spec, seeds=[0] * len(codes), dtype=tokenizer.dtype))


def _eight_bit(pixels: Tensor) -> Tensor:
    """uint8 as the published evaluation rounds: clamp(127.5 x + 128) of x in [-1, 1], cut to whole numbers."""
    return (127.5 * (pixels.float() * 2 - 1) + 128).clamp(0, 255).to(torch.uint8)
