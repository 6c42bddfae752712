"""ConvNeXt, the classifier whose logits some tokenizers are trained to keep (arXiv:2201.03545).

pixels (B, 3, H, W), standardised -> 4x4 patches -> four levels of blocks, 2x2 strides between -> mean over positions
    -> norm -> logits (B, classes)
block: x + gain * linear(gelu(linear(norm(7x7 depth-wise conv x))))
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.keys import Drop, KeyTable, Rename, State

EPS = 1e-6


@dataclass(frozen=True)
class ConvNeXtConfig:
    """Widths and blocks of the four levels; the defaults are ConvNeXt-S."""

    widths: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 27, 3)
    classes: int = 1000


class ConvNeXt(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        entering = (3, *config.widths)
        self.shrinks = nn.ModuleList()
        self.levels = nn.ModuleList()
        for level, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            factor = 2 if level else 4
            conv = nn.Conv2d(entering[level], width, factor, stride=factor)
            norm = ChannelNorm(entering[level] if level else width)
            self.shrinks.append(nn.Sequential(norm, conv) if level else nn.Sequential(conv, norm))
            self.levels.append(nn.Sequential(*(ConvNeXtBlock(width) for _ in range(depth))))
        self.norm = nn.LayerNorm(config.widths[-1], eps=EPS)
        self.head = nn.Linear(config.widths[-1], config.classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), of ImageNet's mean 0 and deviation 1, to logits (B, classes)."""
        x = x.contiguous(memory_format=torch.channels_last)
        for shrink, level in zip(self.shrinks, self.levels, strict=True):
            x = level(shrink(x))
        return self.head(self.norm(x.mean((2, 3))))


class ConvNeXtBlock(nn.Module):
    """A depth-wise convolution, then an MLP at every position, (B, W, h, w) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gain = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm(self.conv(x).permute(0, 2, 3, 1))
        branch = self.gain * self.contract(F.gelu(self.expand(branch)))
        return x + branch.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, W, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def key_table(state: State) -> KeyTable:
    """torchvision's, timm's or transformers' names (seen from `state`) to ours."""
    if "features.0.0.weight" in state:  # torchvision: features.0 and the odd ones shrink or hold blocks in turn
        rules = []
        for level in range(4):
            first, second = ("0", "1")
            rules += [
                Rename(f"features.{2 * level}.{first}.*", f"shrinks.{level}.0.*"),
                Rename(f"features.{2 * level}.{second}.*", f"shrinks.{level}.1.*"),
                Rename(f"features.{2 * level + 1}.#.block.0.*", f"levels.{level}.#.conv.*"),
                Rename(f"features.{2 * level + 1}.#.block.2.*", f"levels.{level}.#.norm.*"),
                Rename(f"features.{2 * level + 1}.#.block.3.*", f"levels.{level}.#.expand.*"),
                Rename(f"features.{2 * level + 1}.#.block.5.*", f"levels.{level}.#.contract.*"),
                Rename(
                    f"features.{2 * level + 1}.#.layer_scale",
                    f"levels.{level}.#.gain",
                    into=torch.flatten,
                    back=lambda gain: gain[:, None, None],
                ),
            ]
        return KeyTable(*rules, Rename("classifier.0.*", "norm.*"), Rename("classifier.2.*", "head.*"))
    if "stem.0.weight" in state:  # timm
        block, mine = "stages.#.blocks.#", "levels.#.#"
        return KeyTable(
            Rename("stem.#.*", "shrinks.0.#.*"),
            Rename("stages.#.downsample.#.*", "shrinks.#.#.*"),
            Rename(f"{block}.conv_dw.*", f"{mine}.conv.*"),
            Rename(f"{block}.norm.*", f"{mine}.norm.*"),
            Rename(f"{block}.mlp.fc1.*", f"{mine}.expand.*"),
            Rename(f"{block}.mlp.fc2.*", f"{mine}.contract.*"),
            Rename(f"{block}.gamma", f"{mine}.gain"),
            Rename("head.norm.*", "norm.*"),
            Rename("head.fc.*", "head.*"),
        )
    block, mine = "convnext.encoder.stages.#.layers.#", "levels.#.#"
    return KeyTable(
        Rename("convnext.embeddings.patch_embeddings.*", "shrinks.0.0.*"),
        Rename("convnext.embeddings.layernorm.*", "shrinks.0.1.*"),
        Rename("convnext.encoder.stages.#.downsampling_layer.#.*", "shrinks.#.#.*"),
        Rename(f"{block}.dwconv.*", f"{mine}.conv.*"),
        Rename(f"{block}.layernorm.*", f"{mine}.norm.*"),
        Rename(f"{block}.pwconv1.*", f"{mine}.expand.*"),
        Rename(f"{block}.pwconv2.*", f"{mine}.contract.*"),
        Rename(f"{block}.layer_scale_parameter", f"{mine}.gain"),
        Rename("convnext.layernorm.*", "norm.*"),
        Rename("classifier.*", "head.*"),
        Drop("num_batches_tracked"),
    )


def config_of(ours: State) -> ConvNeXtConfig:
    """Sizes from a state dict in our names."""
    levels = next(level for level in range(len(ours)) if f"levels.{level}.0.norm.weight" not in ours)
    depths = tuple(
        next(block for block in range(len(ours)) if f"levels.{level}.{block}.norm.weight" not in ours)
        for level in range(levels)
    )
    widths = tuple(ours[f"levels.{level}.0.norm.weight"].shape[0] for level in range(levels))
    return ConvNeXtConfig(widths, depths, ours["head.bias"].shape[0])
