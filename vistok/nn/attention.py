"""Multi-head attention, self and cross, on PyTorch's fused kernel (`scaled_dot_product_attention`).

    x (B, N, W) -> q, k, v (B, heads, N, head) -> [q and k normalised] -> [rotated]
      -> softmax(q k^T / sqrt(head)) v -> (B, N, W)

Masks are boolean and say which pairs may see each other: (N, M), (B, 1, N, M) or (B, heads, N, M). Rotations come from
`positions.py`. Sources: arXiv:1706.03762; query-key normalisation arXiv:2302.05442.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError, InputError
from vistok.nn.positions import Rotation
from vistok.nn.ragged import Ragged

Norm = Literal["none", "rms", "layer", "plain-layer"]


class SelfAttention(nn.Module):
    """Attention of a sequence to itself.

    width    W, of input and output
    heads    number of heads; W must be a multiple of it unless `head` says their width
    bias     whether the projections have biases; `out_bias` for the last one, the same unless given
    qk_norm  "rms" or "layer" norm over each head's queries and keys, with learned gains; "plain-layer" without them
    dropout  of attention weights and of the output, in training
    scale    of the products of queries and keys, 1 / sqrt(head) unless given
    kv_heads  heads of keys and values, `heads` if None; fewer are read by groups of the queries' (arXiv:2305.13245)

    Raises ConfigError when heads do not divide the width, or kv_heads not the heads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        qk_norm: Norm = "none",
        eps: float = 1e-6,
        dropout: float = 0.0,
        scale: float | None = None,
    ):
        super().__init__()
        self.heads, self.head, self.dropout = heads, head or _head(width, heads), dropout
        self.scale = scale
        self.kv_heads = kv_heads or heads
        if heads % self.kv_heads:
            raise ConfigError(f"{self.kv_heads} heads of keys and values do not divide {heads} heads")
        inner = self.heads * self.head
        self.qkv = nn.Linear(width, inner + 2 * self.kv_heads * self.head, bias=bias)
        self.out = nn.Linear(inner, width, bias=bias if out_bias is None else out_bias)
        self.q_norm, self.k_norm = head_norm(qk_norm, self.head, eps), head_norm(qk_norm, self.head, eps)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        rotation: Rotation | None = None,
        only: slice | None = None,
        past: "KeyValues | None" = None,
        ragged: Ragged | None = None,
    ) -> Tensor:
        """(B, N, W) to (B, N, W). With `only`, the output of those positions alone (not with `causal`).

        What nobody reads need not be computed: the last block of a trunk costs a fraction when few positions are kept.
        With `past`, the positions of `x` follow those that it holds, see them too, and are added to it.
        With `ragged`, `x` is the rows (T, W) of sequences of different lengths, each of which sees itself alone;
        `only` then stands for the leading rows.
        """
        if ragged is not None:
            return self.out(self._attend_rows(x, ragged, leading=only is not None))
        plain = isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)
        if only is None and plain and rotation is not None:  # queries and keys lie side by side: one rotation for both
            qk, v = self._heads(self.qkv(x)).split((self.heads + self.kv_heads, self.kv_heads), 1)
            q, k = rotation(qk).split((self.heads, self.kv_heads), 1)
            return self._attend_past(q, k, v, past, mask, causal)
        if only is None:
            q, k, v = self._heads(self.qkv(x)).split((self.heads, self.kv_heads, self.kv_heads), 1)
        else:
            inner = self.heads * self.head
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(x[:, only], weight[:inner], None if bias is None else bias[:inner])
            kv = F.linear(x, weight[inner:], None if bias is None else bias[inner:])
            q, (k, v) = self._heads(q), self._heads(kv).chunk(2, 1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = (rotation if only is None else rotation[only])(q), rotation(k)
        return self._attend_past(q, k, v, past, mask, causal)

    def _attend_past(
        self, q: Tensor, k: Tensor, v: Tensor, past: "KeyValues | None", mask: Tensor | None, causal: bool
    ) -> Tensor:
        if past is not None:
            k, v = past.append(k, v)
        dropout = self.dropout if self.training else 0.0
        out = self.out(attend(q, k, v, mask=mask, causal=causal, dropout=dropout, scale=self.scale))
        return F.dropout(out, dropout) if dropout else out

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, n * head) to (B, n, N, head)."""
        return x.unflatten(-1, (-1, self.head)).transpose(1, 2)

    def _attend_rows(self, x: Tensor, ragged: Ragged, leading: bool) -> Tensor:
        q, k, v = self._heads(ragged.padded(self.qkv(x))).split((self.heads, self.kv_heads, self.kv_heads), 1)
        if leading:
            q = q[:, :, : ragged.lead]
        mask = ragged.mask if ragged.mask.dtype == torch.bool else ragged.mask.to(q.dtype)
        out = attend(self.q_norm(q), self.k_norm(k), v, mask=mask, scale=self.scale)
        return out.flatten(0, 1) if leading else ragged.rows(out)


class KeyValues:
    """Keys and values of the positions so far, (B, heads, n, head) of at most `length`, in memory taken once."""

    def __init__(
        self, batch: int, heads: int, length: int, head: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.keys = torch.empty(batch, heads, length, head, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values with (B, heads, N, head) more. Raises InputError where they no longer fit."""
        end = self.length + k.shape[-2]
        if end > self.keys.shape[-2]:
            raise InputError(f"a sequence of {end} positions where {self.keys.shape[-2]} were planned")
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def clear(self) -> None:
        """Begin anew in the same memory."""
        self.length = 0

    def keep(self, items: int) -> None:
        """Go on with the first `items` of the batch alone."""
        self.keys, self.values = self.keys[:items], self.values[:items]


class CrossAttention(nn.Module):
    """Attention of one sequence to another; arguments as `SelfAttention`, `context_width` is that of the other."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        context_width: int | None = None,
        head: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        qk_norm: Norm = "none",
        eps: float = 1e-6,
    ):
        super().__init__()
        self.heads, self.head = heads, head or _head(width, heads)
        inner = self.heads * self.head
        self.q = nn.Linear(width, inner, bias=bias)
        self.kv = nn.Linear(context_width or width, 2 * inner, bias=bias)
        self.out = nn.Linear(inner, width, bias=bias if out_bias is None else out_bias)
        self.q_norm, self.k_norm = head_norm(qk_norm, self.head, eps), head_norm(qk_norm, self.head, eps)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        mask: Tensor | None = None,
        rotation: Rotation | None = None,
        context_rotation: Rotation | None = None,
    ) -> Tensor:
        """Queries from `x` (B, N, W), keys and values from `context` (B, M, context width), to (B, N, W)."""
        q = self.q(x).unflatten(-1, (self.heads, self.head)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, self.heads, self.head)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        q = q if rotation is None else rotation(q)
        k = k if context_rotation is None else context_rotation(k)
        return self.out(attend(q, k, v, mask=mask))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T scale) v of (B, heads, N | M, head), heads joined again: (B, N, heads * head).

    `scale` is 1 / sqrt(head) unless given. Keys and values may have fewer heads, each read by a group of the queries'.

    `causal` lines up the ends of queries and keys, so that N new positions see the M - N before them. Raises InputError
    when there are more queries than keys then, or a mask as well.
    """
    if causal:
        if mask is not None:
            raise InputError("causal and mask together: fold the causal rule into the mask")
        queries, keys = q.shape[-2], k.shape[-2]
        if queries > keys:
            raise InputError(f"causal attention of {queries} queries to {keys} keys")
        if queries == 1:  # the last position sees all
            causal = False
        elif queries < keys:  # PyTorch's own flag lines up the beginnings
            mask, causal = q.new_ones(queries, keys, dtype=bool).tril(keys - queries), False  # type: ignore[call-overload]
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(2)


def head_norm(kind: Norm, head: int, eps: float = 1e-6) -> nn.Module:
    """The norm over one head's queries or keys; "none" is the identity. Raises ConfigError for another name."""
    if kind == "none":
        return nn.Identity()
    if kind not in ("rms", "layer", "plain-layer"):
        raise ConfigError(f"qk_norm {kind!r}; expected 'none', 'rms', 'layer' or 'plain-layer'")
    if kind == "rms":
        return nn.RMSNorm(head, eps=eps)
    return nn.LayerNorm(head, eps=eps, elementwise_affine=kind == "layer")


def _head(width: int, heads: int) -> int:
    if width % heads:
        raise ConfigError(f"{heads} heads do not divide a width of {width}")
    return width // heads
