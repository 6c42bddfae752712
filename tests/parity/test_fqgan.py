"""FQGAN and its generator FAR against the authors' numbers: heads, codes, losses, teacher-forced and greedy logits."""

import math
from dataclasses import replace

import torch

from tests.parity.cases import Case, assert_all_close, assert_close, parametrize
from vistok.generators import fqgan as generator
from vistok.generators.fqgan import FAR
from vistok.hub import fill
from vistok.losses.representation import contrastive, teacher_input
from vistok.sampling.tokens import guide
from vistok.tokenizers.fqgan import FQGAN, THEIR_PREDICTORS, key_table, recognise


def build(case: Case) -> FQGAN:
    """Sizes from the weights, numbers of attention heads and loss weights from config.json."""
    plain = case.config
    found = recognise(case.weights)
    assert found is not None
    assert (found.cnn.width, list(found.cnn.multipliers)) == (plain["ch"], plain["ch_mult"])
    assert (found.codebook_size, found.code_dim) == (plain["codebook_size"], plain["codebook_embed_dim"])
    assert list(found.heads) == plain["heads"]
    config = replace(
        found,
        adapter_heads=plain["adapter"]["heads"],
        predictor_heads=plain["feat_pred"]["heads"],
        beta=plain["commit_loss_beta"],
        entropy=plain["entropy_loss_ratio"],
        disentangle=plain["disentanglement_ratio"],
        representation=1.0,
    )
    model = FQGAN(config)
    fill(model, key_table(config).to_ours(case.weights), case.name)
    return model.eval()


def unsigned(image):
    return (image + 1) / 2


@parametrize("fqgan", kinds=("tokenizer",))
def test_tokenizer(case):
    io, model = case.io, build(case)
    with torch.no_grad():
        trunk = model.encoder.trunk(io["image"])
        latent = model.encoder(unsigned(io["image"]))
        vectors = (
            model.quantizer(latent.flatten(2).transpose(1, 2)).vectors.transpose(1, 2).unflatten(2, latent.shape[2:])
        )
        tokens = model.encode(unsigned(io["image"]))
        decoded = model.decode(tokens)
    parts = latent.split(model.config.code_dim, 1)
    actual = {f"head_{name}": head.features(trunk) for name, head in model.encoder.heads.items()}
    actual |= {f"latent_{name}": part for name, part in zip(model.config.heads, parts, strict=True)}
    quantized = vectors.split(model.config.code_dim, 1)
    actual |= {f"quantized_{name}": part for name, part in zip(model.config.heads, quantized, strict=True)}
    grid = tokens["grid"]
    actual |= {f"codes_{name}": grid[..., column] for column, name in enumerate(model.config.heads)}
    actual |= {"quantized_concat": vectors, "reconstruction": model.decoder(vectors) * 2 - 1}
    assert_all_close(actual, io)
    assert_close(decoded, unsigned(io["reconstruction_from_codes"]).clamp(0, 1), name="decode(encode)")


@parametrize("fqgan", kinds=("tokenizer",))
def test_training_terms(case):
    io, model = case.io, build(case).train()
    pixels = unsigned(io["image"])
    latent = model.encoder(pixels)
    quantized = model.quantizer(latent.flatten(2).transpose(1, 2))
    heads = model.config.heads
    actual = {"train_disentangle_loss": quantized.losses["disentanglement"]}
    for name in heads:
        actual[f"train_vq_loss_{name}"] = quantized.losses[f"codebook:{name}"]
        actual[f"train_commit_loss_{name}"] = quantized.losses[f"commitment:{name}"]
        actual[f"train_entropy_loss_{name}"] = quantized.losses[f"entropy:{name}"]
    for name, predictor in model.predictors.items():
        label = "semantic_prediction" + name.removeprefix("sem")
        actual[label] = predictor(model.quantizer.part(name, quantized.vectors))
    taught = heads[-1]
    predicted = actual["semantic_prediction" + taught.removeprefix("sem")]
    actual["train_representation_loss"] = contrastive(predicted, io["teacher_feature"])
    actual["teacher_input_224_first_rows"] = teacher_input(pixels)[:, :, :4]
    assert_all_close(actual, io)


@parametrize("fqgan", kinds=("tokenizer",))
def test_loss_is_made_of_the_authors_terms(case):
    io, model = case.io, build(case).train()
    pixels = unsigned(io["image"])
    widths = dict(zip(model.config.semantic, model.config.features, strict=True))
    features = {name: torch.ones(len(pixels), width) for name, width in widths.items()}
    features[model.config.heads[-1]] = io["teacher_feature"]
    terms = model.loss({"pixels": pixels, "features": features}, 0, torch.Generator())
    total = sum(value for key, value in io.items() if key.startswith("train_"))
    strangers = sum(terms.pop(f"representation:{name}") for name in model.config.semantic[:-1])
    assert not strangers or math.isfinite(strangers)
    terms.pop("reconstruction")
    assert_close(torch.stack(list(terms.values())).sum(), total, name="sum of the terms", scale=1.0)


@parametrize("fqgan", kinds=("tokenizer",))
def test_checkpoint_goes_back_out(case):
    model = build(case)
    back = key_table(model.config).to_theirs(model.state_dict())
    rings = {f"quantize_{name}.codebook_used" for name in model.config.heads}
    assert back.keys() - case.weights.keys() <= rings
    assert set(THEIR_PREDICTORS) >= set(model.config.semantic)
    assert all(torch.equal(back[key], value) for key, value in case.weights.items())


def far(case: Case) -> FAR:
    config = generator.configure(case.config)
    seen = generator.recognise(case.weights)
    assert seen is not None
    assert (seen.sub_codes, seen.codebook_size, seen.head_layers) == (
        config.sub_codes,
        config.codebook_size,
        config.head_layers,
    )
    model = FAR(config)
    table = generator.key_table(config)
    fill(model, table.to_ours(case.weights), case.name)
    back = table.to_theirs(model.state_dict())
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[key], value) for key, value in case.weights.items())
    return model.eval()


def codes_of(case: Case) -> torch.Tensor:
    return torch.stack([case.io[f"codes_{slot + 1}"] for slot in range(len(case.config["sub_code_order"]))], -1)


@parametrize("fqgan", kinds=("far",))
def test_far_teacher_forced(case):
    io, model, codes = case.io, far(case), codes_of(case)
    with torch.no_grad():
        logits = model.logits(codes, io["class_labels"])
        terms = model.loss({"codes": codes, "label": io["class_labels"]}, 0, torch.Generator())
    rotation = model.rotation()
    actual = {f"logits_{slot + 1}": logits[:, :, slot] for slot in range(logits.shape[2])}
    actual["freqs_cis"] = torch.stack([rotation.cos, rotation.sin], -1)
    actual["loss"] = torch.stack(list(terms.values())).sum()
    assert_all_close(actual, io)


@parametrize("fqgan", kinds=("far",))
def test_far_greedy(case):
    """Codes step by step with the cache; what they were drawn from, from one pass over the codes."""
    io, model = case.io, far(case)
    labels = io["class_labels"]
    for name, scale in (("unguided", 1.0), ("guided", case.config["cfg_scale"])):
        codes = model.generate(labels, guidance=scale, temperature=0).codes
        assert_close(codes, io[f"generated_{name}_greedy"], name=name)
        with torch.no_grad():
            both = torch.cat([labels, torch.full_like(labels, model.null)])
            logits = guide(model.logits(codes.repeat(2, 1, 1), both), scale)
        assert_close(logits.softmax(-1), io[f"probs_{name}"], name=f"probs_{name}")


@parametrize("fqgan", kinds=("far",))
def test_far_goes_on_from_a_known_prefix(case):
    io, model = case.io, far(case)
    whole = model.generate(io["class_labels"], temperature=0)
    again = model.generate(io["class_labels"], temperature=0, known=whole.prefix(5))
    assert torch.equal(again.codes, whole.codes)
