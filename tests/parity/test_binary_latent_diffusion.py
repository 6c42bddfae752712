"""The binary autoencoder and its diffusion against the authors' numbers: stages, losses, whole trajectories."""

from dataclasses import replace

import torch

from tests.parity.cases import Case, assert_all_close, assert_close, parametrize
from vistok.generators import binary_latent_diffusion as generator
from vistok.generators.binary_latent_diffusion import BinaryDiffusion
from vistok.hub import fill
from vistok.nn.positions import sincos_2d
from vistok.sampling.tokens import Sampling
from vistok.tokenizers import binary_latent_diffusion as tokenizer
from vistok.tokenizers.binary_latent_diffusion import BinaryAutoencoder


def as_rows(latent):
    return latent.flatten(2).transpose(1, 2)


def as_map(rows, like):
    return rows.transpose(1, 2).unflatten(2, like.shape[2:])


def build(case: Case) -> BinaryAutoencoder:
    config, seen = tokenizer.configure(case.config), tokenizer.recognise(case.weights)
    assert seen is not None
    assert (seen.cnn, seen.bits, seen.norm_first) == (config.cnn, config.bits, config.norm_first)
    model = BinaryAutoencoder(config)
    fill(model, tokenizer.key_table(config).to_ours(case.weights), case.name)
    return model.eval()


@parametrize("binary-latent-diffusion", kinds=("ae",))
def test_autoencoder(case):
    io, model = case.io, build(case)
    quantizer, uniform = model.quantizer, as_rows(io["bernoulli_uniform"])
    with torch.no_grad():
        latent = as_rows(io["encoder_out"])
        activation = quantizer.activation(latent)
        out = quantizer(latent)
        values = quantizer._as_values(out.codes, latent.dtype)
        thrown = quantizer._as_values(uniform < quantizer.probabilities(activation), latent.dtype)
        actual = {
            "encoder_out": model.encoder(io["image"]),
            "bit_probabilities": as_map(activation, io["bit_probabilities"]),
            "binary_code": as_map(values, io["binary_code"]),
            "quantized": as_map(out.vectors, io["quantized"]),
            "code_loss": out.stats["code"],
            "reconstruction": model.decoder(io["quantized"]),
            "reconstruction_from_code": model.decoder(as_map(quantizer.decode(out.codes), io["quantized"])),
            "sampled_code": as_map(thrown, io["sampled_code"]),
            "sampled_quantized": as_map(quantizer.vectors(thrown), io["sampled_quantized"]),
        }
    assert_all_close(actual, io)
    tokens = model.encode(io["image"])
    assert torch.equal(tokens.codes, out.codes)
    assert_close(model.decode(tokens), io["reconstruction"].clamp(0, 1), name="decode")


@parametrize("binary-latent-diffusion", kinds=("ae",))
def test_gradient_passes_to_the_probability(case):
    io, model = case.io, build(case)
    latent = io["encoder_out"].clone().requires_grad_()
    vectors = model.quantizer(as_rows(latent)).vectors
    (as_map(vectors, io["grad_weight"]) * io["grad_weight"]).sum().backward()
    assert_close(latent.grad, io["grad_encoder_out"], name="grad_encoder_out")


@parametrize("binary-latent-diffusion", kinds=("ae",))
def test_autoencoder_goes_back_out(case):
    model = build(case)
    back = tokenizer.key_table(model.config).to_theirs(model.state_dict())
    assert back.keys() == case.weights.keys()
    unused = {key for key in back if "logsigma" in key or ".conv_out." in key}
    assert all(torch.equal(back[key], case.weights[key]) for key in back.keys() - unused)


def diffusion(case: Case, **changes) -> BinaryDiffusion:
    config, seen = generator.configure(case.config), generator.recognise(case.weights)
    assert seen is not None
    for field in ("bits", "grid", "width", "depth", "steps", "schedule", "classes", "embed_width"):
        assert getattr(seen, field) == getattr(config, field), field
    model = BinaryDiffusion(replace(config, **changes))
    table = generator.key_table(config)
    fill(model, table.to_ours(case.weights), case.name)
    back = table.to_theirs(model.state_dict())
    assert back.keys() == case.weights.keys()
    assert_all_close(back, case.weights)
    return model.eval()


@parametrize("binary-latent-diffusion", kinds=("diffusion",))
def test_process_and_denoiser(case):
    io, model = case.io, diffusion(case)
    schedule, config = model.schedule, model.config
    noisy = (io["uniform"] < schedule.marginal(io["x0"], io["t"])).float()
    with torch.no_grad():
        actual = {
            "schedule_k_final": schedule.kept,
            "schedule_b_final": schedule.coin,
            "schedule_beta": schedule.step,
            "pos_emb_initial": sincos_2d(*config.grid, config.width)[None],
            "q_xt": schedule.marginal(io["x0"], io["t"]),
            "x_t": noisy,
            "denoiser_logits": model.denoiser(noisy, io["t"], io.get("labels")),
        }
        if "denoiser_logits_uncond" in io:
            absent = torch.full_like(io["labels"], -1)
            actual["denoiser_logits_uncond"] = model.denoiser(noisy, io["t"], absent)
            both = model.denoiser(noisy.repeat(2, 1, 1), io["t"].repeat(2), torch.cat([io["labels"], absent]))
            together = torch.cat([io["denoiser_logits"], io["denoiser_logits_uncond"]])
            assert_close(both, together, name="both branches in one batch")
    assert_all_close(actual, io)


SETTINGS = {
    "focal0_mean": {"focal": 0, "timestep_weight": "mean"},
    "plain_weighted": {"focal": -1, "timestep_weight": "weighted"},
    "focal2_mean": {"focal": 2, "timestep_weight": "mean"},
    "plain_aux01": {"focal": -1, "timestep_weight": "mean", "auxiliary": 0.1},
    "x0pred_plain": {"focal": -1, "timestep_weight": "mean", "flips": False},
}


@parametrize("binary-latent-diffusion", kinds=("diffusion",))
def test_losses(case):
    io = case.io
    for name, changes in SETTINGS.items():
        model = diffusion(case, **changes)
        batch = {"codes": io["x0"].long(), "label": io.get("labels"), "t": io["t"], "uniform": io["uniform"]}
        with torch.no_grad():
            terms = model.loss(batch, 0, torch.Generator())
            logits = model.denoiser(io["x_t"], io["t"], io.get("labels"))
            right = (model.data_logits(logits, io["x_t"]) > 0) == (io["x0"] > 0)
            actual = {
                f"loss_{name}": torch.stack(list(terms.values())).sum(),
                f"bce_{name}": model.cross_entropy(logits, io["x0"], io["x_t"]).mean(),
                f"acc_{name}": right.float().mean(),
            }
            if "auxiliary" in changes:
                actual[f"aux_{name}"] = model.auxiliary(logits, io["x0"], io["x_t"], io["t"]).mean()
        assert_all_close(actual, io)


@parametrize("binary-latent-diffusion", kinds=("diffusion",))
def test_trajectory(case):
    """A whole run with stored throws: every probability, every state, and what `generate` ends with."""
    io, plain = case.io, case.config["sample"]
    model, uniform = diffusion(case), io["sample_uniforms"]
    guidance = 1 + plain["guidance"] if plain["guidance"] is not None else 1.0  # theirs is (1 + w) c - w u
    sampling = Sampling(guidance=guidance, temperature=plain["temp"])
    visited = model.schedule.timesteps(plain["steps"])
    assert visited == io["sampling_timesteps"].tolist()
    items = uniform.shape[1]
    labels = None if plain["label"] is None else torch.full((items,), plain["label"])
    bits, seen, states = (uniform[0] < 0.5).float(), [torch.full_like(uniform[0], 0.5)], []
    with torch.no_grad():
        for index, t in enumerate(visited):
            states.append(bits)
            p = model.predict(bits, t, labels, sampling)
            if index + 1 < len(visited):
                seen.append(model.schedule.posterior(p, bits, t, visited[index + 1]))
                bits = (uniform[index + 1] < seen[-1]).float()
            else:
                bits = (p > 0.5).float()
    states.append(bits)
    assert_close(torch.stack(states).to(torch.uint8), io["sample_trajectory"], name="sample_trajectory")
    assert_close(torch.stack(seen), io["sample_probabilities"], name="sample_probabilities")
    tokens = model.generate(
        plain["label"], count=items, guidance=guidance, temperature=plain["temp"], steps=plain["steps"], uniform=uniform
    )
    assert_close(tokens.codes, io["sample_trajectory"][-1].long(), name="generate")
