"""MaskBit's authors' generators and ours: names of tensors, sizes seen from shapes, configs.

`LFQBert` reads bits, `Bert` a table's vectors; their files differ in the first and the last layer alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.errors import ConfigError
from vistok.keys import Drop, KeyTable, Rename, Rule, State
from vistok.sampling.masked import MaskedSampling


def key_table(reads: str, width: int) -> KeyTable:
    """Their state dict to ours; `width` is the number of bits of a group."""
    block = "transformer.layers.#"
    rules: list[Rule] = [
        Rename("class_emb.weight", "class_table.weight"),
        Rename("pos_emb", "positions"),
        Rename("first_layer.0.*", "norm_in.*"),
        Rename(f"{block}.0.mha.in_proj_weight", "blocks.#.attention.qkv.weight"),
        Rename(f"{block}.0.mha.in_proj_bias", "blocks.#.attention.qkv.bias"),
        Rename(f"{block}.0.mha.out_proj.*", "blocks.#.attention.out.*"),
        Rename(f"{block}.0.norm.*", "blocks.#.norm1.*"),
        Rename(f"{block}.1.net.0.*", "blocks.#.mlp.expand.*"),
        Rename(f"{block}.1.net.2.*", "blocks.#.mlp.contract.*"),
        Rename(f"{block}.1.norm.*", "blocks.#.norm2.*"),
        Rename("norm_after_transformer.*", "norm_after.*"),
        Rename("last_layer.0.*", "mix.*"),
        Rename("last_layer.2.*", "norm_out.*"),
    ]
    if reads == "embedding":
        rules.append(Rename("tok_emb_list.#.weight", "read.tables.#.weight"))
        return KeyTable(*rules, Rename("bias.#", "predict.biases.#"))

    def weights(ours: State) -> dict[str, Tensor]:
        return {"bits_to_indices": (1 << torch.arange(width)).int()}

    rules += [Rename("input_proj.*", "read.project.*"), Rename("prediction_layer.*", "predict.project.*")]
    return KeyTable(*rules, Drop("bits_to_indices", restore=weights))


def seen(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Fields of our config from the names and shapes of an authors' state dict; None if it is none of theirs.

    Heads cannot be seen: they are the published 64 numbers wide.
    """
    if "class_emb.weight" not in state or "transformer.layers.0.0.mha.in_proj_weight" not in state:
        return None
    rows, width = state["class_emb.weight"].shape
    side = int((state["pos_emb"].shape[1] - 1) ** 0.5)
    if "input_proj.weight" in state:
        bits = state["input_proj.weight"].shape[1]
        groups = bits // state["bits_to_indices"].shape[0]
    elif "tok_emb_list.0.weight" in state:
        groups = _count(state, "tok_emb_list.{}.weight")
        bits = groups * ((state["tok_emb_list.0.weight"].shape[0] - 1).bit_length() - 1)
    else:
        return None
    return {
        "reads": "bits" if "input_proj.weight" in state else "embedding",
        "width": width,
        "layers": _count(state, "transformer.layers.{}.0.norm.weight"),
        "heads": max(width // 64, 1),
        "hidden": state["transformer.layers.0.1.net.0.weight"].shape[0],
        "bits": bits,
        "groups": groups,
        "grid": (side, side),
        "prenorm": "norm_after_transformer.weight" in state,
        "classes": rows - 1,
    }


def _count(state: Mapping[str, Tensor], key: str) -> int:
    return next(index for index in range(len(state) + 1) if key.format(index) not in state)


def told(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of our config from the authors': their YAML, or the arguments of `LFQBert` or `Bert` with `decode`'s.

    Raises ConfigError where it is neither.
    """
    model = plain.get("model", {})
    net = {**model.get("vq_model", {}), **plain, **model.get("mlm_model", {})}
    try:
        stride = net.get("input_stride") or 2 ** (net["num_resolutions"] - 1)
        side = net.get("img_size") or plain.get("dataset", {}).get("preprocessing", {}).get("resolution", 256)
        bits = int(net["codebook_size"]).bit_length() - 1
        if net.get("quantizer_type") == "lookup-free":
            bits = net["token_size"]
        return {
            "width": net["hidden_dim"],
            "layers": net["depth"],
            "heads": net["heads"],
            "hidden": net["mlp_dim"],
            "reads": "embedding" if "bert" in (net.get("model_cls"), net.get("kind")) else "bits",
            "bits": bits,
            "groups": net.get("codebook_splits", 1),
            "grid": (side // stride, side // stride),
            "factor": stride,
            "dropout": net.get("dropout", 0.1),
            "prenorm": bool(net.get("use_prenorm", False)),
            "classes": net.get("nclass", 1000),
            "class_dropout": net.get("class_label_dropout", 0.1),
            "schedule": net.get("train_mask_schedule_strategy", "arccos"),
            "smoothing": plain.get("losses", {}).get("mlm", {}).get("label_smoothing", 0.1),
            "sampling": sampling({**net, **plain.get("decode", {})}),
        }
    except KeyError as error:
        raise ConfigError(f"this is no config of MaskBit's generator: it lacks {error}") from error


def sampling(plain: Mapping[str, Any]) -> MaskedSampling:
    """Our sampler's settings from the arguments of the authors' `sample`. Raises ConfigError for unknown annealing."""
    annealing = plain.get("guidance_annealing", "none")
    if annealing not in ("none", "linear", "cosine"):
        raise ConfigError(f"guidance_annealing {annealing!r}; expected 'none', 'linear' or 'cosine'")
    anneals = bool(plain.get("use_sampling_annealing", False))
    return MaskedSampling(
        guidance=1 + plain.get("guidance_scale", 3.0),
        temperature=1.0 if anneals else plain.get("softmax_temperature", 1.0),
        steps=plain.get("num_steps", 12),
        schedule=plain.get("mask_schedule_strategy", plain.get("gen_mask_schedule_strategy", "arccos")),
        choice_temperature=plain.get("randomize_temperature", 4.5),
        temperature_annealing=anneals,
        guidance_curve="constant" if annealing == "none" else annealing,
        guidance_power=plain.get("scale_pow", 4.0) if annealing == "cosine" else 1.0,
    )
