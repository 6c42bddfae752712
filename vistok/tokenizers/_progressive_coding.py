"""The embedded stream of vistok-progressive: the bits of a picture's planes, most rewarding first.

    for every plane:        the prior's first guess sorts the coefficients that are still zero into three passes
      pass 1, 2:            likely ones: group of channels by group, first one half of a checkerboard, then the other;
                            each call of the prior sees everything that has been coded before it
      pass 3:               refinements of what is significant already, then the unlikely ones
      inside each call:     the likeliest coefficients first

Every call to the entropy coder is one array of symbols under one array of integer weights. A reader whose bytes end
early takes the symbols that are the same whatever bytes might have followed; those are right, and all others stay as
the plane before left them. 8 bits of a checksum over the coefficients follow a plane once enough has been coded, and 16
the last symbol: a reader whose prior is not the writer's, bit for bit, finds out.
"""

import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.errors import FormatError, MismatchError
from vistok.layout import Size
from vistok.tokenizers._progressive_prior import UNIT, PlanePrior, activate, frame_rows, framed

PASSES = (-55, -111)  # logits in 1 / UNIT nat of probabilities 0.15 and 0.03, between the passes
STEEPEST = 384  # logits are cut to this, in 1 / UNIT nat
CHECK_AFTER = 400  # significant coefficients between two checksums
AT_ONCE = 1 << 20  # symbols in one call of the coder: bounds the memory of their weights


@dataclass
class Planes:
    """What is known of a picture's coefficients. Arrays are (h w, C), positions in raster order.

    coarse: signed indices at the step of the plane before `plane`, int32; fine: at `plane`'s, where `known`.
    symbols: how many symbols were coded so far.
    """

    size: Size
    plane: int
    coarse: Tensor
    fine: Tensor
    known: Tensor
    symbols: int = 0

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


class EndError(Exception):
    """The stream ends here: all that was asked for has been coded, or the bytes are used up."""


# -- the order of coding, the same for writer and reader ---------------------------------------------------------------


@torch.no_grad()
def walk(prior: PlanePrior, planes: Planes, stream: Any, count: int, enough: Any = None) -> None:
    """Code up to `count` planes of a picture; `planes` holds what is known when the stream ends.

    `stream` is a `StreamWriter` or a `StreamReader`. `enough(planes, bytes)`: asked after every plane that a writer has
    written. Raises MismatchError where a checksum is wrong.
    """
    since = 0
    try:
        with torch.autocast("cpu", enabled=False):
            while planes.plane < count:
                if since >= CHECK_AFTER:
                    stream.check(planes.checksum() & 0xFF, 1 << 8)
                    since = 0
                code_plane(prior, planes, stream)
                if planes.plane + 1 == count or (enough is not None and enough(planes, stream.size())):
                    return
                since += int((planes.fine != 0).sum())
                planes.next_plane()
                stream.next_plane()
    except EndError:
        return


def code_plane(prior: PlanePrior, planes: Planes, stream: Any) -> None:
    """All symbols of one plane. Raises EndError where the stream ends first."""
    height, width = planes.size
    channels, stride = planes.coarse.shape[1], width + 2
    plane = torch.tensor([planes.plane])
    known = planes.coarse.view(1, height, width, channels).permute(0, 3, 1, 2)
    state = prior.trunk(known, plane)
    guess = prior.first_guess(state, plane)[0].flatten(1).T.contiguous()  # (P, 3 C)
    first, turn, refine = steps(guess).split(channels, 1)
    open_ = planes.coarse == 0
    passes = torch.where(open_, 1 + (first < PASSES[0]).to(torch.int8) + (first < PASSES[1]).to(torch.int8), 3)
    rows = frame_rows(1, height, width, plane.device)
    board = (torch.arange(height)[:, None] + torch.arange(width)).view(-1) % 2
    flat = framed(state + prior.context_bias())
    active = activate(flat, exact=True)
    offsets = torch.tensor([(down - 1) * stride + right - 1 for down in range(3) for right in range(3)])
    for turn_of in (1, 2):
        for group, (start, stop) in enumerate(prior.spans):
            members = passes[:, start:stop] == turn_of
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
    members = open_ & (passes == 3)
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
    symbols = torch.from_numpy(stream.code(weights, at, column, fresh))
    count = len(symbols)
    at, column = at[:count], column[:count]
    if fresh:
        planes.fine[at, column] = torch.where(symbols == 2, -1, symbols)
    else:
        before = planes.coarse[at, column]
        planes.fine[at, column] = 2 * before + symbols * before.sign()
    planes.known[at, column] = True
    planes.symbols += count
    if count < len(weights) or stream.ends(planes):
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


# -- writer and reader -------------------------------------------------------------------------------------------------


class StreamWriter:
    """Codes the indices of a picture, int32 (h w, C) at the step of plane `planes - 1`, up to `budget` bytes.

    With a budget, `bytes()` has at most so many; the last call is then cut to the symbols that fit.
    """

    def __init__(self, target: Tensor, planes: int, budget: int | None = None) -> None:
        from constriction import stream

        self._encoder = stream.queue.RangeEncoder()
        self._uniform, self._categorical = stream.model.Uniform, stream.model.Categorical(perfect=False)
        self._target, self._planes, self.budget = target, planes, budget
        self._shift = planes - 1
        self._full = False
        self._before_check: Any = None  # a checksum that no symbol follows is taken back: the reader would not read it

    def code(self, weights: np.ndarray, at: Tensor, column: Tensor, fresh: bool) -> np.ndarray:
        """Write one symbol per row of weights; returns those written."""
        index = self._target[at, column]
        here = index.abs() >> self._shift
        symbols = (here * torch.where(index < 0, 2, 1)) if fresh else here & 1
        values = symbols.to(torch.int32).numpy()
        weights = np.ascontiguousarray(weights, dtype=np.float32)
        budget = self.budget
        before = self._encoder.clone() if budget is not None and len(values) else None
        self._write(self._encoder, values, weights)
        if before is None or budget is None or self._size(self._encoder) <= budget:
            self._before_check = None if len(values) else self._before_check
            return values
        self._full = True
        low, high = 0, len(values)  # `low` symbols fit, `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            trial = before.clone()
            self._write(trial, values[:middle], weights[:middle])
            low, high = (middle, high) if self._size(trial) <= budget else (low, middle)
        self._encoder = before if low or self._before_check is None else self._before_check
        self._write(self._encoder, values[:low], weights[:low])
        return values[:low]

    def ends(self, planes: Planes) -> bool:
        """Whether the budget is used up."""
        return self._full

    def check(self, value: int, size: int) -> None:
        """Write a checksum, an integer below `size`."""
        if self.budget is not None:
            self._before_check = self._encoder.clone()
        self._encoder.encode(np.array([value], dtype=np.int32), self._uniform(size))

    def next_plane(self) -> None:
        """Go on to half of the step."""
        self._shift -= 1

    def size(self) -> int:
        """Bytes so far, or a few more."""
        return self._size(self._encoder)

    def bytes(self) -> bytes:
        """Everything written, ended so that the symbols are the same whatever bytes may follow."""
        return finished(self._encoder)

    def _write(self, encoder: Any, values: np.ndarray, weights: np.ndarray) -> None:
        if len(values):
            encoder.encode(values, self._categorical, weights)

    def _size(self, encoder: Any) -> int:
        """Bytes so far with a checksum of 16 bits to come, or one or two more."""
        words, (lower, span) = encoder.pos()
        if lower + span > 1 << 64:
            return 4 * encoder.num_words() + 3
        return 4 * words + (64 - int(span).bit_length() + 7) // 8 + 3


def finished(encoder: Any) -> bytes:
    """The bytes of a range encoder, as few as settle every symbol whatever follows them."""
    from constriction import stream

    words, (lower, span) = encoder.pos()
    while lower + span > 1 << 64:  # a carry into the words that are out is still open: one symbol more closes it
        encoder = encoder.clone()
        encoder.encode(np.zeros(1, dtype=np.int32), stream.model.Uniform(256))
        words, (lower, span) = encoder.pos()
    data = encoder.get_compressed().astype(">u4").tobytes()
    for size in range(9):
        step = 1 << 64 - 8 * size
        value = -(-lower // step) * step
        if value + step <= lower + span:
            break
    return data[: 4 * words] + value.to_bytes(9, "big")[1 : 1 + size]


class StreamReader:
    """Reads what a `StreamWriter` wrote: `symbols` of them, or with `partial` as many as the bytes settle."""

    def __init__(self, data: bytes, symbols: int, partial: bool = False) -> None:
        from constriction import stream

        self._uniform, self._categorical = stream.model.Uniform, stream.model.Categorical(perfect=False)
        self._left, self._partial = symbols, partial
        fillings = (b"\x00", b"\xff") if partial else (b"\x00",)
        self._decoders = []
        for filling in fillings:
            padded = data + filling * (-len(data) % 4 + FILLED)
            words = np.frombuffer(padded, dtype=">u4").astype(np.uint32)
            self._decoders.append(stream.queue.RangeDecoder(words))

    def code(self, weights: np.ndarray, at: Tensor, column: Tensor, fresh: bool) -> np.ndarray:
        """The symbols under rows of weights, as many as there are."""
        weights = np.ascontiguousarray(weights[: self._left], dtype=np.float32)
        if not len(weights):
            return np.zeros(0, dtype=np.int32)
        found = [self._read(decoder, self._categorical, weights) for decoder in self._decoders]
        symbols = self._agreed(found)
        self._left -= len(symbols)
        return symbols

    def ends(self, planes: Planes) -> bool:
        """Whether all symbols have been read."""
        return self._left == 0

    def check(self, value: int, size: int) -> None:
        """Compare a checksum. Raises MismatchError; EndError where the bytes end within it."""
        found = [self._read(decoder, self._uniform(size), 1) for decoder in self._decoders]
        there = self._agreed(found)
        if not len(there):
            raise EndError
        if int(there[0]) != value:
            raise MismatchError(
                "the compressed file does not decode to what was compressed: its checksum of the coefficients differs. "
                "The file was changed, or this machine computes the model's integers in another way than the writer's"
            )

    def next_plane(self) -> None:
        """Nothing: a reader need not know where it is."""

    def _read(self, decoder: Any, *arguments: Any) -> np.ndarray:
        try:
            return decoder.decode(*arguments)
        except (AssertionError, ValueError) as error:
            if self._partial:
                return np.zeros(0, dtype=np.int32)
            raise FormatError("the compressed file is damaged: its symbols do not decode") from error

    def _agreed(self, found: list[np.ndarray]) -> np.ndarray:
        if len(found) == 1:
            return found[0]
        count = min(len(part) for part in found)
        differs = (found[0][:count] != found[1][:count]).nonzero()[0]
        return found[0][: differs[0]] if len(differs) else found[0][:count]


FILLED = 64  # bytes beyond the end that a decoder may look at
