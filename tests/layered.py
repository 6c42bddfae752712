"""A tokenizer of two levels with a prior, for tests of compressed files: its tables come from numpy and never change.

Brightness at 1/8 in 32 levels, then at 1/4 in 40; either level alone gives a grey picture.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vistok.layout import Segment, Sizes, TokenSpec
from vistok.prior import CodePrior
from vistok.registry import System, register
from vistok.tokenizer import TokenData, Tokenizer

LEVELS = ((8, 32), (4, 40))


@dataclass(frozen=True)
class LayeredConfig:
    prior: int = 8
    seed: int = 0
    version: int = 1


def draw_tables(prior: CodePrior, seed: int) -> None:
    """Fill a prior's tables with integers that are far from uniform."""
    random = np.random.RandomState(seed)
    for name, table in sorted(prior.named_buffers()):
        if name.startswith("order"):
            size = len(torch.unique(table))
            table[:size] = torch.from_numpy(random.permutation(size)).to(table.dtype)
            table[size:] = table[size - 1]
        elif not name.startswith(("group_bias", "member_bias")):
            limit = 100 if table.dtype == torch.int8 else 5000
            table.copy_(torch.from_numpy(random.randint(-limit, limit, tuple(table.shape))))


class Layered(Tokenizer):
    system = "layered"

    def __init__(self, config: LayeredConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.gain = nn.Parameter(torch.ones(()))
        self.spec = TokenSpec(
            size=(32, 32),
            layout=lambda size: tuple(
                Segment(f"level{k}", (size[0] // step, size[1] // step), (levels,))
                for k, (step, levels) in enumerate(LEVELS)
            ),
            sizes=Sizes(multiple=8, minimum=8),
            prefix_rule="segments",
        )
        self.prior = CodePrior(self.spec.segments, config.prior) if config.prior else None
        if self.prior is not None:
            draw_tables(self.prior, config.seed)

    def tokenize(self, pixels: Tensor, spec: TokenSpec, *, seeds: list[int], **conditions: Any) -> TokenData:
        grey = self.prepare(pixels).mean(1, keepdim=True)
        codes = [(nn.functional.avg_pool2d(grey, step) * (levels - 1)).round().flatten(1) for step, levels in LEVELS]
        return TokenData(codes=torch.cat(codes, 1).long())

    def detokenize(
        self, data: TokenData, spec: TokenSpec, *, seeds: list[int], dtype: torch.dtype, **conditions: Any
    ) -> Tensor:
        assert data.codes is not None
        level = int(data.codes.shape[1] > spec.segments[0].count)
        step, levels = LEVELS[level]
        first = spec.segments[0].count * level
        grid = data.codes[:, first:].unflatten(1, spec.segments[level].shape).to(self.dtype) * self.gain / (levels - 1)
        return grid[:, None].expand(-1, 3, -1, -1).repeat_interleave(step, 2).repeat_interleave(step, 3)

    def embed(self, tokens: Any) -> Tensor:
        return tokens.codes[..., None].to(self.dtype)


register(
    System(
        "layered",
        Layered,
        LayeredConfig,
        {"layered": LayeredConfig(), "layered-plain": LayeredConfig(prior=0), "layered-other": LayeredConfig(seed=1)},
    )
)
