"""Several quantizers side by side, each with a part of the latent of its own (FQGAN, arXiv:2411.16681).

    z (B, N, D) = [z_1 | .. | z_C]  ->  quantizer c on z_c  ->  codes (B, N, C), vectors (B, N, D)

The parts are looked up independently, so C lookups among K rows make K^C codes. A disentanglement term pushes the code
vectors of one position towards being orthogonal: the mean of cos^2 of every pair of them (section 3.2).
"""

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from vistok.errors import ConfigError
from vistok.quantize.base import Quantized, Quantizer, within


class ProductQuantizer(Quantizer):
    """Quantizers by name, in the order of the latent's parts and of the codes.

    disentangle   weight of the mean over positions of cos^2, averaged over the pairs; needs parts of one width

    Losses: those of each part with its name behind a colon ("commitment:vis"), and "disentanglement". Raises
    ConfigError where a part is continuous or has several codes itself, or widths do not allow the disentanglement.
    """

    def __init__(self, parts: Mapping[str, Quantizer], *, disentangle: float = 0.0):
        if not parts or any(len(part.codebooks) != 1 for part in parts.values()):
            raise ConfigError("a product is made of quantizers that give one code a position each")
        widths = [part.dim for part in parts.values()]
        super().__init__(sum(widths), [part.codebooks[0] for part in parts.values()])
        self.parts = nn.ModuleDict(parts)
        self.disentangle = within("disentangle", disentangle)
        self._widths = widths
        if self.disentangle and len(set(widths)) > 1:
            raise ConfigError(f"disentanglement compares vectors of one width, the parts have {widths}")

    @property
    def names(self) -> list[str]:
        """Names of the parts, in the order of the codes."""
        return list(self.parts)

    def part(self, name: str, vectors: Tensor) -> Tensor:
        """The vectors (.., width) of one part, out of those of all (.., D)."""
        return vectors.split(self._widths, -1)[self.names.index(name)]

    def _quantize(self, z: Tensor) -> Quantized:
        outs = [self.parts[name](part) for name, part in zip(self.names, z.split(self._widths, -1), strict=True)]
        losses = {
            f"{key}:{name}": v for name, out in zip(self.names, outs, strict=True) for key, v in out.losses.items()
        }
        stats = {f"{key}:{name}": v for name, out in zip(self.names, outs, strict=True) for key, v in out.stats.items()}
        if len(outs) > 1 and len(set(self._widths)) == 1:
            term = squared_cosine([out.vectors for out in outs])
            stats["disentanglement"] = term.detach()
            if self.disentangle:
                losses["disentanglement"] = self.disentangle * term
        vectors = torch.cat([out.vectors for out in outs], -1)
        return Quantized(vectors, self._stack([out.codes for out in outs]), losses, stats)

    def _encode(self, z: Tensor) -> Tensor:
        parts = zip(self.parts.values(), z.split(self._widths, -1), strict=True)
        return self._stack([quantizer.encode(part) for quantizer, part in parts])  # type: ignore[operator]

    def _decode(self, codes: Tensor) -> Tensor:
        columns = codes.unbind(-1) if codes.ndim == 3 else (codes,)
        pairs = zip(self.parts.values(), columns, strict=True)
        return torch.cat([quantizer.decode(column) for quantizer, column in pairs], -1)  # type: ignore[operator]

    @staticmethod
    def _stack(columns: list[Tensor]) -> Tensor:
        return torch.stack(columns, -1) if len(columns) > 1 else columns[0]


def squared_cosine(vectors: list[Tensor]) -> Tensor:
    """Mean over positions, and over pairs, of the squared cosine of vectors (B, N, D)."""
    pairs = [cosine_similarity(a, b, dim=-1).square() for a, b in combinations(vectors, 2)]
    return torch.stack([pair.sum() / max(pair.numel(), 1) for pair in pairs]).mean()
