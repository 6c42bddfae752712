"""The binary autoencoder's authors number all parts of a side in one flat list, in the order of execution.

encoder.blocks     conv; for each level: residual, (attention), .., downsample;
                   residual, attention, residual, norm, conv
generator.blocks   (norm), conv, residual, attention, residual;
                   for each level: residual, (attention), .., upsample; norm, conv
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from vistok.keys import Drop, Fuse, Rename, Rule
from vistok.nn.cnn import CNNConfig
from vistok.tokenizers._vqgan_keys import as_linear, as_pixelwise

Kind = Literal["plain", "residual", "attention", "resample"]


def rules(cnn: CNNConfig, norm_first: bool) -> list[Rule]:
    """All rules of one model."""
    found: list[Rule] = [
        Rename("quantize.proj.0.*", "quantizer.project.*", into=as_linear, back=as_pixelwise),
        Rename("quantize.embed.weight", "quantizer.embed"),
    ]
    unused: dict[str, tuple[int, ...]] = {
        "generator.logsigma.0.weight": (cnn.width, cnn.width, 3, 3),
        "generator.logsigma.0.bias": (cnn.width,),
        "generator.logsigma.2.weight": (cnn.channels, cnn.width, 1, 1),
        "generator.logsigma.2.bias": (cnn.channels,),
    }
    for side, parts in (("encoder", encoder_parts(cnn)), ("generator", decoder_parts(cnn, norm_first))):
        for index, (kind, ours, entering, width) in enumerate(parts):
            theirs = f"{side}.blocks.{index}."
            found += part_rules(kind, theirs, f"{ours}.", entering != width)
            if kind == "residual" and entering == width:
                unused |= {f"{theirs}conv_out.weight": (width, width, 1, 1), f"{theirs}conv_out.bias": (width,)}

    def restore(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in unused.items()}

    first, *others = unused
    dropped: list[Rule] = [Drop(first, restore=restore), *(Drop(name) for name in others)]
    return [*found, *dropped, Drop("disc.*"), Drop("perceptual.*")]


Part = tuple[Kind, str, int, int]  # its kind, our name, channels that enter and leave


def encoder_parts(cnn: CNNConfig) -> list[Part]:
    """The encoder's parts in order."""
    parts: list[Part] = [("plain", "encoder.cnn.conv_in", cnn.channels, cnn.width)]
    entering = cnn.width
    for level, width in enumerate(cnn.widths):
        parts += _level(cnn, "encoder", level, level, entering, cnn.blocks)
        if level + 1 < len(cnn.widths):
            parts.append(("resample", f"encoder.cnn.levels.{level}.resample", width, width))
        entering = width
    return [*parts, *_middle("encoder", entering), *_end("encoder", entering)]


def decoder_parts(cnn: CNNConfig, norm_first: bool) -> list[Part]:
    """The decoder's parts in order."""
    entering = cnn.widths[-1]
    parts: list[Part] = [("plain", "decoder.norm", cnn.latent_dim, cnn.latent_dim)] if norm_first else []
    parts.append(("plain", "decoder.cnn.conv_in", cnn.latent_dim, entering))
    parts += _middle("decoder", entering)
    for place, level in enumerate(reversed(range(len(cnn.widths)))):
        parts += _level(cnn, "decoder", place, level, entering, cnn.decoder_blocks or cnn.blocks)
        entering = cnn.widths[level]
        if level:
            parts.append(("resample", f"decoder.cnn.levels.{place}.resample", entering, entering))
    return [*parts, *_end("decoder", entering)]


def _level(cnn: CNNConfig, side: str, place: int, level: int, entering: int, blocks: int) -> list[Part]:
    parts: list[Part] = []
    width, ours = cnn.widths[level], f"{side}.cnn.levels.{place}"
    for block in range(blocks):
        parts.append(("residual", f"{ours}.blocks.{block}", width if block else entering, width))
        if level in cnn.attention:
            parts.append(("attention", f"{ours}.attentions.{block}", width, width))
    return parts


def _middle(side: str, width: int) -> list[Part]:
    kinds: tuple[Kind, ...] = ("residual", "attention", "residual")
    return [(kind, f"{side}.cnn.middle.{index}", width, width) for index, kind in enumerate(kinds)]


def _end(side: str, width: int) -> list[Part]:
    return [("plain", f"{side}.cnn.{name}", width, width) for name in ("norm_out", "conv_out")]


def part_rules(kind: Kind, theirs: str, ours: str, widens: bool) -> list[Rule]:
    """The rules of one part."""
    if kind == "plain":
        return [Rename(f"{theirs}{name}", f"{ours}{name}") for name in ("weight", "bias")]
    if kind == "resample":
        return [Rename(f"{theirs}conv.*", f"{ours}conv.*")]
    if kind == "attention":
        parts = (f"{theirs}q.*", f"{theirs}k.*", f"{theirs}v.*")
        return [
            Fuse(parts, f"{ours}qkv.*", into=as_linear, back=as_pixelwise),
            Rename(f"{theirs}proj_out.*", f"{ours}out.*", into=as_linear, back=as_pixelwise),
            Rename(f"{theirs}norm.*", f"{ours}norm.*"),
        ]
    same: list[Rule] = [Rename(f"{theirs}{name}.*", f"{ours}{name}.*") for name in ("norm1", "conv1", "norm2", "conv2")]
    return [*same, Rename(f"{theirs}conv_out.*", f"{ours}shortcut.*")] if widens else same


def sizes(state: Mapping[str, Tensor]) -> tuple[CNNConfig, bool]:
    """The CNN's config, and whether a norm comes first in the decoder, read off a state dict."""
    kinds = [_kind(state, f"encoder.blocks.{index}.") for index in range(_count(state, "encoder"))]
    levels: list[list[int]] = [[]]
    for index, kind in enumerate(kinds[1:-5], start=1):  # what follows are residual, attention, residual, norm, conv
        if kind == "resample":
            levels.append([])
        else:
            levels[-1].append(index)
    firsts = [state[f"encoder.blocks.{level[0]}.conv2.weight"].shape[0] for level in levels]
    width = state["encoder.blocks.0.weight"].shape[0]
    norm_first = state["generator.blocks.0.weight"].ndim == 1
    generator = [_kind(state, f"generator.blocks.{index}.") for index in range(_count(state, "generator"))]
    deepest = generator[norm_first + 4 :]
    end = deepest.index("resample") if "resample" in deepest else len(deepest) - 2
    cnn = CNNConfig(
        width=width,
        multipliers=tuple(channels // width for channels in firsts),
        blocks=sum(kinds[index] == "residual" for index in levels[0]),
        latent_dim=state["quantize.embed.weight"].shape[1],
        attention=tuple(
            place for place, level in enumerate(levels) if any(kinds[index] == "attention" for index in level)
        ),
        channels=state["encoder.blocks.0.weight"].shape[1],
        decoder_blocks=deepest[:end].count("residual"),
        activated=False,
    )
    return cnn, norm_first


def _kind(state: Mapping[str, Tensor], prefix: str) -> Kind:
    if f"{prefix}conv1.weight" in state:
        return "residual"
    if f"{prefix}q.weight" in state:
        return "attention"
    return "resample" if f"{prefix}conv.weight" in state else "plain"


def _count(state: Mapping[str, Tensor], side: str) -> int:
    indices = {int(key.split(".")[2]) for key in state if key.startswith(f"{side}.blocks.")}
    return len(indices)
