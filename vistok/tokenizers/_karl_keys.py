"""KARL's published checkpoints: the authors' keys to ours, and which model their weights or arguments describe.

    flat parameters   encoder.transformer.*   decoder.*   quantize.*   base_tokenizer.{vqgan,vae}.*   [gan_losses.*]

Training checkpoints also hold the discriminators and a copy of LPIPS in each of them, which are dropped.
"""

from collections.abc import Mapping
from math import gcd, isqrt
from typing import Any

from torch import Tensor

from vistok.errors import ConfigError
from vistok.keys import Constant, Drop, KeyTable, Rename, Rule, State
from vistok.nn.cnn import CNNConfig
from vistok.nn.query_vit import ViTSize
from vistok.tokenizers._karl_network import BINS, first_probabilities
from vistok.tokenizers._vqgan_keys import cnn_rules
from vistok.tokenizers.vqgan import VQGANConfig

WIDTHS = {"small": 512, "base": 768, "semi_large": 1024}
LAYERS = {"small": 8, "base": 12, "semi_large": 16}
HEADS = {512: 8, 768: 12, 1024: 8}  # of each width, in the released model and its smaller relatives
NAMED = {  # the authors' names: encoder's (width, layers and heads), decoder's
    "karl_tiny": (("small", "small"), ("small", "small")),
    "karl_tiny_semilarge_decoder": (("small", "small"), ("semi_large", "small")),
    "karl_small": (("semi_large", "small"), ("semi_large", "small")),
    "karl_small_decoder_semilarge": (("semi_large", "small"), ("semi_large", "semi_large")),
    "karl_small_decoder_base": (("semi_large", "small"), ("base", "base")),
    "karl_small_decoder_small": (("semi_large", "small"), ("small", "small")),
    "karl_base": (("base", "base"), ("base", "base")),
    "karl_semilarge": (("semi_large", "semi_large"), ("semi_large", "semi_large")),
    "karl_semilarge_decoder_small": (("semi_large", "semi_large"), ("semi_large", "small")),
}


def key_table(base: str, levels: int) -> KeyTable:
    """The table for models on this base, whose CNNs have so many levels."""
    return KeyTable(
        Drop("gan_losses.*"),
        Rename("encoder_positional_embedding", "encoder.positions"),
        Rename("decoder_positional_embedding", "decoder.positions"),
        Rename("decoder_mask_token", "decoder.mask_token", lambda token: token[0], lambda token: token[None]),
        Rename("decoder_latent_tokens_timestep_embed", "decoder.places"),
        Rename("latent_tokens", "encoder.queries"),
        Rename("rec_loss_embeddings", "encoder.conditions"),
        Rename("encoder_ln_pre.*", "encoder.norm_in.*"),
        Rename("encoder_ln_post_halt.*", "encoder.norm_halting.*"),
        Rename("encoder_ln_post.*", "encoder.norm_out.*"),
        Rename("pre_quantizer_mlp.*", "encoder.project.*"),
        Rename("halting_mlp.*", "encoder.halting.*"),
        Rename("patch_embed.weight", "encoder.patches.project.weight", lambda kernel: kernel.flatten(1), _as_kernel),
        Rename("patch_embed.bias", "encoder.patches.project.bias"),
        *_blocks("encoder"),
        *_blocks("decoder"),
        Rename("decoder.ln_pre.*", "decoder.norm_in.*"),
        Rename("decoder.ln_post.*", "decoder.norm_out.*"),
        Rename("decoder.ffn.*", "decoder.predict.*"),
        Rename("decoder_embed.*", "decoder.embed.*"),
        Rename("quantize.embedding.weight", "quantizer.codebook"),
        *_base(base, levels),
        Constant("probabilities", first_probabilities),
    )


def _base(base: str, levels: int) -> list[Rule]:
    theirs = f"base_tokenizer.{base}."
    if base == "vqgan":
        return [
            *cnn_rules("mage", "encoder", f"{theirs}encoder.", "base.vqgan.encoder.cnn.", levels),
            *cnn_rules("mage", "decoder", f"{theirs}decoder.", "base.vqgan.decoder.cnn.", levels),
            Rename(f"{theirs}quantize.embedding.weight", "base.vqgan.quantizer.codebook"),
            Drop(f"{theirs}loss.*"),
        ]
    if base == "vae":
        return [
            *cnn_rules("taming", "encoder", f"{theirs}encoder.", "base.encoder.", levels),
            *cnn_rules("taming", "decoder", f"{theirs}decoder.", "base.decoder.", levels),
            Rename(f"{theirs}quant_conv.*", "base.moments.*"),
            Rename(f"{theirs}post_quant_conv.*", "base.project.*"),
        ]
    return []


def _blocks(side: str) -> list[Rule]:
    theirs, ours = f"{side}.transformer.#", f"{side}.blocks.#"
    return [
        Rename(f"{theirs}.ln_#.*", f"{ours}.norm#.*"),
        Rename(f"{theirs}.attn.in_proj_*", f"{ours}.attention.qkv.*"),
        Rename(f"{theirs}.attn.out_proj.*", f"{ours}.attention.out.*"),
        Rename(f"{theirs}.mlp.c_fc.*", f"{ours}.mlp.expand.*"),
        Rename(f"{theirs}.mlp.c_proj.*", f"{ours}.mlp.contract.*"),
    ]


def _as_kernel(matrix: Tensor) -> Tensor:
    patch = isqrt(matrix.shape[1] // 3)
    return matrix.unflatten(1, (3, patch, patch))


# -- which model it is -----------------------------------------------------------------------------------------------


def fields_of_state(state: State) -> dict[str, Any] | None:
    """Fields of the config that shapes tell, None where it is no KARL.

    The grid is taken to be 16 x 16, as theirs always is, and heads as in the named sizes (else of 64).
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    try:
        return _fields_of_shapes(shapes)
    except (LookupError, ValueError, TypeError, ZeroDivisionError):
        return None


def _fields_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    patch = shapes["patch_embed.weight"][-1]
    rows = shapes["latent_tokens"][0]
    fields: dict[str, Any] = {
        "encoder": _vit(shapes, "encoder"),
        "decoder": _vit(shapes, "decoder"),
        "rows": rows,
        "token_dim": shapes["decoder_embed.weight"][1],
        "quantized": "quantize.embedding.weight" in shapes,
        "image_size": 16 * patch,
        "patch": patch,
        "table": shapes["encoder_positional_embedding"][-1],
        "halting": shapes["halting_mlp.0.weight"][0],
    }
    assert shapes["rec_loss_embeddings"][0] == len(BINS)
    if fields["quantized"]:
        fields["codebook_size"] = shapes["quantize.embedding.weight"][0]
    stem = "base_tokenizer.vqgan."
    if f"{stem}encoder.conv_in.weight" in shapes:
        codes, dim = shapes[f"{stem}quantize.embedding.weight"]
        cnn = _cnn(shapes, stem, dim, style="maskgit", middle_blocks=2)
        return fields | {"base": "vqgan", "vqgan": VQGANConfig("maskgit", cnn, codes, dim, resolution=16 * patch)}
    stem = "base_tokenizer.vae."
    cnn = _cnn(shapes, stem, shapes[f"{stem}post_quant_conv.weight"][0], double_latent=True)
    return fields | {"base": "vae", "vae": cnn}


def _vit(shapes: Mapping[str, tuple[int, ...]], side: str) -> ViTSize:
    hidden, width = shapes[f"{side}.transformer.0.mlp.c_fc.weight"]
    layers = _count(shapes, side + ".transformer.{}.ln_1.weight")
    return ViTSize(width, layers, HEADS.get(width, max(width // 64, 1)), hidden / width)


def _cnn(shapes: Mapping[str, tuple[int, ...]], stem: str, dim: int, **style: Any) -> CNNConfig:
    pattern = stem + "encoder.down.{}.block.0.conv1.weight"
    widths = [shapes[pattern.format(level)][0] for level in range(_count(shapes, pattern))]
    width = gcd(*widths)
    blocks = _count(shapes, stem + "encoder.down.0.block.{}.conv1.weight")
    return CNNConfig(width, tuple(each // width for each in widths), blocks, dim, **style)


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return next(index for index in range(len(shapes) + 1) if pattern.format(index) not in shapes)


def fields_of_config(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the config that the authors' arguments describe: `model`, `base_tokenizer`, `quantize_latent`, and the
    entries of their YAML (`vq_codebook_size`, `vq_token_dim`, `vq_commitment_cost`, `patch_size`). Raises ConfigError.
    """
    try:
        encoder, decoder = NAMED[plain["model"]]
    except KeyError as error:
        raise ConfigError(
            f"this is no configuration of KARL's authors: {error}; models are {', '.join(NAMED)}"
        ) from error
    base = plain.get("base_tokenizer", "vqgan")
    if base not in ("vqgan", "vae"):
        raise ConfigError(f"base_tokenizer {base!r}; KARL's authors have 'vqgan' and 'vae'")
    patch = int(plain.get("patch_size", 16))
    return {
        "encoder": _named(*encoder),
        "decoder": _named(*decoder),
        "quantized": bool(plain.get("quantize_latent", False)),
        "codebook_size": int(plain.get("vq_codebook_size", 4096)),
        "token_dim": int(plain.get("vq_token_dim", 12)),
        "commitment": float(plain.get("vq_commitment_cost", 0.25)),
        "base": base,
        "image_size": 16 * patch,
        "patch": patch,
    }


def _named(width: str, depth: str) -> ViTSize:
    return ViTSize(WIDTHS[width], LAYERS[depth], LAYERS[depth])
