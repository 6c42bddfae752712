"""FlexTok against its authors' numbers: FSQ, encoder, decoder under every condition, sampling, one training step."""

from dataclasses import replace

import pytest
import torch

from tests.parity.cases import Case, assert_close, parametrize
from vistok.hub import fill
from vistok.nn.vae import VAEConfig
from vistok.quantize import FSQ
from vistok.sampling.flow import interpolate
from vistok.tokenizers._flextok_keys import fields_of_state
from vistok.tokenizers._flextok_network import TrunkSize
from vistok.tokenizers.flextok import FlexTok, FlexTokConfig, key_table

TOLERANCE = 2e-5


@parametrize("flextok", kinds=("fsq",))
def test_fsq(case: Case) -> None:
    for index, levels in enumerate(case.config["levels"]):
        io, quantizer = case.io, FSQ(levels)
        out = quantizer(io[f"z_{index}"])
        assert_close(out.vectors, io[f"q_{index}"], name="vectors")
        assert_close(out.codes, io[f"ids_{index}"], name="codes")
        codes = io[f"all_codes_index_{index}"]
        assert_close(quantizer.decode(codes[None])[0], io[f"all_codes_{index}"], name="vectors of codes")


def build(case: Case) -> FlexTok:
    """Sizes from the weights; heads, levels, picture and the VAE's groups and scale from config.json."""
    pytest.importorskip("diffusers")
    plain = case.config
    fields = fields_of_state(case.weights)
    assert fields is not None
    head, scale = plain["head_dim"], plain.get("attention_scale")

    def size(seen: TrunkSize) -> TrunkSize:
        return replace(seen, head=head, scale=scale)

    vae = VAEConfig(
        plain["vae"]["latent_channels"],
        tuple(plain["vae"]["block_out_channels"]),
        plain["vae"]["layers_per_block"],
        plain["vae"]["norm_num_groups"],
        plain["vae"]["scaling_factor"],
    )
    assert replace(vae, groups=1, scale=1.0) == replace(fields["vae"], groups=1, scale=1.0)
    assert (size(fields["encoder"]).width, size(fields["encoder"]).depth) == (plain["enc_width"], plain["enc_depth"])
    assert (size(fields["decoder"]).width, size(fields["decoder"]).depth) == (plain["dec_width"], plain["dec_depth"])
    assert fields["registers"] == plain["num_registers"]
    assert fields["modulated_head"] == plain["final_head_adaLN"]
    assert fields["grid"] == tuple(plain["posemb_max_grid"])
    fields |= {
        "encoder": size(fields["encoder"]),
        "decoder": size(fields["decoder"]),
        "vae": vae,
        "size": tuple(plain["image_hw"]),
        "levels": tuple(plain["fsq_levels"]),
        "times": "logit-normal",
    }
    model = FlexTok(FlexTokConfig(**fields))
    fill(model, key_table(model.config).to_ours(case.weights), case.name)
    return model.eval()


@parametrize("flextok", kinds=("tokenizer",))
@torch.no_grad()
def test_encoding(case: Case) -> None:
    model, io = build(case), case.io
    pixels = (io["image"] + 1) / 2
    latent = model.vae.encode(pixels)
    assert_close(latent, io["vae_latent"], name="vae_latent")
    assert_close(model.encoder.features(io["vae_latent"]), io["enc_registers_out"], name="enc_registers_out")
    assert_close(model.encoder(io["vae_latent"]), io["fsq_input"], name="fsq_input")
    out = model.quantizer(io["fsq_input"])
    assert_close(out.vectors, io["fsq_output"], name="fsq_output")
    assert_close(out.codes, io["token_ids"], name="token_ids")
    assert_close(model.encode(pixels).codes, io["token_ids"], name="encode")
    assert_close(model.quantizer.decode(io["token_ids"]), io["fsq_output"], name="vectors of the codes")


@parametrize("flextok", kinds=("tokenizer",))
@torch.no_grad()
def test_velocity(case: Case) -> None:
    model, io = build(case), case.io
    cells, times, vectors = model.config.cells, io["timesteps"], io["fsq_output"]
    assert_close(model.decoder.time_embedding(times), io["time_embedding"], name="time_embedding")
    absent = torch.ones(len(vectors), dtype=torch.bool)
    conditions = {"all_tokens": {}, "keep_k": {"lengths": io["keep_k"]}, "null": {"absent": absent}}
    for name, condition in conditions.items():
        known = model.decoder.registers(vectors, cells, **condition)
        assert_close(model.decoder(io["noise"], times, known), io[f"velocity_{name}"], name=f"velocity_{name}")


@parametrize("flextok", kinds=("tokenizer",))
@torch.no_grad()
def test_sampling(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents and pictures of every guidance, from the stored noise; then through `decode`, mixed and one by one."""
    model, io, plain = build(case), case.io, case.config
    steps, lengths = plain["sampling_steps"], io["keep_k"]
    for name, guidance in (("plain", 1.0), ("cfg", plain["guidance_scale"]), ("apg", plain["guidance_scale"])):
        how = {"steps": steps, "guidance": guidance, "guide": "cfg" if name == "cfg" else "apg"}
        found = model.sample(io["fsq_output"], io["noise"], lengths, **how)
        assert_close(found, io[f"sample_latent_{name}"], name=f"sample_latent_{name}")
        image = model.vae.decode(io[f"sample_latent_{name}"])
        assert_close(image * 2 - 1, io[f"sample_image_{name}"], name=f"sample_image_{name}")
        monkeypatch.setattr(
            "vistok.tokenizers.flextok.normals", lambda seeds, shape, device: io["noise"][list(seeds)].to(device)
        )
        tokens = model.encode((io["image"] + 1) / 2)
        expected = ((io[f"sample_image_{name}"] + 1) / 2).clamp(0, 1)
        mixed = model.decode(tokens.prefix(lengths.tolist()), seed=range(len(lengths)), **how)
        assert_close(mixed, expected, name=f"decode of mixed lengths, {name}", scale=1)
        for row, length in enumerate(lengths.tolist()):
            one = model.decode(tokens[row].prefix(length), seed=row, **how)
            assert_close(one, expected[row : row + 1], name=f"decode of {length}, {name}", scale=1)


@parametrize("flextok", kinds=("tokenizer",))
def test_training(case: Case) -> None:
    model, io = build(case), case.io
    noisy, target = interpolate(io["vae_latent"], io["noise"], io["train_sigma"])
    assert_close(noisy, io["train_x_t"], name="train_x_t")
    known = model.decoder.registers(io["fsq_output"], model.config.cells, io["keep_k"])
    velocity = model.decoder(noisy, io["train_sigma"], known)
    assert_close(velocity, io["train_velocity"], name="train_velocity")
    assert_close((velocity - target).square().mean(), io["train_loss_mse"], name="train_loss_mse")


@parametrize("flextok", kinds=("tokenizer",))
def test_checkpoint_goes_back_out(case: Case) -> None:
    model = build(case)
    back = key_table(model.config).to_theirs(model.state_dict())
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[key], case.weights[key]) for key in back)
