"""The authors' names of TokenBridge's generator, and ours."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vistok.keys import Drop, Fuse, Rename, Rule
from vistok.quantize.normal import NormalLevels, normal_levels


def rules(dimensions: int, levels: Callable[[], NormalLevels]) -> list[Rule]:
    """Rules for tokens of so many dimensions. Their tables of levels and their mask are made anew from `levels`."""

    def tables(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = levels()
        values, boundaries = normal_levels(2**made.bits, made.clamp)
        return {
            "reconstruction_values": values,
            "boundaries": boundaries,
            "channel_mask": torch.full((dimensions, dimensions), -torch.inf).triu(1),
        }

    heads = [tuple(f"channel_heads.{slot}.{part}" for slot in range(dimensions)) for part in ("weight", "bias")]
    return [
        Rename("class_emb.weight", "class_table.weight"),
        Rename("fake_latent", "null_class"),
        Rename("mask_token", "mask_token"),
        Rename("encoder_pos_embed_learned", "encoder_positions"),
        Rename("decoder_pos_embed_learned", "decoder_positions"),
        Rename("output_pos_embed", "output_positions"),
        Rename("z_proj.*", "project.*"),
        Rename("z_proj_ln.*", "project_norm.*"),
        Rename("encoder_norm.*", "encoder_norm.*"),
        Rename("decoder_embed.*", "decoder_embed.*"),
        Rename("decoder_norm.*", "decoder_norm.*"),
        *_block_rules("encoder_blocks.#.", "encoder.#."),
        *_block_rules("decoder_blocks.#.", "decoder.#."),
        Rename("channel_embed", "head.places"),
        Rename("timesteps_embeddings", "head.shifts"),
        Rename("condition_proj.*", "head.condition.*"),
        Fuse(tuple(f"token_embeddings.{slot}.weight" for slot in range(dimensions - 1)), "head.embeddings"),
        Rename("channel_blocks.#.attn.q_norm.*", "head.blocks.#.attention.q_norm.*"),
        Rename("channel_blocks.#.attn.k_norm.*", "head.blocks.#.attention.k_norm.*"),
        Rename("channel_blocks.#.adaLN_modulation.1.*", "head.blocks.#.modulation.project.*"),
        *_block_rules("channel_blocks.#.", "head.blocks.#."),
        Rename("channel_norm.*", "head.norm.*"),
        Rename("channel_final.adaLN_modulation.1.*", "head.modulation.project.*"),
        Fuse(heads[0], "head.weight", into=_stacked, back=_single),
        Fuse(heads[1], "head.bias", into=_stacked, back=_single),
        Drop("reconstruction_values", restore=tables),
        Drop("boundaries"),
        Drop("channel_mask"),
    ]


def _stacked(part: Tensor) -> Tensor:
    return part[None]


def _single(part: Tensor) -> Tensor:
    return part[0]


def _block_rules(theirs: str, ours: str) -> list[Rule]:
    """timm's names of a block, and ours."""
    return [
        Rename(f"{theirs}norm1.*", f"{ours}norm1.*"),
        Rename(f"{theirs}attn.qkv.*", f"{ours}attention.qkv.*"),
        Rename(f"{theirs}attn.proj.*", f"{ours}attention.out.*"),
        Rename(f"{theirs}norm2.*", f"{ours}norm2.*"),
        Rename(f"{theirs}mlp.fc1.*", f"{ours}mlp.expand.*"),
        Rename(f"{theirs}mlp.fc2.*", f"{ours}mlp.contract.*"),
    ]
