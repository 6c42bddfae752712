"""VQGAN+ and MaskBit's tokenizer: the contract, bit order, training terms, the authors' files."""

from dataclasses import replace

import pytest
import torch

import vistok
from vistok import checkpoints
from vistok.errors import ConfigError, InputError
from vistok.losses.adversarial import AdversarialLoss
from vistok.losses.blurred import BlurredDiscriminator
from vistok.tokenizers.maskgit import VARIANTS, VQGANPlus, VQGANPlusConfig, configure, key_table, recognise

TINY = [name for name in VARIANTS if name.endswith("tiny")]


@pytest.mark.parametrize("name", TINY)
def test_any_picture_goes_in_and_comes_back_in_its_size(name):
    torch.manual_seed(0)
    tok = vistok.create(name)
    images = torch.rand(2, 3, 30, 41)
    tokens = tok.encode(images)
    assert tokens.segments[0].shape == (8, 11)
    assert tok.decode(tokens).shape == images.shape
    assert tok.embed(tokens).shape == (2, 88, tok.config.cnn.latent_dim)
    assert torch.equal(tok.encode(images[1:]).codes, tokens.codes[1:])


def test_the_first_channel_is_the_lowest_bit():
    tok = vistok.create("maskbit-tokenizer-tiny")
    latent = torch.full((1, 8, 1, 3), -1.0)
    latent[0, 0, 0, 0] = latent[0, 7, 0, 1] = 0.5
    latent[0, 3, 0, 2] = 0.0  # counts as negative
    assert tok.quantize(latent).codes.tolist() == [[1, 128, 0]]
    assert tok.quantizer.decode(torch.tensor([[5]]))[0, 0].tolist() == [1, -1, 1, -1, -1, -1, -1, -1]


@pytest.mark.parametrize("name", TINY)
def test_a_few_steps_lower_the_loss(name):
    torch.manual_seed(0)
    tok = vistok.create(name).train()
    batch = {"pixels": torch.rand(2, 3, 1, 1).expand(2, 3, 32, 32)}
    optimizer = torch.optim.Adam(tok.parameters(), 1e-3)
    history = []
    for step in range(12):
        terms = tok.loss(batch, step, torch.Generator())
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        history.append(float(terms["reconstruction"].detach()))
    assert min(history[-3:]) < 0.8 * history[0]
    assert all(parameter.grad is not None for parameter in tok.parameters())


def test_the_entropy_counts_more_at_first():
    torch.manual_seed(0)
    tok = vistok.create("maskbit-tokenizer-tiny").train()
    batch = {"pixels": torch.rand(2, 3, 32, 32)}
    first, middle, later = (tok.loss(batch, step, torch.Generator())["entropy"] for step in (0, 1000, 5000))
    torch.testing.assert_close(first, 3 * later)
    torch.testing.assert_close(middle, 2 * later)


def test_judges():
    tok = vistok.create("vqgan-plus-tiny").train()
    adversary = AdversarialLoss(BlurredDiscriminator(width=32, stages=4), weight=0.02, adaptive=False, lecam=0.001)
    tok.judge(adversary, perceptual=lambda a, b: (a - b).abs().mean((1, 2, 3)))
    batch = {"pixels": torch.rand(2, 3, 32, 32)}
    terms = tok.loss(batch, 0, torch.Generator())
    assert terms.keys() == {"reconstruction", "perceptual", "adversarial", "commitment", "codebook"}
    tok.discriminator_loss(batch, 0).backward()
    assert adversary.discriminator.last.weight.grad is not None


@pytest.mark.parametrize("name", TINY)
def test_an_authors_checkpoint_file_converts(name, tmp_path):
    torch.manual_seed(0)
    tok = vistok.create(name)
    path = tmp_path / "tokenizer.bin"
    torch.save(key_table(tok.config).to_theirs(tok.state_dict()), path)
    done = checkpoints.convert_file(path, "maskgit", tmp_path / "model")
    assert done["role"] == "tokenizer"
    back = vistok.load(tmp_path / "model")
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(back.encode(images).codes, tok.encode(images).codes)
    checkpoints.export_file(tmp_path / "model", tmp_path / "back.bin")
    theirs, again = checkpoints.read(path), checkpoints.read(tmp_path / "back.bin")
    assert theirs.keys() == again.keys()
    assert all(torch.equal(again[key], value) for key, value in theirs.items())


def test_levels_are_told_from_names_whichever_way_they_count():
    for turned in (False, True):
        config = replace(VARIANTS["vqgan-plus-tiny"], full_first=turned)
        state = key_table(config).to_theirs(VQGANPlus(config).state_dict())
        assert ("decoder.up.0.upsample_conv.weight" in state) != turned
        assert recognise(state).full_first == turned


def test_bad_configs():
    with pytest.raises(ConfigError, match="expected 'lookup'"):
        VQGANPlusConfig(codebook="fsq")
    with pytest.raises(ConfigError, match="bits"):
        VQGANPlusConfig(replace(VARIANTS["maskbit-tokenizer-tiny"].cnn, latent_dim=30))
    with pytest.raises(ConfigError, match="lacks"):
        configure({"model": {"vq_model": {}}})
    tok = vistok.create("maskbit-tokenizer-tiny")
    with pytest.raises(InputError, match="codes"):
        tok.quantizer.decode(torch.tensor([[256]]))
