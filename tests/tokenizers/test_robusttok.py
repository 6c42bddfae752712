"""RobustTok: its codes, what training does to them, where it starts, and checkpoints through `convert`."""

from dataclasses import replace

import pytest
import torch

import vistok
from tests.golden import draw_weights
from vistok import checkpoints
from vistok.errors import ConfigError, InputError
from vistok.losses.adversarial import AdversarialLoss
from vistok.losses.patchgan import PatchDiscriminator
from vistok.nn.vit import ViTConfig
from vistok.tokenizers.robusttok import TINY, Perturbation, RobustTok, configure, key_table


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = vistok.create("robusttok-tiny")
    draw_weights(model)
    return model


@pytest.fixture
def pixels():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_there_and_back(model, pixels):
    tokens = model.encode(pixels)
    assert tokens.codes.shape == (4, 64)
    assert int(tokens.bits()[0]) == 64 * 7
    assert model.decode(tokens).shape == pixels.shape
    with model.inference():
        direct = model(pixels).clamp(0, 1)
    torch.testing.assert_close(model.decode(tokens), direct, rtol=1e-4, atol=1e-4)
    assert model.embed(tokens).shape == (4, 64, 16)
    assert model.decode(model.encode(torch.rand(1, 3, 20, 30))).shape == (1, 3, 20, 30)


def test_it_learns_and_perturbation_makes_it_harder(pixels):
    finals = {}
    for name in ("robusttok-tiny", "robusttok-tiny-plain"):
        torch.manual_seed(0)
        model = vistok.create(name).train()
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        rng = torch.Generator().manual_seed(0)
        totals = []
        for step in range(25):
            terms = model.loss({"pixels": pixels}, step, rng)
            total = torch.stack(list(terms.values())).sum()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            totals.append(total.item())
        assert totals[-1] < 0.8 * totals[0]
        finals[name] = terms
    assert set(finals["robusttok-tiny"]) == {"reconstruction", "semantic", "commitment", "codebook"}


def test_only_the_first_images_are_perturbed_and_only_in_training(model, pixels):
    latent = model.encoder(pixels).flatten(2).transpose(1, 2)
    quantized = model.quantizer(latent)

    def vectors(share):
        model.config = replace(model.config, perturbation=Perturbation(share=share, strength=8))
        return model.perturbed(latent, quantized, 0, torch.Generator().manual_seed(1))

    half, all_ = vectors(0.5), vectors(1.0)
    assert torch.equal(half[2:], quantized.vectors[2:])
    assert torch.equal(half[:2], all_[:2])
    changed = (all_ != quantized.vectors).any(-1).float().mean()
    assert 0.75 < changed < 1.0  # 7 of 8 draws are another code
    assert torch.equal(vectors(0.0), quantized.vectors)
    model.config = replace(model.config, perturbation=Perturbation(share=1.0, strength=8), semantic=0.0)
    clean = [model.eval().loss({"pixels": pixels}, 0, torch.Generator().manual_seed(s)) for s in (1, 2)]
    assert clean[0]["reconstruction"] == clean[1]["reconstruction"]
    noisy = [model.train().loss({"pixels": pixels}, 0, torch.Generator().manual_seed(s)) for s in (1, 2)]
    assert noisy[0]["reconstruction"] != noisy[1]["reconstruction"]
    assert noisy[0]["commitment"] == clean[0]["commitment"]  # of the codes before perturbation


def test_the_schedule_is_the_papers():
    rule = Perturbation(rate=1.0, share=0.1, strength=100, fades=(40, 120), final=0.5)
    assert rule.at(0) == rule.at(40) == (1.0, 100)
    assert rule.at(80) == (0.75, 75)
    assert rule.at(120) == rule.at(10_000) == (0.5, 50)
    assert [rule.images(batch) for batch in (0, 1, 9, 20, 1024)] == [0, 1, 1, 2, 102]
    for wrong in ({"rate": 1.5}, {"strength": 0}, {"fades": (3, 2)}):
        with pytest.raises(ConfigError):
            Perturbation(**wrong)
    with pytest.raises(ConfigError, match="neighbours"):
        replace(TINY, perturbation=Perturbation(strength=1000))


def test_judges_and_teachers(model, pixels):
    model.train().teach(lambda images: images.flatten(1)[:, :64])
    critic = PatchDiscriminator(width=8, layers=1)
    model.judge(AdversarialLoss(critic, weight=0.5), perceptual=lambda a, b: (a - b).abs().mean((1, 2, 3)))
    batch = {"pixels": pixels}
    terms = model.loss(batch, 0, torch.Generator().manual_seed(0))
    assert {"adversarial", "perceptual", "semantic"} <= set(terms)
    terms["semantic"].backward()
    assert model.encoder.project.weight.grad.abs().sum() > 0
    assert model.discriminator_loss(batch, 0).item() > 0
    model.teach(lambda images: images.flatten(1)[:, :5])
    with pytest.raises(InputError, match="features"):
        model.loss({"pixels": pixels}, 0, torch.Generator())


def test_semantic_is_lowest_where_vectors_point_to_their_own_features(model):
    features = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    wanted = model.encoder.project(features).detach()
    own = model.semantic(wanted[:, None] * 5, {"pixels": None, "features": features})
    other = model.semantic(wanted.roll(1, 0)[:, None] * 5, {"pixels": None, "features": features})
    assert own < other


def test_hits_follow_use(model, pixels):
    model.train().quantizer.eval()  # no restarts between the two steps
    codes = model.encode(pixels).codes
    counts = torch.bincount(codes.flatten(), minlength=128).float()
    model.loss({"pixels": pixels}, 0, torch.Generator())
    assert torch.equal(model.hits, counts)
    model.loss({"pixels": pixels[:1]}, 1, torch.Generator())
    expected = 0.9 * counts + 0.1 * torch.bincount(codes[0], minlength=128)
    torch.testing.assert_close(model.hits, expected)
    assert 0 < model.code_usage(256) <= 1


def test_training_starts_from_a_dinov2_file(tmp_path):
    torch.manual_seed(0)
    old = vistok.create("robusttok-tiny", vit=ViTConfig(28, 7, 64, 2, 4, layer_scale=1.0), codebook_size=128)
    theirs = key_table(old.config).to_theirs(old.state_dict())
    kept = {key[14:]: value for key, value in theirs.items() if key.startswith("encoder.model.")}
    torch.save(kept | {"mask_token": torch.zeros(1, 64)}, tmp_path / "dinov2.pth")
    model = RobustTok(replace(TINY, backbone=str(tmp_path / "dinov2.pth")))
    model.initialise(iter(()), torch.Generator())
    for vit in (model.encoder.vit, model.decoder.vit):
        assert torch.equal(vit.blocks[1].mlp.expand.weight, old.encoder.vit.blocks[1].mlp.expand.weight)
        assert vit.positions.shape == (1, 65, 64)
    taught = RobustTok(replace(model.config, teacher="backbone"))
    terms = taught.loss({"pixels": torch.rand(2, 3, 32, 32)}, 0, torch.Generator())
    assert terms["semantic"] > 0
    with pytest.raises(ConfigError, match="backbone"):
        replace(TINY, teacher="backbone")


def test_an_authors_checkpoint_file_converts(model, tmp_path):
    theirs = key_table(model.config).to_theirs(model.state_dict())
    theirs["semantic_model.norm.weight"] = torch.ones(64)
    path = tmp_path / "RobustTok.pt"
    torch.save({"model": {}, "ema": theirs, "discriminator": {"heads.0.2.bias": torch.ones(1)}, "steps": 3}, path)
    config = tmp_path / "config.yaml"
    config.write_text(
        "{codebook_size: 128, codebook_embed_dim: 16, v_patch_nums: [8], enc_type: dinov2, product_quant: 1, "
        "vit: {img_size: 32, patch_size: 4, embed_dim: 64, depth: 2, num_heads: 4}}"
    )
    done = checkpoints.convert_file(path, "robusttok", tmp_path / "model", config=config)
    assert done["role"] == "tokenizer"
    back = vistok.load(tmp_path / "model")
    assert torch.equal(back.encode(torch.ones(1, 3, 32, 32)).codes, model.encode(torch.ones(1, 3, 32, 32)).codes)


@pytest.mark.parametrize(
    "wrong", [{"product_quant": 2}, {"enc_type": "cnn"}, {"v_patch_nums": [1, 2, 16]}, {"abs_pos_embed": False}]
)
def test_what_this_file_does_not_hold_is_refused(wrong):
    args = {"codebook_size": 128, "codebook_embed_dim": 16, "v_patch_nums": [16]}
    assert configure(args).codebook_size == 128
    with pytest.raises(ConfigError):
        configure(args | wrong)
