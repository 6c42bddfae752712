"""MaskGIT and MaskBit: groups of bits, what they learn from, and the contract of generation."""

from dataclasses import replace

import pytest
import torch

import vistok
from tests.golden import draw_weights
from vistok import checkpoints
from vistok.errors import ConfigError, InputError, MismatchError
from vistok.generators._maskgit_keys import sampling as configure_sampling
from vistok.generators.maskgit import SMALL, VARIANTS, MaskGIT, configure, key_table
from vistok.sampling.masked import MaskedSampling
from vistok.tokens import Tokens

TINY = [name for name in VARIANTS if name.endswith("tiny")]


def create(name: str) -> MaskGIT:
    torch.manual_seed(0)
    model = vistok.create(name)
    draw_weights(model)
    return model


@pytest.mark.parametrize(("bits", "groups"), [(8, 2), (8, 1), (9, 3)])
def test_codes_are_cut_from_the_lowest_bit(bits, groups):
    model = MaskGIT(replace(SMALL, bits=bits, groups=groups))
    codes = torch.arange(2**bits).view(1, -1)
    parts = model.split(codes)
    width = bits // groups
    for index in range(groups):
        assert torch.equal(parts[..., index], codes // 2 ** (index * width) % 2**width)
    assert torch.equal(model.join(parts), codes)
    shown = model.read.bits(parts)
    assert torch.equal(((shown + 1) // 2 << torch.arange(bits)).sum(-1), codes)
    hidden = model.read.bits(parts.index_fill(2, torch.tensor([0]), model.mask_id))
    assert int(hidden[..., :width].abs().sum()) == 0
    assert torch.equal(hidden[..., width:], shown[..., width:])


@pytest.mark.parametrize("name", TINY)
def test_an_item_does_not_depend_on_its_batch(name):
    model = create(name)
    together = model.generate([3, 1, 4], seed=10)
    alone = model.generate(1, seed=11)
    assert torch.equal(together.codes[1], alone.codes[0])
    assert not torch.equal(model.generate(1, seed=12).codes, alone.codes)
    assert not torch.equal(model.generate(2, seed=11).codes, alone.codes)


@pytest.mark.parametrize("name", TINY)
def test_what_is_known_stays(name):
    model = create(name)
    whole = model.generate([3, 1], seed=2)
    keep = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    some = Tokens(whole.segments, codes=whole.codes, keep=keep, canvas=whole.canvas)
    filled = model.generate([5, 6], seed=9, known=some)
    assert torch.equal(filled.codes[keep], whole.codes[keep])
    assert not torch.equal(filled.codes[~keep], whole.codes[~keep])
    assert torch.equal(model.generate([5, 6], seed=9, known=whole).codes, whole.codes)
    assert torch.equal(model.generate([5, 6], known=whole.prefix(20)).codes[:, :20], whole.codes[:, :20])


def test_settings_reach_the_sampler():
    model = create("maskbit-tiny")
    asked = []
    model.norm_in.register_forward_hook(lambda module, args, output: asked.append(len(output)))
    model.generate([0, 1], steps=3, guidance=1.0)
    assert asked == [2, 2, 2]
    asked.clear()
    model.generate([0, 1], steps=3, guidance=2.0)
    assert asked == [2, 4, 4]  # the guidance begins at none
    asked.clear()
    model.generate(count=2, steps=2, guidance=2.0)
    assert asked == [2, 2]
    settings = {"choice_temperature": 0.0, "temperature": 0.0, "guidance": 1.0}
    sure = model.generate(1, seed=1, **settings)
    assert torch.equal(sure.codes, model.generate(1, seed=2, **settings).codes)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"steps": 0}, "steps=0"),
        ({"choice_temperature": -1.0}, "choice_temperature"),
        ({"guidance": float("inf")}, "guidance"),
        ({"temperature": -1.0}, "temperature"),
        ({"step": 3}, "did you mean 'steps'"),
    ],
)
def test_bad_settings(wrong, word):
    with pytest.raises(InputError, match=word):
        create("maskbit-tiny").generate(1, **wrong)


def test_bad_conditions_and_tokens():
    model = create("maskbit-tiny")
    with pytest.raises(InputError, match=r"0\.\.9"):
        model.generate(10)
    with pytest.raises(MismatchError, match="takes tokens of grid"):
        model.generate(1, known=create("maskgit-tiny").generate(1))
    with pytest.raises(MismatchError, match="makes tokens of"):
        model.attach(vistok.create("vqgan-plus-tiny"))


@pytest.mark.parametrize(
    ("name", "theirs"), [("maskbit-tiny", "maskbit-tokenizer-tiny"), ("maskgit-tiny", "vqgan-plus-tiny")]
)
def test_its_tokens_decode(name, theirs):
    model, tok = create(name), vistok.create(theirs)
    model.attach(tok)
    tokens = model.generate([0, 1])
    assert tokens.source == tok.source
    assert tok.decode(tokens).shape == (2, 3, 32, 32)
    loss = model.loss({"pixels": torch.rand(2, 3, 32, 32), "label": torch.tensor([0, 1])}, 0, torch.Generator())
    assert torch.isfinite(loss["code"])


@pytest.mark.parametrize("name", TINY)
def test_it_learns_codes(name):
    torch.manual_seed(0)
    model = vistok.create(name).train()
    codes = torch.randint(0, 2**model.config.bits, (4, 64), generator=torch.Generator().manual_seed(1))
    codes[:] = codes[:, :1]  # one code a picture: what is shown says the rest
    batch = {"codes": codes, "label": torch.tensor([0, 1, 2, 3])}
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    rng = torch.Generator().manual_seed(0)
    totals = []
    for step in range(60):
        (total,) = model.loss(batch, step, rng).values()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert sum(totals[-5:]) < 0.6 * sum(totals[:5])


def test_loss_says_what_it_counts():
    """MaskGIT counts the masked codes alone."""
    batch = {"codes": torch.randint(0, 64, (2, 64), generator=torch.Generator().manual_seed(0)), "label": [0, 1]}
    model = create("maskgit-tiny").eval()
    captured = {}
    inner = model.logits

    def watched(groups, labels):
        captured.update(groups=groups, logits=inner(groups, labels))
        return captured["logits"]

    model.logits = watched
    (loss,) = model.loss(batch, 0, torch.Generator().manual_seed(0)).values()
    masked = captured["groups"] == model.mask_id
    expected = torch.nn.functional.cross_entropy(
        captured["logits"][masked], batch["codes"][..., None][masked], label_smoothing=0.1
    )
    torch.testing.assert_close(loss, expected)


def test_prenorm_differs_and_trains_its_last_norm():
    config = replace(SMALL, prenorm=True)
    model = MaskGIT(config).train()
    batch = {"codes": torch.randint(0, 256, (2, 64)), "label": [0, 1]}
    sum(model.loss(batch, 0, torch.Generator()).values()).backward()
    assert float(model.norm_after.weight.grad.abs().sum()) > 0
    assert "norm_after_transformer.weight" in key_table(config).to_theirs(model.state_dict())


@pytest.mark.parametrize("name", TINY)
def test_an_authors_checkpoint_file_converts(name, tmp_path):
    model = create(name)
    path = tmp_path / "generator.bin"
    torch.save(key_table(model.config).to_theirs(model.state_dict()), path)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
        model:
            vq_model: {{codebook_size: {2**model.config.bits}, token_size: 8, num_resolutions: 3}}
            mlm_model:
                {{model_cls: {"lfq_bert" if name == "maskbit-tiny" else "bert"}, hidden_dim: 64, depth: 2, heads: 4,
                mlp_dim: 128, codebook_splits: {model.config.groups}, nclass: 10, num_steps: 8, guidance_scale: 2.0}}
        dataset: {{preprocessing: {{resolution: 32}}}}
        """
    )
    done = checkpoints.convert_file(path, "maskgit", tmp_path / "model", config=config)
    assert done["role"] == "generator"
    back = vistok.load(tmp_path / "model")
    assert back.sampling.guidance == 3.0
    back.sampling = model.sampling
    assert torch.equal(back.generate([1, 2], seed=1).codes, model.generate([1, 2], seed=1).codes)
    checkpoints.export_file(tmp_path / "model", tmp_path / "back.bin")
    assert checkpoints.read(tmp_path / "back.bin").keys() == checkpoints.read(path).keys()


def test_published_settings():
    settings = {bits: VARIANTS[f"maskbit-{bits}bit"].sampling for bits in (10, 12, 14, 16, 18)}
    assert {bits: round(one.guidance - 1, 6) for bits, one in settings.items()} == {
        10: 6.4, 12: 7.1, 14: 7.1, 16: 6.5, 18: 5.7,
    }  # fmt: skip
    assert settings[14] == configure_sampling(
        {
            "guidance_scale": 7.1,
            "guidance_annealing": "cosine",
            "num_steps": 64,
            "gen_mask_schedule_strategy": "arccos",
            "softmax_temperature": 1.0,
            "randomize_temperature": 7.8,
            "scale_pow": 3.0,
        }
    )
    assert configure_sampling({"guidance_annealing": "none", "guidance_scale": 3.0}) == MaskedSampling(
        guidance=4.0, steps=12, schedule="arccos"
    )


@pytest.mark.parametrize(
    ("wrong", "word"),
    [({"bits": 9}, "do not divide"), ({"reads": "words"}, "reads='words'"), ({"bits": 40}, "at most 18")],
)
def test_bad_configs(wrong, word):
    with pytest.raises(ConfigError, match=word):
        replace(SMALL, **wrong)


def test_a_config_that_is_none_of_theirs():
    with pytest.raises(ConfigError, match="lacks"):
        configure({"model": {}})
    with pytest.raises(ConfigError, match="guidance_annealing"):
        configure_sampling({"guidance_annealing": "cos"})
