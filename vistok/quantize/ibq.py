"""Index backpropagation quantization (arXiv:2412.02692): the gradient reaches all codes through the softmax.

    logits = z E^T (B, N, K),  p = softmax(logits),  code = argmax
    out    = (onehot(code) + p - sg p) E     in value E[code]; backward through p to z and to every row of E

The soft assignment has N x K entries; it is made in chunks, in the backward pass alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from vistok.quantize.base import Quantized, Quantizer, mean_square, positive, within
from vistok.quantize.entropy import EntropyTerm, table_entropies
from vistok.quantize.search import nearest

_CHUNK = 1 << 21  # entries of p held at a time


class IBQ(Quantizer):
    """VQ by highest inner product whose whole codebook learns at every step.

    commitment  beta of beta mean((sg z - q)^2) on the hard vectors
    entropy     an EntropyTerm over softmax(z E^T / temperature); None turns it off

    Losses: "quantization" (mean((q - z)^2) on the soft path + mean((sg q - z)^2) + the beta term) and "entropy"; stats:
    "sample_entropy", "batch_entropy". Raises ConfigError for illegal options.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        commitment: float = 0.25,
        entropy: EntropyTerm | None = EntropyTerm(weight=0.05),  # noqa: B008 - frozen
    ):
        super().__init__(dim, (positive("codebook_size", codebook_size),))
        self.commitment = within("commitment", commitment)
        self.entropy = entropy
        self.codebook = nn.Parameter(torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size))

    def table(self) -> Tensor:
        """The vectors (K, D) that codes stand for."""
        return self.codebook if self.codebook.dtype == torch.float64 else self.codebook.float()

    def _quantize(self, z: Tensor) -> Quantized:
        table = self.table().to(z.dtype)
        rows = z.flatten(0, 1)
        codes = nearest(rows.detach(), table.detach(), "dot")
        soft = _IndexBackpropagation.apply(rows, table, codes).view_as(z)
        hard = embedding(codes, table).view_as(z)
        quantization = (
            mean_square(soft, z) + mean_square(hard.detach(), z) + self.commitment * mean_square(hard, z.detach())
        )
        losses, stats = {"quantization": quantization}, {}
        if self.entropy is not None:
            parts = table_entropies(rows, table, self.entropy, "dot")
            losses["entropy"], stats = self.entropy.combine(*parts), self.entropy.stats(*parts)
        return Quantized(soft, codes.view(z.shape[:2]), losses, stats)

    def _encode(self, z: Tensor) -> Tensor:
        return nearest(z.flatten(0, 1), self.table().to(z.dtype), "dot").view(z.shape[:2])

    def _decode(self, codes: Tensor) -> Tensor:
        return embedding(codes.long(), self.table())


class _IndexBackpropagation(torch.autograd.Function):
    """rows (M, D), table (K, D), codes (M,) -> table[codes], with the gradient of the soft assignment."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(rows, table, codes)
        return table[codes]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        rows, table, codes = ctx.saved_tensors
        to_rows, to_table = torch.empty_like(rows), torch.zeros_like(table).index_add_(0, codes, grad)
        step = max(_CHUNK // len(table), 16)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            p = (rows[part] @ table.T).softmax(1)
            gain = grad[part] @ table.T
            gain -= (p * gain).sum(1, keepdim=True)  # backward of the softmax
            gain *= p
            to_rows[part] = gain @ table
            to_table += gain.T @ rows[part]
        return to_rows, to_table, None


def authors_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from SEED-Voken's `embedding.weight`."""
    return {"codebook": state["embedding.weight"]}
