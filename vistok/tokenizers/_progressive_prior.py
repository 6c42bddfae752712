"""The prior of vistok-progressive: how likely each bit of a plane is, from integer arithmetic that is exact everywhere.

    what is known of all coefficients, asinh(value / step)  (B, C, h, w)
       |  3 x 3 convolutions of sizes and of signed values, residual blocks                          `trunk`
    state (B, W, h, w) --1 x 1--> first guess of zero, sign and refinement, (B, 3 C, h, w)            `guess`
       |  + a column for every coefficient of this plane that has been coded since                    `context`
       |  one head per group of channels: 3 x 3, 1 x 1: what the coded ones change                    `change`
    logits in nats of "becomes nonzero" and "is negative" for the group, (B, 2 G, h, w)

In training it is an ordinary network in floating point whose activations are clipped to [0, 8). For coding, weights
are rounded to 8 bits per output channel (times a power of two) and activations to 1/32, so that every product is an
integer in units of its channel, and every partial sum stays below 2^24 units, where float32 is exact: the result
depends neither on the order of summation nor on threads, batch, library or processor (integer networks: Balle,
Johnston and Minnen, ICLR 2019). Convolutions are sums of matrix products over shifted rows, never Winograd or FFT.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNIT = 32  # activations are multiples of 1 / UNIT
TOP = 255 / UNIT  # and at most this
GUESS = ("nonzero", "negative", "refine")


class ExactConv(nn.Conv2d):
    """A convolution, 1 x 1 or 3 x 3 with zero padding, that in evaluation mode is exact for inputs on the grid.

    On the grid: multiples of 1 / UNIT whose size is at most TOP. The bias is added to the exact sum.
    """

    _rounded: tuple[int, Tensor] | None = None

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__(inputs, outputs, size, padding=size // 2)
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h, w)."""
        if self.training:
            return super().forward(x)
        batch, _, height, width = x.shape
        rows = self.sum_rows(framed(x), frame_rows(batch, height, width, x.device), width + 2)
        return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)

    def sum_rows(self, flat: Tensor, rows: Tensor, stride: int) -> Tensor:
        """The convolution at some rows of a framed map (`framed`), (n, outputs); `stride`: its width with the frame."""
        weight = self.taps()
        reach = self.kernel_size[0] // 2
        total: Tensor | None = None
        for index, tap in enumerate(weight):
            offset = (index // 3 - 1) * stride + index % 3 - 1 if reach else 0
            part = flat[rows + offset] @ tap
            total = part if total is None else total.add_(part)
        assert total is not None
        assert self.bias is not None
        return total + self.bias.float()

    def taps(self) -> Tensor:
        """The rounded weights, float32 (size^2, inputs, outputs)."""
        if (
            self._rounded is None
            or self._rounded[0] != self.weight._version
            or self._rounded[1].device != self.weight.device
        ):
            rounded = round_weights(self.weight.detach().float())
            self._rounded = (self.weight._version, rounded.flatten(2).permute(2, 1, 0).contiguous())
        return self._rounded[1]


def round_weights(weight: Tensor, largest: float = 255.0) -> Tensor:
    """Weights (O, ...) rounded to at most 127 units a channel, a power of two each; sums over inputs stay exact.

    `largest`: of the inputs, in their own units. Rounding twice changes nothing.
    """
    flat = weight.flatten(1)
    exponent = torch.frexp(flat.abs().amax(1).clamp_min(2.0**-40) / 127).exponent  # 2^exponent > max / 127
    unit = torch.ldexp(torch.ones_like(flat[:, 0]), exponent)[:, None]
    for _ in range(8):
        counts = (flat / unit).round()
        heavy = counts.abs().sum(1) * largest >= 1 << 24
        if not bool(heavy.any()):
            break
        unit = torch.where(heavy[:, None], 2 * unit, unit)
    return (counts * unit).view_as(weight)


def framed(x: Tensor) -> Tensor:
    """(B, C, h, w) with a frame of zeros as rows, (B (h + 2) (w + 2), C)."""
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).flatten(0, 2)


def frame_rows(batch: int, height: int, width: int, device: torch.device) -> Tensor:
    """Rows of a framed map that hold the positions of (B, h, w), in raster order."""
    grid = torch.arange((height + 2) * (width + 2), device=device).view(height + 2, width + 2)[1:-1, 1:-1].reshape(-1)
    return (torch.arange(batch, device=device)[:, None] * ((height + 2) * (width + 2)) + grid).view(-1)


def activate(x: Tensor, exact: bool) -> Tensor:
    """ReLU, clipped at TOP; `exact` also rounds to the grid."""
    return on_grid(x).clamp_(0, TOP) if exact else x.clamp(0, TOP)


def on_grid(x: Tensor) -> Tensor:
    """Rounded to multiples of 1 / UNIT."""
    return (x * UNIT + 0.5).floor_().div_(UNIT)


class PriorBlock(nn.Module):
    """Residual block: 3 x 3, 1 x 1, each on clipped activations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = ExactConv(width, width, 3)
        self.proj = ExactConv(width, width, 1)
        with torch.no_grad():
            self.proj.weight.mul_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        exact = not self.training
        hidden = activate(self.conv(activate(x, exact)), exact)
        x = x + self.proj(hidden).float()
        return on_grid(x) if exact else x


class PlanePrior(nn.Module):
    """The network; see the module's docstring. `groups`: channels of each group, in order; they sum to C."""

    table: Tensor

    def __init__(self, planes: int, groups: tuple[int, ...], signed: int, width: int, depth: int, head: int) -> None:
        super().__init__()
        channels = sum(groups)
        self.groups, self.signed = groups, min(signed, channels)
        self.starts = [sum(groups[:index]) for index in range(len(groups) + 1)]
        self.sizes = ExactConv(channels, width, 3)
        self.signs = ExactConv(self.signed, width, 3)
        self.plane = nn.Parameter(torch.zeros(planes, width))
        self.blocks = nn.ModuleList(PriorBlock(width) for _ in range(depth))
        self.guess = ExactConv(width, 3 * channels, 1)
        self.offset = nn.Parameter(torch.zeros(planes, 3 * channels))
        self.context = ExactConv(3 * channels, width, 1)
        self.hidden = nn.ModuleList(ExactConv(width, head, 3) for _ in groups)
        self.change = nn.ModuleList(ExactConv(head, 2 * count, 1) for count in groups)
        self.register_buffer("table", sizes_table())
        with torch.no_grad():
            self.sizes.weight.mul_(0.5)
            self.signs.weight.mul_(0.5)
            self.guess.weight.mul_(0.1)
            self.context.weight.mul_(0.5)
            for layer in self.change:
                layer.weight.mul_(0.1)  # type: ignore[operator, union-attr]

    def trunk(self, known: Tensor, plane: Tensor) -> Tensor:
        """State from the signed indices at the step before, integers (B, C, h, w), and the plane, long (B,)."""
        sizes = self.table[known.abs().long().clamp_max(len(self.table) - 1)]
        x = self.sizes(sizes).float()
        x = x + self.signs((sizes * known.sign())[:, : self.signed]).float()
        x = x + self.plane[plane].float()[:, :, None, None]
        x = x if self.training else on_grid(x)
        for block in self.blocks:
            x = block(x)
        return x

    def first_guess(self, state: Tensor, plane: Tensor) -> Tensor:
        """Logits (B, 3 C, h, w): nonzero, negative, refinement, as far as they follow from earlier planes."""
        logits = self.guess(activate(state, not self.training)).float()
        return logits + self.offset[plane].float()[:, :, None, None]

    def column(self, group: int) -> Tensor:
        """Indices of the group's channels within the three maps that `context` takes."""
        span = torch.arange(self.starts[group], self.starts[group + 1])
        return torch.cat([span + part * self.starts[-1] for part in range(3)])

    def adds(self, features: Tensor, group: int | None = None) -> Tensor:
        """What coded symbols, (B, 3 C, h, w) or a group's (B, 3 G, h, w), add to the state: known, nonzero, sign."""
        if group is None:
            return self.context(features).float()
        weight = self.context.weight[:, self.column(group).to(features.device)]
        return F.conv2d(features, weight).float()

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First channel of each group, and the one after its last."""
        return list(pairwise(self.starts))

    def context_bias(self) -> Tensor:
        """What `adds` gives where nothing has been coded, (W, 1, 1)."""
        assert self.context.bias is not None
        return self.context.bias.float()[:, None, None]

    def adds_rows(self, features: Tensor, group: int) -> Tensor:
        """`adds` for rows (n, 3 G) of coded symbols of a group, exactly."""
        return features @ self.context.taps()[0][self.column(group)]

    def head_rows(self, active: Tensor, rows: Tensor, offsets: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """`head` at some rows of the framed, activated state, exactly: nonzero and negative, (n, G) each."""
        hidden, change = self.hidden[group], self.change[group]
        taps, last = hidden.taps().flatten(0, 1), change.taps()[0]  # type: ignore[operator, union-attr]
        found = []
        for part in rows.split(ROWS_AT_ONCE):
            around = active[part[:, None] + offsets].flatten(1)  # (n, 9 W)
            state = activate((around @ taps) + hidden.bias.float(), exact=True)  # type: ignore[operator, union-attr]
            found.append((state @ last) + change.bias.float())  # type: ignore[operator, union-attr]
        changed, turned = torch.cat(found).chunk(2, 1)
        return changed, turned

    def head(self, state: Tensor, group: int) -> Tensor:
        """What the state changes in the group's logits, (B, 2 G, h, w): nonzero, negative."""
        exact = not self.training
        hidden = activate(self.hidden[group](activate(state, exact)), exact)
        return self.change[group](hidden).float()


def sizes_table(count: int = 1024) -> Tensor:
    """What the network sees of an index k at the step before: asinh of its value in steps, a multiple of 1 / UNIT.

    A buffer, stored with the weights: it must be the same wherever a file is read.
    """
    values = [0.0] + [math.asinh(2 * (k + CENTRE)) for k in range(1, count)]
    return torch.tensor([round(value * UNIT) / UNIT for value in values])


ROWS_AT_ONCE = 8192  # positions whose neighbourhoods are gathered at once
CENTRE = 0.42  # where in its interval a coefficient is taken to lie; below the middle, as small ones are more frequent
