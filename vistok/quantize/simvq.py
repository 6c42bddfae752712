"""SimVQ (arXiv:2411.02038): a frozen random codebook behind one learned linear map, so that all codes move together.

z (B, N, D),  E = B W^T with B (K, D0) frozen, W (D, D0) learned  ->  nearest row of E  ->  codes, vectors
"""

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from vistok.quantize.base import Quantized, Quantizer, mean_square, one_of, positive, within
from vistok.quantize.rotation import Estimator, estimate
from vistok.quantize.search import nearest


class SimVQ(Quantizer):
    """VQ whose gradient reaches the codebook only through a shared linear map.

    codebook_dim     D0 of the frozen codebook, `dim` by default; it is drawn from N(0, 1 / D0)
    estimator        "rotation" (the default of vector-quantize-pytorch) or "straight-through"
    commitment       weight of mean((z - sg q)^2)
    codebook_weight  weight of mean((sg z - q)^2)

    Losses: "commitment", "codebook". Raises ConfigError for illegal options.
    """

    frozen: Tensor  # (K, D0)

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        codebook_dim: int | None = None,
        estimator: Estimator = "rotation",
        commitment: float = 0.25,
        codebook_weight: float = 1.0,
    ):
        super().__init__(dim, (positive("codebook_size", codebook_size),))
        width = positive("codebook_dim", dim if codebook_dim is None else codebook_dim)
        self.estimator: Estimator = one_of("estimator", estimator, ("straight-through", "rotation"))
        self.commitment = within("commitment", commitment)
        self.codebook_weight = within("codebook_weight", codebook_weight)
        self.register_buffer("frozen", torch.randn(codebook_size, width) / sqrt(width))
        self.transform = nn.Linear(width, dim, bias=False)

    def table(self) -> Tensor:
        """The vectors (K, D) that codes stand for."""
        dtype = torch.float64 if self.frozen.dtype == torch.float64 else torch.float32
        return self.frozen.to(dtype) @ self.transform.weight.to(dtype).T

    def _quantize(self, z: Tensor) -> Quantized:
        table = self.table().to(z.dtype)
        codes = nearest(z.detach().flatten(0, 1), table.detach())
        q = embedding(codes, table).view_as(z)
        losses = {
            "commitment": self.commitment * mean_square(z, q.detach()),
            "codebook": self.codebook_weight * mean_square(q, z.detach()),
        }
        return Quantized(estimate(z, q, self.estimator), codes.view(z.shape[:2]), losses)

    def _encode(self, z: Tensor) -> Tensor:
        return nearest(z.flatten(0, 1), self.table().to(z.dtype)).view(z.shape[:2])

    def _decode(self, codes: Tensor) -> Tensor:
        return embedding(codes.long(), self.table())


def authors_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from vector-quantize-pytorch's `frozen_codebook` and `code_transform.weight`."""
    return {"frozen": state["frozen_codebook"], "transform.weight": state["code_transform.weight"]}
