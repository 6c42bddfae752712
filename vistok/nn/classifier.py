"""A vision transformer that says which class a picture is of, as DeiT and MAE's fine-tuned ViTs are.

    pixels (B, 3, H, W) -> patches or a small CNN -> [class, distillation, patches] + positions (B, P + N, W)
      -> blocks -> class token, or mean of the patches -> logits (B, classes)

The blocks can be run by someone else (a reducer), who may hand back fewer tokens and how many patches each stands for.
Sources: arXiv:2010.11929; distillation token arXiv:2012.12877 (DeiT); norm after the mean arXiv:2111.06377 (MAE);
convolutional stem arXiv:2106.14881.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vistok.errors import ConfigError, InputError
from vistok.keys import KeyTable, Rename, State
from vistok.nn.transformer import Activation
from vistok.nn.vit import SkippingBlock, vit_rules


@dataclass(frozen=True)
class ClassifierConfig:
    """Sizes.

    image         height and width in pixels; `patch` the side of a patch
    class_token, distill_token   whether they stand before the patches; DeiT's logits are the mean of both heads'
    pool          what is classified: the class token, or the mean of the patches
    norm_first    whether the last norm comes before the mean; after it in MAE. The class token is always normed first
    stem          "patch": one linear map a patch. "cnn": two 3x3 convolutions of stride 2 with a GELU, patches of 4
    mean, std     of the pixels that the network was trained with, by channel
    """

    image: tuple[int, int] = (224, 224)
    patch: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    classes: int = 1000
    channels: int = 3
    mlp: float = 4.0
    class_token: bool = True
    distill_token: bool = False
    pool: Literal["class", "mean"] = "class"
    norm_first: bool = True
    stem: Literal["patch", "cnn"] = "patch"
    activation: Activation = "gelu"
    qkv_bias: bool = True
    eps: float = 1e-6
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if any(side % self.patch for side in self.image):
            raise ConfigError(f"patches of {self.patch} pixels do not tile {self.image[0]} x {self.image[1]}")
        if self.pool == "class" and not self.class_token:
            raise ConfigError("pool 'class' needs class_token; a ViT without one has pool 'mean'")
        if self.distill_token and not self.class_token:
            raise ConfigError("a distillation token stands after a class token: set class_token too")
        if self.stem == "cnn" and self.patch != 4:
            raise ConfigError(f"the CNN stem makes patches of 4 pixels, not {self.patch}")

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return int(self.class_token) + int(self.distill_token)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image[0] // self.patch, self.image[1] // self.patch


class Classifier(nn.Module):
    """See the module's docstring."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ClassifierConfig, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch = _stem(config)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if config.class_token else None
        self.distill_token = nn.Parameter(torch.zeros(1, 1, width)) if config.distill_token else None
        rows, columns = config.grid
        self.positions = nn.Parameter(torch.zeros(1, config.prefix + rows * columns, width))
        last = max(config.depth - 1, 1)
        self.blocks = nn.ModuleList(
            SkippingBlock(
                drop_path * index / last,
                width,
                config.heads,
                hidden=int(width * config.mlp),
                activation=config.activation,
                bias=config.qkv_bias,
                eps=config.eps,
            )
            for index in range(config.depth)
        )
        if not config.qkv_bias:  # timm leaves the other biases in
            for block in self.blocks:
                attention, mlp = block.attention, block.mlp  # type: ignore[union-attr]
                for name, owner in (("out", attention), ("expand", mlp), ("contract", mlp)):
                    plain = getattr(owner, name)
                    setattr(owner, name, nn.Linear(plain.in_features, plain.out_features))
        self.norm = nn.LayerNorm(width, eps=config.eps)
        self.head = nn.Linear(width, config.classes)
        self.distill_head = nn.Linear(width, config.classes) if config.distill_token else None
        self.register_buffer("mean", torch.tensor(config.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(-1, 1, 1), persistent=False)
        for token in (self.positions, self.class_token, self.distill_token):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def normed(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] in the range that the network was trained with."""
        return (pixels - self.mean) / self.std

    def embed(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in the network's own range to tokens (B, P + N, W), positions added.

        Raises InputError for pictures of another size.
        """
        expected = (self.config.channels, *self.config.image)
        if tuple(pixels.shape[1:]) != expected:
            raise InputError(f"pictures {tuple(pixels.shape[1:])}; this network takes {expected}: resize them")
        tokens = self.patch(pixels).flatten(2).transpose(1, 2)
        before = [token for token in (self.class_token, self.distill_token) if token is not None]
        return torch.cat([*(token.expand(len(tokens), -1, -1) for token in before), tokens], 1) + self.positions

    def classify(self, tokens: Tensor, sizes: Tensor | None = None) -> Tensor:
        """What the blocks give, (B, P + M, W), to logits (B, classes). `sizes` (B, P + M): patches behind a token.

        A mean weighs every token by them, so that it is the mean over patches.
        """
        if self.config.pool == "mean":
            found = self.norm(tokens) if self.config.norm_first else tokens
            weights = None if sizes is None else sizes[:, self.config.prefix :]
            pooled = weighted_mean(found[:, self.config.prefix :], weights)
            return self.head(pooled if self.config.norm_first else self.norm(pooled))
        found = self.norm(tokens[:, : self.config.prefix])
        logits = self.head(found[:, 0])
        return logits if self.distill_head is None else (logits + self.distill_head(found[:, 1])) / 2

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in the network's own range to logits (B, classes)."""
        tokens = self.embed(pixels)
        for block in self.blocks:
            tokens = block(tokens)
        return self.classify(tokens)


def weighted_mean(tokens: Tensor, sizes: Tensor | None) -> Tensor:
    """The mean over tokens (B, N, W), each with its weight of `sizes` (B, N): (B, W)."""
    if sizes is None:
        return tokens.mean(1)
    return torch.einsum("bnw,bn->bw", tokens, sizes.to(tokens.dtype)) / sizes.sum(1, keepdim=True).to(tokens.dtype)


def _stem(config: ClassifierConfig) -> nn.Module:
    if config.stem == "patch":
        return nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)
    return nn.Sequential(
        nn.Conv2d(config.channels, config.width // 2, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(config.width // 2, config.width, 3, stride=2, padding=1),
    )


def classifier_keys(config: ClassifierConfig, ours: str = "") -> KeyTable:
    """timm's names (DeiT's and MAE's too) to ours."""
    rules = [
        Rename("dist_token", f"{ours}distill_token"),
        Rename("head_dist.*", f"{ours}distill_head.*"),
        Rename("head.*", f"{ours}head.*"),
        Rename("fc_norm.*" if not config.norm_first else "norm.*", f"{ours}norm.*"),
    ]
    return KeyTable(*rules, *(rule for rule in vit_rules("", ours) if rule.theirs != "norm.*"))  # type: ignore[union-attr]


def recognise_classifier(state: State) -> ClassifierConfig | None:
    """Sizes of a state dict in timm's names; heads are 64 wide but in ViT-H, square pictures. None where it is none."""
    patch, positions, head = (state.get(key) for key in ("patch_embed.proj.weight", "pos_embed", "head.weight"))
    hidden = state.get("blocks.0.mlp.fc1.weight")
    if patch is None or positions is None or head is None or hidden is None:
        return None
    if "blocks.0.ls1.gamma" in state or "blocks.0.attn.q_norm.weight" in state:
        return None
    width, prefix = patch.shape[0], int("cls_token" in state) + int("dist_token" in state)
    side = round((positions.shape[1] - prefix) ** 0.5)
    mean = "fc_norm.weight" in state or not prefix
    return ClassifierConfig(
        image=(side * patch.shape[-1],) * 2,
        patch=patch.shape[-1],
        width=width,
        depth=next(index for index in range(len(state)) if f"blocks.{index}.norm1.weight" not in state),
        heads=16 if width == 1280 else max(width // 64, 1),
        classes=head.shape[0],
        channels=patch.shape[1],
        mlp=hidden.shape[0] / width,
        class_token="cls_token" in state,
        distill_token="dist_token" in state,
        pool="mean" if mean else "class",
        norm_first="fc_norm.weight" not in state,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
    )
