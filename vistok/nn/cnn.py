"""The convolutional encoder and decoder of the VQGAN line, shared by most tokenizers of the field.

    pixels (B, 3, H, W) -> conv_in -> levels 0 .. L-1 -> middle -> norm, SiLU, conv_out -> latent (B, D, H/f, W/f)
    latent (B, D, h, w) -> conv_in -> middle -> levels L-1 .. 0 -> norm, SiLU, conv_out -> pixels (B, 3, h f, w f)

A level is a few residual blocks, each followed by attention where the config says so, then a change of size by two
(none at the last level), so f = 2^(L-1). Two styles are published:

    taming    (arXiv:2012.09841; LlamaGen's, 2406.06525, is the same with attention at the deepest level)
              strided convolutions down, biases everywhere, attention in the middle, one more block per decoder level
    maskgit   (arXiv:2202.04200)
              average pools down, no biases inside blocks, no attention, a shortcut that reads the branch's own output

Activations are kept in channels-last memory, where a 1x1 convolution is a plain matrix product.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError, InputError

GROUPS = 32
EPS = 1e-6


@dataclass(frozen=True)
class CNNConfig:
    """Sizes of one encoder or decoder.

    width         channels of level 0; level i has width * multipliers[i]
    blocks        residual blocks per level of the encoder (the decoder of style "taming" has one more)
    latent_dim    D, channels of the latent
    attention     levels (0 is full resolution) whose blocks are each followed by attention
    double_latent the encoder gives 2 D channels: mean and log variance of a Gaussian
    decoder_blocks  residual blocks per level of the decoder, where they are not what the style says
    middle_blocks   residual blocks in the middle of style "maskgit", as many as `blocks` unless given (MAGE has 2)
    activated     SiLU between the last norm and `conv_out` (without: Unleashing Transformers, arXiv:2111.12701)
    halving       "conv" with stride 2, or "pool"; as the style has it unless given (VQGAN+ is "maskgit" with "conv")
    middle_attention  whether the middle of style "taming" has attention
    groups        of every GroupNorm. As many as there are channels would take away each channel's mean, and with it the
                  picture's brightness and colour: at small widths take fewer
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    latent_dim: int = 256
    attention: tuple[int, ...] = ()
    style: Literal["taming", "maskgit"] = "taming"
    double_latent: bool = False
    dropout: float = 0.0
    channels: int = 3
    decoder_blocks: int | None = None
    middle_blocks: int | None = None
    activated: bool = True
    halving: Literal["conv", "pool"] | None = None
    middle_attention: bool = True
    groups: int = GROUPS

    def __post_init__(self) -> None:
        if not self.multipliers or min(self.multipliers) < 1 or self.blocks < 1 or self.decoder_blocks == 0:
            raise ConfigError(f"a CNN needs multipliers and blocks of at least 1, got {self}")
        if self.groups < 1 or any(width % self.groups for width in self.widths):
            raise ConfigError(f"widths {self.widths} must be multiples of {self.groups}, the groups of its GroupNorm")
        if any(level not in range(len(self.multipliers)) for level in self.attention):
            raise ConfigError(f"attention at levels {self.attention}, where levels are 0..{len(self.multipliers) - 1}")
        if self.style == "maskgit" and self.attention:
            raise ConfigError("style 'maskgit' has no attention")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, full resolution first."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def factor(self) -> int:
        """f: pixels per latent position, along one side."""
        return 2 ** (len(self.multipliers) - 1)


class CNNTrunk(nn.Module):
    """Pixels (B, C, H, W), in the system's own range, to the features (B, widths[-1], H/f, W/f) before any head.

    Raises InputError unless H and W are multiples of f.
    """

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        taming = config.style == "taming"
        self.conv_in = nn.Conv2d(config.channels, config.width, 3, padding=1, bias=taming)
        entering = (config.width, *widths[:-1])
        self.levels = nn.ModuleList(
            Level(config, level, entering[level], config.blocks, _shrink(config, level)) for level in range(len(widths))
        )
        self.middle = _middle(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, widths[-1], H/f, W/f)."""
        if any(side % self.config.factor for side in pixels.shape[-2:]):
            raise InputError(
                f"this CNN takes sides that are multiples of {self.config.factor}, got {tuple(pixels.shape[-2:])}"
            )
        _settle(self)
        x = self.conv_in(pixels.contiguous(memory_format=torch.channels_last))
        for level in self.levels:
            x = level(x)
        return self.middle(x)


class CNNEncoder(CNNTrunk):
    """Pixels (B, C, H, W), in the system's own range, to a latent (B, D, H/f, W/f); 2 D channels if `double_latent`."""

    def __init__(self, config: CNNConfig) -> None:
        super().__init__(config)
        width = config.widths[-1]
        self.norm_out = _norm_out(config, width)
        out = config.latent_dim * (2 if config.double_latent else 1)
        taming = config.style == "taming"
        self.conv_out = nn.Conv2d(width, out, 3, padding=1) if taming else nn.Conv2d(width, out, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H/f, W/f)."""
        return self.conv_out(self.norm_out(super().forward(pixels)))


class CNNDecoder(nn.Module):
    """Latent (B, D, h, w) to pixels (B, C, h f, w f) in the system's own range, not clamped.

    `levels` are in the order of execution: the deepest first.
    """

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        deepest = len(widths) - 1
        blocks = config.decoder_blocks or config.blocks + (config.style == "taming")
        entering = (*widths[1:], widths[-1])
        self.conv_in = nn.Conv2d(config.latent_dim, widths[-1], 3, padding=1)
        self.middle = _middle(config)
        self.levels = nn.ModuleList(
            Level(config, level, entering[level], blocks, Upsample(widths[level]) if level else None)
            for level in range(deepest, -1, -1)
        )
        self.norm_out = _norm_out(config, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.channels, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """The weight at which an adaptive adversarial weight compares gradients."""
        return self.conv_out.weight

    def forward(self, latent: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, C, h f, w f)."""
        _settle(self)
        x = self.middle(self.conv_in(latent.contiguous(memory_format=torch.channels_last)))
        for level in self.levels:
            x = level(x)
        return self.conv_out(self.norm_out(x))


class Level(nn.Module):
    """Residual blocks at one resolution, attention after each where there is any, and the change of size."""

    def __init__(self, config: CNNConfig, level: int, entering: int, blocks: int, resample: nn.Module | None) -> None:
        super().__init__()
        width = config.widths[level]
        self.blocks = nn.ModuleList(
            ResidualBlock(entering if index == 0 else width, width, config) for index in range(blocks)
        )
        attends = level in config.attention
        self.attentions = nn.ModuleList(PixelAttention(width, config.groups) for _ in range(blocks if attends else 0))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[index](x)
        return x if self.resample is None else self.resample(x)


class NormSiLU(nn.GroupNorm):
    """GroupNorm (eps 1e-6), then SiLU; in place where no gradient needs the value between."""

    def __init__(self, width: int, groups: int = GROUPS) -> None:
        super().__init__(groups, width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x), inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 `shortcut` where the width changes.

    Style "maskgit" applies the shortcut to the branch and drops x, as its published weights were trained.
    """

    def __init__(self, entering: int, width: int, config: CNNConfig) -> None:
        super().__init__()
        self.keeps_input = config.style == "taming"
        bias = config.style == "taming"
        self.norm1 = NormSiLU(entering, config.groups)
        self.conv1 = nn.Conv2d(entering, width, 3, padding=1, bias=bias)
        self.norm2 = NormSiLU(width, config.groups)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        source = entering if self.keeps_input else width
        self.shortcut = nn.Conv2d(source, width, 1, bias=bias) if entering != width else None

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv2(self.dropout(self.norm2(self.conv1(self.norm1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(x if self.keeps_input else branch)
        return branch + x if torch.is_grad_enabled() else branch.add_(x)


class PixelAttention(nn.Module):
    """x + attention over all positions of norm(x): one head as wide as the map, scale width^-0.5."""

    def __init__(self, width: int, groups: int = GROUPS) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, h w, C), a view in channels-last memory
        q, k, v = self.qkv(tokens).unsqueeze(1).chunk(3, -1)
        attended = self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + attended.transpose(1, 2).unflatten(2, (height, width))


class Downsample(nn.Module):
    """3x3 convolution with stride 2; the border is padded on the right and below alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel repeated 2x2, then a 3x3 convolution.

    A 3x3 window of the repeated map sees only 2x2 distinct pixels, so without gradients each of the four phases of the
    output is a 2x2 convolution of the small map, whose weights are sums of the 3x3 ones: 4/9 of the multiplications.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        batch, width, h, w = x.shape
        assert self.conv.bias is not None
        phases = F.conv2d(x, self._phase_weights(), self.conv.bias.repeat(4), padding=1)  # (B, 4 C, h + 1, w + 1)
        large = torch.empty(
            batch, width, 2 * h, 2 * w, dtype=phases.dtype, device=x.device, memory_format=torch.channels_last
        )
        for index, phase in enumerate(phases.chunk(4, 1)):
            down, right = divmod(index, 2)
            large[:, :, down::2, right::2] = phase[:, :, down : down + h, right : right + w]
        return large

    def _phase_weights(self) -> Tensor:
        """(4 C, C, 2, 2): phase (down, right) adds the rows, then the columns, that fall on the same small pixel."""
        top, centre, bottom = self.conv.weight.to(torch.promote_types(self.conv.weight.dtype, torch.float32)).unbind(2)
        phases = []
        for rows in ((top, centre + bottom), (top + centre, bottom)):
            left, middle, right = torch.stack(rows, 2).unbind(3)
            phases += [torch.stack((left, middle + right), 3), torch.stack((left + middle, right), 3)]
        return torch.cat(phases).to(self.conv.weight.dtype).contiguous(memory_format=torch.channels_last)


def _settle(module: nn.Module) -> None:
    """Lay weights out as inference reads them, once: each convolution would otherwise reorder them in every call."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    with torch.inference_mode(False):
        for parameter in module.parameters():
            if parameter.ndim == 4 and not parameter.is_contiguous(memory_format=torch.channels_last):
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _norm_out(config: CNNConfig, width: int) -> nn.Module:
    groups = config.groups
    return NormSiLU(width, groups) if config.activated else nn.GroupNorm(groups, width, eps=EPS)


def _shrink(config: CNNConfig, level: int) -> nn.Module | None:
    if level == len(config.multipliers) - 1:
        return None
    halving = config.halving or ("conv" if config.style == "taming" else "pool")
    return Downsample(config.widths[level]) if halving == "conv" else nn.AvgPool2d(2)


def _middle(config: CNNConfig) -> nn.Sequential:
    width = config.widths[-1]
    if config.style == "taming":
        attention = PixelAttention(width, config.groups) if config.middle_attention else nn.Identity()
        return nn.Sequential(ResidualBlock(width, width, config), attention, ResidualBlock(width, width, config))
    return nn.Sequential(*(ResidualBlock(width, width, config) for _ in range(config.middle_blocks or config.blocks)))
