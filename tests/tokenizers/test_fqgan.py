"""FQGAN: its codes, what its losses do, who teaches it, and checkpoints through `convert`."""

from dataclasses import replace

import pytest
import torch

import vistok
from tests.golden import draw_weights
from vistok import checkpoints
from vistok.errors import ConfigError, InputError
from vistok.losses.adversarial import AdversarialLoss
from vistok.losses.patchgan import PatchDiscriminator
from vistok.tokenizers.fqgan import SMALL, THEIR_HEADS, key_table


@pytest.fixture(params=["fqgan-tiny", "fqgan-tiny-triple"])
def model(request):
    torch.manual_seed(0)
    model = vistok.create(request.param)
    draw_weights(model)
    return model


@pytest.fixture
def pixels():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_there_and_back(model, pixels):
    tokens = model.encode(pixels)
    count = len(model.config.heads)
    assert tokens.codes.shape == (4, 64, count)
    assert tokens.segments[0].codebooks == (64,) * count
    assert int(tokens.bits()[0]) == 64 * 6 * count
    assert torch.equal(vistok.Tokens.from_bytes(tokens.to_bytes()).codes, tokens.codes)
    assert model.decode(tokens).shape == pixels.shape
    with model.inference():
        direct = model(pixels).clamp(0, 1)
    torch.testing.assert_close(model.decode(tokens), direct, rtol=1e-4, atol=1e-4)
    assert model.embed(tokens).shape == (4, 64, 8 * count)


def test_pictures_of_other_sizes_are_padded(model):
    assert model.decode(model.encode(torch.rand(1, 3, 20, 30))).shape == (1, 3, 20, 30)


def test_training_lowers_the_loss_and_teaches_the_codes(pixels):
    torch.manual_seed(0)
    model = vistok.create("fqgan-tiny").train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    rng = torch.Generator().manual_seed(0)
    totals = []
    for step in range(12):
        terms = model.loss({"pixels": pixels}, step, rng)
        total = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append({name: value.item() for name, value in terms.items()})
    assert set(totals[0]) >= {
        "reconstruction",
        "representation:sem",
        "disentanglement",
        "commitment:vis",
        "entropy:sem",
    }
    assert totals[-1]["reconstruction"] < totals[0]["reconstruction"]
    assert totals[-1]["representation:sem"] < totals[0]["representation:sem"]


def test_judges_and_their_turn(pixels):
    torch.manual_seed(0)
    model = vistok.create("fqgan-tiny").train()
    batch = {"pixels": pixels}
    with pytest.raises(ConfigError, match="judge"):
        model.discriminator_loss(batch, 0)
    critic = PatchDiscriminator(width=8, layers=1)
    model.judge(AdversarialLoss(critic, weight=0.5, adaptive=False), perceptual=lambda a, b: (a - b).abs().mean())
    terms = model.loss(batch, 0, torch.Generator())
    assert {"adversarial", "perceptual"} <= set(terms)
    assert model.discriminator_loss(batch, 0).item() > 0
    assert not any("critic" in key or "main" in key for key in model.state_dict())


def test_a_teacher_of_ones_own(pixels):
    model = vistok.create("fqgan-tiny")
    model.teach({"sem": lambda seen: seen.mean((2, 3)).repeat(1, 22)[:, :64]})
    assert torch.isfinite(model.loss({"pixels": pixels}, 0, torch.Generator())["representation:sem"])
    model.teach({"sem": lambda seen: seen.mean((2, 3))})
    with pytest.raises(InputError, match=r"\(4, 3\), expected \(4, 64\)"):
        model.loss({"pixels": pixels}, 0, torch.Generator())
    with pytest.raises(InputError, match="there are sem"):
        model.teach({"vis": lambda seen: seen})


def test_without_supervision_there_is_nothing_to_teach(pixels):
    model = vistok.create("fqgan-tiny", features=())
    assert not any(name.startswith("representation") for name in model.loss({"pixels": pixels}, 0, torch.Generator()))
    with pytest.raises(ConfigError, match="teachers"):
        replace(SMALL, teachers=())
    with pytest.raises(ConfigError, match="two sub-codebooks"):
        replace(SMALL, heads=("vis",))


def test_an_authors_checkpoint_file_converts(model, tmp_path):
    theirs = key_table(model.config).to_theirs(model.state_dict())
    assert all(f"quantize_{head}.codebook_used" in theirs for head in model.config.heads)
    assert any(THEIR_HEADS["vis"] in key for key in theirs)
    path = tmp_path / "fqgan.pt"
    torch.save({"model": theirs, "steps": 3}, path)
    done = checkpoints.convert_file(path, "fqgan", tmp_path / "model")
    assert done["role"] == "tokenizer"
    back = vistok.load(tmp_path / "model")
    assert back.config.cnn == model.config.cnn
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)


def test_it_runs_in_half_precision():
    torch.manual_seed(0)
    half = vistok.create("fqgan-tiny", dtype=torch.bfloat16)
    tokens = half.encode(torch.rand(2, 3, 32, 32))
    assert half.decode(tokens).dtype == torch.bfloat16
