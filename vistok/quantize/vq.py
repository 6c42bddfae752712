"""Vector quantization: each latent becomes the nearest row of a learned codebook.

    z (B, N, D) -> [normalise] -> nearest row of E (K, D) -> codes (B, N) -> rows q (B, N, D) -> gradient estimator

Sources: VQ-VAE (arXiv:1711.00937), VQGAN (taming-transformers), ViT-VQGAN and LlamaGen (l2-normalised), SoundStream
(EMA with restarts), CVQ-VAE (arXiv:2307.15139, online clustering), rotation trick (arXiv:2410.06424).

How the published variants are set:

    taming, legacy=False      VectorQuantizer(d, K)
    taming, legacy=True       VectorQuantizer(d, K, commitment=1.0, codebook_weight=0.25)   beta on the other term
    LlamaGen, FQGAN           VectorQuantizer(d, K, metric="cosine", entropy=EntropyTerm(weight=..))
    vector-quantize-pytorch   VectorQuantizer(d, K, learning="ema", commitment=1.0, decay=0.8)
    TA-TiTok                  VectorQuantizer(d, K, learning="cvq")
"""

from collections.abc import Mapping
from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, normalize

from vistok.errors import ConfigError
from vistok.quantize.base import Quantized, Quantizer, mean_square, one_of, positive, within
from vistok.quantize.entropy import EntropyTerm, table_entropies
from vistok.quantize.processes import pick_best, sum_over_processes
from vistok.quantize.restarts import restart
from vistok.quantize.rotation import Estimator, estimate
from vistok.quantize.search import nearest, nearest_with_score


class VectorQuantizer(Quantizer):
    """One codebook of K vectors, learned by gradient, by moving averages, or by online clustering.

    dim, codebook_size  D and K
    metric              "l2", or "cosine": latents and rows are scaled to unit length first, and so is what comes out
    learning            "gradient": the codebook loss moves the rows that were chosen;
                        "ema": rows follow the mean of the latents that chose them, no codebook loss;
                        "cvq": as gradient, and rarely chosen rows move to the latent nearest to them
    estimator           "straight-through" or "rotation" (see rotation.py)
    transform           the codebook is seen through a learned linear map (D, D), as in SimVQ but trained itself too
                        (HiMTok); only with "gradient", without restarts
    commitment          weight of mean((z - sg q)^2)
    codebook_weight     weight of mean((sg z - q)^2); not with "ema"
    entropy             an EntropyTerm over softmax(-distance), or None
    decay, eps          of the moving averages, and the smoothing of their counts
    restart_below       rows whose averaged count per step falls below this are replaced by latents of the batch, drawn
                        alike in all processes from `seed`; 0 turns it off, 1 or 2 are usual. Not with "cvq"

    Losses: "commitment", "codebook", "entropy"; stats: "sample_entropy", "batch_entropy". Statistics move in training
    mode only, also under no_grad: call eval() to freeze them. Raises ConfigError for illegal options.
    """

    codebook: Tensor  # (K, D); a parameter, or a buffer with learning="ema"
    counts: Tensor  # (K,) averaged number of latents per step (a share of the batch with "cvq")
    sums: Tensor  # (K, D) averaged sum of the latents of each code
    steps: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        metric: Literal["l2", "cosine"] = "l2",
        learning: Literal["gradient", "ema", "cvq"] = "gradient",
        estimator: Estimator = "straight-through",
        transform: bool = False,
        commitment: float = 0.25,
        codebook_weight: float = 1.0,
        entropy: EntropyTerm | None = None,
        decay: float = 0.99,
        eps: float = 1e-5,
        restart_below: float = 0.0,
        seed: int = 0,
    ):
        super().__init__(dim, (positive("codebook_size", codebook_size),))
        self.metric = one_of("metric", metric, ("l2", "cosine"))
        self.learning = one_of("learning", learning, ("gradient", "ema", "cvq"))
        self.estimator: Estimator = one_of("estimator", estimator, ("straight-through", "rotation"))
        self.commitment = within("commitment", commitment)
        self.codebook_weight = within("codebook_weight", codebook_weight)
        self.entropy = entropy
        self.decay = within("decay", decay, 0, 1)
        self.eps = within("eps", eps)
        self.restart_below = within("restart_below", restart_below)
        self.seed = seed
        if transform and (learning != "gradient" or restart_below):
            raise ConfigError("transform=True goes with learning='gradient' and restart_below=0 alone")
        self.transform = nn.Linear(dim, dim, bias=False) if transform else None
        self._normalize_eps = 1e-6 if learning == "ema" else 1e-12  # as the respective authors have it

        rows = self._initial_rows(codebook_size, dim)
        if learning == "ema":
            self.register_buffer("codebook", rows)
            self.register_buffer("counts", torch.ones(codebook_size))
            self.register_buffer("sums", rows.clone())
        else:
            self.codebook = nn.Parameter(rows)
            if learning == "cvq":
                self.register_buffer("counts", torch.zeros(codebook_size))
            elif restart_below:
                self.register_buffer("counts", torch.full((codebook_size,), max(1.0, restart_below)))
        if restart_below:
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def _initial_rows(self, size: int, dim: int) -> Tensor:
        if self.learning == "ema":
            rows = torch.empty(size, dim).uniform_(-1, 1) * sqrt(6 / dim)
        else:
            rows = torch.empty(size, dim).uniform_(-1 / size, 1 / size)
        return self._unit(rows) if self.metric == "cosine" else rows

    def rows(self, codebook: Tensor | None = None) -> Tensor:
        """The codebook (K, D) at full precision, through `transform` where there is one, not scaled to unit length."""
        rows = self.codebook if codebook is None else codebook
        rows = rows if rows.dtype == torch.float64 else rows.float()
        return rows if self.transform is None else rows @ self.transform.weight.to(rows.dtype).T

    def table(self) -> Tensor:
        """The vectors (K, D) that codes stand for: the codebook, of unit length with metric "cosine"."""
        return self._table(self.codebook)

    def _table(self, rows: Tensor) -> Tensor:
        rows = self.rows(rows)
        # EMA rows are stored normalised, so a lookup gives their stored bits
        return self._unit(rows) if self.metric == "cosine" and self.learning != "ema" else rows

    def quantize(self, z: Tensor) -> tuple[Quantized, Tensor]:
        """`forward` without any update of statistics, and the latents (M, D) for `learn`.

        They are given as they were compared, but with "cvq" as they came: its rows move to latents of any length.
        """
        given = z
        z = self._unit(z) if self.metric == "cosine" else z
        rows = z.flatten(0, 1)
        changes = self.training and self.learning != "ema" and (self.learning == "cvq" or self.restart_below > 0)
        # rows that `learn` overwrites must not be those that the backward pass reads
        table = self._table(self.codebook.clone() if changes else self.codebook)
        codes = self._nearest(rows.detach(), table.detach())
        q = embedding(codes, table).view_as(z)
        losses = {"commitment": self.commitment * mean_square(z, q.detach())}
        stats = {}
        if self.learning != "ema":
            losses["codebook"] = self.codebook_weight * mean_square(q, z.detach())
        if self.entropy is not None:
            parts = table_entropies(rows, table, self.entropy)
            losses["entropy"], stats = self.entropy.combine(*parts), self.entropy.stats(*parts)
        vectors = estimate(z, q, self.estimator)
        seen = given.flatten(0, 1) if self.learning == "cvq" else rows
        return Quantized(vectors, codes.view(z.shape[:2]), losses, stats), seen.detach()

    @torch.no_grad()
    def learn(self, rows: Tensor, codes: Tensor) -> None:
        """Move the statistics by one step for `rows` (M, D), as `quantize` gave them, and their `codes` (M,)."""
        if self.learning == "gradient" and not self.restart_below:
            return
        size = self.codebooks[0]
        wants_sums = self.learning == "ema"
        packed = rows.new_zeros(size, 1 + (self.dim if wants_sums else 0))  # one exchange for counts and sums
        packed[:, 0] = torch.bincount(codes, minlength=size)
        if wants_sums:
            packed[:, 1:].index_add_(0, codes, rows)
        sum_over_processes(packed)
        counts = packed[:, 0]
        if self.learning == "cvq":
            self._move_towards_latents(rows, counts)
            return
        self.counts.lerp_(counts.to(self.counts.dtype), 1 - self.decay)
        if wants_sums:
            self.sums.lerp_(packed[:, 1:].to(self.sums.dtype), 1 - self.decay)
            total = self.counts.sum()
            smoothed = (self.counts + self.eps) / (total + size * self.eps) * total
            means = self.sums / smoothed[:, None]
            self.codebook.copy_(self._unit(means) if self.metric == "cosine" else means)
        if self.restart_below:
            self._restart(rows, counts)

    def _restart(self, rows: Tensor, counts: Tensor) -> None:
        """Replace rows that died by latents of the batch."""
        self.steps += 1
        if counts.sum() == 0:
            return
        seed = self.seed * 1_000_003 + int(self.steps)
        found = restart(self.codebook, self.counts, self.restart_below, rows, seed)
        if found is not None and self.learning == "ema":
            dead, fresh = found
            self.sums[dead] = fresh * self.restart_below

    def _move_towards_latents(self, rows: Tensor, counts: Tensor) -> None:
        """CVQ-VAE eq. 4-7: the rarer a code, the further it moves to the latent nearest to it."""
        total = counts.sum()
        if total == 0:
            return
        self.counts.lerp_((counts / total).to(self.counts.dtype), 1 - self.decay)
        stay = 1 - torch.exp(-self.counts * self.codebooks[0] * 10 / (1 - self.decay) - 1e-3)
        anchors, scores = self._anchors(rows)
        self.codebook.data.copy_(torch.lerp(pick_best(scores, anchors), self.codebook.detach(), stay[:, None]))

    def _anchors(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if len(rows) == 0:  # another process has latents
            return torch.zeros_like(self.codebook), self.codebook.new_full((len(self.codebook),), -torch.inf)
        compared = self._unit(rows) if self.metric == "cosine" else rows
        found, scores = nearest_with_score(self.table().detach(), compared, "dot" if self.metric == "cosine" else "l2")
        return rows[found], scores

    def _unit(self, x: Tensor) -> Tensor:
        return normalize(x, dim=-1, eps=self._normalize_eps)

    def _nearest(self, rows: Tensor, table: Tensor) -> Tensor:
        return nearest(rows, table.to(rows.dtype), "dot" if self.metric == "cosine" else "l2")

    def _quantize(self, z: Tensor) -> Quantized:
        out, rows = self.quantize(z)
        if self.training and out.codes is not None:
            self.learn(rows, out.codes.flatten())
        return out

    def _encode(self, z: Tensor) -> Tensor:
        z = self._unit(z) if self.metric == "cosine" else z
        return self._nearest(z.flatten(0, 1), self.table()).view(z.shape[:2])

    def _decode(self, codes: Tensor) -> Tensor:
        return embedding(codes.long(), self.table())


def authors_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from an authors': taming / LlamaGen / TiTok `embedding.weight` and `embed_prob`, HF `embed`,
    vector-quantize-pytorch `_codebook.{embed, embed_avg, cluster_size}` (one head), Open-Sora style `codebook_used`
    dropped.
    """
    ours = {
        "embedding.weight": "codebook",
        "embed": "codebook",
        "embed_prob": "counts",
        "_codebook.embed": "codebook",
        "_codebook.embed_avg": "sums",
        "_codebook.cluster_size": "counts",
    }
    renamed = {ours[key]: value for key, value in state.items() if key in ours}
    heads = {key: value.squeeze(0) for key, value in state.items() if key.startswith("_codebook.") and key in ours}
    return renamed | {ours[key]: value for key, value in heads.items()}
