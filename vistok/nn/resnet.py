"""ResNet with bottleneck blocks, the classifier whose logits VQGAN+ is trained to keep (arXiv:1512.03385).

pixels (B, 3, H, W), standardised -> 7x7 convolution of stride 2, 3x3 maximum of stride 2 -> four levels of blocks
    -> mean over positions -> logits (B, classes)
block: relu(x + norm(1x1 relu(norm(3x3 relu(norm(1x1 x))))))

The stride of a level is in the 3x3 convolution, as in torchvision's weights. Meant for inference: no initialisation of
its own.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.keys import KeyTable, Rename, State

EXPANSION = 4


@dataclass(frozen=True)
class ResNetConfig:
    """Width of the first level's bottleneck and blocks of the four levels; the defaults are ResNet-50."""

    width: int = 64
    depths: tuple[int, ...] = (3, 4, 6, 3)
    classes: int = 1000


class ConvNorm(nn.Module):
    """Convolution without bias, then BatchNorm."""

    def __init__(self, entering: int, width: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(entering, width, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """See the module's docstring: (B, C, h, w) to (B, 4 width, h / stride, w / stride)."""

    def __init__(self, entering: int, width: int, stride: int) -> None:
        super().__init__()
        self.narrow = ConvNorm(entering, width, 1)
        self.middle = ConvNorm(width, width, 3, stride)
        self.widen = ConvNorm(width, EXPANSION * width, 1)
        changes = entering != EXPANSION * width or stride > 1
        self.shortcut = ConvNorm(entering, EXPANSION * width, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.widen(F.relu(self.middle(F.relu(self.narrow(x)))))
        return F.relu(branch + self.shortcut(x))


class ResNet(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.stem = ConvNorm(3, config.width, 7, 2)
        self.levels = nn.ModuleList()
        entering = config.width
        for level, depth in enumerate(config.depths):
            width = config.width * 2**level
            blocks = [
                Bottleneck(EXPANSION * width if index else entering, width, 2 if level and not index else 1)
                for index in range(depth)
            ]
            self.levels.append(nn.Sequential(*blocks))
            entering = EXPANSION * width
        self.head = nn.Linear(entering, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), of ImageNet's mean 0 and deviation 1, to logits (B, classes)."""
        x = F.max_pool2d(F.relu(self.stem(x.contiguous(memory_format=torch.channels_last))), 3, stride=2, padding=1)
        for level in self.levels:
            x = level(x)
        return self.head(x.mean((2, 3)))


def key_table(levels: int = 4) -> KeyTable:
    """torchvision's names, which are timm's too, to ours."""
    rules = [
        Rename("conv1.weight", "stem.conv.weight"),
        Rename("bn1.*", "stem.norm.*"),
        Rename("fc.*", "head.*"),
    ]
    for level in range(levels):
        theirs, ours = f"layer{level + 1}.#", f"levels.{level}.#"
        for number, name in enumerate(("narrow", "middle", "widen"), 1):
            rules += [
                Rename(f"{theirs}.conv{number}.weight", f"{ours}.{name}.conv.weight"),
                Rename(f"{theirs}.bn{number}.*", f"{ours}.{name}.norm.*"),
            ]
        rules += [
            Rename(f"{theirs}.downsample.0.weight", f"{ours}.shortcut.conv.weight"),
            Rename(f"{theirs}.downsample.1.*", f"{ours}.shortcut.norm.*"),
        ]
    return KeyTable(*rules)


def config_of(ours: State) -> ResNetConfig:
    """Sizes from a state dict in our names."""
    levels = next(level for level in range(len(ours)) if f"levels.{level}.0.widen.conv.weight" not in ours)
    depths = tuple(
        next(block for block in range(len(ours)) if f"levels.{level}.{block}.widen.conv.weight" not in ours)
        for level in range(levels)
    )
    return ResNetConfig(ours["stem.conv.weight"].shape[0], depths, ours["head.bias"].shape[0])
