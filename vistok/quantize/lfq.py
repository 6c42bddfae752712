"""Lookup-free quantization (MAGVIT-v2, arXiv:2310.05737): a code is the signs of the latent's dimensions.

    z (B, N, D) -> [project_in] -> sign -> vectors of +-scale -> [project_out] -> (B, N, D)
                                      \\-> codes: the bits, cut into one integer per codebook

The entropy term keeps all 2^d codes in use. It is taken over each codebook (vector-quantize-pytorch), over the joint
code of all bits (Open-MAGVIT2, also where tokens are factorised), or over single bits.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.quantize.base import Projection, Quantized, Quantizer, mean_square, one_of, positive, within
from vistok.quantize.entropy import EntropyTerm, bit_entropies
from vistok.quantize.rotation import straight_through


class LFQ(Quantizer):
    """Binary codes: `bits` dimensions, each -scale or +scale (zero counts as negative).

    bits          bits of a code; several numbers give several codes per position, from consecutive dimensions
    dim           D of the latent; other than the total of bits, linear projections go in and out
    scale         length of a vector's components
    bit_order     "msb": the first dimension is the most significant bit (vector-quantize-pytorch);
                  "lsb": the least significant (Open-MAGVIT2, ImageFolder)
    commitment    weight of mean((z - sg q)^2), z after project_in
    entropy       an EntropyTerm, or None
    entropy_over  "codebook": each on its own, averaged; "joint": the code of all bits; "bit": see entropy.py

    Losses: "commitment", "entropy"; stats: "sample_entropy", "batch_entropy". Raises ConfigError for illegal options.
    """

    shifts: Tensor
    sphere = False

    def __init__(
        self,
        bits: int | Sequence[int],
        dim: int | None = None,
        *,
        scale: float = 1.0,
        bit_order: Literal["msb", "lsb"] = "msb",
        commitment: float = 0.25,
        entropy: EntropyTerm | None = EntropyTerm(),  # noqa: B008 - frozen
        entropy_over: Literal["codebook", "joint", "bit"] = "codebook",
    ):
        groups = (bits,) if isinstance(bits, int) else tuple(bits)
        self_bits = tuple(_fits_int64(positive("bits", group)) for group in groups)
        width = sum(self_bits)
        super().__init__(width if dim is None else dim, tuple(2**group for group in self_bits))
        self.bits = self_bits
        self.scale = within("scale", scale)
        self.bit_order = one_of("bit_order", bit_order, ("msb", "lsb"))
        self.commitment = within("commitment", commitment)
        self.entropy = entropy
        self.entropy_over = one_of("entropy_over", entropy_over, ("codebook", "joint", "bit"))
        projects = self.dim != width
        self.project_in = Projection(self.dim, width) if projects else nn.Identity()
        self.project_out = Projection(width, self.dim) if projects else nn.Identity()
        shifts = [range(group - 1, -1, -1) if bit_order == "msb" else range(group) for group in self_bits]
        self.register_buffer("shifts", torch.tensor([shift for group in shifts for shift in group]), persistent=False)

    def table(self, codebook: int = 0) -> Tensor:
        """Every vector (2^bits, bits) of one codebook in the order of its codes, before project_out."""
        codes = torch.arange(self.codebooks[codebook], device=self.shifts.device)
        shifts = self.shifts.split(self.bits)[codebook]
        return self._values(((codes[:, None] >> shifts) & 1).float(), self.bits[codebook])

    def component(self, bits: int) -> float:
        """Absolute value of a vector's components, in a codebook of so many bits."""
        return self.scale

    def prepare(self, z: Tensor) -> Tensor:
        """The projected latent (B, N, bits) as signs, losses and entropy see it."""
        return self.project_in(z)

    def _values(self, ones: Tensor, bits: int) -> Tensor:
        return (ones * 2 - 1) * self.component(bits)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.bits, dim=-1)

    def _signed(self, z: Tensor) -> Tensor:
        parts = zip(self._split((z > 0).to(z.dtype)), self.bits, strict=True)
        return torch.cat([self._values(part, bits) for part, bits in parts], -1)

    def _codes(self, z: Tensor) -> Tensor:
        values = (z > 0).long() << self.shifts
        if len(self.bits) == 1:
            return values.sum(-1)
        return torch.stack([part.sum(-1) for part in self._split(values)], -1)

    def _quantize(self, z: Tensor) -> Quantized:
        z = self.prepare(z)
        q = self._signed(z.detach())
        losses = {"commitment": self.commitment * mean_square(z, q)}
        stats = {}
        if self.entropy is not None:
            parts = self._entropies(z, self.entropy)
            losses["entropy"], stats = self.entropy.combine(*parts), self.entropy.stats(*parts)
        return Quantized(self.project_out(straight_through(z, q)), self._codes(z.detach()), losses, stats)

    def _entropies(self, z: Tensor, term: EntropyTerm) -> tuple[Tensor, Tensor]:
        """Similarity is 2 z.c, so a bit's logit is the difference between its two signs, 4 z c / temperature."""
        parts = zip(self._split(z), self.bits, strict=True)
        logits = [part.flatten(0, 1) * (4 * self.component(bits) / term.temperature) for part, bits in parts]
        if self.entropy_over != "codebook":
            return bit_entropies(torch.cat(logits, 1), term, "bits" if self.entropy_over == "bit" else "codes")
        pairs = [bit_entropies(group, term) for group in logits]
        sample, batch = zip(*pairs, strict=True)
        return torch.stack(sample).mean(), torch.stack(batch).mean()

    def _encode(self, z: Tensor) -> Tensor:
        return self._codes(self.prepare(z))

    def _decode(self, codes: Tensor) -> Tensor:
        columns = codes.long()[..., None] if len(self.bits) == 1 else codes.long()
        groups = torch.tensor(self.bits, device=codes.device)
        ones = (columns.repeat_interleave(groups, dim=-1) >> self.shifts) & 1
        parts = zip(self._split(ones.float()), self.bits, strict=True)
        return self.project_out(torch.cat([self._values(part, bits) for part, bits in parts], -1))


def _fits_int64(bits: int) -> int:
    """`bits` if a code of so many fits an int64; else ConfigError."""
    if bits > 62:
        raise ConfigError(f"a code of {bits} bits does not fit an integer of 64; give bits as several groups")
    return bits


def authors_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from vector-quantize-pytorch's or Open-MAGVIT2's: projections stay, constant tables go."""
    return {key: value for key, value in state.items() if key.startswith(("project_in.", "project_out."))}
