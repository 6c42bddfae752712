"""Binary spherical quantization (arXiv:2406.07548): signs of a latent that was first put on the unit sphere.

    z (B, N, D) -> [project_in] -> z / |z| per codebook -> sign / sqrt(bits) -> [project_out] -> (B, N, D)

The error is bounded, |z - q| <= sqrt(2 - 2 / sqrt(bits)), and the entropy factorises over bits (`entropy_over="bit"`,
the paper's form), so codes of 36 bits and more train without a table.
"""

from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vistok.quantize.lfq import LFQ


class BSQ(LFQ):
    """LFQ on the sphere: each codebook's part of the latent gets length `scale`, and so do its vectors.

    Options, losses and errors are those of LFQ; commitment and entropy act on the normalised latent. For codes too long
    for one integer give `bits` as groups, e.g. (18, 18), with entropy_over="bit".
    """

    def component(self, bits: int) -> float:
        return self.scale / sqrt(bits)

    def prepare(self, z: Tensor) -> Tensor:
        z = super().prepare(z)
        if len(self.bits) == 1:
            return self._on_sphere(z)
        return torch.cat([self._on_sphere(part) for part in self._split(z)], -1)

    def _on_sphere(self, z: Tensor) -> Tensor:
        return normalize(z, dim=-1, eps=1e-6) * self.scale
