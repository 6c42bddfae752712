"""The authors' names inside one CNN of the VQGAN line, in its three published families, and ours.

taming    down.{i}.block.{j}, down.{i}.attn.{j}, mid.block_1, mid.attn_1; up.{i} counts from full resolution
maskgit   the same without attention, mid.{j}, upsample_conv
mage      maskgit's network in taming's names: mid.block_{j}, upsample.conv
var       taming's names, with one fused qkv in every attention
llamagen  conv_blocks.{i}.res.{j}, conv_blocks.{i}.attn.{j}, mid.{j}, in the order of execution
ours      levels.{i}.blocks.{j}, levels.{i}.attentions.{j}, levels.{i}.resample, middle.{j}, in the order of execution
"""

from typing import Literal

from torch import Tensor

from vistok.keys import Fuse, Rename, Rule

Family = Literal["taming", "maskgit", "llamagen"]


def cnn_rules(
    family: Family | Literal["mage", "var"],
    side: Literal["encoder", "decoder"],
    theirs: str,
    ours: str,
    levels: int = 5,
) -> list[Rule]:
    """Rules for one CNN of `levels` levels, under the prefix `theirs` in the authors' file and `ours` in the model."""
    up = "upsample_conv" if family == "maskgit" else "upsample.conv"
    resample = "downsample.conv" if side == "encoder" else up
    fused = family == "var"
    if family == "llamagen":
        rules = _level_rules(f"{theirs}conv_blocks.#.", f"{ours}levels.#.", "res", resample)
        rules += _attention_rules(f"{theirs}mid.1.", f"{ours}middle.1.")
        rules += _block_rules(f"{theirs}mid.#.", f"{ours}middle.#.")
    elif side == "encoder":
        rules = _level_rules(f"{theirs}down.#.", f"{ours}levels.#.", "block", resample, fused)
    else:  # theirs count levels from full resolution, ours in the order of execution
        rules = []
        for level in range(levels):
            theirs_level, ours_level = f"{theirs}up.{levels - 1 - level}.", f"{ours}levels.{level}."
            rules += _level_rules(theirs_level, ours_level, "block", resample, fused)
    if family == "maskgit":
        rules += _block_rules(f"{theirs}mid.#.", f"{ours}middle.#.")
    if family in ("taming", "mage", "var"):
        last = 1 if family == "mage" else 2
        rules += _block_rules(f"{theirs}mid.block_1.", f"{ours}middle.0.")
        rules += _block_rules(f"{theirs}mid.block_2.", f"{ours}middle.{last}.")
    if family in ("taming", "var"):
        rules += _attention_rules(f"{theirs}mid.attn_1.", f"{ours}middle.1.", fused)
    return [*rules, *(Rename(f"{theirs}{name}.*", f"{ours}{name}.*") for name in ("conv_in", "norm_out", "conv_out"))]


def _level_rules(theirs: str, ours: str, block: str, resample: str, fused: bool = False) -> list[Rule]:
    return [
        *_block_rules(f"{theirs}{block}.#.", f"{ours}blocks.#."),
        *_attention_rules(f"{theirs}attn.#.", f"{ours}attentions.#.", fused),
        Rename(f"{theirs}{resample}.*", f"{ours}resample.conv.*"),
    ]


def _block_rules(theirs: str, ours: str) -> list[Rule]:
    same = [Rename(f"{theirs}{name}.*", f"{ours}{name}.*") for name in ("norm1", "conv1", "norm2", "conv2")]
    return [*same, Rename(f"{theirs}nin_shortcut.*", f"{ours}shortcut.*")]


def _attention_rules(theirs: str, ours: str, fused: bool = False) -> list[Rule]:
    parts = (f"{theirs}qkv.*",) if fused else (f"{theirs}q.*", f"{theirs}k.*", f"{theirs}v.*")
    return [
        Fuse(parts, f"{ours}qkv.*", into=as_linear, back=as_pixelwise),
        Rename(f"{theirs}proj_out.*", f"{ours}out.*", into=as_linear, back=as_pixelwise),
        Rename(f"{theirs}norm.*", f"{ours}norm.*"),
    ]


def as_linear(weight: Tensor) -> Tensor:
    """A 1x1 convolution's weight (O, I, 1, 1) as a matrix (O, I); biases pass."""
    return weight.flatten(1) if weight.ndim == 4 else weight


def as_pixelwise(weight: Tensor) -> Tensor:
    """The inverse of `as_linear`."""
    return weight[:, :, None, None] if weight.ndim == 2 else weight
