"""FlexTok's published checkpoints: the authors' keys to ours, and which model their weights or configs describe.

    vae.vae.*  (diffusers)   encoder.module_dict.enc_*   decoder.module_dict.dec_*

Neither the width of a head, nor FSQ's levels, nor the VAE's scale can be seen in shapes. Published files carry the
whole configuration in their header (and as config.json beside them): a tree whose `_target_` entries name the authors'
classes. They are read as words, never imported.
"""

from collections.abc import Mapping
from math import gcd, isqrt
from typing import Any

import torch
from torch import Tensor

from vistok.errors import ConfigError
from vistok.keys import Constant, Fuse, KeyTable, Rename, Rule, State
from vistok.nn.vae import VAEConfig
from vistok.tokenizers._flextok_network import TrunkSize

LEVELS = (8, 8, 8, 5, 5, 5)
HEAD, GROUPS = 64, 32


def key_table(scale: float | None, modulated_head: bool) -> KeyTable:
    """The table for one model; `scale` of its VAE, None where it works on pixels."""
    enc, dec = "encoder.module_dict.", "decoder.module_dict."
    rules: list[Rule] = [
        Rename(f"{enc}enc_patch_emb.patch_proj.*", "encoder.embed.*"),
        Rename(f"{enc}enc_posemb_module.posembs", "encoder.positions", _table, _planes),
        Rename(f"{enc}enc_register_module.registers", "encoder.registers"),
        *_trunk(f"{enc}enc_transformer.", "encoder."),
        Rename(f"{enc}enc_to_latents.proj.*", "encoder.project.*"),
        Rename(f"{dec}dec_from_latents.proj.*", "decoder.embed_codes.*"),
        Rename(f"{dec}dec_registers_posemb_module.posembs", "decoder.register_positions", _rows, _columns),
        Rename(f"{dec}dec_nested_dropout.dropout_mask_token", "decoder.mask_token"),
        Rename(f"{dec}dec_latent_dropout.nullcond", "decoder.null_token"),
        Rename(f"{dec}dec_noise_patch_emb.patch_proj.*", "decoder.embed.*"),
        Rename(f"{dec}dec_patches_posemb_module.posembs", "decoder.positions", _table, _planes),
        Rename(f"{dec}dec_time_embedder.mlp.*", "decoder.time.*"),
        *_trunk(f"{dec}dec_transformer.", "decoder."),
        Rename(f"{dec}dec_to_patches.proj.*", "decoder.project.*"),
    ]
    if modulated_head:
        rules.append(Rename(f"{dec}dec_to_patches.adaLN_modulation.1.*", "decoder.head_modulation.project.*"))
    if scale is not None:
        rules += [
            Rename("vae.vae.*", "vae.model.*"),
            Constant("vae.running_var", lambda: torch.tensor(scale**-2)),
        ]
    return KeyTable(*rules)


def _trunk(theirs: str, ours: str) -> list[Rule]:
    theirs, ours = f"{theirs}blocks.#.", f"{ours}blocks.#."
    return [
        Fuse(tuple(f"{theirs}attn.{part}.weight" for part in ("wq", "wk", "wv")), f"{ours}attention.qkv.weight"),
        Rename(f"{theirs}attn.proj.weight", f"{ours}attention.out.weight"),
        Fuse((f"{theirs}mlp.fc1.weight", f"{theirs}mlp.fc3.weight"), f"{ours}mlp.expand.weight"),
        Rename(f"{theirs}mlp.fc2.weight", f"{ours}mlp.contract.weight"),
        Rename(f"{theirs}adaLN_modulation.1.*", f"{ours}modulation.project.*"),
    ]


def _table(planes: Tensor) -> Tensor:
    return planes[0].permute(1, 2, 0)


def _planes(table: Tensor) -> Tensor:
    return table.permute(2, 0, 1)[None].contiguous()


def _rows(planes: Tensor) -> Tensor:
    return planes[0, 0].T


def _columns(rows: Tensor) -> Tensor:
    return rows.T[None, None].contiguous()


# -- which model it is -----------------------------------------------------------------------------------------------


def fields_of_state(state: State) -> dict[str, Any] | None:
    """Fields of the config that shapes tell, None where it is no FlexTok; heads are taken to be 64 wide, levels as
    published, 32 groups in the VAE and its scale as 1.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    try:
        return _fields_of_shapes(shapes)
    except (LookupError, ValueError, TypeError, ZeroDivisionError):
        return None


def _fields_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    enc, dec = "encoder.module_dict.", "decoder.module_dict."
    registers, _ = shapes[f"{enc}enc_register_module.registers"]
    *_, rows, columns = shapes[f"{enc}enc_posemb_module.posembs"]
    vae = _vae(shapes) if "vae.vae.encoder.conv_in.weight" in shapes else None
    channels = vae.latent_dim if vae else 3
    patch = isqrt(shapes[f"{enc}enc_patch_emb.patch_proj.weight"][1] // channels)
    step = patch * (vae.factor if vae else 1)
    return {
        "encoder": _size(shapes, f"{enc}enc_transformer."),
        "decoder": _size(shapes, f"{dec}dec_transformer."),
        "registers": registers,
        "vae": vae,
        "size": (rows * step, columns * step),
        "patch": patch,
        "grid": (rows, columns),
        "modulated_head": f"{dec}dec_to_patches.adaLN_modulation.1.weight" in shapes,
    }


def _size(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> TrunkSize:
    width = shapes[f"{prefix}blocks.0.attn.wq.weight"][0]
    return TrunkSize(width, _count(shapes, prefix + "blocks.{}.attn.wq.weight"), HEAD)


def _vae(shapes: Mapping[str, tuple[int, ...]]) -> VAEConfig:
    stem = "vae.vae.encoder.down_blocks.{}.resnets.0.conv1.weight"
    levels = _count(shapes, stem)
    widths = tuple(shapes[stem.format(level)][0] for level in range(levels))
    return VAEConfig(
        latent_dim=shapes["vae.vae.decoder.conv_in.weight"][1],
        widths=widths,
        groups=min(GROUPS, gcd(*widths)),
        blocks=_count(shapes, "vae.vae.encoder.down_blocks.0.resnets.{}.conv1.weight"),
    )


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return next(index for index in range(len(shapes) + 1) if pattern.format(index) not in shapes)


def fields_of_config(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the config that the authors' configuration tree describes. Raises ConfigError."""
    try:
        vae, encoder, decoder = plain["vae"], _modules(plain["encoder"]), _modules(plain["decoder"])
        registers = encoder["enc_register_module"]
        grid = encoder["enc_posemb_module"]["max_sizes"]
        patch = int(encoder["enc_patch_emb"].get("patch_sizes", (2, 2))[0])
        rows, columns = (int(side) for side in grid)
        return {
            "encoder": _described(encoder["enc_transformer"]),
            "decoder": _described(decoder["dec_transformer"]),
            "registers": int(registers["n_max"]),
            "levels": tuple(plain["regularizer"]["levels"]),
            "vae": VAEConfig(int(vae.get("latent_channels", 16)), scale=float(vae.get("scaling_factor") or 1.0)),
            "size": (rows * patch * 8, columns * patch * 8),
            "patch": patch,
            "grid": (rows, columns),
            "modulated_head": decoder["dec_to_patches"].get("adaLN_emb_read_key") is not None,
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"this is not a configuration of FlexTok's authors: {error} is missing or unknown") from error


def _modules(part: Mapping[str, Any]) -> Mapping[str, Any]:
    return part["module_dict"]


def _described(trunk: Mapping[str, Any]) -> TrunkSize:
    return TrunkSize(int(trunk.get("dim", 768)), int(trunk.get("depth", 12)), int(trunk.get("head_dim", HEAD)))
