"""The embedded stream of vistok-progressive: the bits of a picture's planes, most rewarding first.

    for every plane:        the prior's first guess sorts the coefficients that are still zero into six passes
      pass 1 to 5:          likely ones: group of channels by group, first one half of a checkerboard, then the other;
                            each call of the prior sees everything that has been coded before it
      pass 6:               refinements of what is significant already, then the unlikely ones
      inside each call:     the likeliest coefficients first

Every call to the entropy coder is one array of symbols under one array of integer weights. Bytes that end early settle
some symbols (`_progressive_range`); all other coefficients stay as the plane before left them. 8 bits of a checksum
over the coefficients precede a plane whenever enough has been coded, so that a reader whose prior is not the writer's,
bit for bit, finds out early; the file's own checksum does in the end.
"""

import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.layout import Size
from vistok.tokenizers._progressive_prior import UNIT, PlanePrior, activate, frame_rows, framed
from vistok.tokenizers._progressive_range import EndError

PASSES = (13, -20, -55, -90, -125)  # logits in 1 / UNIT nat between the passes: 0.6, 0.35, 0.15, 0.06 and 0.02
STEEPEST = 384  # logits are cut to this, in 1 / UNIT nat
CHECK_AFTER = 400  # significant coefficients before the first checksum; each later one comes after 3 times as many
AT_ONCE = 1 << 20  # symbols in one call of the coder: bounds the memory of their weights


@dataclass
class Planes:
    """What is known of a picture's coefficients. Arrays are (h w, C), positions in raster order.

    coarse: signed indices at the step of the plane before `plane`, int32; fine: at `plane`'s, where `known`.
    """

    size: Size
    plane: int
    coarse: Tensor
    fine: Tensor
    known: Tensor

    @classmethod
    def nothing(cls, size: Size, channels: int) -> "Planes":
        """The state before the first symbol of a picture of `size` positions."""
        shape = (size[0] * size[1], channels)
        zeros = torch.zeros(shape, dtype=torch.int32)
        return cls(size, 0, zeros, zeros.clone(), torch.zeros(shape, dtype=torch.bool))

    def checksum(self) -> int:
        """32 bits over everything that is known."""
        fine = torch.where(self.known, self.fine, self.coarse)
        check = zlib.crc32(fine.numpy().data, self.plane)
        return zlib.crc32(np.packbits(self.known.numpy()).data, check)

    def next_plane(self) -> None:
        """Begin the next plane; this one is known wholly."""
        self.plane += 1
        self.coarse = self.fine
        self.fine, self.known = torch.zeros_like(self.coarse), torch.zeros_like(self.known)

    def previous_plane(self) -> None:
        """The inverse, where nothing of this plane is known."""
        self.plane -= 1
        self.fine = self.coarse
        self.coarse = torch.div(self.fine, 2, rounding_mode="trunc")
        self.known = torch.ones_like(self.known)

    def settle(self) -> None:
        """A plane of which nothing is known has not been begun."""
        if self.plane and not bool(self.known.any()):
            self.previous_plane()

    def forget(self, at: Tensor, column: Tensor) -> None:
        """Take back coefficients that were learned last."""
        self.fine[at, column] = 0
        self.known[at, column] = False


# -- the order of coding, the same for writer and reader ---------------------------------------------------------------


@torch.no_grad()
def walk(prior: PlanePrior, planes: Planes, stream: Any, count: int, enough: Any = None) -> None:
    """Code up to `count` planes of a picture; `planes` holds what is known when the stream ends.

    `stream` is a `StreamWriter` or a `StreamReader`. `enough(planes, bytes)`: asked after every plane that a writer has
    written. Raises MismatchError where a checksum is wrong.
    """
    since, due = 0, CHECK_AFTER
    try:
        with torch.autocast("cpu", enabled=False):
            while planes.plane < count:
                if since >= due:
                    stream.check(planes, planes.checksum() & 0xFF, 1 << 8)
                    since, due = 0, 3 * due
                code_plane(prior, planes, stream)
                if planes.plane + 1 == count or (enough is not None and enough(planes, stream.size())):
                    return
                since += int((planes.fine != 0).sum())
                planes.next_plane()
                stream.next_plane()
    except EndError:
        planes.settle()


def code_plane(prior: PlanePrior, planes: Planes, stream: Any) -> None:
    """All symbols of one plane. Raises EndError where the stream ends first."""
    height, width = planes.size
    channels, stride = planes.coarse.shape[1], width + 2
    plane = torch.tensor([planes.plane])
    known = planes.coarse.view(1, height, width, channels).permute(0, 3, 1, 2)
    state = prior.trunk(known, plane)
    guess = steps(prior.first_guess(state, plane)[0].flatten(1).T.contiguous())  # (P, 3 C)
    first, turn, refine = guess.split(channels, 1)
    open_ = planes.coarse == 0
    passes = torch.zeros_like(first, dtype=torch.int8)
    for bound in PASSES:
        passes += first < bound
    rows = frame_rows(1, height, width, plane.device)
    board = (torch.arange(height)[:, None] + torch.arange(width)).view(-1) % 2
    flat = framed(state + prior.context_bias())
    active = activate(flat, exact=True)
    offsets = torch.tensor([(down - 1) * stride + right - 1 for down in range(3) for right in range(3)])
    for turn_of in range(len(PASSES)):
        for group, (start, stop) in enumerate(prior.spans):
            members = open_[:, start:stop] & (passes[:, start:stop] == turn_of)
            some = members.any(1)
            for half in (0, 1):
                at = (some & (board == half)).nonzero()[:, 0]
                if not len(at):
                    continue
                zero, sign = prior.head_rows(active, rows[at], offsets, group)
                zero = (steps(zero) + first[at, start:stop]).clamp_(-STEEPEST, STEEPEST)
                sign = (steps(sign) + turn[at, start:stop]).clamp_(-STEEPEST, STEEPEST)
                chosen, column = members[at].nonzero(as_tuple=True)
                _ternary(planes, stream, at[chosen], column + start, zero[chosen, column], sign[chosen, column])
                value = torch.where(members[at], planes.fine[at, start:stop], 0)
                features = torch.cat([members[at].float(), value.abs().float(), value.float()], 1)
                flat[rows[at]] += prior.adds_rows(features, group)
                active[rows[at]] = activate(flat[rows[at]], exact=True)
    at, column = (~open_).nonzero(as_tuple=True)
    _refinements(planes, stream, at, column, refine[at, column])
    members = open_ & (passes == len(PASSES))
    zero, sign = first.clone(), turn.clone()
    for group, (start, stop) in enumerate(prior.spans):
        some = members[:, start:stop].any(1).nonzero()[:, 0]
        changed, turned = prior.head_rows(active, rows[some], offsets, group)
        zero[some, start:stop] += steps(changed)
        sign[some, start:stop] += steps(turned)
    at, column = members.nonzero(as_tuple=True)
    zero, sign = (part.clamp_(-STEEPEST, STEEPEST)[at, column] for part in (zero, sign))
    _ternary(planes, stream, at, column, zero, sign)


def _ternary(planes: Planes, stream: Any, at: Tensor, column: Tensor, zero: Tensor, sign: Tensor) -> None:
    """Code coefficients that were zero, likeliest first: still zero, positive, negative."""
    order = torch.from_numpy(np.argsort(-zero.numpy(), kind="stable"))
    for part in order.split(AT_ONCE):
        nonzero, negative = tables()[0][zero[part].numpy()], tables()[1][sign[part].numpy()]
        weights = np.stack([(P_ONE - nonzero) * S_ONE, nonzero * (S_ONE - negative), nonzero * negative], 1)
        _code(planes, stream, at[part], column[part], weights, fresh=True)


def _refinements(planes: Planes, stream: Any, at: Tensor, column: Tensor, logit: Tensor) -> None:
    """Code whether coefficients lie in the outer half of their interval."""
    for where in torch.arange(len(at)).split(AT_ONCE):
        outer = tables()[0][logit[where].numpy()]
        _code(planes, stream, at[where], column[where], np.stack([P_ONE - outer, outer], 1), fresh=False)


def _code(planes: Planes, stream: Any, at: Tensor, column: Tensor, weights: np.ndarray, fresh: bool) -> None:
    symbols = torch.from_numpy(stream.code(planes, weights, at, column, fresh))
    count = len(symbols)
    at, column = at[:count], column[:count]
    if fresh:
        planes.fine[at, column] = torch.where(symbols == 2, -1, symbols)
    else:
        before = planes.coarse[at, column]
        planes.fine[at, column] = 2 * before + symbols * before.sign()
    planes.known[at, column] = True
    if count < len(weights) or stream.ends():
        raise EndError


def steps(logits: Tensor) -> Tensor:
    """Logits in nats, cut and rounded to 1 / UNIT: int16."""
    return (logits * UNIT + 0.5).floor_().clamp_(-STEEPEST, STEEPEST).to(torch.int16)


P_ONE, S_ONE = 1 << 15, 1 << 8  # one, for probabilities of becoming nonzero and of signs; the product is below 2^24


@cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """Sigmoids of logits -STEEPEST..STEEPEST in units of 1 / P_ONE and 1 / S_ONE, never 0 or 1; negative logits wrap.

    float32 that holds integers, computed in integers alone.
    """
    one = 1 << 60
    power, powers = one, []
    for _ in range(STEEPEST + 1):
        powers.append(power)
        power = power * EXP_STEP >> 60
    found = []
    for scale in (P_ONE, S_ONE):
        table = np.empty(2 * STEEPEST + 1, dtype=np.float32)
        for place, value in enumerate(powers):
            low = min(max((2 * scale * value + one + value) // (2 * (one + value)), 1), scale - 1)
            table[-place] = low
            table[place] = scale - low
        found.append(table)
    return found[0], found[1]


EXP_STEP = 1117449839007427528  # 2^60 exp(-1 / UNIT)
