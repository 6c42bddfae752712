"""A small tokenizer for tests of the contract: 4x4 patches, their mean colour quantized to 8 levels a channel."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vistok.layout import Segment, Sizes, TokenSpec
from vistok.registry import System, register
from vistok.tokenizer import Tokenizer


@dataclass(frozen=True)
class ToyConfig:
    levels: int = 8
    only: tuple[tuple[int, int], ...] = ()
    version: int = 1


class MeanColour(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(pixels, 4) * self.gain


class Rounder(nn.Module):
    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def encode(self, latent: Tensor) -> Tensor:
        return (latent * (self.levels - 1)).round().long()

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float() / (self.levels - 1)


class Toy(Tokenizer):
    system = "toy"

    def __init__(self, config: ToyConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.encoder, self.quantizer = MeanColour(), Rounder(config.levels)
        self.decoder = nn.Upsample(scale_factor=4)
        self.spec = TokenSpec(
            size=config.only[0] if config.only else (16, 16),
            layout=lambda size: (Segment("grid", (size[0] // 4, size[1] // 4), (config.levels,) * 3),),
            sizes=Sizes(only=config.only) if config.only else Sizes(multiple=4, minimum=4),
        )


register(System("toy", Toy, ToyConfig, {"toy": ToyConfig(), "toy-16": ToyConfig(only=((16, 16),))}))
