"""TiTok against its authors' numbers: every tokenizer case, whatever its sizes and options.

The kinds of its generators are not here: they belong to other systems' files.
"""

from dataclasses import replace

import torch

from tests.parity.cases import Case, assert_close, parametrize
from tests.parity.titok_case import as_map, as_sequence, check_decoding, check_encoding, check_proxy_loss, load
from vistok.losses import blurred
from vistok.losses.adversarial import discriminator_hinge, generator_hinge, lecam
from vistok.tokenizers.titok import configure, key_table


@parametrize("titok", kinds=("tokenizer",))
def test_tokenizer(case: Case) -> None:
    model, io = load(case), case.io
    with torch.no_grad():
        check_encoding(model, io)
        check_decoding(model, io, io.get("text_guidance"))
        if "stage1_reconstruction_loss" in io:
            check_proxy_loss(model, io)
    if "clustering_codes" in io:
        check_clustering(model, io)


def check_clustering(model, io) -> None:
    """One training step of CVQ on the stored latent: codes from before the update, codebook and usage after it."""
    model.quantizer.train()
    out = model.quantizer(as_sequence(io["encoder_latent"]))
    assert_close(out.codes[:, None], io["clustering_codes"], name="clustering_codes")
    assert_close(model.quantizer.codebook, io["clustering_codebook_after"], name="clustering_codebook_after")
    assert_close(model.quantizer.counts, io["clustering_embed_prob_after"], name="clustering_embed_prob_after")
    model.eval()


@parametrize("titok", kinds=("tokenizer",))
def test_loss_is_made_of_the_authors_terms(case: Case) -> None:
    """One-stage and second-stage losses: mean squared error of the authors' own reconstruction, and their terms."""
    model, io = load(case), case.io
    text, pixels = io.get("text_guidance"), io["image"]
    if model.stage == "proxy" or "codes" not in io or "reconstruction" not in io:
        return
    terms = model.loss({"pixels": pixels, "text": text}, 0, torch.Generator().manual_seed(0))
    expected = (io["reconstruction"] - pixels).square().mean()
    assert_close(terms.pop("reconstruction"), expected, name="reconstruction")
    if model.stage == "pixels":
        assert not terms
    else:
        assert_close(sum(terms.values()), io["quantizer_loss"], name="quantizer_loss")


@parametrize("titok", kinds=("tokenizer",))
def test_config_and_weights_tell_the_same(case: Case) -> None:
    """What `configure` reads from config.json alone is the model that the weights show."""
    told = configure(case.config)
    seen = load(case).config
    ignored = {"codebook_size": 0} if seen.latent == "kl" else {}
    ignored |= {} if seen.legacy else {"proxy_codes": 0}
    if told.text is None:  # the authors leave it out where it is as published
        ignored["text"] = None
    assert replace(told, **ignored) == replace(seen, **ignored)


@parametrize("titok", kinds=("tokenizer",))
def test_checkpoint_goes_back_out(case: Case) -> None:
    model = load(case)
    back = key_table(model.config).to_theirs(model.state_dict())
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[key], case.weights[key]) for key in back)


@parametrize("titok", kinds=("tokenizer",))
def test_gradients_reach_the_latent_straight_through(case: Case) -> None:
    """The authors pass the quantized vectors' gradient to the latent unchanged; unit length scales it."""
    model, io = load(case), case.io
    if "codes" not in io or model.config.normalize:
        return
    latent = as_sequence(io["encoder_latent"]).requires_grad_()
    vectors = model.quantizer(latent).vectors
    weights = torch.randn(as_map(vectors).shape, generator=torch.Generator().manual_seed(0))
    (as_map(vectors) * weights).sum().backward()
    assert_close(latent.grad, as_sequence(weights), name="gradient")


@parametrize("titok", kinds=("discriminator",))
def test_discriminator(case: Case) -> None:
    io, config = case.io, case.config
    judge = blurred.BlurredDiscriminator(config["num_channels"], config["hidden_channels"], config["num_stages"]).eval()
    table = blurred.key_table(config["num_stages"])
    judge.load_state_dict(table.to_ours(case.weights))
    real, fake = judge(io["real"]), judge(io["fake"])
    past = io["ema_real"], io["ema_fake"]
    found = {
        "logits_real": real,
        "logits_fake": fake,
        "hinge_d_loss": discriminator_hinge(real, fake),
        "generator_loss": generator_hinge(fake),
    }
    for name, value in found.items():
        assert_close(value, io[name], name=name)
    assert_close(lecam(real.mean(), fake.mean(), *past).reshape(io["lecam"].shape), io["lecam"], name="lecam")
    back = table.to_theirs(judge.state_dict())
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[key], case.weights[key]) for key in back)
