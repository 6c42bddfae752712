"""Gumbel-softmax quantization: a code is drawn from logits over the codebook (arXiv:1611.01144, 2102.12092).

    z (B, N, D) -> linear -> logits (B, N, K) -> one-hot draw -> codes (B, N) -> rows of the codebook (B, N, D)

In training the draw adds Gumbel noise and the gradient goes through the softmax at `temperature`. In evaluation it is
the most likely code; the VQGAN authors' code draws there too, so its codes differ from call to call.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, one_hot

from vistok.quantize.base import Quantized, Quantizer, positive, within


class GumbelQuantizer(Quantizer):
    """K logits per position, one drawn.

    kl_weight    weight of KL(softmax(logits) || uniform), mean over positions, in nats
    temperature  of the softmax through which gradients flow; lower is closer to one-hot and noisier
    rng          the generator of the noise, or None for torch's own

    Losses: "kl". Holds (B, N, K) probabilities while training, as its gradient needs them.
    """

    def __init__(self, dim: int, codebook_size: int, *, kl_weight: float = 5e-4, temperature: float = 1.0):
        super().__init__(dim, (positive("codebook_size", codebook_size),))
        self.kl_weight = within("kl_weight", kl_weight)
        self.temperature = within("temperature", temperature, 1e-6)
        self.logits = nn.Linear(dim, codebook_size)
        self.codebook = nn.Parameter(torch.randn(codebook_size, dim))
        self.rng: torch.Generator | None = None

    def _scores(self, z: Tensor) -> Tensor:
        return linear(z, self.logits.weight.to(z.dtype), self.logits.bias.to(z.dtype))

    def _quantize(self, z: Tensor) -> Quantized:
        logits = self._scores(z)
        size = self.codebooks[0]
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        losses = {"kl": self.kl_weight * (p * (size * p + 1e-10).log()).sum(-1).mean()}
        if not self.training:
            codes = logits.argmax(-1)
            return Quantized(self._decode(codes).to(z.dtype), codes, losses)
        device = self.rng.device if self.rng is not None else logits.device
        noise = torch.empty(logits.shape, dtype=logits.dtype, device=device).exponential_(generator=self.rng)
        soft = ((logits - noise.log().to(logits.device)) / self.temperature).softmax(-1)
        codes = soft.argmax(-1)
        draw = one_hot(codes, size).to(soft.dtype) - soft.detach() + soft
        return Quantized(draw @ self.codebook.to(z.dtype), codes, losses)

    def _encode(self, z: Tensor) -> Tensor:
        return self._scores(z).argmax(-1)

    def _decode(self, codes: Tensor) -> Tensor:
        return embedding(codes.long(), self.codebook if self.codebook.dtype == torch.float64 else self.codebook.float())
