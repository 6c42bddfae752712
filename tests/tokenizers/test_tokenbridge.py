"""TokenBridge: sixteen codes a position, seeded draws, a VAE whose scale is followed, and MAR's checkpoint."""

import pytest
import torch

import vistok
from tests.golden import draw_weights
from vistok import checkpoints
from vistok.errors import ConfigError
from vistok.losses.adversarial import AdversarialLoss
from vistok.losses.patchgan import PatchDiscriminator
from vistok.tokenizers.tokenbridge import VARIANTS, key_table


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = vistok.create("tokenbridge-tiny")
    draw_weights(model)
    return model


@pytest.fixture
def pixels():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_published_layout():
    with torch.device("meta"):
        spec = vistok.create("tokenbridge-kl16").spec
    assert spec.segments[0].codebooks == (64,) * 16
    assert spec.segments[0].shape == (16, 16)
    assert spec.bits == 256 * 96


def test_there_and_back(model, pixels):
    tokens = model.encode(pixels)
    assert tokens.codes.shape == (3, 16, 8)
    assert torch.equal(vistok.Tokens.from_bytes(tokens.to_bytes()).codes, tokens.codes)
    with model.inference():
        torch.testing.assert_close(model.decode(tokens), model(pixels).clamp(0, 1), rtol=1e-4, atol=1e-4)
    assert model.decode(model.encode(torch.rand(3, 50, 70))).shape == (1, 3, 50, 70)


def test_draws_belong_to_the_item(model, pixels):
    together = model.encode(pixels, sample=True, seed=[1, 2, 3])
    alone = model.encode(pixels[1:2], sample=True, seed=2)
    assert torch.equal(together.codes[1:2], alone.codes)
    assert not torch.equal(together.codes, model.encode(pixels).codes)


def test_training_lowers_the_loss_and_follows_the_scale(pixels):
    torch.manual_seed(0)
    model = vistok.create("tokenbridge-tiny").train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    rng, totals = torch.Generator().manual_seed(0), []
    for step in range(15):
        terms = model.loss({"pixels": pixels}, step, rng)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        totals.append(terms["reconstruction"].item())
    assert set(terms) == {"reconstruction", "kl"}
    assert totals[-1] < totals[0]
    assert not torch.equal(model.quantizer.running_var, torch.ones(8))
    before = model.quantizer.running_var.clone()
    model.eval().loss({"pixels": pixels}, 0, rng)
    assert torch.equal(model.quantizer.running_var, before)


def test_judges(pixels):
    torch.manual_seed(0)
    model = vistok.create("tokenbridge-tiny").train()
    model.judge(AdversarialLoss(PatchDiscriminator(width=8, layers=1)), perceptual=lambda a, b: (a - b).square().mean())
    batch = {"pixels": pixels}
    assert {"adversarial", "perceptual"} <= set(model.loss(batch, 0, torch.Generator().manual_seed(0)))
    assert model.discriminator_loss(batch, 0).item() > 0


def test_an_authors_checkpoint_file_converts(model, pixels, tmp_path):
    path = tmp_path / "kl.ckpt"
    torch.save({"model": key_table(model.config).to_theirs(model.state_dict())}, path)
    done = checkpoints.convert_file(path, "tokenbridge", tmp_path / "model")
    assert done["role"] == "tokenizer"
    back = vistok.load(tmp_path / "model")
    torch.testing.assert_close(back.quantizer.running_var, torch.full((8,), 0.2325**-2))
    with torch.no_grad():
        assert torch.equal(back.moments(pixels), model.eval().moments(pixels))


def test_what_does_not_fit():
    with pytest.raises(ConfigError, match="scale"):
        vistok.create("tokenbridge-tiny", scale=0.0)
    assert VARIANTS["tokenbridge-kl16"].cnn.factor == 16


def test_it_runs_in_half_precision():
    torch.manual_seed(0)
    half = vistok.create("tokenbridge-tiny", dtype=torch.bfloat16)
    tokens = half.encode(torch.rand(2, 3, 32, 32))
    assert half.decode(tokens).dtype == torch.bfloat16
