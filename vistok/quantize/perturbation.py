"""Latent perturbation: codes replaced by near neighbours, as a generator that samples would get them wrong.

    latent z (B, N, D) -> its `strength` nearest rows of the codebook (K, D) -> one of them, drawn, where u <= rate

Source: RobustTok (arXiv:2503.08354, section 3.2). Neighbours are those of the latent, not of its code; the nearest is
the code itself, so that a token changes with probability rate * (strength - 1) / strength.
"""

import torch
from torch import Tensor

from vistok.errors import InputError

CELLS = 1 << 23  # distances held at once


@torch.no_grad()
def neighbours(z: Tensor, table: Tensor, count: int) -> Tensor:
    """Indices (M, count) of the rows of `table` (K, D) nearest to each of `z` (M, D), the nearest first.

    Made in blocks of rows, so that the M x K distances never stand in memory together.
    """
    if not 1 <= count <= len(table):
        raise InputError(f"{count} neighbours in a codebook of {len(table)}; expected 1 to {len(table)}")
    table = table.to(z.dtype)
    bias = table.square().sum(1) / -2
    parts = [torch.addmm(bias, part, table.T).topk(count, 1).indices for part in z.split(max(CELLS // len(table), 1))]
    return torch.cat(parts) if parts else torch.empty(0, count, dtype=torch.long, device=z.device)


@torch.no_grad()
def perturb(
    z: Tensor,
    table: Tensor,
    codes: Tensor,
    *,
    rate: float,
    strength: int,
    chance: Tensor,
    rank: Tensor,
) -> Tensor:
    """Codes (B, N) in which some are exchanged for neighbours of their latents.

    z             latents (B, N, D) as they are compared with the rows of `table` (K, D): of unit length where those are
    codes         the ordinary codes (B, N)
    rate          share of the tokens that are drawn anew, where `chance` (B, N), uniform in [0, 1), is at most that
    strength      size of the neighbourhood
    rank          which neighbour, 0 .. strength - 1, long (B, N)

    Only latents that change are compared again.
    """
    if not 0 <= rate <= 1:
        raise InputError(f"rate {rate}; expected a share in [0, 1]")
    changes = (chance <= rate) & (rank > 0)
    near = neighbours(z[changes].detach().float(), table.float(), strength)
    changed = codes.clone()
    changed[changes] = near.gather(1, rank[changes][:, None])[:, 0]
    return changed
