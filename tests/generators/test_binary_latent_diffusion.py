"""Binary latent diffusion: per-item throws, known bits, few steps, guidance, and that it learns."""

import pytest
import torch

import vistok
from tests.golden import draw_weights
from vistok import checkpoints
from vistok.errors import ConfigError, InputError
from vistok.generators.binary_latent_diffusion import key_table, recognise
from vistok.tokens import Tokens


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = vistok.create("binary-latent-diffusion-generator-tiny", depth=2)
    draw_weights(model)
    return model


def test_an_item_does_not_depend_on_its_batch(model):
    together = model.generate([3, 1, 4], seed=10, guidance=2.0, steps=4)
    assert torch.equal(together.codes[1], model.generate(1, seed=11, guidance=2.0, steps=4).codes[0])
    assert not torch.equal(together.codes[1], model.generate(1, seed=12, guidance=2.0, steps=4).codes[0])
    assert together.codes.shape == (3, 16, 16)


def test_a_missing_class_is_an_absent_token(model):
    bits, t = (torch.rand(2, 16, 16) < 0.5).float(), torch.tensor([3, 9])
    with torch.no_grad():
        absent = model.denoiser(bits, t, torch.tensor([-1, -1]))
        mixed = model.denoiser(bits, t, torch.tensor([5, -1]))
        present = model.denoiser(bits, t, torch.tensor([5, 5]))
    torch.testing.assert_close(model.denoiser(bits, t), absent)
    torch.testing.assert_close(mixed[1], absent[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[0], present[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(present[1], absent[1], atol=1e-4)


def test_known_bits_stay(model):
    whole = model.generate([3, 1], seed=2, steps=4)
    keep = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    known = Tokens(whole.segments, codes=whole.codes, keep=keep)
    again = model.generate([3, 1], seed=9, steps=4, known=known)
    assert torch.equal(again.codes[keep], whole.codes[keep])
    assert not torch.equal(again.codes, whole.codes)


def test_it_learns_and_its_tokens_decode():
    torch.manual_seed(0)
    tok = vistok.create("binary-latent-diffusion-tiny")
    model = vistok.create("binary-latent-diffusion-generator-tiny", depth=2, focal=-1.0).attach(tok).train()
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    batch = {"codes": tok.encode(pixels).codes, "label": torch.tensor([0, 1, 2, 3])}
    fixed = batch | {"t": torch.tensor([5, 20, 35, 50]), "uniform": torch.rand(4, 16, 16)}
    optimizer, rng = torch.optim.AdamW(model.parameters(), 1e-3), torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = model.eval().loss(fixed, 0, rng)["cross_entropy"]
    model.train()
    for step in range(60):
        optimizer.zero_grad()
        model.loss(batch, step, rng)["cross_entropy"].backward()
        optimizer.step()
    with torch.no_grad():
        assert model.eval().loss(fixed, 0, rng)["cross_entropy"] < 0.8 * before
    assert tok.decode(model.generate([0, 1], steps=3)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("changes", [{"flips": False, "focal": 0.25}, {"focal": 2.0, "timestep_weight": "weighted"}])
def test_other_losses_are_finite_and_differ(changes):
    torch.manual_seed(0)
    model = vistok.create("binary-latent-diffusion-generator-tiny-free", auxiliary=0.1, **changes)
    draw_weights(model)
    codes = torch.randint(0, 2, (3, 16, 16), generator=torch.Generator().manual_seed(0))
    terms = model.loss({"codes": codes}, 0, torch.Generator().manual_seed(0))
    assert set(terms) == {"cross_entropy", "auxiliary"}
    assert all(bool(torch.isfinite(value)) for value in terms.values())


def test_what_does_not_fit(model):
    with pytest.raises(InputError, match="top_k"):
        model.generate(0, top_k=4)
    with pytest.raises(InputError, match="1 to 64"):
        model.generate(0, steps=100)
    with pytest.raises(InputError, match="unconditional"):
        vistok.create("binary-latent-diffusion-generator-tiny-free").generate(3)
    with pytest.raises(ConfigError, match="sample_steps"):
        vistok.create("binary-latent-diffusion-generator-tiny", sample_steps=100)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_authors_checkpoint_converts(model, prefix, tmp_path):
    theirs = key_table(model.config).to_theirs(model.state_dict())
    path = tmp_path / "bld.th"
    torch.save({prefix + key: value for key, value in theirs.items()}, path)
    config = tmp_path / "config.yaml"
    config.write_text(
        "{codebook_size: 16, latent_shape: [1, 4, 4], emb_dim: 32, bert_n_emb: 128, bert_n_layers: 2, bert_n_head: 4, "
        "total_steps: 64, sample_steps: 64, dataset: imagenet, num_classes: 10, p_flip: true}"
    )
    done = checkpoints.convert_file(path, "binary-latent-diffusion", tmp_path / "model", config=config)
    assert done["role"] == "generator"
    back = vistok.load(tmp_path / "model")
    same = {"steps": 4, "temperature": 0.9, "seed": 1}
    assert torch.equal(back.generate([1, 2], **same).codes, model.generate([1, 2], **same).codes)
    assert recognise(theirs).schedule == "linear"
    with pytest.raises(ConfigError, match="captions"):
        recognise(theirs | {"_denoise_fn.blocks.0.cross.query.weight": torch.ones(1)})


def test_one_evaluation_a_step_both_branches_in_one_batch(model):
    seen = []
    model.denoiser.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    model.generate([0, 1, 2], steps=5, guidance=2.0)
    assert seen == [6] * 5
    seen.clear()
    model.generate([0, 1, 2], steps=5, guidance=1.0)
    assert seen == [3] * 5


def test_it_runs_in_half_precision():
    torch.manual_seed(0)
    half = vistok.create("binary-latent-diffusion-generator-tiny", dtype=torch.bfloat16)
    assert half.generate([0, 1], guidance=2.0, steps=3).codes.min() >= 0
