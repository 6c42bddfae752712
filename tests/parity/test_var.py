"""VAR against the authors' numbers: the tokenizer scale by scale, the transformer teacher-forced, greedy pictures."""

import re
from dataclasses import replace

import torch

from tests.parity.cases import Case, assert_all_close, assert_close, parametrize
from vistok.generators import var as generator
from vistok.generators.var import VAR
from vistok.hub import fill
from vistok.sampling.tokens import Sampling, probabilities
from vistok.tokenizers import var as tokenizer
from vistok.tokenizers.var import VARTokenizer


def build(case: Case) -> VARTokenizer:
    """Sizes from config.json; what shapes tell has to agree."""
    config = tokenizer.configure(case.config)
    seen = tokenizer.recognise({**case.weights, "quantize.ema_vocab_hit_SV": torch.zeros(10, config.codebook_size)})
    assert seen is not None
    unseen = {"scales": config.scales, "metric": config.metric, "ratio": config.ratio, "beta": config.beta}
    if not config.ratio:
        unseen["phis"] = config.phis
    unseen["cnn"] = replace(seen.cnn, dropout=config.cnn.dropout)
    assert replace(seen, **unseen) == config
    model = VARTokenizer(config, name=case.name)
    table = tokenizer.key_table(config)
    fill(model, table.to_ours(case.weights), case.name)
    back = table.to_theirs(model.state_dict())
    assert back.keys() == case.weights.keys()
    counts = "quantize.ema_vocab_hit_SV"
    assert all(torch.equal(back[key], value) for key, value in case.weights.items() if key != counts)
    assert back[counts].shape == case.weights[counts].shape
    return model.eval()


def as_rows(latent):
    return latent.flatten(2).transpose(1, 2)


def as_map(rows, like):
    return rows.transpose(1, 2).unflatten(2, like.shape[2:])


def unsigned(image):
    return (image + 1) / 2


@parametrize("var", kinds=("vqvae",))
@torch.no_grad()
def test_tokenizer(case):
    io, model = case.io, build(case)
    quantizer, like = model.quantizer, io["encoder_latent"]
    features = model.encoder.cnn(io["image"])
    latent = model.encoder(unsigned(io["image"]))
    assert_all_close({"encoder_out": features, "encoder_latent": latent}, io)
    tokens = model.encode(unsigned(io["image"]))
    codes = [tokens[segment.name].flatten(1) for segment in tokens.segments]
    sums = quantizer.cumulative(tokens.codes)
    actual = {f"codes_{scale}": part for scale, part in enumerate(codes)}
    actual |= {f"fhat_{scale}": as_map(rows, like) for scale, rows in enumerate(sums)}
    actual |= {"quantized": as_map(quantizer.decode(tokens.codes), like)}
    actual |= {"var_input": quantizer.next_inputs(tokens.codes)}
    assert_all_close(actual, io)
    assert (
        not set(io)
        - set(actual)
        - {"encoder_out", "encoder_latent", "image"}
        - {name for name in io if name.startswith(("reconstruction", "train_"))}
    )
    for name in io:
        if name.startswith("reconstruction"):
            scale = name.removeprefix("reconstruction").removeprefix("_scale")
            part = tokens.prefix(model.spec.prefixes[int(scale)]) if scale else tokens
            assert_close(model.decode(part), unsigned(io[name]), name=name)


@parametrize("var", kinds=("vqvae",))
def test_training_of_the_quantizer(case):
    io, model = case.io, build(case).train()
    latent = io["encoder_latent"].clone().requires_grad_()
    out = model.quantizer(as_rows(latent))
    loss = torch.stack(list(out.losses.values())).sum()
    (loss + out.vectors.pow(3).mean()).backward()
    actual = {
        "train_vq_loss": loss,
        "train_fhat": as_map(out.vectors, latent),
        "train_grad_latent": latent.grad,
        "train_grad_codebook": model.quantizer.codebook.grad,
    }
    if "train_grad_phi0" in io:
        actual["train_grad_phi0"] = model.quantizer.convs[0].weight.grad
    assert_all_close(actual, io)
    assert {name for name in io if name.startswith("train_")} == set(actual)


def transformer(case: Case) -> VAR:
    """The generator with the tokenizer of its `vae_case` attached; options from both config.json."""
    vae = Case(case.path.parent / case.config["vae_case"])
    config = generator.configure({**case.config, "vae_kwargs": vae.config})
    seen = generator.recognise(case.weights)
    assert seen is not None
    for name in ("scales", "codebook_size", "code_dim", "classes"):
        assert getattr(seen, name) == getattr(config, name), name
    for name in ("width", "depth", "by_angle", "shared_condition", "mlp"):
        assert getattr(seen.trunk, name) == getattr(config.trunk, name), name
    model = VAR(config, name=case.name)
    table = generator.key_table(config)
    fill(model, table.to_ours(case.weights), case.name)
    back = table.to_theirs(model.state_dict())
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[key], value) for key, value in case.weights.items())
    return model.eval().attach(build(vae))


@parametrize("var", kinds=("var",))
def test_teacher_forced(case, monkeypatch):
    io, model = case.io, transformer(case)
    codes, labels = io["codes"], io["labels"]
    dropped = torch.where(io["label_drop_uniform"] < model.config.class_dropout, model.null, labels)
    actual = {
        "var_input": model.quantizer.next_inputs(codes),
        "logits": model.logits(codes, dropped),
        "logits_nodrop": model.logits(codes, labels),
    }
    monkeypatch.setattr(generator, "drop_labels", lambda labels, share, null, rng: dropped)
    actual["loss"] = model.train().loss({"codes": codes, "label": labels}, 0, torch.Generator())["code"]
    assert_all_close(actual, io)


@parametrize("var", kinds=("var",))
def test_greedy_pictures(case):
    """Codes with the cache, scale by scale; what they were drawn from, from one pass over the codes; the picture."""
    io, model = case.io, transformer(case)
    guidance = 1 + case.config["cfg"]  # theirs is (1 + t) c - t u
    options = {"guidance": guidance, "temperature": 0.0, "seed": 0}
    tokens = model.generate(io["labels"], **options)
    assert_close(tokens.codes, io["greedy_codes"], name="greedy_codes")
    with torch.no_grad():
        with_class = model.logits(tokens.codes, io["labels"])
        without = model.logits(tokens.codes, torch.full_like(io["labels"], model.null))
    place = model.level / max(len(model.lengths) - 1, 1)
    t = (case.config["cfg"] * place)[None, :, None]
    assert_close((1 + t) * with_class - t * without, io["greedy_cfg_logits"], name="greedy_cfg_logits")
    assert_close(model.tokenizer.decode(tokens), io["generated_image"], name="generated_image")
    direct = model.pixels(io["labels"], more_smooth=False, **options)
    assert_close(direct, io["generated_image"], name="generated_image, from the sums")


@parametrize("var", kinds=("var",))
def test_filter(case):
    """What is drawn with, for the top-k (k8) and top-p (p09 is 0.9) of each name."""
    io, seen = case.io, 0
    for name in io:
        if name.startswith("filter_probs_"):
            k, p = re.search(r"k(\d+)", name), re.search(r"p(\d)(\d*)", name)
            sampling = Sampling(
                top_k=int(k.group(1)) if k else 0, top_p=float(f"{p.group(1)}.{p.group(2) or 0}") if p else 1.0
            )
            assert_close(probabilities(io["filter_in"], sampling), io[name], name=name)
            seen += 1
    assert seen or "filter_in" not in io
