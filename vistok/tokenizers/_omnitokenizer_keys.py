"""OmniTokenizer's published checkpoints: the authors' keys to ours, sizes from shapes, and inflation to clips.

    encoder.*  decoder.*  pre_vq_conv.1.*  post_vq_conv.1.*  codebook.*   [image_discriminator.*  video_discriminator.*
    perceptual_model.*]

Some weights of theirs have no effect: the norm of a context that is never given, position biases that are computed and
not added, and the codebook of a VAE.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vistok.errors import ConfigError
from vistok.keys import Drop, KeyTable, Rename, Rule, State
from vistok.nn.space_time import SpaceTimeSize, window_offsets

if TYPE_CHECKING:
    from vistok.tokenizers.omnitokenizer import OmniTokenizerConfig

Inflation = Literal["average", "first"]
TIME_ONLY = ("average", "center", "first", "last")


def key_table(config: "OmniTokenizerConfig") -> KeyTable:
    """The table for a model of this config."""
    time = "t" * config.time_blocks
    rules: list[Rule] = [Drop("perceptual_model.*"), Drop("image_discriminator.*"), Drop("video_discriminator.*")]
    for side, short in (("encoder", "enc"), ("decoder", "dec")):
        blocks = {"space": config.encoder_blocks if side == "encoder" else config.decoder_blocks, "time": time}
        for axis, name in (("space", "spatial"), ("time", "temporal")):
            rules += _transformer(config, f"{side}.{short}_{name}_transformer", f"{side}.{axis}", blocks[axis], axis)
    for theirs, ours in (("to_patch_emb_first_frame", "first"), ("to_patch_emb", "rest")):
        rules += [Rename(f"encoder.{theirs}.{n + 1}.*", f"encoder.{ours}.{n}.*") for n in range(3)]
    rules += [
        Rename("decoder.to_pixels_first_frame.0.*", "decoder.first.*"),
        Rename("decoder.to_pixels.0.*", "decoder.rest.*"),
        Rename("pre_vq_conv.1.*", "encoder.project.*"),
        Rename("post_vq_conv.1.*", "decoder.project.*"),
    ]
    size, dim = config.codebook_size, config.token_dim
    shapes = {"embeddings": (size, dim), "N": (size,), "z_avg": (size, dim), "codebook_usage": (size,)}
    if config.latent == "vq":
        rules += [
            Rename("codebook.embeddings", "quantizer.codebook"),
            Rename("codebook.N", "quantizer.counts"),
            Rename("codebook.z_avg", "quantizer.sums"),
        ]
        shapes = {"codebook_usage": (size,)}
    unused = {f"codebook.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    rules.append(Drop("codebook.*", restore=lambda ours: unused))
    return KeyTable(*rules)


def _transformer(config: "OmniTokenizerConfig", theirs: str, ours: str, kinds: str, axis: str) -> list[Rule]:
    rules: list[Rule] = [
        Rename(f"{theirs}.norm_out.gamma", f"{ours}.norm.gain"),
        Rename(f"{theirs}.norm_out.beta", f"{ours}.norm.shift"),
    ]
    rotary, width, heads = config.rotary and axis == "space", config.size.width, config.size.heads
    restored: dict[str, Tensor] = {}
    for index, kind in enumerate(kinds):
        a, b = f"{theirs}.layers.{index}", f"{ours}.blocks.{index}"
        rules += [
            Rename(f"{a}.3.0.*", f"{b}.mlp.norm.*"),
            Rename(f"{a}.3.1.weight", f"{b}.mlp.expand.weight"),
            Rename(f"{a}.3.4.weight", f"{b}.mlp.contract.weight"),
            Rename(f"{a}.1.norm.gamma", f"{b}.attention.norm.gain"),
            Rename(f"{a}.1.norm.beta", f"{b}.attention.norm.shift"),
        ]
        if kind == "w":
            rules += [
                Rename(f"{a}.1.relative_position_bias_table", f"{b}.attention.bias"),
                Rename(f"{a}.1.qkv.weight", f"{b}.attention.qkv.weight"),
                Rename(f"{a}.1.proj.*", f"{b}.attention.out.*"),
            ]
            restored[f"{a}.1.relative_position_index"] = window_offsets(config.space_window)
            continue
        rules += [
            Rename(f"{a}.0.dsconv.*", f"{b}.positions.*"),
            Rename(f"{a}.1.q_scale", f"{b}.attention.q_scale"),
            Rename(f"{a}.1.k_scale", f"{b}.attention.k_scale"),
            Rename(f"{a}.1.to_q.weight", f"{b}.attention.q.weight"),
            Rename(f"{a}.1.to_kv.weight", f"{b}.attention.kv.weight"),
            Rename(f"{a}.1.to_out.weight", f"{b}.attention.out.weight"),
        ]
        restored[f"{a}.1.context_norm.gamma"], restored[f"{a}.1.context_norm.beta"] = (
            torch.ones(width),
            torch.zeros(width),
        )
        bias = f"{a}.1.spatial_rel_pos_bias.net"
        layers = (("0.0", 0, (width, 2)), ("1.0", 2, (width, width)), ("2", 4, (heads, width)))
        for name, place, shape in layers:
            if config.biased and axis == "space" and not rotary:
                rules.append(Rename(f"{bias}.{name}.*", f"{b}.attention.bias.net.{place}.*"))
            elif not rotary:
                restored[f"{bias}.{name}.weight"] = torch.zeros(shape)
                restored[f"{bias}.{name}.bias"] = torch.zeros(shape[0])
    rules += [Drop(name, restore=_constant(name, value)) for name, value in restored.items()]
    return rules


def _constant(name: str, value: Tensor) -> Any:
    return lambda ours: {name: value}


def fields_of_state(state: State) -> dict[str, Any] | None:
    """Fields of the config that names and shapes tell; None where this is no OmniTokenizer. Heads are 64 wide."""
    if "encoder.to_patch_emb_first_frame.1.weight" not in state or "pre_vq_conv.1.weight" not in state:
        return None
    space, time = "encoder.enc_spatial_transformer.layers", "encoder.enc_temporal_transformer.layers"
    patch = round((len(state["encoder.to_patch_emb_first_frame.1.weight"]) / 3) ** 0.5)
    frames = len(state["encoder.to_patch_emb.1.weight"]) // (3 * patch**2)
    width = len(state["pre_vq_conv.1.weight"][0])
    head = len(state[f"{time}.0.1.q_scale"])
    heads = len(state[f"{time}.0.1.to_q.weight"]) // head
    hidden = state[f"{time}.0.3.4.weight"].shape[1]
    size, dim = state["codebook.embeddings"].shape
    windows = [key for key in state if key.endswith("relative_position_bias_table")]
    table = len(state[windows[0]]) if windows else 225
    # `hidden` is int(factor * 2/3 * width): the factor that gives it back is found among quarters
    factor = next((q / 4 for q in range(1, 65) if int(q / 4 * (2 / 3) * width) == hidden), 4.0)
    return {
        "size": SpaceTimeSize(width, heads, head, factor),
        "encoder_blocks": _letters(state, space),
        "decoder_blocks": _letters(state, "decoder.dec_spatial_transformer.layers"),
        "time_blocks": len(_letters(state, time)),
        "patch": patch,
        "frames": frames,
        "latent": "kl" if len(state["pre_vq_conv.1.weight"]) == 2 * dim else "vq",
        "codebook_size": size,
        "token_dim": dim,
        "space_window": (round(table**0.5) + 1) // 2,
        "rotary": not any(".enc_spatial_transformer." in key and "spatial_rel_pos_bias" in key for key in state),
        "resizes": frames != 2,
    }


def _letters(state: State, layers: str) -> str:
    letters = ""
    while f"{layers}.{len(letters)}.3.1.weight" in state:
        letters += "t" if f"{layers}.{len(letters)}.0.dsconv.weight" in state else "w"
    return letters


def fields_of_config(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of our config from the authors' arguments. Raises ConfigError where they are none."""
    args = dict(plain.get("args", plain))
    args = {key.replace("casual", "causal"): value for key, value in args.items()}
    try:
        blocks, frames = args["enc_block"], args["temporal_patch_size"]
        return {
            "size": SpaceTimeSize(args["embedding_dim"], args["heads"], args["dim_head"], args.get("ff_mult", 4.0)),
            "encoder_blocks": blocks,
            "decoder_blocks": args["dec_block"],
            "time_blocks": args.get("temporal_depth", 4),
            "patch": args["patch_size"],
            "frames": frames,
            "latent": "kl" if args.get("use_vae", False) else "vq",
            "codebook_size": args["n_codes"],
            "token_dim": args["codebook_dim"],
            "normalize": args.get("l2_code", True),
            "kl_weight": args.get("kl_weight", 1e-6),
            "space_window": args.get("twod_window_size", 8),
            "rotary": args.get("spatial_pos", "rel") == "rope",
            "causal": args.get("causal_in_temporal_transformer", True),
            "causal_conv": args.get("causal_in_peg", True),
            "window": max(1 + frames, 1 + 16 // frames * frames),
            "resolution": args["resolution"],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"these are not the arguments of OmniTokenizer's authors: {error} is missing") from error


# -- from pictures to clips ------------------------------------------------------------------------------------------


def inflate(state: State, frames: int, strategy: Inflation = "average") -> dict[str, Tensor]:
    """Weights of the clip's patches and pixel heads from those of the first frame, in the authors' names.

    "average" repeats them `frames` times and divides by it; "first" gives the first copy all and the others nothing.
    Inputs are repeated as whole copies although a clip's patches have the colour slowest: so the authors train.
    """
    if strategy not in ("average", "first"):
        raise ConfigError(f"inflation {strategy!r}; expected 'average' or 'first'")

    def spread(tensor: Tensor, axis: int) -> Tensor:
        copies = [tensor / frames] * frames
        if strategy == "first":
            copies = [tensor] + [torch.zeros_like(tensor)] * (frames - 1)
        return torch.cat(copies, axis)

    first, rest = "encoder.to_patch_emb_first_frame", "encoder.to_patch_emb"
    head, heads = "decoder.to_pixels_first_frame.0", "decoder.to_pixels.0"
    return {
        f"{rest}.1.weight": spread(state[f"{first}.1.weight"], 0),
        f"{rest}.1.bias": spread(state[f"{first}.1.bias"], 0),
        f"{rest}.2.weight": spread(state[f"{first}.2.weight"], 1),
        f"{rest}.2.bias": state[f"{first}.2.bias"],
        f"{rest}.3.weight": state[f"{first}.3.weight"],
        f"{rest}.3.bias": state[f"{first}.3.bias"],
        f"{heads}.weight": spread(state[f"{head}.weight"], 0),
        f"{heads}.bias": spread(state[f"{head}.bias"], 0),
    }


def inflate_kernel(kernel: Tensor, depth: int, strategy: str = "center") -> Tensor:
    """A 2D convolution's kernel (O, I, h, w) as one over time too, (O, I, depth, h, w); vectors pass.

    "average" spreads it over time; "first", "center" and "last" put it at one place: of four, at 0, 1 and 3.
    """
    if strategy not in TIME_ONLY:
        raise ConfigError(f"inflation {strategy!r}; expected one of {', '.join(TIME_ONLY)}")
    if kernel.ndim != 4:
        return kernel
    if strategy == "average":
        return kernel[:, :, None].repeat(1, 1, depth, 1, 1) / depth
    place = {"first": 0, "center": depth // 2 - 1, "last": depth - 1}[strategy]
    deep = kernel.new_zeros(*kernel.shape[:2], depth, *kernel.shape[2:])
    deep[:, :, place] = kernel
    return deep
