"""The binary autoencoder: bits as tokens, seeded throws, its loss, and the authors' training checkpoints."""

from dataclasses import replace

import pytest
import torch

import vistok
from tests.golden import draw_weights
from vistok import checkpoints
from vistok.errors import ConfigError
from vistok.losses.adversarial import AdversarialLoss
from vistok.losses.patchgan import PatchDiscriminator
from vistok.tokenizers.binary_latent_diffusion import VARIANTS, key_table

TINY = ["binary-latent-diffusion-tiny", "binary-latent-diffusion-tiny-signed"]


@pytest.fixture(params=TINY)
def model(request):
    torch.manual_seed(0)
    model = vistok.create(request.param)
    draw_weights(model)
    return model


def pixels_for(model, items=3):
    return torch.rand(items, 3, *model.spec.size, generator=torch.Generator().manual_seed(0))


def test_there_and_back(model):
    pixels = pixels_for(model)
    tokens = model.encode(pixels)
    assert tokens.codes.shape == (3, model.spec.length, model.config.bits)
    assert int(tokens.bits()[0]) == model.spec.length * model.config.bits
    assert torch.equal(vistok.Tokens.from_bytes(tokens.to_bytes()).codes, tokens.codes)
    with model.inference():
        torch.testing.assert_close(model.decode(tokens), model(pixels).clamp(0, 1), rtol=1e-4, atol=1e-4)
    side = 2 * model.config.cnn.factor
    assert model.decode(model.encode(torch.rand(1, 3, side + 3, side))).shape == (1, 3, side + 3, side)


def test_throws_belong_to_the_item(model):
    pixels = pixels_for(model)
    together = model.encode(pixels, sample=True, seed=[1, 2, 3])
    assert torch.equal(together.codes[1:2], model.encode(pixels[1:2], sample=True, seed=2).codes)
    assert not torch.equal(together.codes, model.encode(pixels).codes)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = vistok.create(TINY[0]).train()
    pixels, rng, totals = pixels_for(model), torch.Generator().manual_seed(0), []
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(20):
        terms = model.loss({"pixels": pixels}, step, rng)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        totals.append(terms["reconstruction"].item())
    assert totals[-1] < 0.8 * totals[0]
    first = vistok.create(TINY[0]).train()
    draw_weights(first)
    again = [first.loss({"pixels": pixels}, 0, torch.Generator().manual_seed(5))["reconstruction"] for _ in range(2)]
    assert torch.equal(*again)


def test_judges_see_pixels_in_0_1():
    torch.manual_seed(0)
    model, seen = vistok.create(TINY[0], code_weight=0.1).train(), []
    critic = PatchDiscriminator(width=8, layers=1)
    model.judge(AdversarialLoss(critic, limit=1.0), perceptual=lambda a, b: (seen.append(b), (a - b).square())[1])
    batch = {"pixels": pixels_for(model)}
    assert {"adversarial", "perceptual", "code"} <= set(model.loss(batch, 0, torch.Generator().manual_seed(0)))
    assert torch.equal(seen[0], batch["pixels"])
    assert model.discriminator_loss(batch, 0).item() > 0


def test_an_authors_training_checkpoint_converts(model, tmp_path):
    theirs = {f"ae.{key}": value for key, value in key_table(model.config).to_theirs(model.state_dict()).items()}
    judges = {"disc.main.0.weight": torch.ones(2), "perceptual.lin0.model.1.weight": torch.ones(2)}
    path = tmp_path / "binaryae_ema.th"
    torch.save(theirs | judges, path)
    done = checkpoints.convert_file(path, "binary-latent-diffusion", tmp_path / "model")
    assert done["role"] == "tokenizer"
    back = vistok.load(tmp_path / "model")
    assert (back.config.cnn, back.config.norm_first) == (model.config.cnn, model.config.norm_first)
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)


def test_the_published_layout():
    with torch.device("meta"):
        spec = vistok.create("binary-latent-diffusion-c128").spec
    assert spec.segments[0].codebooks == (2,) * 128
    assert spec.bits == 256 * 128
    with pytest.raises(ConfigError, match="activated"):
        replace(VARIANTS["binary-latent-diffusion-c64"], cnn=vistok.create("vqgan-tiny").config.cnn)


def test_it_runs_in_half_precision():
    torch.manual_seed(0)
    half = vistok.create("binary-latent-diffusion-tiny", dtype=torch.bfloat16)
    tokens = half.encode(torch.rand(2, 3, 32, 32))
    assert half.decode(tokens).dtype == torch.bfloat16
