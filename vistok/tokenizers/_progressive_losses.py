"""How vistok-progressive is trained: the prior's bits at a random moment of coding, and planes known in part.

The moments and the order are those of `_progressive_coding`; here they are drawn, a picture at a time, so that one step
costs one pass through the network and its heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.tokenizers._progressive_prior import PlanePrior

LN2 = 0.6931471805599453
CLASSES = (0.15, 0.03)  # probabilities of becoming nonzero that separate the passes of a plane
PASS_SHARES = (0.4, 0.3, 0.3)  # how often training looks at each pass
FEWEST = 24  # nonzero coefficients: pictures with fewer in a plane do not count more


def draw_known(latent: Tensor, coarse: Tensor, step: Tensor, rng: torch.Generator) -> Tensor:
    """Which coefficients a file that ends inside a plane holds to this plane's step, bool (B, C, h, w).

    Files hold the likeliest first; here likeliness is how large the neighbourhood and the channel are. Two pictures of
    five have the whole plane.
    """
    batch = len(latent)
    size = latent.abs()
    around = F.avg_pool2d(size.clamp_max(2 * step), 3, 1, 1, count_include_pad=False)
    usual = size.mean((2, 3), keepdim=True)
    noise = torch.randn(latent.shape, generator=rng, device=rng.device).to(latent)
    score = ((around + usual) / (2 * step)).clamp_min(1e-4).log2() + 0.4 * noise
    score = torch.where(coarse != 0, score.new_tensor(-1.7), score)
    ends = torch.rand(batch, generator=rng, device=rng.device).to(latent) * 4 - 3
    whole = torch.rand(batch, generator=rng, device=rng.device).to(latent) < 0.4
    return score >= torch.where(whole, -torch.inf, ends)[:, None, None, None]


def prior_loss(
    prior: PlanePrior, quantizer: Any, latent: Tensor, plane: Tensor, rng: torch.Generator
) -> dict[str, Tensor]:
    """Bits per nonzero coefficient of one plane, long (B,), of a latent (B, C, h, w), at one moment of its coding.

    The moment: one of the three passes, and whether half of the positions (a checkerboard) of the group have been
    coded. Weights make the sum an unbiased estimate of the cost of the whole plane. `guess` is what the cost would be
    without anything from the plane itself; it decides on the passes.
    """
    count = len(latent)
    fine = quantizer.index(latent, plane)
    coarse = (fine / 2).trunc()
    nonzero, negative = (fine != 0).float(), (latent < 0).float()
    open_ = coarse == 0
    state = prior.trunk(coarse, plane)
    first, signs, refines = prior.first_guess(state, plane).chunk(3, 1)
    likely = first.detach().sigmoid()
    passes = torch.where(open_, 1 + (likely < CLASSES[0]).long() + (likely < CLASSES[1]).long(), 3)
    draws = torch.tensor(PASS_SHARES, device=rng.device)
    now = (torch.multinomial(draws, count, replacement=True, generator=rng) + 1).to(latent.device)
    halves = torch.randint(2, (count,), generator=rng, device=rng.device).to(latent.device) * (now < 3)
    parity = torch.randint(2, (count,), generator=rng, device=rng.device).to(latent.device)
    rows, columns = (torch.arange(side, device=latent.device) for side in latent.shape[2:])
    board = ((rows[:, None] + columns) % 2 == parity[:, None, None])[:, None]  # (B, 1, h, w): the half coded first
    now_, halves_ = now[:, None, None, None], halves[:, None, None, None]
    signed = nonzero * (1 - 2 * negative)
    done = (passes < now_) & open_
    features = torch.cat([done.float(), nonzero * done, signed * done], 1)
    state = state + prior.adds(features)
    weight = (1 / draws.to(latent)[now - 1])[:, None, None, None] * (1 + halves_)
    weight = torch.where((passes == now_) & open_ & ((halves_ == 0) | ~board), weight, 0)
    cost = F.binary_cross_entropy_with_logits
    total = latent.new_zeros(count)
    for group, (start, stop) in enumerate(prior.spans):
        own = (((passes == now_) & open_ & (now_ < 3))[:, start:stop]).float()
        part = torch.cat([own, nonzero[:, start:stop] * own, signed[:, start:stop] * own], 1)
        added = prior.adds(part, group)
        changed, turned = prior.head(state + added * (board & (halves_ == 1)), group).chunk(2, 1)
        target = nonzero[:, start:stop]
        bits = cost(first[:, start:stop] + changed, target, reduction="none")
        bits = bits + target * cost(signs[:, start:stop] + turned, negative[:, start:stop], reduction="none")
        total = total + (bits * weight[:, start:stop]).sum((1, 2, 3))
        state = state + added
    refined = cost(refines, (fine.abs() - 2 * coarse.abs()), reduction="none") * ~open_
    scale = 1 / (LN2 * nonzero.sum((1, 2, 3)).clamp_min(FEWEST))
    guess = (cost(first, nonzero, reduction="none") * open_).sum((1, 2, 3))
    return {
        "bits": (total * scale).mean(),
        "refine": (refined.sum((1, 2, 3)) * scale).mean(),
        "guess": 0.2 * (guess * scale).mean(),
    }
