"""Binary latent diffusion: per-item throws, known bits, few steps, guidance, and that it learns."""

import pytest
import torch

import vistok
from tests.golden import draw_weights
from vistok import checkpoints
from vistok.errors import ConfigError, InputError
from vistok.generators.binary_latent_diffusion import configure, key_table, recognise
from vistok.nn.t5_text import T5Features
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


def reading(place):
    """A model that reads a text of 24 numbers a position, as a token or by cross-attention."""
    return vistok.create(
        "binary-latent-diffusion-generator-tiny-text", text=(1 if place == "token" else 5, 24), text_as=place
    )


@pytest.mark.parametrize("place", ["token", "cross"])
def test_a_text_is_read_and_its_absence_too(place):
    torch.manual_seed(0)
    model = vistok.create(
        "binary-latent-diffusion-generator-tiny-text", text=(1 if place == "token" else 5, 24), text_as=place
    )
    draw_weights(model)
    length = 1 if place == "token" else 3
    texts = T5Features(torch.randn(2, length, 24, generator=torch.Generator().manual_seed(1)))
    bits, t = (torch.rand(2, 16, 16) < 0.5).float(), torch.tensor([3, 9])
    with torch.no_grad():
        present, absent = model.denoiser(bits, t, texts), model.denoiser(bits, t)
        none = T5Features(texts.features, torch.tensor([[True] * length, [False] * length]))
        mixed = model.denoiser(bits, t, none)
        longer = T5Features(
            torch.cat([texts.features, torch.full((2, 2, 24), 9.0)], 1),
            torch.tensor([[True] * length + [False] * 2] * 2),
        )
    torch.testing.assert_close(mixed[0], present[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], absent[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(present[1], absent[1], atol=1e-4)
    if place == "cross":
        torch.testing.assert_close(model.denoiser(bits, t, longer), present, rtol=1e-4, atol=1e-5)
    told = model.generate(texts, guidance=2.0, steps=3)
    assert told.codes.shape == (2, 16, 16)
    model.attach_text(lambda strings: T5Features(texts.features[: len(strings)]))
    assert torch.equal(model.generate("a cat", guidance=2.0, steps=3).codes[0], told.codes[0])
    batch = {"codes": told.codes, "caption": ["a cat", "a dog"]}
    assert float(model.train().loss(batch, 0, torch.Generator().manual_seed(0))["cross_entropy"].detach()) > 0
    with pytest.raises(InputError, match="reads"):
        model.generate(T5Features(torch.randn(1, length, 25)))
    with pytest.raises(InputError, match="needs captions"):
        model.loss({"codes": told.codes}, 0, torch.Generator())


@pytest.mark.parametrize("place", ["token", "cross"])
def test_the_text_models_of_the_authors_are_recognised(place):
    """Their names, where a text is read: a linear map for a token, and three parts more in a block for cross."""
    model = vistok.create(
        "binary-latent-diffusion-generator-tiny-text", text=(1 if place == "token" else 5, 24), text_as=place
    )
    theirs = key_table(model.config).to_theirs(model.state_dict())
    wanted = {
        "token": {"cls_embedding.weight": (64, 24), "cls_embedding.bias": (64,)},
        "cross": {
            "blocks.0.cross.query.weight": (64, 64), "blocks.0.cross.kv.weight": (128, 24),
            "blocks.0.cross.proj.bias": (64,), "blocks.0.cross.null_emb": (1, 1, 24), "blocks.1.ln1_5.weight": (64,),
            "blocks.1.gamma_1_5": (64,), "blocks.1.gamma_1": (64,),
        },
    }[place]  # fmt: skip
    assert {name: tuple(theirs[f"_denoise_fn.{name}"].shape) for name in wanted} == wanted
    found = recognise(theirs)
    assert (found.text_as, found.text[1], found.classes) == (place, 24, None)
    back = key_table(found).to_ours(theirs)
    assert set(back) == set(model.state_dict())


def test_cross_attention_adds_what_a_hand_computes():
    torch.manual_seed(0)
    model = vistok.create("binary-latent-diffusion-generator-tiny-text")
    draw_weights(model)
    block, x, text = model.denoiser.blocks[0], torch.randn(1, 5, 64), torch.randn(1, 3, 24)
    after = x + block.scale1 * block.attention(block.norm1(x))
    q = block.cross.q(block.norm_cross(after)).view(5, 4, 16)
    k, v = block.cross.kv(text[0]).view(3, 2, 4, 16).unbind(1)
    weights = (torch.einsum("nhd,mhd->hnm", q, k) / 4).softmax(-1)
    after = after + block.scale_cross * block.cross.out(torch.einsum("hnm,mhd->nhd", weights, v).reshape(1, 5, 64))
    torch.testing.assert_close(block(x, text), after + block.scale2 * block.mlp(block.norm2(after)))


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


def test_the_text_models_arguments_configure_them():
    plain = {
        "codebook_size": 64, "latent_shape": [1, 16, 16], "emb_dim": 256, "bert_n_emb": 768, "bert_n_layers": 24,
        "bert_n_head": 12, "total_steps": 64, "dataset": "laion", "p_flip": True,
    }  # fmt: skip
    token, cross = configure(plain), configure(plain | {"cross": True})
    assert (token.text_as, token.text, token.classes) == ("token", (1, 768), None)
    assert (cross.text_as, cross.text, cross.classes) == ("cross", (128, 1024), None)


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
