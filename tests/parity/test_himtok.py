"""HiMTok against its authors' numbers: the tokenizer at every stage and prefix, and what a language model needs."""

from dataclasses import replace

import torch

from tests.parity.cases import Case, assert_close, parametrize
from tests.parity.titok_case import as_map, as_sequence
from vistok.losses.segmentation import binary_cross_entropy, dice
from vistok.nn.query_vit import ViTSize
from vistok.tokenizers._himtok_language import (
    MaskWords,
    blurred_target,
    hierarchical_loss,
    mask_loss,
    place_codes,
    shortened,
    soft_tokens,
)
from vistok.tokenizers.himtok import HiMTok, fields_of_state, key_table, probability
from vistok.tokenizers.himtok import HiMTokConfig as Config


def load(case: Case) -> HiMTok:
    """The model with the case's weights: every key used, none missing; heads from config.json."""
    sizes, model = case.config["size_table"], case.config["official"]["model"]["vq_model"]
    vit = ViTSize(sizes["width"], sizes["layers"], sizes["heads"], float(sizes.get("mlp_ratio", 4)))
    seen = Config(**(fields_of_state(case.weights) | {"encoder": vit, "decoder": vit}))
    assert seen.tokens == model["num_latent_tokens"]
    assert seen.codebook_size == model["codebook_size"]
    tokenizer = HiMTok(replace(seen, commitment=model["commitment_cost"]))
    tokenizer.load_state_dict(key_table(tokenizer.config).to_ours(case.weights))
    return tokenizer.eval()


@parametrize("himtok", kinds=("tokenizer",))
def test_tokenizer(case: Case) -> None:
    model, io = load(case), case.io
    with torch.no_grad():
        masks = io["mask"]
        assert_close(as_map(model.encoder(model.prepare(masks))), io["encoder_latent"], name="encoder_latent")
        assert_close(model.quantizer.rows(), io["projected_codebook"], name="projected_codebook")
        out = model.quantizer(as_sequence(io["encoder_latent"]))
        assert_close(out.codes[:, None], io["codes"], name="codes of the authors' latent")
        assert_close(as_map(out.vectors), io["z_quantized"], name="z_quantized")
        for ours, theirs in (("commitment", "loss_commitment"), ("codebook", "loss_codebook")):
            assert_close(out.losses[ours].reshape(1), io[theirs], name=theirs)
        assert_close(sum(out.losses.values()).reshape(1), io["quantizer_loss"], name="quantizer_loss")
        tokens = model.encode(masks[:, :1])
        assert_close(tokens.codes[:, None], io["codes"], name="codes")
        vectors = as_sequence(io["z_quantized"])
        features = model.decoder.features(model.decoder.trunk(vectors))
        if "decoder_features" in io:
            features = features.transpose(1, 2).unflatten(2, model.decoder.grid)
            assert_close(features, io["decoder_features"], name="decoder_features")
        values = model.decoder(vectors)
        assert_close(values, io["pixel_decoder_out"], name="pixel_decoder_out")
        assert_close(probability(values), io["mask_probability"], name="mask_probability")
        assert_close(model.decode(tokens), io["mask_probability"], name="decode(encode)")
        for name, expected in io.items():
            if name.startswith("mask_probability_prefix"):
                length = int(name.removeprefix("mask_probability_prefix"))
                assert_close(model.decode(tokens.prefix(length)), expected, name=name)
        if "prefix_lengths_drawn" in io:
            kept = model.decoder.trunk.embed(vectors)
            there = torch.arange(kept.shape[1]) < io["prefix_lengths_drawn"][:, None]
            assert_close(kept * there[:, :, None], io["decoder_embed_masked"], name="decoder_embed_masked")
            short = [model.decoder(vectors[i : i + 1, :k]) for i, k in enumerate(io["prefix_lengths_drawn"].tolist())]
            together = model.decoder(vectors, io["prefix_lengths_drawn"])
            assert_close(together, torch.cat(short), name="lengths and prefixes are one")


@parametrize("himtok", kinds=("tokenizer", "lmm-side"))
def test_checkpoint_goes_back_out(case: Case) -> None:
    model = load(case)
    back = key_table(model.config).to_theirs(model.state_dict())
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[key], case.weights[key]) for key in back)


@parametrize("himtok", kinds=("lmm-side",))
def test_language_side(case: Case) -> None:
    model, io, config = load(case), case.io, case.config
    words = MaskWords(
        config["tt_start"], config["tt_end"], config["tt_index_start"], model.config.codebook_size, model.config.tokens
    )
    target = io["target_masks"]
    with torch.no_grad():
        codes = model.encode(target[:, None]).codes
        assert_close(codes, io["mask_tokens"], name="mask_tokens")
        assert_close(place_codes(io["input_ids"], codes, words), io["replaced_input_ids"], name="replaced_input_ids")
        labels = place_codes(io["labels"], codes, words)
        assert_close(labels, io["replaced_labels"], name="replaced_labels")
        soft, valid = soft_tokens(io["logits"], labels[:, 1:], words)
        assert_close(soft, io["soft_tokens"], name="soft_tokens")
        assert_close(valid, io["valid"], name="valid")
        found = model.soft_decode(soft)
        assert_close(found, io["soft_mask"], name="soft_mask")
        half = soft[:, : model.config.tokens // 2]
        assert_close(model.soft_decode(half), io["soft_mask_first_half"], name="soft_mask_first_half")
        assert_close(binary_cross_entropy(found, target).reshape(1), io["loss_bce"], name="loss_bce")
        assert_close(dice(found, target).reshape(1), io["loss_dice"], name="loss_dice")
        assert_close(mask_loss(found, target, valid).reshape(1), io["mask_loss"], name="mask_loss")
        lengths = io["hier_prefix_lengths"].tolist()
        short = shortened(soft, lengths[-1])
        assert_close(short, io["hier_soft_tokens_last"], name="hier_soft_tokens_last")
        assert_close(model.soft_decode(short), io["hier_mask_last"], name="hier_mask_last")
        assert_close(blurred_target(target, lengths[-1]), io["hier_target_last"], name="hier_target_last")
        term = hierarchical_loss(model, soft, target, lengths, valid)
        assert_close(term.reshape(1), io["hierarchical_loss"], name="hierarchical_loss")


@parametrize("himtok", kinds=("lmm-side",))
def test_masks_that_are_not_square_are_padded_and_scaled_as_the_authors_do(case: Case) -> None:
    model, io = load(case), case.io
    seen = []
    hook = model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.encode(io["nonsquare_mask"][:, None])
    hook.remove()
    assert_close(seen[0], io["nonsquare_prepared"], name="nonsquare_prepared")
