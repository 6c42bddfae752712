"""MaskGIT's family against the authors' numbers: the convolutional tokenizers, then MaskBit's generator and sampler."""

import torch

from tests.parity.cases import Case, assert_all_close, assert_close, parametrize
from vistok.generators import maskgit as generators
from vistok.generators.maskgit import MaskGIT
from vistok.hub import fill
from vistok.losses.masked import masked_cross_entropy
from vistok.sampling.masked import StoredDraws
from vistok.sampling.masking import SCHEDULES, masking_ratio
from vistok.tokenizers import maskgit as tokenizers
from vistok.tokenizers.maskgit import VQGANPlus


def tokenizer(case: Case) -> VQGANPlus:
    config = tokenizers.configure(case.config)
    model = VQGANPlus(config)
    table = tokenizers.key_table(config)
    fill(model, table.to_ours(case.weights), case.name)
    seen = tokenizers.recognise(case.weights)
    assert seen is not None
    assert (seen.cnn, seen.codebook, seen.codes) == (config.cnn, config.codebook, config.codes)
    assert seen.full_first == config.full_first or len(config.cnn.multipliers) == 1
    back = table.to_theirs(model.state_dict())
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[key], value) for key, value in case.weights.items())
    return model.eval()


def as_map(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return rows.transpose(1, 2).unflatten(2, like.shape[2:])


@parametrize("maskgit", kinds=("conv-tokenizer",))
def test_tokenizer(case):
    io, model = case.io, tokenizer(case)
    latent = model.encoder(io["image"])
    quantized = model.quantize(latent)
    vectors = as_map(quantized.vectors, latent)
    losses = {name: value for name, value in quantized.losses.items() if name != "entropy"}
    assert_all_close(
        {
            "encoder_latent": latent,
            "codes": quantized.codes.reshape(io["codes"].shape),
            "quantized": vectors,
            "code_vectors": model.quantizer.decode(io["codes"].flatten(1)),
            "reconstruction": model.decoder(vectors),
            "eval_quantizer_loss": sum(losses.values()),
        },
        io,
    )
    tokens = model.encode(io["image"])  # the public verbs, where the fast paths are taken
    assert_close(tokens["grid"], io["codes"], name="encode")
    assert_close(model.decode(tokens), io["reconstruction"].clamp(0, 1), name="decode")


@parametrize("maskgit", kinds=("conv-tokenizer",))
def test_quantizer_in_training(case):
    """Of the authors' latent: the entropy's softmax has a temperature of 0.01 and multiplies float32 noise."""
    io, model = case.io, tokenizer(case).train()
    quantized = model.quantize(io["encoder_latent"])
    actual = {
        "train_quantizer_loss": sum(quantized.losses.values()),
        "train_commitment_loss": quantized.losses["commitment"],
    }
    if model.config.entropy:
        actual |= {
            "train_entropy_loss": quantized.losses["entropy"],
            "train_per_sample_entropy": quantized.stats["sample_entropy"],
            "train_avg_entropy": model.config.entropy_batch * quantized.stats["batch_entropy"],
        }
    assert_all_close(actual, io)


@parametrize("maskgit", kinds=("conv-tokenizer",))
def test_tokenizer_gradient(case):
    """Ours made exact: the authors' float32 is 7e-5 of the gradient's scale away from that, by the same noise."""
    io, model = case.io, tokenizer(case).train().double()
    pixels = io["image"].double()
    latent = model.encoder(pixels)
    quantized = model.quantize(latent)
    image = model.decoder(as_map(quantized.vectors, latent))
    total = (image - pixels).square().mean() + sum(quantized.losses.values())
    total.backward()
    assert_all_close({"train_loss_mse_plus_quantizer": total}, io)
    gradient = model.encoder.cnn.conv_out.weight.grad
    tolerance = 2e-4 if model.config.entropy else 2e-5
    assert_close(gradient, io["grad_encoder_conv_out"], rtol_of_scale=tolerance, name="gradient")


@parametrize("maskgit", kinds=("conv-tokenizer",))
def test_tokenizer_loss_is_made_of_the_same_parts(case):
    io, model = case.io, tokenizer(case).train()
    after = model.config.entropy_steps
    terms = model.loss({"pixels": io["image"]}, after, torch.Generator())
    assert_close(torch.stack(list(terms.values())).sum(), io["train_loss_mse_plus_quantizer"], name="loss")


# -- MaskBit's generator ---------------------------------------------------------------------------------------------


def generator(case: Case) -> MaskGIT:
    config = generators.configure(case.config)
    model = MaskGIT(config)
    table = generators.key_table(config)
    fill(model, table.to_ours(case.weights), case.name)
    seen = generators.recognise(case.weights)
    assert seen is not None
    for name in ("width", "layers", "hidden", "reads", "bits", "groups", "grid", "prenorm", "classes"):
        assert getattr(seen, name) == getattr(config, name), name
    back = table.to_theirs(model.state_dict())
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[key], value) for key, value in case.weights.items())
    return model.eval()


def dropped(case: Case, model: MaskGIT) -> torch.Tensor:
    io = case.io
    return torch.where(io["drop_label_mask"], model.null, io["class_labels"])


@parametrize("maskgit", kinds=("lfq-bert",))
def test_generator(case):
    io, model = case.io, generator(case)
    assert model.mask_id == case.config["mask_token"]
    assert model.spec.length == case.config["tokens"]
    groups = model.split(io["codes"])
    assert_all_close(
        {
            "group_tokens": groups,
            "masked_tokens": groups.masked_fill(io["mask"], model.mask_id),
            "input_bits": model.read.bits(io["masked_tokens"]).float(),
            "recombined": model.join(groups).float(),
        },
        io,
    )
    logits = model.logits(io["masked_tokens"], dropped(case, model))
    smoothing = model.config.smoothing
    assert_all_close(
        {
            "logits": logits,
            "mlm_loss": masked_cross_entropy(logits, groups, io["mask"], model.config.unmasked, smoothing),
            "masked_token_loss": masked_cross_entropy(logits, groups, io["mask"], 0.0, smoothing),
        },
        io,
    )


@parametrize("maskgit", kinds=("lfq-bert",))
def test_sampler(case):
    """Step by step, with the authors' random numbers."""
    io, model = case.io, generator(case)
    items, inner = len(io["decode_labels"]), model.logits
    seen, logits = [], []

    def watched(groups, labels):
        seen.append(groups[:items])
        logits.append(inner(groups, labels))
        return logits[-1]

    model.logits = watched
    draws = StoredDraws(io["decode_categorical_gumbel"], io["decode_confidence_gumbel"])
    with torch.no_grad():
        groups = model.sample_groups(io["decode_labels"], items, model.sampling, draws)
    actual = {"decode_inputs": torch.stack(seen), "decode_codes": model.join(groups)}
    last = logits[-1].chunk(2) if model.sampling.guidance_at(model.sampling.steps - 1) != 1 else (logits[-1],)
    actual |= dict(zip(("decode_cond_logits_last", "decode_uncond_logits_last"), last, strict=False))
    assert_all_close(actual, io)


@parametrize("maskgit", kinds=("lfq-bert",))
def test_schedules(case):
    for schedule in SCHEDULES:
        ratio = masking_ratio(case.io["schedule_progress"], schedule)
        assert_close(ratio, case.io[f"schedule_{schedule}"], name=schedule)
