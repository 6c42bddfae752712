"""VQGAN as a tokenizer: the contract, its training loss, its configs."""

import pytest
import torch

import vistok
from vistok.errors import ConfigError, InputError
from vistok.losses.adversarial import AdversarialLoss
from vistok.losses.patchgan import PatchDiscriminator
from vistok.nn.cnn import CNNConfig
from vistok.tokenizers.vqgan import VARIANTS, VQGANConfig, configure, key_table, recognise

TINY = [name for name in VARIANTS if name.endswith("tiny")]


@pytest.mark.parametrize("name", TINY)
def test_any_picture_goes_in_and_comes_back_in_its_size(name):
    torch.manual_seed(0)
    tok = vistok.create(name)
    images = torch.rand(2, 3, 30, 41)
    tokens = tok.encode(images)
    assert tokens.segments[0].shape == (8, 11)
    assert tok.decode(tokens).shape == images.shape
    assert tok.embed(tokens).shape == (2, 88, tok.config.code_dim)
    again = tok.encode(images[1:])
    assert torch.equal(again.codes, tokens.codes[1:])
    legal = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(tok.decode(tok.encode(legal)), tok(legal).clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_half_precision_runs(name):
    tok = vistok.create(name, dtype=torch.bfloat16)
    out = tok.decode(tok.encode(torch.rand(1, 3, 32, 32)))
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", TINY)
def test_a_few_steps_lower_the_loss(name):
    torch.manual_seed(0)
    tok = vistok.create(name).train()
    batch = {"pixels": torch.rand(2, 3, 1, 1).expand(2, 3, 32, 32)}
    optimizer = torch.optim.Adam(tok.parameters(), 1e-3)
    history = []
    for step in range(12):
        terms = tok.loss(batch, step, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        history.append(float(terms["reconstruction"].detach()))
    assert min(history[-3:]) < 0.8 * history[0]
    assert all(parameter.grad is not None for parameter in tok.parameters())


def test_gumbel_noise_comes_from_the_given_generator():
    torch.manual_seed(0)
    tok = vistok.create("vqgan-gumbel-tiny").train()
    batch = {"pixels": torch.rand(1, 3, 32, 32)}

    def value(seed):
        return tok.loss(batch, 0, torch.Generator().manual_seed(seed))["reconstruction"].item()

    assert value(1) == value(1)
    assert value(1) != value(2)


def test_judges_act_and_stay_outside_the_model():
    torch.manual_seed(0)
    tok = vistok.create("vqgan-tiny").train()
    before = set(tok.state_dict())
    with pytest.raises(ConfigError, match="judge"):
        tok.discriminator_loss({"pixels": torch.rand(1, 3, 32, 32)}, 0)
    adversary = AdversarialLoss(PatchDiscriminator(width=4, layers=1), start=1, weight=0.8)
    tok.judge(adversary, perceptual=lambda a, b: (a - b).square().mean((1, 2, 3)))
    batch = {"pixels": torch.rand(2, 3, 32, 32)}
    early = tok.loss(batch, 0, torch.Generator())
    late = tok.loss(batch, 1, torch.Generator())
    assert early["adversarial"].item() == 0
    assert late["adversarial"].item() != 0
    assert late["perceptual"].item() > 0
    assert tok.discriminator_loss(batch, 1).item() > 0
    assert set(tok.state_dict()) == before


def test_soft_codes_are_a_distribution_that_peaks_at_the_code():
    torch.manual_seed(0)
    tok = vistok.create("vqgan-maskgit-tiny")
    image = torch.rand(1, 3, 16, 16)
    latent = tok.encoder(image)
    soft = tok.soft_codes(latent, temperature=0.5)
    assert torch.allclose(soft.sum(-1), torch.ones(1, 16))
    assert torch.equal(soft.argmax(-1), tok.encode(image).codes)
    with pytest.raises(ConfigError, match="logits"):
        vistok.create("vqgan-gumbel-tiny").soft_codes(latent)


def test_attention_follows_the_nominal_resolution():
    params = {"ddconfig": {"ch": 32, "ch_mult": [1, 1, 2], "num_res_blocks": 1, "z_channels": 8, "resolution": 64}}
    params |= {"embed_dim": 8, "n_embed": 16}
    params["ddconfig"]["attn_resolutions"] = [32, 16]
    config = configure(params)
    assert config.cnn.attention == (1, 2)
    assert config.codebook == "legacy"
    gumbel = configure({"model": {"target": "taming.models.vqgan.GumbelVQ", "params": params | {"kl_weight": 1e-8}}})
    assert gumbel.codebook == "gumbel"
    with pytest.raises(ConfigError, match="double_z"):
        configure(params | {"ddconfig": params["ddconfig"] | {"double_z": True}})


def test_gumbel_checkpoints_have_the_authors_names():
    """There is no manifest of the Gumbel model: its names are those of the authors' code."""
    with torch.device("meta"):
        tok = vistok.create("vqgan-openimages-gumbel-f8")
        state = key_table(tok.config).to_theirs(tok.state_dict())
    assert tuple(state["quantize.proj.weight"].shape) == (8192, 256, 1, 1)
    assert tuple(state["quantize.embed.weight"].shape) == (8192, 256)
    assert "encoder.down.3.attn.1.q.weight" in state
    found = recognise(state)
    assert found == tok.config


def test_impossible_configs_and_sizes_are_refused():
    with pytest.raises(ConfigError, match="code_dim must be 256"):
        VQGANConfig("maskgit", CNNConfig(style="maskgit"), code_dim=8)
    with pytest.raises(ConfigError, match="kl_weight"):
        VQGANConfig(codebook="gumbel", entropy=0.1)
    with pytest.raises(InputError, match="multiples of 4"):
        vistok.create("vqgan-tiny")(torch.rand(1, 3, 30, 32))
