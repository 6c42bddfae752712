"""Transformer blocks: pre-norm, optionally with cross-attention; post-norm; and conditioned by adaptive layer norm.

pre-norm    x += attention(norm x)    [x += cross(norm x, context)]    x += MLP(norm x)
post-norm   x = norm(x + attention(x))    x = norm(x + MLP(x))
adaLN-Zero (DiT, arXiv:2212.09748): each norm's output is scaled and shifted, each branch gated, by a condition
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.nn.attention import CrossAttention, Norm, SelfAttention
from vistok.nn.positions import Rotation
from vistok.nn.ragged import Ragged

Activation = Literal["gelu", "gelu-tanh", "silu", "swiglu"]


class MLP(nn.Module):
    """Two linear maps with an activation between, W -> hidden -> out.

    "gelu" is exact (erf), "gelu-tanh" its approximation: checkpoints tell them apart. "swiglu" gates the hidden values
    by SiLU of as many others, in one fused map `expand` of twice the width (arXiv:2002.05202). `dropout` acts on the
    hidden values and on the output, in training.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        out: int | None = None,
        activation: Activation = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        if activation not in ("gelu", "gelu-tanh", "silu", "swiglu"):
            raise ConfigError(f"activation {activation!r}; expected 'gelu', 'gelu-tanh', 'silu' or 'swiglu'")
        self.activation, self.dropout = activation, dropout
        self.expand = nn.Linear(width, hidden * (2 if activation == "swiglu" else 1), bias=bias)
        self.contract = nn.Linear(hidden, out or width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.expand(x)
        if self.activation == "swiglu":
            gate, value = hidden.chunk(2, -1)
            hidden = F.silu(gate) * value
        elif self.activation == "silu":
            hidden = F.silu(hidden)
        else:
            hidden = F.gelu(hidden, approximate="tanh" if self.activation == "gelu-tanh" else "none")
        if not (self.dropout and self.training):
            return self.contract(hidden)
        return F.dropout(self.contract(F.dropout(hidden, self.dropout)), self.dropout)


class Block(nn.Module):
    """A pre-norm transformer block, (B, N, W) to (B, N, W).

    width, heads   of the attention
    hidden         width of the MLP, 4 W unless given
    qkv_bias       of the maps to queries, keys and values alone; as `bias` unless given
    context_width  adds cross-attention to a context of this width, between attention and MLP
    eps            of the layer norms: 1e-5 in CLIP's line, 1e-6 in timm's
    dropout        in the self-attention and the MLP, in training, as timm's blocks have it
    layer_scale    learned gains on what every branch adds, and their first value (arXiv:2103.17239)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        hidden: int | None = None,
        activation: Activation = "gelu",
        bias: bool = True,
        qkv_bias: bool | None = None,
        qk_norm: Norm = "none",
        context_width: int | None = None,
        eps: float = 1e-5,
        dropout: float = 0.0,
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.scale1: nn.Parameter | None = None
        self.scale2: nn.Parameter | None = None
        if layer_scale is not None:
            self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), layer_scale)) for _ in range(2))
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = SelfAttention(
            width,
            heads,
            bias=bias if qkv_bias is None else qkv_bias,
            out_bias=bias,
            qk_norm=qk_norm,
            dropout=dropout,
        )
        if context_width:
            self.norm_cross = nn.LayerNorm(width, eps=eps)
            self.cross = CrossAttention(width, heads, context_width=context_width, bias=bias, qk_norm=qk_norm)
            self.scale_cross = None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale))
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, hidden or 4 * width, activation=activation, bias=bias, dropout=dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        rotation: Rotation | None = None,
        context_mask: Tensor | None = None,
        only: slice | None = None,
        ragged: Ragged | None = None,
    ) -> Tensor:
        """With `only`, those positions alone come out, which saves the work for the others.

        With `ragged`, `x` is the rows (T, W) of sequences of different lengths, and `only` its leading rows.
        """
        kept = x if only is None else x[..., only, :]
        attended = self.attention(self.norm1(x), mask=mask, causal=causal, rotation=rotation, only=only, ragged=ragged)
        x = kept + _scaled(attended, self.scale1)
        if context is not None:
            x = x + _scaled(self.cross(self.norm_cross(x), context, mask=context_mask), self.scale_cross)
        return x + _scaled(self.mlp(self.norm2(x)), self.scale2)


def _scaled(x: Tensor, gain: Tensor | None) -> Tensor:
    return x if gain is None else x * gain


class PostNormBlock(nn.Module):
    """BERT's block (arXiv:1810.04805), (B, N, W) to (B, N, W): each branch is added and the sum normalised.

    `dropout` in training: of attention weights and of what both branches add. Epsilons of BERT are 1e-12.
    """

    def __init__(self, width: int, heads: int, *, hidden: int | None = None, eps: float = 1e-12, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.attention = SelfAttention(width, heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, hidden or 4 * width)
        self.norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, *, only: slice | None = None) -> Tensor:
        """With `only`, those positions alone come out, which saves the work for the others."""
        kept = x if only is None else x[:, only]
        x = self.norm1(kept + self.attention(x, only=only))
        return self.norm2(x + F.dropout(self.mlp(x), self.dropout, self.training))


class Modulation(nn.Module):
    """A condition (B, C) to `parts` vectors (B, 1, W): shifts, scales and gates. Zero at first, so gates start closed.

    A condition for every position, (B, N, C), gives (B, N, W). The map is Linear(SiLU(condition)).
    """

    def __init__(self, condition_width: int, width: int, parts: int):
        super().__init__()
        self.parts = parts
        self.project = nn.Linear(condition_width, parts * width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        condition = condition if condition.ndim == 3 else condition[:, None]
        return self.project(F.silu(condition)).chunk(self.parts, -1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


class AdaBlock(nn.Module):
    """DiT's block: a `Block` whose norms have no weights of their own but those that the condition gives.

    Chunks of the modulation, in order: shift, scale, gate of the attention; shift, scale, gate of the MLP.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        condition_width: int,
        *,
        hidden: int | None = None,
        activation: Activation = "gelu-tanh",
        qk_norm: Norm = "none",
        eps: float = 1e-6,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.attention = SelfAttention(width, heads, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.mlp = MLP(width, hidden or 4 * width, activation=activation)
        self.modulation = Modulation(condition_width, width, 6)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """`x` (B, N, W), `condition` (B, C)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        attended = self.attention(modulate(self.norm1(x), shift1, scale1), mask=mask, causal=causal, rotation=rotation)
        x = torch.addcmul(x, gate1, attended)
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))
