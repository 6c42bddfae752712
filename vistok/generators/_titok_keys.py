"""TiTok's published generators: the authors' keys to ours, and which model their weights or configs describe.

ImageBert   model.embeddings.*  model.encoder.layer.#.*  model.lm_head.*        Hugging Face's names
UViTBert    embeddings  pos_embed  in_blocks  mid_block  out_blocks  lm_head    timm's
MaskGen     blocks.# or decoder_blocks.#, diffloss.net.* of KL                  diffusers'
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.errors import ConfigError
from vistok.keys import Drop, Fuse, KeyTable, Rename, Rule, State
from vistok.sampling.masked import MaskedSampling
from vistok.sampling.masking import Schedule

# -- keys --------------------------------------------------------------------------------------------------------------


def key_table(network: str, latent: str) -> KeyTable:
    """The table for one kind of network ("bert", "uvit", "mmdit") on codes ("vq") or vectors ("kl")."""
    if network == "bert":
        return KeyTable(*_bert())
    if network == "uvit":
        return KeyTable(*_uvit())
    return KeyTable(*(_codes() if latent == "vq" else _vectors()))


def _bert() -> list[Rule]:
    theirs, ours = "model.encoder.layer.#.", "network.blocks.#."
    qkv = tuple(f"{theirs}attention.self.{name}.*" for name in ("query", "key", "value"))
    return [
        Rename("model.embeddings.word_embeddings.weight", "network.table.weight"),
        Rename("model.embeddings.position_embeddings.weight", "network.positions"),
        Rename("model.embeddings.token_type_embeddings.weight", "network.types"),
        Rename("model.embeddings.LayerNorm.*", "network.norm.*"),
        Drop("model.embeddings.position_ids"),
        Fuse(qkv, f"{ours}attention.qkv.*"),
        Rename(f"{theirs}attention.output.dense.*", f"{ours}attention.out.*"),
        Rename(f"{theirs}attention.output.LayerNorm.*", f"{ours}norm1.*"),
        Rename(f"{theirs}intermediate.dense.*", f"{ours}mlp.expand.*"),
        Rename(f"{theirs}output.dense.*", f"{ours}mlp.contract.*"),
        Rename(f"{theirs}output.LayerNorm.*", f"{ours}norm2.*"),
        Rename("model.lm_head.*", "network.head.*"),
    ]


def _uvit() -> list[Rule]:
    rules: list[Rule] = [
        Rename("embeddings.weight", "network.table.weight"),
        Rename("pos_embed", "network.positions"),
        Rename("out_blocks.#.skip_linear.*", "network.skips.#.*"),
        Rename("norm.*", "network.norm.*"),
        Rename("lm_head.*", "network.head.*"),
    ]
    for theirs, ours in (("in_blocks.#", "down.#"), ("mid_block", "middle"), ("out_blocks.#", "up.#")):
        rules += [
            Rename(f"{theirs}.norm1.*", f"network.{ours}.norm1.*"),
            Rename(f"{theirs}.attn.qkv.*", f"network.{ours}.attention.qkv.*"),
            Rename(f"{theirs}.attn.proj.*", f"network.{ours}.attention.out.*"),
            Rename(f"{theirs}.norm2.*", f"network.{ours}.norm2.*"),
            Rename(f"{theirs}.mlp.fc1.*", f"network.{ours}.mlp.expand.*"),
            Rename(f"{theirs}.mlp.fc2.*", f"network.{ours}.mlp.contract.*"),
        ]
    return rules


def _codes() -> list[Rule]:
    def tied(ours: State) -> dict[str, Tensor]:
        return {"lm_head.weight": ours["network.table.weight"]}

    return [
        Rename("embeddings.weight", "network.table.weight"),
        Drop("lm_head.weight", restore=tied),  # the same table again
        Rename("pos_embed", "network.positions"),
        Rename("text_embed_proj.*", "network.trunk.text.*"),
        Rename("cond_pooled_proj.*", "network.trunk.pooled.*"),
        Rename("norm.linear.*", "network.trunk.norm.modulation.project.*"),
        *_joint("blocks"),
    ]


def _vectors() -> list[Rule]:
    head = "network.head."
    return [
        Rename("text_emb.*", "network.trunk.text.*"),
        Rename("text_pooled_emb.*", "network.trunk.pooled.*"),
        Rename("decoder_norm.linear.*", "network.trunk.norm.modulation.project.*"),
        *_joint("decoder_blocks"),
        Rename("z_proj.*", "network.project.*"),
        Rename("z_proj_ln.*", "network.project_norm.*"),
        Rename("mask_token", "network.mask_token"),
        Rename("decoder_pos_embed_learned", "network.positions"),
        Rename("diffusion_pos_embed_learned", "network.output_positions"),
        Rename("diffloss.net.time_embed.mlp.0.*", head + "time.expand.*"),
        Rename("diffloss.net.time_embed.mlp.2.*", head + "time.contract.*"),
        Rename("diffloss.net.cond_embed.*", head + "condition.*"),
        Rename("diffloss.net.input_proj.*", head + "project.*"),
        Rename("diffloss.net.res_blocks.#.in_ln.*", head + "blocks.#.norm.*"),
        Rename("diffloss.net.res_blocks.#.mlp.0.*", head + "blocks.#.mlp.expand.*"),
        Rename("diffloss.net.res_blocks.#.mlp.2.*", head + "blocks.#.mlp.contract.*"),
        Rename("diffloss.net.res_blocks.#.adaLN_modulation.1.*", head + "blocks.#.modulation.project.*"),
        Rename("diffloss.net.final_layer.adaLN_modulation.1.*", head + "modulation.project.*"),
        Rename("diffloss.net.final_layer.linear.*", head + "out.*"),
    ]


def _joint(stack: str) -> list[Rule]:
    theirs, ours = f"{stack}.#.", "network.trunk.blocks.#."
    return [
        Rename(f"{theirs}norm1.linear.*", f"{ours}modulation.project.*"),
        Rename(f"{theirs}norm1_context.linear.*", f"{ours}text_modulation.project.*"),
        Fuse(tuple(f"{theirs}attn.to_{name}.*" for name in "qkv"), f"{ours}qkv.*"),
        Fuse(tuple(f"{theirs}attn.add_{name}_proj.*" for name in "qkv"), f"{ours}text_qkv.*"),
        Rename(f"{theirs}attn.to_out.0.*", f"{ours}out.*"),
        Rename(f"{theirs}attn.to_add_out.*", f"{ours}text_out.*"),
        Rename(f"{theirs}ff.net.0.proj.*", f"{ours}mlp.expand.*"),
        Rename(f"{theirs}ff.net.2.*", f"{ours}mlp.contract.*"),
        Rename(f"{theirs}ff_context.net.0.proj.*", f"{ours}text_mlp.expand.*"),
        Rename(f"{theirs}ff_context.net.2.*", f"{ours}text_mlp.contract.*"),
    ]


# -- which model it is -------------------------------------------------------------------------------------------------


def fields_of_state(state: State) -> dict[str, Any] | None:
    """Fields of the config that an authors' state dict fits, None where it is none of these.

    Heads cannot be seen: they are 16, as in every published size. Neither can the settings of generation, the tokens'
    scale, nor the size of the pictures.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    try:
        if "model.embeddings.word_embeddings.weight" in shapes:
            return _of_classes("bert", shapes, "model.embeddings.word_embeddings.weight", "model.lm_head.weight") | {
                "tokens": shapes["model.embeddings.position_embeddings.weight"][0] - 1,
                "depth": _count("model.encoder.layer.#.output.dense.weight", shapes),
                "hidden": shapes["model.encoder.layer.0.intermediate.dense.weight"][0],
            }
        if "mid_block.attn.qkv.weight" in shapes:
            return _of_classes("uvit", shapes, "embeddings.weight", "lm_head.weight") | {
                "tokens": shapes["pos_embed"][1] - 1,
                "depth": 2 * _count("in_blocks.#.norm1.weight", shapes),
                "hidden": shapes["mid_block.mlp.fc1.weight"][0],
            }
        if "text_embed_proj.weight" in shapes:
            width, text = shapes["text_embed_proj.weight"]
            return _of_text(width, text, shapes["cond_pooled_proj.weight"][1]) | {
                "latent": "vq",
                "tokens": shapes["pos_embed"][1],
                "depth": _count("blocks.#.norm1.linear.weight", shapes),
                "rows": shapes["embeddings.weight"][0],
            }
        if "text_emb.weight" in shapes and "diffloss.net.input_proj.weight" in shapes:
            width, text = shapes["text_emb.weight"]
            return _of_text(width, text, shapes["text_pooled_emb.weight"][1]) | {
                "latent": "kl",
                "tokens": shapes["mask_token"][1] * shapes["decoder_pos_embed_learned"][1],
                "depth": _count("decoder_blocks.#.norm1.linear.weight", shapes),
                "token_dim": shapes["z_proj.weight"][1],
                "head_width": shapes["diffloss.net.input_proj.weight"][0],
                "head_depth": _count("diffloss.net.res_blocks.#.in_ln.weight", shapes),
            }
    except (LookupError, ValueError, TypeError):
        return None
    return None


def _of_classes(network: str, shapes: Mapping[str, tuple[int, ...]], table: str, head: str) -> dict[str, Any]:
    (rows, width), codes = shapes[table], shapes[head][0]
    heads = _heads(width)
    fields = {"network": network, "latent": "vq", "width": width, "heads": heads}
    return fields | {"codebook_size": codes, "classes": rows - codes - 2}


def _of_text(width: int, text: int, pooled: int) -> dict[str, Any]:
    return {"network": "mmdit", "width": width, "heads": _heads(width), "text_width": text, "aesthetic": pooled - text}


def _heads(width: int) -> int:
    return 16 if width % 16 == 0 and width >= 256 else max(width // 64, 1)


def _count(pattern: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    number = 0
    while pattern.replace("#", str(number)) in shapes:
        number += 1
    return number


def fields_of_config(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the config that an authors' config file (nested mappings) describes.

    Raises ConfigError for what is missing or has no counterpart here.
    """
    told = " ".join(str(plain.get(key, "")) for key in ("kind", "variant", "official_class")).lower()
    plain = plain.get("official_config", plain)
    try:
        model = plain["model"]
        tokenizer = model.get("vq_model", {})
        if "maskgen" in model:
            return _maskgen(plain, model["maskgen"], tokenizer)
        if "generator" not in model:
            raise ConfigError("this is no config of a generator of TiTok's authors: it has no model.generator")
        return _class_generator(plain, model["generator"], tokenizer, "UViT" if "uvit" in told else "ViT")
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"this is no config of a generator of TiTok's authors: {error} is missing") from error


def _class_generator(plain: Mapping, settings: Mapping, tokenizer: Mapping, usual: str) -> dict[str, Any]:
    kinds = {"ViT": "bert", "UViT": "uvit"}
    kind = settings.get("model_type", usual)
    if kind not in kinds:
        raise ConfigError(f"model_type {kind!r}; TiTok's generators are 'ViT' and 'UViT'")
    tokens = settings.get("image_seq_len")
    width, depth = settings.get("hidden_size", 768), settings.get("num_hidden_layers", 24)
    fields = {
        "network": kinds[kind],
        "width": width,
        "depth": 2 * (depth // 2) if kind == "UViT" else depth,  # a U-ViT has one block more, in the middle
        "heads": settings.get("num_attention_heads", 16),
        "hidden": settings.get("intermediate_size", 4 * width),
        "tokens": tokens if isinstance(tokens, int) else tokenizer["num_latent_tokens"],  # else a reference to it
        "codebook_size": tokenizer["codebook_size"],
        "classes": settings["condition_num_classes"],
        "dropout": float(settings.get("dropout", 0.1)),
        "condition_dropout": float(settings.get("class_label_dropout", 0.1)),
        "sampling": class_sampling(
            steps=settings.get("num_steps", 8),
            scale=float(settings.get("guidance_scale", 3.0)),
            decay=settings.get("guidance_decay", "linear"),
            temperature=float(settings.get("randomize_temperature", 4.5)),
            schedule=settings.get("mask_schedule_strategy", "arccos"),
        ),
        **_pictures(plain),
    }
    losses = plain.get("losses", {})
    if "label_smoothing" in losses:
        fields["label_smoothing"] = float(losses["label_smoothing"])
    if "loss_weight_unmasked_token" in losses:
        fields["visible_weight"] = float(losses["loss_weight_unmasked_token"])
    return fields


def _maskgen(plain: Mapping, settings: Mapping, tokenizer: Mapping) -> dict[str, Any]:
    latent = {"vq": "vq", "vae": "kl"}[tokenizer.get("quantize_mode", "vq" if "codebook_size" in tokenizer else "vae")]
    if latent == "vq" and not settings.get("weight_tying", True):
        raise ConfigError("MaskGen with a head of its own (weight_tying: false) was never published")
    fields = {
        "network": "mmdit",
        "latent": latent,
        "width": settings["decoder_embed_dim"],
        "depth": settings["decoder_depth"],
        "heads": settings["decoder_num_heads"],
        "tokens": tokenizer["num_latent_tokens"],
        "text": (tokenizer.get("text_context_length", 77), tokenizer.get("text_embed_dim", 768)),
        "aesthetic": settings["micro_condition_embed_dim"] if settings["micro_condition"] else 0,
        "aesthetic_score": float(settings.get("sample_aesthetic_score", 6.0)),
        "condition_dropout": float(settings.get("text_drop_prob", 0.1)),
        **_pictures(plain),
    }
    if latent == "vq":
        return fields | {
            "codebook_size": tokenizer["codebook_size"],
            "spare": settings["condition_num_classes"] + 1,
            "sampling": maskgen_sampling(
                settings.get("num_iter", 16), float(settings.get("cfg", 12)), float(settings.get("temperature", 1.5))
            ),
        }
    losses = plain.get("losses", {})
    return fields | {
        "token_dim": tokenizer["token_size"],
        "scale": float(tokenizer["scale_factor"]),
        "head_width": losses["diffloss_w"],
        "head_depth": losses["diffloss_d"],
        "diffusion_steps": int(losses.get("num_sampling_steps", 100)),
        "diffusion_repeats": settings.get("diffusion_batch_mul", 4),
        "sampling": vector_sampling(settings.get("num_iter", 32), float(settings.get("cfg", 3))),
    }


def _pictures(plain: Mapping) -> dict[str, Any]:
    side = plain.get("dataset", {}).get("preprocessing", {}).get("crop_size")
    return {} if side is None else {"image_size": int(side)}


# -- published settings of generation ----------------------------------------------------------------------------------


def class_sampling(
    steps: int,
    scale: float,
    decay: str,
    temperature: float,
    *,
    power: float = 3.0,
    annealing: bool = True,
    schedule: Schedule = "arccos",
) -> MaskedSampling:
    """The authors' `generate` as `MaskedSampling`. Raises ConfigError for another `decay`.

    Their "constant" and "linear" write c + w (c - u), which is our s = 1 + w; their "power-cosine" writes ours.
    `annealing` as in their evaluation on ImageNet; their demo leaves it off.
    """
    guidance: dict[str, Any]
    if decay in ("constant", "linear"):
        guidance = {"guidance": 1 + scale, "guidance_curve": decay}
    elif decay == "power-cosine":
        guidance = {"guidance": scale, "guidance_curve": "cosine", "guidance_power": power}
    else:
        raise ConfigError(f"guidance_decay {decay!r}; expected 'constant', 'linear' or 'power-cosine'")
    return MaskedSampling(
        steps=steps,
        schedule=schedule,
        choice_temperature=temperature,
        draw_temperature=temperature,
        confidence="logit",
        temperature_annealing=annealing,
        precision="float64",
        **guidance,
    )


def maskgen_sampling(steps: int = 16, scale: float = 12.0, temperature: float = 2.0) -> MaskedSampling:
    """MaskGen-VQ's: w of c + w (c - u) goes from 1 to `scale` on a cosine, read at the end of each step."""
    return MaskedSampling(
        guidance=1 + scale,
        guidance_start=2.0,
        guidance_curve="cosine",
        guidance_after=True,
        steps=steps,
        schedule="arccos",
        choice_temperature=temperature,
        draw_temperature=temperature,
        confidence="logit",
        temperature_annealing=True,
    )


def vector_sampling(steps: int = 32, scale: float = 3.0) -> MaskedSampling:
    """MaskGen-KL's: positions in random order; guidance grows with the share of them that is done."""
    return MaskedSampling(guidance=scale, guidance_curve="linear", steps=steps, choice_temperature=0.0)
