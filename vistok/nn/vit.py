"""A plain vision transformer, as DINO and DINOv2 are: class token, learned positions, pre-norm blocks.

    pixels (B, 3, H, W) -> p x p patches -> [class, patches] + positions (B, 1 + N, W) -> blocks -> features

Sources: arXiv:2010.11929, 2104.14294 (DINO), 2304.07193 (DINOv2, whose blocks have layer scale).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.keys import KeyTable, Rename, Rule, State, Transform, same
from vistok.nn.transformer import Activation, Block


@dataclass(frozen=True)
class ViTConfig:
    """Sizes. `image` is the side in pixels that the positions are for; `layer_scale` its first value, or none."""

    image: int = 224
    patch: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    layer_scale: float | None = None
    activation: Activation = "gelu"
    mlp: float = 4.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.image % self.patch:
            raise ConfigError(f"patches of {self.patch} pixels do not tile a side of {self.image}")

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image // self.patch


class ViT(nn.Module):
    """See the module's docstring. Without `patches` it has no patch embedding: a decoder, whose tokens come from
    elsewhere. `drop_path`: share of items that skip a branch in training, rising linearly from 0 over the blocks.
    """

    def __init__(self, config: ViTConfig, *, patches: bool = True, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.patch = nn.Conv2d(3, config.width, config.patch, stride=config.patch) if patches else None
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + config.grid**2, config.width))
        last = max(config.depth - 1, 1)
        self.blocks = nn.ModuleList(
            SkippingBlock(
                drop_path * index / last,
                config.width,
                config.heads,
                hidden=int(config.width * config.mlp),
                activation=config.activation,
                eps=config.eps,
                layer_scale=config.layer_scale,
            )
            for index in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        nn.init.trunc_normal_(self.positions, std=0.02)
        nn.init.normal_(self.class_token, std=1e-6)

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in the model's own range to patch tokens (B, N, W), without positions."""
        assert self.patch is not None
        return self.patch(pixels).flatten(2).transpose(1, 2)

    def placed(self, tokens: Tensor) -> Tensor:
        """Patch tokens (B, N, W) with the class token before them and positions added: (B, 1 + N, W)."""
        return torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], 1) + self.positions

    def run(self, tokens: Tensor, *, first: int | None = None, last: int | None = None) -> Tensor:
        """Blocks and the final norm, (B, M, W) to (B, M, W); with `first` or `last`, only so many tokens of that end.

        What nobody reads is left out of the last block, but in training with skipped branches.
        """
        kept = slice(0, first) if first is not None else slice(-last, None) if last is not None else None
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        if kept is None or (self.blocks[-1].skip and self.training):
            tokens = self.blocks[-1](tokens)
            return self.norm(tokens if kept is None else tokens[:, kept])
        return self.norm(self.blocks[-1](tokens, only=kept))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) to all tokens after the final norm, (B, 1 + N, W), the class token first."""
        return self.run(self.placed(self.embed(pixels)))


class SkippingBlock(Block):
    """A block whose branches are each left out, in training, for a share `skip` of the items (arXiv:1603.09382)."""

    def __init__(self, skip: float, width: int, heads: int, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.skip = skip

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """(B, N, W) to (B, N, W)."""
        if not (self.skip and self.training):
            return super().forward(x, *args, **options)
        x = x + self._kept(self.attention(self.norm1(x)), self.scale1)
        return x + self._kept(self.mlp(self.norm2(x)), self.scale2)

    def _kept(self, branch: Tensor, gain: Tensor | None) -> Tensor:
        branch = branch if gain is None else branch * gain
        kept = branch.new_empty(len(branch), 1, 1).bernoulli_(1 - self.skip)
        return branch * kept / (1 - self.skip)


def vit_rules(theirs: str, ours: str, *, qkv_bias: Transform = same) -> list[Rule]:
    """timm's and DINO's own names (one layout) to ours; `qkv_bias` changes the fused bias on its way in."""
    return [
        Rename(f"{theirs}cls_token", f"{ours}class_token"),
        Rename(f"{theirs}pos_embed", f"{ours}positions"),
        Rename(f"{theirs}patch_embed.proj.*", f"{ours}patch.*"),
        Rename(f"{theirs}blocks.#.attn.qkv.bias", f"{ours}blocks.#.attention.qkv.bias", into=qkv_bias),
        Rename(f"{theirs}blocks.#.attn.qkv.*", f"{ours}blocks.#.attention.qkv.*"),
        Rename(f"{theirs}blocks.#.attn.proj.*", f"{ours}blocks.#.attention.out.*"),
        Rename(f"{theirs}blocks.#.ls1.gamma", f"{ours}blocks.#.scale1"),
        Rename(f"{theirs}blocks.#.ls2.gamma", f"{ours}blocks.#.scale2"),
        Rename(f"{theirs}blocks.#.mlp.fc1.*", f"{ours}blocks.#.mlp.expand.*"),
        Rename(f"{theirs}blocks.#.mlp.fc2.*", f"{ours}blocks.#.mlp.contract.*"),
        Rename(f"{theirs}blocks.#.norm1.*", f"{ours}blocks.#.norm1.*"),
        Rename(f"{theirs}blocks.#.norm2.*", f"{ours}blocks.#.norm2.*"),
        Rename(f"{theirs}norm.*", f"{ours}norm.*"),
    ]


def vit_keys(theirs: str = "", ours: str = "") -> KeyTable:
    """A whole state dict of timm's or DINO's."""
    return KeyTable(*vit_rules(theirs, ours))


def fitted(state: State, config: ViTConfig) -> dict[str, Tensor]:
    """A state dict in our names with its patch kernel and its positions resampled to those of `config`.

    The kernel so that it sees a scaled patch as it saw the patch (arXiv:2212.08013, FlexiViT), positions bicubically.
    """
    fitting = dict(state)
    kernel, positions = state["patch.weight"], state["positions"]
    if kernel.shape[-1] != config.patch:
        fitting["patch.weight"] = _resampled_kernel(kernel, config.patch)
    if positions.shape[1] != 1 + config.grid**2:
        old = round((positions.shape[1] - 1) ** 0.5)
        grid = positions[:, 1:].transpose(1, 2).unflatten(2, (old, old))
        grid = F.interpolate(grid, size=(config.grid, config.grid), mode="bicubic", antialias=True)
        fitting["positions"] = torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)
    return fitting


def _resampled_kernel(kernel: Tensor, patch: int) -> Tensor:
    """(W, C, p, p) to (W, C, patch, patch): the pseudo-inverse of resizing a patch, applied to the kernel."""
    old = kernel.shape[-1]
    units = torch.eye(old * old).view(old * old, 1, old, old)
    resize = F.interpolate(units, size=(patch, patch), mode="bicubic", antialias=True).flatten(1)  # (p^2, patch^2)
    found = kernel.flatten(2).double() @ torch.linalg.pinv(resize.double()).T
    return found.unflatten(2, (patch, patch)).to(kernel.dtype)


def recognise_vit(state: State, prefix: str = "", *, heads: int | None = None) -> ViTConfig | None:
    """Sizes of a state dict in timm's names; heads are 64 wide unless given. None where it is no ViT."""
    patch, positions = state.get(f"{prefix}patch_embed.proj.weight"), state.get(f"{prefix}pos_embed")
    hidden = state.get(f"{prefix}blocks.0.mlp.fc1.weight")
    if patch is None or positions is None or hidden is None:
        return None
    width, side = patch.shape[0], round((positions.shape[1] - 1) ** 0.5)
    depth = next(index for index in range(len(state)) if f"{prefix}blocks.{index}.norm1.weight" not in state)
    return ViTConfig(
        image=side * patch.shape[-1],
        patch=patch.shape[-1],
        width=width,
        depth=depth,
        heads=heads or max(width // 64, 1),
        layer_scale=1e-5 if f"{prefix}blocks.0.ls1.gamma" in state else None,
        mlp=hidden.shape[0] / width,
    )
