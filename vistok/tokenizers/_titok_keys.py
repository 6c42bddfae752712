"""TiTok's published checkpoints: the authors' keys to ours, and which model their weights or configs describe.

    encoder.*  decoder.*  latent_tokens  quantize.embedding.weight   [pixel_quantize.embedding.weight  pixel_decoder.*]

Convolutions with kernel 1, and the patch embedding, are matrices here.
"""

from collections.abc import Mapping
from math import gcd, isqrt
from typing import Any

from torch import Tensor

from vistok.errors import ConfigError
from vistok.keys import Drop, KeyTable, Rename, Rule, State
from vistok.nn.cnn import CNNConfig
from vistok.nn.query_vit import ViTSize
from vistok.tokenizers.vqgan import MASKGIT_F16, cnn_rules

SIZES = {"small": ViTSize(512, 8, 8), "base": ViTSize(768, 12, 12), "large": ViTSize(1024, 24, 16)}
HEAD = 64  # width of a head in every published size


def key_table(legacy: bool, clustering: bool, cnn_levels: int) -> KeyTable:
    """The table for one model: which head it has, whether it still counts the use of its codes, and how many levels the
    CNN of its second stage has (0 without one).
    """
    rules: list[Rule] = [
        Rename("latent_tokens", "encoder.trunk.queries"),
        Rename("quantize.embedding.weight", "quantizer.codebook"),
        Rename("quantize.embed_prob", "quantizer.counts") if clustering else Drop("quantize.embed_prob"),
        *_trunk("encoder"),
        Rename("encoder.patch_embed.weight", "encoder.trunk.patches.project.weight", _flatten_kernel, _square_kernel),
        Rename("encoder.patch_embed.bias", "encoder.trunk.patches.project.bias"),
        Rename("encoder.latent_token_positional_embedding", "encoder.trunk.query_positions"),
        Rename("encoder.conv_out.weight", "encoder.project.weight", _as_matrix, _as_kernel),
        Rename("encoder.conv_out.bias", "encoder.project.bias"),
        *_trunk("decoder"),
        Rename("decoder.mask_token", "decoder.trunk.mask_token", lambda token: token[0], lambda token: token[None]),
        Rename("decoder.latent_token_positional_embedding", "decoder.trunk.latent_positions"),
        Rename("decoder.decoder_embed.*", "decoder.trunk.embed.*"),
        Rename("decoder.text_guidance_proj.*", "decoder.trunk.text.*"),
        Rename("decoder.text_guidance_positional_embedding", "decoder.trunk.text_positions"),
    ]
    if not legacy:
        rules += [
            Rename("decoder.ffn.0.weight", "decoder.project.weight", _as_matrix, _as_kernel),
            Rename("decoder.ffn.0.bias", "decoder.project.bias"),
            Rename("decoder.conv_out.*", "decoder.smooth.*"),
        ]
    else:
        rules += [
            Rename("decoder.ffn.#.weight", "decoder.classify.#.weight", _as_matrix, _as_kernel),
            Rename("decoder.ffn.#.bias", "decoder.classify.#.bias"),
        ]
    if cnn_levels:
        rules.append(Rename("pixel_quantize.embedding.weight", "decoder.codebook"))
        rules += cnn_rules("maskgit", "decoder", "pixel_decoder.", "decoder.pixels.", cnn_levels)
    return KeyTable(*rules)


def _trunk(side: str) -> list[Rule]:
    theirs, ours = f"{side}.transformer.#", f"{side}.trunk.blocks.#"
    return [
        Rename(f"{side}.class_embedding", f"{side}.trunk.class_token"),
        Rename(f"{side}.positional_embedding", f"{side}.trunk.positions"),
        Rename(f"{side}.ln_pre.*", f"{side}.trunk.norm_in.*"),
        Rename(f"{side}.ln_post.*", f"{side}.trunk.norm_out.*"),
        Rename(f"{theirs}.ln_#.*", f"{ours}.norm#.*"),
        Rename(f"{theirs}.attn.in_proj_*", f"{ours}.attention.qkv.*"),
        Rename(f"{theirs}.attn.out_proj.*", f"{ours}.attention.out.*"),
        Rename(f"{theirs}.mlp.c_fc.*", f"{ours}.mlp.expand.*"),
        Rename(f"{theirs}.mlp.c_proj.*", f"{ours}.mlp.contract.*"),
    ]


def _as_matrix(kernel: Tensor) -> Tensor:
    return kernel.flatten(1)


def _as_kernel(matrix: Tensor) -> Tensor:
    return matrix[:, :, None, None]


def _flatten_kernel(kernel: Tensor) -> Tensor:
    return kernel.flatten(1)


def _square_kernel(matrix: Tensor) -> Tensor:
    patch = isqrt(matrix.shape[1] // 3)
    return matrix.unflatten(1, (3, patch, patch))


# -- which model it is -----------------------------------------------------------------------------------------------


def fields_of_state(state: State) -> dict[str, Any] | None:
    """Fields of the TiTokConfig that an authors' state dict fits, None if it is no TiTok.

    Heads, and whether codes are of unit length, cannot be seen in shapes: they are taken as in the published sizes
    (heads of 64; unit length in two-stage models), and are a guess for others.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    try:
        return _fields_of_shapes(shapes)
    except (LookupError, ValueError, TypeError, ZeroDivisionError):
        return None


def _fields_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    patch = shapes["encoder.patch_embed.weight"][-1]
    side = patch * isqrt(shapes["encoder.positional_embedding"][0] - 1)
    legacy = "decoder.ffn.2.weight" in shapes
    fields: dict[str, Any] = {
        "encoder": _vit_size("encoder", shapes),
        "decoder": _vit_size("decoder", shapes),
        "tokens": shapes["latent_tokens"][0],
        "token_dim": shapes["decoder.decoder_embed.weight"][1],
        "latent": "kl",
        "normalize": legacy,
        "clustering": "quantize.embed_prob" in shapes,
        "legacy": legacy,
        "pixel_decoder": _pixel_decoder(shapes) if "pixel_decoder.conv_in.weight" in shapes else None,
        "image_size": side,
        "encoder_patch": patch,
        "decoder_patch": side // isqrt(shapes["decoder.positional_embedding"][0] - 1),
    }
    if "quantize.embedding.weight" in shapes:
        fields |= {"latent": "vq", "codebook_size": shapes["quantize.embedding.weight"][0]}
    if legacy:
        fields["proxy_codes"] = shapes["decoder.ffn.2.weight"][0]
    if "decoder.text_guidance_proj.weight" in shapes:
        positions = shapes["decoder.text_guidance_positional_embedding"][0]
        fields["text"] = (positions, shapes["decoder.text_guidance_proj.weight"][1])
    return fields


def _vit_size(side: str, shapes: Mapping[str, tuple[int, ...]]) -> ViTSize:
    hidden, width = shapes[f"{side}.transformer.0.mlp.c_fc.weight"]
    layers = _count(f"{side}.transformer.#.ln_1.weight", shapes)
    return ViTSize(width, layers, max(width // HEAD, 1), hidden / width)


def _pixel_decoder(shapes: Mapping[str, tuple[int, ...]]) -> CNNConfig:
    levels = _count("pixel_decoder.up.#.block.0.conv1.weight", shapes)
    widths = [shapes[f"pixel_decoder.up.{level}.block.0.conv2.weight"][0] for level in range(levels)]
    blocks = _count("pixel_decoder.up.0.block.#.conv1.weight", shapes)
    return _cnn(widths, blocks, shapes["pixel_decoder.conv_in.weight"][1])


def _cnn(widths: list[int], blocks: int, latent_dim: int) -> CNNConfig:
    width = gcd(*widths)
    return CNNConfig(width, tuple(each // width for each in widths), blocks, latent_dim, style="maskgit")


def _count(pattern: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    number = 0
    while pattern.replace("#", str(number)) in shapes:
        number += 1
    return number


def fields_of_config(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the TiTokConfig that an authors' config file (nested mappings) describes.

    What it leaves out counts as in their code: quantize_mode "vq", finetune_decoder and is_legacy True, no clustering.
    Their code knows three sizes of ViT by name; a config with other sizes holds theirs as "official_config" and beside
    it width, layers, heads and mlp_ratio of both sides, proxy_codebook_size and the CNN's sizes as "pixel_decoder".
    Raises ConfigError for what is missing or unknown.
    """
    sizes, plain = plain, plain.get("official_config", plain)
    try:
        model, side = plain["model"]["vq_model"], int(plain["dataset"]["preprocessing"]["crop_size"])
        mode = model.get("quantize_mode", "vq")
        if mode not in ("vq", "vae"):
            raise ConfigError(f"quantize_mode {mode!r}; TiTok has 'vq' and 'vae'")
        cnn = MASKGIT_F16.cnn if model.get("finetune_decoder", True) else None
        fields = {
            "encoder": SIZES[model["vit_enc_model_size"]],
            "decoder": SIZES[model["vit_dec_model_size"]],
            "tokens": model["num_latent_tokens"],
            "token_dim": model["token_size"],
            "latent": "vq" if mode == "vq" else "kl",
            "normalize": bool(model.get("use_l2_norm", False)),
            "clustering": bool(model.get("clustering_vq", False)),
            "commitment": float(model.get("commitment_cost", 0.25)),
            "legacy": bool(model.get("is_legacy", True)),
            "pixel_decoder": cnn,
            "image_size": side,
            "encoder_patch": model["vit_enc_patch_size"],
            "decoder_patch": model["vit_dec_patch_size"],
        }
        if "width" in sizes:
            vit = ViTSize(sizes["width"], sizes["layers"], sizes["heads"], float(sizes.get("mlp_ratio", 4)))
            fields |= {"encoder": vit, "decoder": vit}
        if cnn is not None and sizes.get("pixel_decoder"):
            net = sizes["pixel_decoder"]
            fields["pixel_decoder"] = CNNConfig(
                net["hidden"], tuple(net["mult"]), net["res"], net["z"], style="maskgit"
            )
        if "proxy_codebook_size" in sizes and fields["legacy"]:
            fields["proxy_codes"] = sizes["proxy_codebook_size"]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"this is not a config of TiTok's authors: {error} is missing or unknown") from error
    if mode == "vq":
        fields["codebook_size"] = model["codebook_size"]
    if "text_context_length" in model or "text_embed_dim" in model:
        fields["text"] = (model.get("text_context_length", 77), model.get("text_embed_dim", 768))
    return fields
