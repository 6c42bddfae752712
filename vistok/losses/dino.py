"""A discriminator on the features of a frozen DINO ViT: small heads, many depths, no collapse to colour statistics.

    pixels (B, 3, H, W) -> ImageNet's statistics -> 224 x 224 -> frozen ViT-S/16, before and after some blocks
        -> patch tokens + class token, (B, W, 196) each -> one head a depth -> logits (B, depths * 196)
    head: 1x1 conv, norm, LeakyReLU -> (9-tap conv, norm, LeakyReLU, + input) / sqrt(2) -> 1x1 conv, over the sequence

Sources: StyleGAN-T (arXiv:2301.09515), in the form of VAR (2404.02905) and RobustTok (2503.08354). Convolutions have
spectral norm. The ViT's weights are the user's file or the Hub's; they are frozen and in no checkpoint.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from vistok.errors import ConfigError, MismatchError
from vistok.keys import Drop, Fuse, KeyTable, Rename
from vistok.losses.discriminators import Discriminator, JudgedSizes
from vistok.losses.frozen import Frozen
from vistok.losses.weights import Source, read_weights
from vistok.nn.vit import ViT, ViTConfig, recognise_vit, vit_rules

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HUB = "facebook/dino-vits16:pytorch_model.bin"


class FrozenViT(Frozen):
    """A ViT that gives patch + class tokens at some depths: before the first block, and after each of `taps`."""

    def __init__(self, config: ViTConfig, taps: Sequence[int]) -> None:
        super().__init__()
        if any(tap not in range(config.depth) for tap in taps):
            raise ConfigError(f"taps {tuple(taps)} of a ViT with blocks 0..{config.depth - 1}")
        self.net, self.taps = ViT(config), tuple(sorted(taps))
        del self.net.norm, self.net.blocks[max(self.taps) + 1 :]
        self.freeze()

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, S, S), standardised, to (B, W, N) for each depth."""
        tokens = self.net.placed(self.net.embed(x))
        found = [_with_class(tokens)]
        for index, block in enumerate(self.net.blocks):
            tokens = block(tokens)
            if index in self.taps:
                found.append(_with_class(tokens))
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Weights in DINO's or timm's names. The bias of the keys is zero, as the authors set it."""
        ours = {key: value for key, value in frozen_keys().to_ours(state).items() if key in self.weights()}
        wrong = [key for key, value in self.weights().items() if key not in ours or ours[key].shape != value.shape]
        if wrong:
            raise MismatchError(
                f"these are not the weights of this DINO ViT: {wrong[0]} is missing or of another shape"
            )
        self.load_weights(ours)


class DinoDiscriminator(Discriminator):
    """See the module's docstring.

    taps          blocks after which heads look, one more looks before the first
    kernel        taps of the middle convolution
    virtual       pictures that are normalised together
    weights       of the ViT: a path, `owner/repo:file`, none for the Hub's DINO ViT-S/16, or "random" for tests
    image, patch, vit_width, depth, heads     sizes of a "random" ViT; others say theirs themselves

    Pictures larger than the ViT's are cropped at random or shrunk in training, each with probability 0.5, and shrunk in
    eval mode; smaller ones are enlarged.
    """

    def __init__(
        self,
        *,
        taps: Sequence[int] = (2, 5, 8, 11),
        kernel: int = 9,
        virtual: int = 8,
        weights: Source | None = None,
        image: int = 224,
        patch: int = 16,
        vit_width: int = 384,
        depth: int = 12,
        heads: int = 6,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        state = None if weights == "random" else as_timm(read_weights(weights or HUB, "discriminator 'dino'"))
        config = ViTConfig(image, patch, vit_width, depth, heads, activation="gelu-tanh")
        if state is not None:
            found = recognise_vit(state)
            if found is None:
                raise MismatchError(
                    "discriminator 'dino': these weights are not a ViT's, in DINO's or transformers' names"
                )
            config = ViTConfig(found.image, found.patch, found.width, found.depth, found.heads, activation="gelu-tanh")
        self.vit = FrozenViT(config, taps)
        if state is not None:
            self.vit.load(state)
        self.heads = nn.ModuleList(Head(config.width, kernel, virtual) for _ in range(len(self.vit.taps) + 1))
        self.image = image if state is None else config.image
        mean, deviation = (torch.tensor(values)[:, None, None] for values in IMAGENET)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)
        self.sizes = JudgedSizes(minimum=16)

    mean: Tensor
    deviation: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, depths * N)."""
        found = self.features(x)
        return torch.cat([head(part) for head, part in zip(self.heads, found, strict=True)], 1)

    def features(self, x: Tensor) -> list[Tensor]:
        """What the heads see, of pixels in the judge's own range: (B, W, N) for each depth."""
        low, high = self.range
        return self.vit(self._sized(((x - low) / (high - low) - self.mean) / self.deviation))

    def _sized(self, x: Tensor) -> Tensor:
        side, (height, width) = self.image, x.shape[-2:]
        if (height, width) == (side, side):
            return x
        if min(height, width) < side:
            return F.interpolate(x, size=(side, side), mode="bicubic", align_corners=False)
        if self.training and torch.rand(()).item() < 0.5:
            top, left = (int(torch.randint(length - side + 1, ())) for length in (height, width))
            return x[..., top : top + side, left : left + side]
        return F.interpolate(x, size=(side, side), mode="area")


class Head(nn.Module):
    """(B, W, N) to logits (B, N)."""

    def __init__(self, width: int, kernel: int, virtual: int) -> None:
        super().__init__()
        self.conv1 = spectral_norm(nn.Conv1d(width, width, 1), eps=1e-12)
        self.norm1 = LocalBatchNorm(width, virtual)
        middle = nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular")
        self.conv2 = spectral_norm(middle, eps=1e-12)
        self.norm2 = LocalBatchNorm(width, virtual)
        self.conv3 = spectral_norm(nn.Conv1d(width, 1, 1), eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm1(self.conv1(x)), 0.2)
        x = (F.leaky_relu(self.norm2(self.conv2(x)), 0.2) + x) / sqrt(2)
        return self.conv3(x).squeeze(1)


class LocalBatchNorm(nn.Module):
    """Normalises (B, W, N) over the positions and pictures of groups of at most `virtual`, in eval mode too.

    Groups are as equal as the authors' where they divide the batch, else as many more as it takes to divide it.
    """

    def __init__(self, width: int, virtual: int = 8, eps: float = 1e-6) -> None:
        super().__init__()
        self.virtual, self.eps = virtual, eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        groups = -(-len(x) // self.virtual)
        while len(x) % groups:
            groups += 1
        parts = x.float().unflatten(0, (groups, -1))
        variance, mean = torch.var_mean(parts, (1, 3), keepdim=True, correction=0)
        normal = ((parts - mean) * torch.rsqrt(variance + self.eps)).flatten(0, 1)
        return (normal * self.weight[:, None] + self.bias[:, None]).to(x.dtype)


def _with_class(tokens: Tensor) -> Tensor:
    return (tokens[:, 1:] + tokens[:, :1]).transpose(1, 2)


def _no_key_bias(bias: Tensor) -> Tensor:
    q, k, v = bias.chunk(3)
    return torch.cat([q, torch.zeros_like(k), v])


def frozen_keys() -> KeyTable:
    """DINO's and timm's names to those of `FrozenViT`, the bias of the keys zeroed."""
    dropped = (Drop("x_shift"), Drop("x_scale"), Drop("head.*"), Drop("pooler.*"), Drop("classifier.*"))
    return KeyTable(*dropped, *vit_rules("", "net.", qkv_bias=_no_key_bias))


def as_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's state dict in transformers' names, in timm's; any other unchanged."""
    if "embeddings.cls_token" not in state:
        return state
    block, qkv = "encoder.layer.#", ("query", "key", "value")
    attention = f"{block}.attention.attention"
    return KeyTable(
        Rename("embeddings.cls_token", "cls_token"),
        Rename("embeddings.position_embeddings", "pos_embed"),
        Rename("embeddings.patch_embeddings.projection.*", "patch_embed.proj.*"),
        Fuse(tuple(f"{attention}.{part}.weight" for part in qkv), "blocks.#.attn.qkv.weight"),
        Fuse(tuple(f"{attention}.{part}.bias" for part in qkv), "blocks.#.attn.qkv.bias"),
        Rename(f"{block}.attention.output.dense.*", "blocks.#.attn.proj.*"),
        Rename(f"{block}.intermediate.dense.*", "blocks.#.mlp.fc1.*"),
        Rename(f"{block}.output.dense.*", "blocks.#.mlp.fc2.*"),
        Rename(f"{block}.layernorm_before.*", "blocks.#.norm1.*"),
        Rename(f"{block}.layernorm_after.*", "blocks.#.norm2.*"),
        Rename("layernorm.*", "norm.*"),
        Rename("pooler.*", "pooler.*"),
    ).to_ours(state)


def head_keys() -> KeyTable:
    """The authors' trainable heads to ours. Ours keep the spectral norm's vectors as PyTorch's parametrization does."""
    rules = []
    for theirs, ours in (("0.0", "conv1"), ("1.fn.0", "conv2"), ("2", "conv3")):
        weight = f"heads.#.{ours}.parametrizations.weight"
        rules += [
            Rename(f"heads.#.{theirs}.weight_orig", f"{weight}.original"),
            Rename(f"heads.#.{theirs}.weight_u", f"{weight}.0._u"),
            Rename(f"heads.#.{theirs}.weight_v", f"{weight}.0._v"),
            Rename(f"heads.#.{theirs}.bias", f"heads.#.{ours}.bias"),
        ]
    return KeyTable(*rules, Rename("heads.#.0.1.*", "heads.#.norm1.*"), Rename("heads.#.1.fn.1.*", "heads.#.norm2.*"))
