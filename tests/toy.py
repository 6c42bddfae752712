"""A small tokenizer for tests of the contract: 4x4 patches, their mean colour quantized to 8 levels a channel."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vistok.layout import Clips, Segment, Sizes, TokenSpec
from vistok.registry import System, register
from vistok.tokenizer import TokenData, Tokenizer


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


class ToyVideo(Toy):
    """Pictures, and clips of 1 + 2 k frames, at most 5: the first frame alone, the others' means by twos."""

    system = "toy-video"

    def __init__(self, config: ToyConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        still = self.spec.layout

        def layout(size: tuple[int, int], frames: int | None) -> tuple[Segment, ...]:
            first = replace(still(size)[0], name="first", shape=(1, size[0] // 4, size[1] // 4))
            pairs = replace(first, name="rest", shape=((frames or 1) // 2, *first.shape[1:]))
            return (first, pairs) if frames and frames > 1 else (first,)

        self.spec = replace(
            self.spec, layout=layout, modality="video", clips=Clips(first=1, step=2, maximum=5), frames=5
        )

    def tokenize(self, pixels: Tensor, spec: TokenSpec, *, seeds: list[int]) -> TokenData:
        clip = self.prepare(pixels if pixels.ndim == 5 else pixels[:, :, None])
        first, rest = clip[:, :, :1], clip[:, :, 1:].unflatten(2, (-1, 2)).mean(3)
        frames = torch.cat([first, rest], 2).transpose(1, 2)  # (B, t, C, H, W)
        latent = self.encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return TokenData(codes=self.quantizer.encode(latent.permute(0, 1, 3, 4, 2).flatten(1, 3)))

    def detokenize(self, data: TokenData, spec: TokenSpec, *, seeds: list[int], dtype: torch.dtype) -> Tensor:
        grid = (spec.size[0] // 4, spec.size[1] // 4)
        latent = self.quantizer.decode(data.codes).unflatten(1, (-1, *grid)).permute(0, 1, 4, 2, 3)
        frames = self.decoder(latent.flatten(0, 1)).unflatten(0, latent.shape[:2]).transpose(1, 2)
        if spec.frames is None:
            return frames[:, :, 0]
        return torch.cat([frames[:, :, :1], frames[:, :, 1:].repeat_interleave(2, 2)], 2)


register(System("toy-video", ToyVideo, ToyConfig, {"toy-video": ToyConfig()}))
