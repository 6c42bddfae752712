"""Fit a tokenizer's prior to photographs: which codes stand beside which, learned in a minute.

    photographs --encode--> codes --which are known around each--> `CodePrior`'s tables, as integers

    python -m vistok.training.prior MODEL_FOLDER PHOTOGRAPHS -o NEW_FOLDER [--flip]

The network is trained with its tables rounded to the integers that they will be (straight-through gradients), so that
nothing is lost when they are written. The tokenizer's other weights stay as they are; its fingerprint changes.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import InputError
from vistok.prior import EMBEDDING, HIDDEN, LOGIT, MIXING, NEVER, OUTPUT, CodePrior, look
from vistok.tokenizer import Tokenizer
from vistok.tokens import Tokens

LN2 = 0.6931471805599453


def fit(
    prior: CodePrior,
    pictures: Iterable[Sequence[Tensor]],
    vectors: Sequence[Tensor],
    *,
    epochs: float = 3.0,
    batch_size: int = 1024,
    learning_rate: float = 0.01,
    seed: int = 0,
) -> list[float]:
    """Learn the tables from the codes of training pictures: for each, one long (h, w) tensor per segment.

    `vectors`: for each segment (K, D), any description of its codes in which alike ones are near; the groups are cut
    from it. `epochs` and `batch_size` are those of the largest segment. Returns each segment's last mean cost, in bits
    a code.
    """
    rng = torch.Generator().manual_seed(seed)
    data = [_positions(prior, index, pictures := list(pictures)) for index in range(len(prior.sizes))]
    nets = [
        _Segment(prior, index, order_by_likeness(vectors[index], _members(prior, index)), examples[1], rng)
        for index, examples in enumerate(data)
    ]
    embeddings = nn.ParameterList(torch.randn(size + 1, prior.hidden, generator=rng) * 0.5 for size in prior.sizes)
    tables = [*embeddings, *(net.member for net in nets)]
    others = [p for net in nets for p in net.parameters() if p is not net.member]
    adam = torch.optim.AdamW(
        [{"params": tables, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.01}],
        lr=learning_rate,
        betas=(0.9, 0.99),
    )
    largest = max(len(codes) for _, codes, _ in data)
    steps = max(1, round(largest * epochs / batch_size))
    recent = np.zeros(len(nets))
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        losses = []
        for net, (around, codes, parity) in zip(nets, data, strict=True):
            count = max(1, batch_size * len(codes) // largest)
            rows = torch.randint(len(codes), (count,), generator=rng)
            losses.append(net(embeddings, around[rows].long(), codes[rows].long(), parity[rows].long()))
        adam.zero_grad()
        torch.stack(losses).sum().backward()
        adam.step()
        costs = np.array([float(loss.detach()) / LN2 for loss in losses])
        recent = costs if step == 0 else recent + (costs - recent) * max(0.02, 1 / (step + 1))
    for index, net in enumerate(nets):
        net.write(prior, index, embeddings[index])
    return recent.tolist()


class _Segment(nn.Module):
    """The tables of one segment as floats, in the units of the integer ones, and the cost of codes under them."""

    def __init__(self, prior: CodePrior, index: int, order: Tensor, codes: Tensor, rng: torch.Generator) -> None:
        super().__init__()
        groups, members, hidden = getattr(prior, f"member{index}").shape
        self.places = prior.places[index]
        self.size, self.members = prior.sizes[index], members
        self.order = torch.cat([order, order[-1:].expand(groups * members - self.size)])
        self.rank = torch.empty(self.size, dtype=torch.long)
        self.rank[order] = torch.arange(self.size)
        share = torch.zeros(groups * members)
        share[: self.size] = torch.bincount(codes.long(), minlength=self.size)[order] + 0.5
        share = (share / share.sum()).view(groups, members)
        spread = (hidden * len(self.places)) ** -0.5
        self.mixing = nn.Parameter(torch.randn(len(self.places), hidden, hidden, generator=rng) * spread)
        self.bias = nn.Parameter(torch.zeros(4, hidden))
        self.group = nn.Parameter(torch.zeros(groups, hidden))
        self.group_bias = nn.Parameter(share.sum(1).log().clamp_min(NEVER / LOGIT))
        self.member = nn.Parameter(torch.zeros(groups, members, hidden))
        within = share / share.amax(1, keepdim=True).clamp_min(1e-12)
        self.member_bias = nn.Parameter(within.log().clamp_min(NEVER / LOGIT))

    def forward(self, embeddings: Sequence[Tensor], around: Tensor, codes: Tensor, parity: Tensor) -> Tensor:
        """Mean cost in nats of `codes` (n,), given those `around` them (n, places) and the positions' parity (n,)."""
        known = torch.stack(
            [_rounded(embeddings[p.segment][around[:, i]], EMBEDDING) for i, p in enumerate(self.places)]
        )
        total = torch.bmm(known, _rounded(self.mixing, MIXING)).sum(0)
        total = total + _rounded(self.bias, EMBEDDING * MIXING, NEVER)[parity]
        state = total.clamp(0, 255 / HIDDEN)
        state = state + ((state * HIDDEN).floor() / HIDDEN - state).detach()
        group, member = (self.rank[codes] // self.members), self.rank[codes] % self.members
        likely = state @ _rounded(self.group, OUTPUT).T + _rounded(self.group_bias, LOGIT, NEVER)
        within = torch.bmm(_rounded(self.member[group], OUTPUT), state[:, :, None])[..., 0]
        within = within + _rounded(self.member_bias[group], LOGIT, NEVER)
        return F.cross_entropy(likely, group) + F.cross_entropy(within, member)

    @torch.no_grad()
    def write(self, prior: CodePrior, index: int, embedding: Tensor) -> None:
        """Round everything into the prior's buffers."""
        tables = {
            "order": self.order,
            "embedding": embedding * EMBEDDING,
            "mixing": self.mixing * MIXING,
            "bias": self.bias * (EMBEDDING * MIXING),
            "group": self.group * OUTPUT,
            "group_bias": (self.group_bias - self.group_bias.max()) * LOGIT,
            "member": self.member * OUTPUT,
            "member_bias": (self.member_bias - self.member_bias.amax(1, keepdim=True)) * LOGIT,
        }
        for name, table in tables.items():
            buffer = getattr(prior, f"{name}{index}")
            limit = 127 if buffer.dtype == torch.int8 else -NEVER - 1
            buffer.copy_(table.round().clamp(-limit, limit))


def _members(prior: CodePrior, index: int) -> int:
    return getattr(prior, f"member{index}").shape[1]


def _rounded(values: Tensor, scale: int, lowest: int = -127) -> Tensor:
    """Values rounded to 1 / scale within the table's range; the gradient passes."""
    kept = values.clamp(lowest / scale, -lowest / scale)
    return kept + ((kept * scale).round() / scale - kept).detach()


def _positions(prior: CodePrior, index: int, pictures: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """All positions of a segment: the codes known around each (n, places), its own (n,) and its parity (n,)."""
    around, own, parity = [], [], []
    for picture in pictures:
        grids = [codes.cpu().numpy().reshape(1, *((1,) * (2 - codes.ndim)), *codes.shape) for codes in picture]
        shape = grids[index].shape
        seen = [look(grids[place.segment], prior.sizes[place.segment], place, shape) for place in prior.places[index]]
        around.append(np.stack(seen, -1).reshape(-1, len(seen)).astype(np.int32))
        own.append(grids[index].reshape(-1).astype(np.int32))
        odd = 2 * (np.arange(shape[1]) % 2)[:, None] + np.arange(shape[2]) % 2
        parity.append(np.broadcast_to(odd, shape).reshape(-1).astype(np.int32))
    return tuple(torch.from_numpy(np.concatenate(part)) for part in (around, own, parity))  # type: ignore[return-value]


def order_by_likeness(vectors: Tensor, members: int) -> Tensor:
    """A permutation (K,) of code vectors (K, D) whose runs of `members` are alike: halved along the widest direction.

    The first half holds a whole number of runs, so that none straddles a cut.
    """

    def halve(rows: Tensor) -> list[Tensor]:
        if len(rows) <= members:
            return [rows]
        centred = vectors[rows] - vectors[rows].mean(0)
        direction = torch.linalg.eigh(centred.T @ centred)[1][:, -1]
        rows = rows[(centred @ direction).argsort(stable=True)]
        half = (-(-len(rows) // members) + 1) // 2 * members
        return halve(rows[:half]) + halve(rows[half:])

    vectors = vectors.detach().float().cpu()
    return torch.cat(halve(torch.arange(len(vectors))))


# -- for a tokenizer and a folder of photographs -----------------------------------------------------------------------


def fit_tokenizer(
    tokenizer: Tokenizer, photographs: str | Path, *, hidden: int = 32, flip: bool = False, epochs: float = 3.0
) -> Tokenizer:
    """The same tokenizer with a prior fitted to the codes of every photograph of a source; `flip`: mirrored ones too.

    Raises InputError for a tokenizer whose config has no `prior`.
    """
    from vistok.data.sources import open_source
    from vistok.pixels import from_pil

    if "prior" not in {field.name for field in fields(tokenizer.config)}:
        raise InputError(f"{tokenizer.name} has no prior to fit")
    fitted: Any = type(tokenizer)(replace(tokenizer.config, prior=hidden), name=tokenizer.name)
    state = {name: value for name, value in tokenizer.state_dict().items() if not name.startswith("prior.")}
    fitted.to(tokenizer.device, tokenizer.dtype).eval().load_state_dict(state, strict=False)
    prior: CodePrior = fitted.prior
    started = time.perf_counter()
    codes: list[list[Tensor]] = []
    sums = [torch.zeros(size, 0) for size in prior.sizes]
    seen = [torch.zeros(size) for size in prior.sizes]
    for item in open_source(photographs):
        pixels = from_pil(item.image)
        for view in [pixels, pixels.flip(-1)] if flip else [pixels]:
            tokens = tokenizer.encode(view)
            codes.append([tokens[segment.name][0] for segment in tokens.segments])
            _add_vectors(tokenizer, tokens, sums, seen)
        print(f"\rencoded {len(codes)} pictures, {time.perf_counter() - started:.0f} s", end="", file=sys.stderr)
    vectors = [total / count.clamp_min(1)[:, None] for total, count in zip(sums, seen, strict=True)]
    costs = fit(prior, codes, vectors, epochs=epochs)
    told = ", ".join(
        f"{segment.name} {cost:.2f} of {segment.bits}"
        for segment, cost in zip(tokenizer.spec.segments, costs, strict=True)
    )
    print(f"\nbits a code: {told}; {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return fitted


def _add_vectors(tokenizer: Tokenizer, tokens: Tokens, sums: list[Tensor], seen: list[Tensor]) -> None:
    """Add each code's vector, as `embed` gives it, to its segment's sums (K, D) and counts (K,)."""
    vectors, start = tokenizer.embed(tokens).float().cpu()[0], 0
    for index, segment in enumerate(tokens.segments):
        stop = start + segment.count
        codes = tokens.data[0, start:stop].cpu()
        if not sums[index].shape[1]:
            sums[index] = torch.zeros(len(sums[index]), vectors.shape[1])
        sums[index].index_add_(0, codes, vectors[start:stop])
        seen[index].index_add_(0, codes, torch.ones(len(codes)))
        start = stop


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of the module's docstring."""
    import vistok

    parser = argparse.ArgumentParser(prog="python -m vistok.training.prior", description="Fit a tokenizer's prior.")
    parser.add_argument("model", help="a model folder or name")
    parser.add_argument("photographs", help="a folder or any other source of training pictures")
    parser.add_argument("-o", "--output", required=True, type=Path, help="the new model folder")
    parser.add_argument("--hidden", type=int, default=32, help="width of the network, at most 32")
    parser.add_argument("--flip", action="store_true", help="also learn from mirrored pictures; twice the time")
    parser.add_argument("--epochs", type=float, default=3.0)
    options = parser.parse_args(arguments)
    tokenizer = vistok.load(options.model)
    fit_tokenizer(tokenizer, options.photographs, hidden=options.hidden, flip=options.flip, epochs=options.epochs).save(
        options.output
    )


if __name__ == "__main__":
    main()
