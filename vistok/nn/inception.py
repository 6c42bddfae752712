"""The Inception-v3 of FID: the network of the TensorFlow graph of 2015-12-05, in the layout of its PyTorch ports.

    pixels (B, 3, 299, 299) in [-1, 1]
      -> 3 convolutions, pool ("64") -> 2 more, pool ("192") -> 5b..5d, 6a..6e ("768") -> 7a..7c, mean ("2048")
      -> logits (B, 1008)

It differs from torchvision's: averages leave the padding out, the last block pools by the maximum, BatchNorm's eps is
1e-3, there is no auxiliary head and there are 1,008 classes. Architecture: arXiv:1512.00567.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = {"64": 64, "192": 192, "768": 768, "2048": 2048, "logits_unbiased": 1008, "logits": 1008, "spatial": 2023}
SIDE = 299
SPATIAL = 7  # channels of mixed_6's first convolution that sFID looks at, at 17 x 17 places


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average(x: Tensor) -> Tensor:
    """3 x 3 means of what lies inside the picture."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def maximum(x: Tensor) -> Tensor:
    """3 x 3 maxima, size kept."""
    return F.max_pool2d(x, 3, 1, 1)


class Branches(nn.Module):
    """Chains side by side, by the names of their convolutions; each takes x, or x pooled, and all are concatenated."""

    chains: Sequence[Sequence[str]] = ()
    pool = staticmethod(average)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for chain in self.chains:
            part = self.pool(x) if chain[0] == "branch_pool" else x
            for name in chain:
                part = getattr(self, name)(part)
            found.append(part)
        return torch.cat(found, 1)


class MixedA(Branches):
    """5b, 5c, 5d: 1x1 | 5x5 | two 3x3 | pool."""

    chains = (
        ("branch1x1",),
        ("branch5x5_1", "branch5x5_2"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
        ("branch_pool",),
    )

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(inputs, 64, 1)
        self.branch5x5_1 = ConvNorm(inputs, 48, 1)
        self.branch5x5_2 = ConvNorm(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNorm(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, padding=1)
        self.branch_pool = ConvNorm(inputs, pooled, 1)


class MixedB(Branches):
    """6a, halves the sides: 3x3 | two 3x3 | the maximum itself."""

    chains = (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNorm(inputs, 384, 3, 2)
        self.branch3x3dbl_1 = ConvNorm(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), F.max_pool2d(x, 3, 2)], 1)


class MixedC(Branches):
    """6b .. 6e: 1x1 | 7x7 in two lines | twice that | pool."""

    chains = (
        ("branch1x1",),
        ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
        ("branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"),
        ("branch_pool",),
    )

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        across: dict[str, Any] = {"kernel": (1, 7), "padding": (0, 3)}
        down: dict[str, Any] = {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = ConvNorm(inputs, 192, 1)
        self.branch7x7_1 = ConvNorm(inputs, width, 1)
        self.branch7x7_2 = ConvNorm(width, width, **across)
        self.branch7x7_3 = ConvNorm(width, 192, **down)
        self.branch7x7dbl_1 = ConvNorm(inputs, width, 1)
        self.branch7x7dbl_2 = ConvNorm(width, width, **down)
        self.branch7x7dbl_3 = ConvNorm(width, width, **across)
        self.branch7x7dbl_4 = ConvNorm(width, width, **down)
        self.branch7x7dbl_5 = ConvNorm(width, 192, **across)
        self.branch_pool = ConvNorm(inputs, 192, 1)


class MixedD(Branches):
    """7a, halves the sides: 3x3 | 7x7 in two lines, 3x3 | the maximum itself."""

    chains = (("branch3x3_1", "branch3x3_2"), ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"))

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNorm(inputs, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, 2)
        self.branch7x7x3_1 = ConvNorm(inputs, 192, 1)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), F.max_pool2d(x, 3, 2)], 1)


class MixedE(nn.Module):
    """7b, 7c: 1x1 | 1x3 and 3x1 side by side | a 3x3 before those | pool, of 7c by the maximum."""

    def __init__(self, inputs: int, by_maximum: bool) -> None:
        super().__init__()
        self.pool = maximum if by_maximum else average
        across: dict[str, Any] = {"kernel": (1, 3), "padding": (0, 1)}
        down: dict[str, Any] = {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = ConvNorm(inputs, 320, 1)
        self.branch3x3_1 = ConvNorm(inputs, 384, 1)
        self.branch3x3_2a = ConvNorm(384, 384, **across)
        self.branch3x3_2b = ConvNorm(384, 384, **down)
        self.branch3x3dbl_1 = ConvNorm(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvNorm(384, 384, **across)
        self.branch3x3dbl_3b = ConvNorm(384, 384, **down)
        self.branch_pool = ConvNorm(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(single),
                self.branch3x3_2b(single),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(self.pool(x)),
            ],
            1,
        )


class FIDInception(nn.Module):
    """See the module's docstring; attribute names are the published state dict's."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = MixedA(192, 32)
        self.Mixed_5c = MixedA(256, 64)
        self.Mixed_5d = MixedA(288, 64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(768, 128)
        self.Mixed_6c = MixedC(768, 160)
        self.Mixed_6d = MixedC(768, 160)
        self.Mixed_6e = MixedC(768, 192)
        self.Mixed_7a = MixedD(768)
        self.Mixed_7b = MixedE(1280, by_maximum=False)
        self.Mixed_7c = MixedE(2048, by_maximum=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor, names: Sequence[str] = ("2048",)) -> dict[str, Tensor]:
        """Pixels (B, 3, 299, 299) in [-1, 1] to the named features, (B, W) each; widths in `FEATURES`.

        Nothing is computed behind the last that is asked for.
        """
        found: dict[str, Tensor] = {}
        order = ("64", "192", "spatial", "768", "2048", "logits_unbiased", "logits")
        last = max(order.index(name) for name in names)
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        found["64"] = x.mean((2, 3))
        if last >= 1:
            x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
            found["192"] = x.mean((2, 3))
        if last >= 2:
            x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))))
            if "spatial" in names:  # the graph's "mixed_6/conv:0": 6d's first convolution, before its norm
                found["spatial"] = self.Mixed_6d.branch1x1.conv(x)[:, :SPATIAL].flatten(1)
        if last >= 3:
            x = self.Mixed_6e(self.Mixed_6d(x))
            found["768"] = x.mean((2, 3))
        if last >= 4:
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
            found["2048"] = x.mean((2, 3))
            found["logits_unbiased"] = F.linear(found["2048"], self.fc.weight)
            found["logits"] = found["logits_unbiased"] + self.fc.bias
        return {name: found[name] for name in names}
