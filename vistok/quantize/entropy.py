"""Entropy of soft code assignments: each vector should be sure of its code, the batch should use all codes.

    p_n = softmax over the codes of n's similarities / temperature
    term = weight (sample * mean_n H(p_n)  -  batch * H(mean_n p_n))          in nats

The mean over n runs over all processes. p has N x K entries: it is made in chunks of rows and made again in the
backward pass, so that none of it is kept. Where codes are strings of independent bits (LFQ, BSQ), p factorises and
most of it is never made at all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from vistok.errors import ConfigError
from vistok.quantize.base import one_of, within
from vistok.quantize.processes import mean_over_processes

CHUNK = 1 << 21  # entries of p held at a time


@dataclass(frozen=True)
class EntropyTerm:
    """Weights and conventions of the entropy term.

    weight       of the whole term in the training loss
    temperature  divides the similarities; lucidrains' `inv_temperature` is its inverse
    sample       weight of the mean entropy of one vector (to be made small)
    batch        weight of the entropy of the mean (to be made large); `diversity_gamma` elsewhere
    log          guard of the logarithms: "add" takes log(p + 1e-5) of the batch mean (Open-MAGVIT2, LlamaGen, IBQ),
                 "clamp" takes log(max(p, 1e-5)) everywhere (vector-quantize-pytorch)
    """

    weight: float = 0.1
    temperature: float = 0.01
    sample: float = 1.0
    batch: float = 1.0
    log: Literal["add", "clamp"] = "add"

    def __post_init__(self) -> None:
        within("entropy weight", self.weight)
        within("entropy sample weight", self.sample)
        within("entropy batch weight", self.batch)
        one_of("entropy log", self.log, ("add", "clamp"))
        if not self.temperature > 0:
            raise ConfigError(f"entropy temperature must be above 0, got {self.temperature!r}")

    def combine(self, sample_entropy: Tensor, batch_entropy: Tensor) -> Tensor:
        """The weighted term from its two parts."""
        return self.weight * (self.sample * sample_entropy - self.batch * batch_entropy)

    def stats(self, sample_entropy: Tensor, batch_entropy: Tensor) -> dict[str, Tensor]:
        """The two parts, unweighted and detached."""
        return {"sample_entropy": sample_entropy.detach(), "batch_entropy": batch_entropy.detach()}


def table_entropies(
    z: Tensor, table: Tensor, term: EntropyTerm, similarity: Literal["l2", "dot"] = "l2"
) -> tuple[Tensor, Tensor]:
    """Sample and batch entropy of `z` (M, D) over the rows of `table` (K, D); gradients reach both.

    Similarity is minus the squared distance, or the inner product.
    """

    def chunk(rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        logits = rows @ table.T
        if similarity == "l2":  # |z|^2 is the same for all codes and leaves the softmax alone
            logits = 2 * logits - table.square().sum(1)
        logits = logits / term.temperature
        p = logits.softmax(1)
        log_p = p.clamp(min=1e-5).log() if term.log == "clamp" else logits.log_softmax(1)
        return -(p * log_p).sum(), p.sum(0)

    return _over_chunks(chunk, z, (table,), len(table), term)


def bit_entropies(
    logits: Tensor, term: EntropyTerm, batch_over: Literal["codes", "bits"] = "codes"
) -> tuple[Tensor, Tensor]:
    """Sample and batch entropy over the 2^d codes of d independent bits, P(bit = 1) = sigmoid(logits), logits (M, d).

    `batch_over` "bits" takes the sum of the mean bits' entropies instead of the entropy over all codes (BSQ,
    arXiv:2406.07548, eq. 11): an upper bound that needs no table of 2^d, and the sample entropy is exact.
    """
    bits = logits.shape[1]
    if batch_over == "bits":
        mean = mean_over_processes(logits.sigmoid().sum(0), len(logits))
        return _bits_entropy(logits, term), (_entropy(mean, term) + _entropy(1 - mean, term)).sum()
    if bits > 24:
        raise ConfigError(f"the entropy over 2^{bits} codes does not fit; take it over bits, or split the code")
    first = bits // 2
    signs = (_signs(first, logits), _signs(bits - first, logits))

    def halves(rows: Tensor) -> tuple[Tensor, Tensor]:
        # sigmoid(u) = e^(u/2) / (e^(u/2) + e^(-u/2)), so a softmax over all sign vectors of a half is its product
        return (rows[:, :first] @ signs[0].T / 2).softmax(1), (rows[:, first:] @ signs[1].T / 2).softmax(1)

    def chunk(rows: Tensor) -> tuple[Tensor, Tensor]:
        p, q = halves(rows)
        if term.log == "add":
            return rows.new_zeros(()), (p.T @ q).flatten()
        joint = (p[:, :, None] * q[:, None, :]).flatten(1)
        return -(joint * joint.clamp(min=1e-5).log()).sum(), joint.sum(0)

    width = 2 ** (bits - first) if term.log == "add" else 2**bits
    sample, batch = _over_chunks(chunk, logits, (), width, term)
    return (_bits_entropy(logits, term) if term.log == "add" else sample), batch


def _over_chunks(
    chunk: Callable[..., tuple[Tensor, Tensor]], rows: Tensor, shared: tuple[Tensor, ...], width: int, term: EntropyTerm
) -> tuple[Tensor, Tensor]:
    """Sum what `chunk` gives over chunks of rows; in the backward pass each chunk is computed anew."""
    step = max(CHUNK // width, 16)
    entropy, total = None, None
    for start in range(0, max(len(rows), 1), step):
        part = rows[start : start + step]
        if torch.is_grad_enabled() and len(rows) > step:
            h, p = checkpoint(chunk, part, *shared, use_reentrant=False, preserve_rng_state=False)
        else:
            h, p = chunk(part, *shared)
        entropy, total = (h, p) if entropy is None else (entropy + h, total + p)
    assert entropy is not None
    assert total is not None
    mean = mean_over_processes(total, len(rows))
    return entropy / max(len(rows), 1), _entropy(mean, term).sum()


def _entropy(p: Tensor, term: EntropyTerm) -> Tensor:
    return -p * (p.clamp(min=1e-5).log() if term.log == "clamp" else (p + 1e-5).log())


def _bits_entropy(logits: Tensor, term: EntropyTerm) -> Tensor:
    """Mean over vectors of the summed entropies of their bits, exact for any logits."""
    h = -(logits.sigmoid() * logsigmoid(logits) + (-logits).sigmoid() * logsigmoid(-logits))
    return h.sum() / max(len(logits), 1)


def _signs(bits: int, like: Tensor) -> Tensor:
    """All sign vectors (2^bits, bits) of -1 and 1."""
    codes = torch.arange(2**bits, device=like.device)
    return ((codes[:, None] >> torch.arange(bits, device=like.device)) & 1).to(like.dtype) * 2 - 1
