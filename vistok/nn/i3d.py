"""I3D: Inception-v1 inflated to clips, as trained on Kinetics-400; the network of FVD (arXiv:1705.07750, 1812.01717).

    pixels (B, 3, 16, 224, 224) in [-1, 1]
      -> 7x7x7 /2, pool, 1x1x1, 3x3x3, pool      (B,  192, 8, 28, 28)
      -> Mixed_3b, 3c, pool                      (B,  480, 4, 14, 14)
      -> Mixed_4b .. 4f, pool                    (B,  832, 2,  7,  7)
      -> Mixed_5b, 5c, mean over 2 x 7 x 7       (B, 1024, 1)           -> mean over time -> "pooled" (B, 1024)
      -> 1x1x1                                   (B,  400, 1)           -> mean over time -> "logits" (B, 400)

Every convolution and pool keeps ceil(size / stride) places and pads as TensorFlow does: an odd place more behind than
before. BatchNorm's eps is 1e-3. Attribute names are those of the PyTorch ports of the published weights, so that their
state dicts are ours. Architecture: arXiv:1705.07750, figure 3; Inception-v1: arXiv:1409.4842, table 1.
"""

from collections.abc import Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = {"logits": 400, "pooled": 1024}
SIDE, FRAMES = 224, 16

# widths of a mixed block: 1x1x1 | 1x1x1, 3x3x3 | 1x1x1, 3x3x3 | pool, 1x1x1
MIXED: dict[str, tuple[int, int, int, int, int, int]] = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}
# before the block of this name: kernel and stride of a pool, time first
POOLS = {"3b": ((1, 3, 3), (1, 2, 2)), "4b": ((3, 3, 3), (2, 2, 2)), "5b": ((2, 2, 2), (2, 2, 2))}

Triple = tuple[int, int, int]


def pad_same(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """Zeros around (B, C, T, H, W), so that ceil(size / stride) windows fit: TensorFlow's SAME."""
    pads = []
    for size, width, step in zip(x.shape[2:], kernel, stride, strict=True):
        total = max((-(-size // step) - 1) * step + width - size, 0)
        pads.append((total // 2, total - total // 2))
    return F.pad(x, list(chain(*reversed(pads))))  # F.pad counts axes from the last


def max_pool(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """Maxima of SAME windows. Zeros in the padding change none: what comes here has been through a ReLU."""
    return F.max_pool3d(pad_same(x, kernel, stride), kernel, stride)


class Unit(nn.Module):
    """Convolution without bias, padded as SAME, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(outputs, eps=1e-3)
        self.kernel: Triple = (kernel, kernel, kernel)
        self.stride: Triple = (stride, stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(pad_same(x, self.kernel, self.stride))), inplace=True)


class Mixed(nn.Module):
    """Four branches side by side, concatenated: widths as in `MIXED`."""

    def __init__(self, inputs: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        first, narrow, wide, narrower, less, pooled = widths
        self.b0 = Unit(inputs, first)
        self.b1a, self.b1b = Unit(inputs, narrow), Unit(narrow, wide, 3)
        self.b2a, self.b2b = Unit(inputs, narrower), Unit(narrower, less, 3)
        self.b3b = Unit(inputs, pooled)
        self.outputs = first + wide + less + pooled

    def forward(self, x: Tensor) -> Tensor:
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class Logits(nn.Module):
    """The last convolution, 1x1x1 with a bias."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(x)


class I3D(nn.Module):
    """See the module's docstring."""

    def __init__(self, classes: int = FEATURES["logits"]) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = Unit(64, 64)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        width = 192
        for name, widths in MIXED.items():
            block = Mixed(width, widths)
            self.add_module(f"Mixed_{name}", block)
            width = block.outputs
        self.logits = Logits(width, classes)

    def forward(self, x: Tensor, names: Sequence[str] = ("logits",)) -> dict[str, Tensor]:
        """Pixels (B, 3, T, 224, 224) in [-1, 1], T at least 9, to the named features, (B, W) each: see `FEATURES`.

        Of other sizes the mean before the logits is over as much of 2 x 7 x 7 places as there is, then over the rest.
        """
        x = max_pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        for name in MIXED:
            if name in POOLS:
                x = max_pool(x, *POOLS[name])
            x = self.get_submodule(f"Mixed_{name}")(x)
        kernel = [min(most, size) for most, size in zip((2, 7, 7), x.shape[2:], strict=True)]
        x = F.avg_pool3d(x, kernel, stride=1)
        found = {"pooled": x}
        if "logits" in names:
            found["logits"] = self.logits(x)
        return {name: found[name].mean((2, 3, 4)) for name in names}
