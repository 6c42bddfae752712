"""Perceptual distances between a reconstruction and its target, by name, of pixels in [0, 1].

    build_perceptual(name, weights=...)  ->  module;  module(reconstruction, target) -> distances (B,)

| name | what | weights |
| --- | --- | --- |
| lpips-vgg, lpips-alex | LPIPS v0.1 (arXiv:1801.03924) | yours or, of VGG, the Hub's |
| convnext-logits | mean squared difference of a ConvNeXt's logits, at 224 pixels (TiTok) | yours or the Hub's |
| resnet50-logits | the same of a ResNet-50's (VQGAN+, MaskBit) | yours or the Hub's |
| lpips-vgg+convnext | (LPIPS + 0.1 logits) / 1.1 (TA-TiTok and one-stage TiTok) | both |
| steerable | fixed oriented filters at several scales, contrast-normalised | none, no download |

The target's features are taken without gradients, the reconstruction's gradient at once (`frozen.py`), so nothing of a
judge stays in memory until the model's backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError, MismatchError, UnknownNameError, nearest
from vistok.losses.frozen import Frozen, at_once
from vistok.losses.weights import Source, read_weights
from vistok.nn import convnext, resnet

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LPIPS = ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))

HUB: dict[str, tuple[str, ...]] = {
    "lpips-vgg": (
        "timm/vgg16.tv_in1k:pytorch_model.bin",
        "chaofengc/IQA-PyTorch-Weights:LPIPS_v0.1_vgg-a78928a0.pth",
    ),
    "convnext-logits": ("timm/convnext_small.fb_in1k:pytorch_model.bin",),
    "resnet50-logits": ("timm/resnet50.tv_in1k:pytorch_model.bin",),
}
PERCEPTUALS = ("lpips-vgg", "lpips-alex", "convnext-logits", "resnet50-logits", "lpips-vgg+convnext", "steerable")


class Perceptual(Frozen):
    """Base: `distance(reconstruction, target)`, (B,), of pixels in [0, 1], with the gradient taken at once."""

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """(B, 3, H, W) twice, to (B,). Gradients reach the reconstruction alone."""
        with torch.no_grad():
            wanted = self.features(target.detach())
        return at_once(reconstruction, lambda pixels: self.compare(self.features(pixels), wanted))

    def features(self, pixels: Tensor) -> Any:
        """What is compared, of pixels (B, 3, H, W) in [0, 1]."""
        raise NotImplementedError

    def compare(self, found: Any, wanted: Any) -> Tensor:
        """Distances (B,) between the features of reconstruction and target."""
        raise NotImplementedError


def wide(features: Tensor) -> Tensor:
    """At full precision: under autocast, differences of close features would drown in rounding."""
    return features if features.dtype == torch.float64 else features.float()


class Standardise(nn.Module):
    """(pixels - mean) / deviation per channel; `signed`: of pixels moved to [-1, 1] first."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean_deviation: tuple[Sequence[float], Sequence[float]], signed: bool = False) -> None:
        super().__init__()
        mean, deviation = (torch.tensor(values)[:, None, None] for values in mean_deviation)
        if signed:
            mean, deviation = (mean + 1) / 2, deviation / 2
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.deviation


# index in torchvision's `features`: what stands there; taps follow the activation after the convolution
_VGG = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_ALEX = ((0,), (3,), (6,), (8,), (10,))
_ALEX_CONV: dict[int, dict[str, int]] = {0: {"stride": 4, "padding": 2}, 3: {"padding": 2}}


class Lpips(Perceptual):
    """LPIPS v0.1: unit-length features at five depths, their squared differences weighed per channel, then the mean.

    signed  the published network sees pixels in [-1, 1]; false feeds it [0, 1], as binary latent diffusion's authors
            did
    """

    def __init__(self, net: str, state: dict[str, Tensor], *, signed: bool = True) -> None:
        super().__init__()
        self.net, self.levels = net, _VGG if net == "vgg" else _ALEX
        self.standard = Standardise(LPIPS, signed)
        self.convs, self.heads = nn.ModuleList(), nn.ParameterList()
        for level, indices in enumerate(self.levels):
            stage = nn.ModuleList()
            for index in indices:
                weight, bias = (self._find(state, level, index, part) for part in ("weight", "bias"))
                how = {"padding": weight.shape[-1] // 2} | (_ALEX_CONV.get(index, {}) if net == "alex" else {})
                conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], **how)  # type: ignore[arg-type]
                conv.weight, conv.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
                stage.append(conv)
            self.convs.append(stage)
            head = state.get(f"lin{level}.model.1.weight", state.get(f"lins.{level}.model.1.weight"))
            if head is None or head.numel() != stage[-1].out_channels:
                raise MismatchError(
                    f"LPIPS needs its heads lin0.model.1.weight .. lin4.model.1.weight, as wide as {net}'s levels; "
                    "give the backbone's and the heads' files together: weights=[BACKBONE, HEADS]"
                )
            self.heads.append(nn.Parameter(head.clone().reshape(1, -1, 1, 1)))
        self.freeze()

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Unit-length features of five depths, (B, C, h, w) each."""
        taps = [wide(tap) for tap in self.taps(pixels)]
        return [tap / (tap.square().sum(1, keepdim=True).sqrt() + 1e-10) for tap in taps]

    def taps(self, pixels: Tensor) -> list[Tensor]:
        """Features of five depths as the backbone gives them."""
        x = self.standard(pixels).contiguous(memory_format=torch.channels_last)
        found = []
        for level, stage in enumerate(self.convs):
            if level and self.net == "vgg":
                x = F.max_pool2d(x, 2)
            elif level in (1, 2):
                x = F.max_pool2d(x, 3, stride=2)
            for conv in stage:  # type: ignore[attr-defined]
                x = F.relu(conv(x))
            found.append(x)
        return found

    def scores(self, found: list[Tensor], wanted: list[Tensor]) -> Tensor:
        """Distances of each depth, (5, B)."""
        pairs = zip(found, wanted, self.heads, strict=True)
        return torch.stack([((a - b).square() * head).sum(1).mean((1, 2)) for a, b, head in pairs])

    def compare(self, found: list[Tensor], wanted: list[Tensor]) -> Tensor:
        """(B,)."""
        return self.scores(found, wanted).sum(0)

    @torch.no_grad()
    def map(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Where the distance lies: (B, 1, H, W), each depth's map scaled up and added."""
        size = reconstruction.shape[-2:]
        pairs = zip(self.features(reconstruction), self.features(target), self.heads, strict=True)
        maps = [((a - b).square() * head).sum(1, keepdim=True) for a, b, head in pairs]
        return torch.stack([F.interpolate(part, size=size, mode="bilinear") for part in maps]).sum(0)

    def _find(self, state: dict[str, Tensor], level: int, index: int, part: str) -> Tensor:
        """torchvision's `features.N`, the lpips package's `net.sliceK.N`."""
        for name in (f"features.{index}.{part}", f"net.slice{level + 1}.{index}.{part}"):
            if name in state:
                return state[name]
        raise MismatchError(
            f"LPIPS needs {'VGG16' if self.net == 'vgg' else 'AlexNet'} in torchvision's or the lpips package's names; "
            f"features.{index}.{part} is missing"
        )


class Logits(Perceptual):
    """Mean squared difference of a classifier's logits, both pictures scaled to 224 x 224 (bilinear, antialiased).

    net   "convnext" or "resnet50", of any sizes, which `state` says
    """

    def __init__(self, net: str, state: dict[str, Tensor], *, size: int = 224) -> None:
        super().__init__()
        self.net: nn.Module
        try:
            if net == "convnext":
                ours = convnext.key_table(state).to_ours(state)
                self.net = convnext.ConvNeXt(convnext.config_of(ours))
            else:
                ours = resnet.key_table().to_ours(state)
                self.net = resnet.ResNet(resnet.config_of(ours))
            _fill(self.net, ours)
        except (MismatchError, KeyError, RuntimeError, StopIteration) as error:
            wanted = "a ConvNeXt classifier" if net == "convnext" else "a ResNet of bottleneck blocks"
            raise MismatchError(
                f"{net}-logits needs {wanted} in torchvision's, timm's or transformers' names: "
                f"{str(error).splitlines()[0]}"
            ) from error
        self.size, self.standard = size, Standardise(IMAGENET)
        self.freeze()

    def features(self, pixels: Tensor) -> Tensor:
        """Logits (B, classes)."""
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, size=(self.size, self.size), mode="bilinear", antialias=True)
        return wide(self.net(self.standard(pixels)))

    def compare(self, found: Tensor, wanted: Tensor) -> Tensor:
        """(B,)."""
        return (found - wanted).square().mean(1)


def _fill(net: nn.Module, state: dict[str, Tensor]) -> None:
    """All of `state` into `net`; counts of batches, which older files lack, stay."""
    counts = {key: value for key, value in net.state_dict().items() if key.endswith("num_batches_tracked")}
    net.load_state_dict(counts | state)


class Combined(Perceptual):
    """A weighted mean of distances."""

    def __init__(self, parts: Sequence[Perceptual], shares: Sequence[float]) -> None:
        super().__init__()
        self.parts, self.shares = nn.ModuleList(parts), tuple(shares)
        self.freeze()

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """(B, 3, H, W) twice, to (B,)."""
        each = [part(reconstruction, target) * share for part, share in zip(self.parts, self.shares, strict=True)]
        return torch.stack(each).sum(0) / sum(self.shares)


def build_perceptual(name: str, weights: Source | Sequence[Source] | None = None, **options: Any) -> Perceptual:
    """The distance `name`. `weights`: paths or `owner/repo:file`, several where backbone and heads are apart.

    options: `signed` (lpips), `size` (of logits), those of `Steerable`; `convnext` gives the combination's second
    file. Raises UnknownNameError, ConfigError for an option that does not exist, MismatchError for weights of another
    net, VistokError where they cannot be had.
    """
    if name not in PERCEPTUALS:
        hint = nearest(name, PERCEPTUALS) or "; known: " + ", ".join(PERCEPTUALS)
        raise UnknownNameError(f"no perceptual distance {name!r}{hint}")
    try:
        if name == "steerable":
            from vistok.losses.steerable import Steerable

            if weights is not None:
                raise ConfigError("perceptual 'steerable' has no weights")
            return Steerable(**options)
        if name == "lpips-vgg+convnext":
            second = options.pop("convnext", None)
            parts = [build_perceptual("lpips-vgg", weights, **options), build_perceptual("convnext-logits", second)]
            return Combined(parts, (1.0, 0.1))
        if weights is None and name not in HUB:
            raise ConfigError(f"perceptual {name!r} needs weights=[BACKBONE, HEADS]: no file of it is known on the Hub")
        state = read_weights(weights if weights is not None else HUB[name], f"perceptual {name!r}")
        if name.endswith("-logits"):
            return Logits(name.removesuffix("-logits"), state, **options)
        return Lpips(name.removeprefix("lpips-"), state, **options)
    except TypeError as error:
        raise ConfigError(f"perceptual {name!r}: {error}") from error
