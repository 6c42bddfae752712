"""KARL against its authors' numbers: base, encoder, halting, codes, decoder with and without halting, both calls.

The README beside the cases asks for a tolerance of 2e-4: its float32 numbers are that badly conditioned.
"""

from dataclasses import replace

import torch

from tests.parity.cases import Case, assert_close, parametrize
from vistok.hub import fill
from vistok.quantize import VectorQuantizer
from vistok.tokenizers._karl_keys import fields_of_state
from vistok.tokenizers._karl_network import CodeBase
from vistok.tokenizers.karl import KARL, KARLConfig, key_table

TOLERANCE = 2e-4


def build(case: Case) -> KARL:
    """Sizes from the weights, heads and options from config.json."""
    plain = case.config
    fields = fields_of_state(case.weights)
    assert fields is not None
    for side in ("encoder", "decoder"):
        assert (fields[side].width, fields[side].layers) == (plain[side]["width"], plain[side]["layers"])
        fields[side] = replace(fields[side], heads=plain[side]["heads"])
    assert fields["quantized"] == plain["quantize_latent"]
    assert (fields["image_size"], fields["patch"]) == (plain["image_size"], plain["patch_size"])
    assert (fields["rows"], fields["table"]) == (plain["max_latent_tokens"], plain["max_grid_tokens"])
    assert (fields["token_dim"], fields["halting"]) == (plain["vq_token_dim"], plain["halting_mlp_hidden"])
    fields |= {"threshold": plain["halting_threshold"], "commitment": plain["vq_commitment_cost"]}
    model = KARL(KARLConfig(**fields))
    fill(model, key_table(model.config).to_ours(case.weights), case.name)
    return model.eval()


def pictures(case: Case):
    """Index, pixels (1, 3, S, S), wanted error, and the authors' numbers of each picture."""
    for index, wanted in enumerate(case.config["desired_eps"]):
        own = {name.removeprefix(f"img{index}_"): value for name, value in case.io.items()}
        yield index, case.io["images"][index : index + 1], torch.tensor([wanted]), own


@parametrize("karl", kinds=("tokenizer",))
@torch.no_grad()
def test_encoding(case: Case) -> None:
    model, budget = build(case), case.config["token_budget"]
    for _, pixels, wanted, io in pictures(case):
        base = model.base.latent(pixels)
        if isinstance(model.base, CodeBase) and "base_ids" in io:
            assert_close(model.base.vqgan.quantizer.encode(base), io["base_ids"], name="base_ids")
        grid = model.encoder.grid(pixels, base)
        assert_close(grid, io["grid_tokens"], TOLERANCE, name="grid_tokens")
        x = model.encoder.sequence(grid, model.config.cells, wanted, budget)
        for block in model.encoder.blocks:
            x = block(x)
        assert_close(x, io["encoder_out"], TOLERANCE, name="encoder_out")
        latent = model.encoder(pixels, base, wanted, budget)
        assert_close(latent.tokens, io["prequant"], TOLERANCE, name="prequant")
        assert_close(latent.halting.sigmoid()[..., None], io["halt_prob"], TOLERANCE, name="halt_prob")
        tokens = model.encode(pixels, quality=float(wanted), budget=budget)
        assert torch.equal(tokens.keep[:, :budget], ~io["halted"].bool())
        assert not tokens.keep[:, budget:].any()
        if isinstance(model.quantizer, VectorQuantizer):
            assert_close(tokens.codes[:, :budget], io["ids"], name="ids")
            out = model.quantizer(io["prequant"])
            assert_close(out.codes, io["ids"], name="ids of the authors' latent")
            assert_close(out.vectors, io["quantized"], TOLERANCE, name="quantized")
        else:
            assert_close(tokens.vectors[:, :budget], io["prequant"], TOLERANCE, name="vectors")


@parametrize("karl", kinds=("tokenizer",))
@torch.no_grad()
def test_decoding(case: Case) -> None:
    model, budget = build(case), case.config["token_budget"]
    alone = []
    for _, pixels, wanted, io in pictures(case):
        vectors = io.get("quantized", io["prequant"])
        keep = ~io["halted"].bool()
        assert_close(model.decoder(vectors, keep), io["decoder_logits"], TOLERANCE, name="decoder_logits")
        assert_close(model.decoder(vectors), io["decoder_logits_no_halting"], TOLERANCE, name="without halting")
        assert_close(model.reconstruct(vectors, keep), io["reconstruction"], TOLERANCE, name="reconstruction")
        decoded = model.decode(model.encode(pixels, quality=float(wanted), budget=budget))
        assert_close(decoded, io["reconstruction"].clamp(0, 1), TOLERANCE, name="decode(encode)", scale=1)
        alone.append(io["reconstruction"].clamp(0, 1))
    together = model.decode(model.encode(case.io["images"], quality=case.config["desired_eps"], budget=budget))
    assert_close(together, torch.cat(alone), TOLERANCE, name="pictures of different lengths together", scale=1)


@parametrize("karl", kinds=("tokenizer",))
def test_training_step(case: Case) -> None:
    """Both calls on the first picture, from the stored budget and wanted error."""
    model, io = build(case).train(), case.io
    model.base.requires_grad_(False)
    model.base.eval()
    first, second = io["train_token_counts"].tolist()
    assert second == model.config.tokens
    assert_close(model.probabilities, io["probs_before"], name="probs_before")
    batch: dict = {}
    terms = model.two_calls(batch, io["images"][:1], first, io["train_eps_call0"].flatten())
    assert_close(batch["wanted"], io["train_eps_call1"].flatten(), TOLERANCE, name="train_eps_call1")
    assert_close(model.probabilities, io["probs_after"], name="probs_after")
    expected = {
        f"latent_token_active_loss_bce_{first}_0": terms["active_estimate"],
        f"nll_loss_{first}_0": terms.get("nll_estimate"),
        f"code_loss_{first}_0": terms["code_estimate"],
        f"latent_token_active_loss_bce_{second}": terms["active_halting"],
        f"latent_token_halt_loss_bce_{second}": terms.get("halt_halting"),
        f"nll_loss_{second}_1": terms.get("nll_halting"),
        f"code_loss_{second}_1": terms["code_halting"],
    }
    if model.config.quantized:
        expected[f"quantization_loss_{first}"] = terms["commitment_estimate"] + terms["codebook_estimate"]
        expected[f"quantization_loss_{second}"] = terms["commitment_halting"] + terms["codebook_halting"]
    stored = {name for name in io if name.startswith("train_") and "_loss" in name and name != "train_total_loss"}
    assert stored <= {f"train_{name}" for name in expected}
    for name in stored:
        assert_close(expected[name.removeprefix("train_")], io[name], TOLERANCE, name=name)
    assert_close(torch.stack(list(terms.values())).sum(), io["train_total_loss"], TOLERANCE, name="train_total_loss")


@parametrize("karl", kinds=("tokenizer",))
def test_checkpoint_goes_back_out(case: Case) -> None:
    model = build(case)
    back = key_table(model.config).to_theirs(model.state_dict())
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[key], case.weights[key]) for key in back)
