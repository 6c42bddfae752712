"""FlexTok: prefixes, seeds, guidance, mixed lengths, what training sees, and what it costs."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import vistok
from vistok.errors import ConfigError, InputError
from vistok.nn.vae import VAE, VAEConfig
from vistok.tokenizers.flextok import VARIANTS, FlexTok


@pytest.fixture(scope="module")
def tok():
    torch.manual_seed(0)
    return shaken(vistok.create("flextok-tiny"))


def shaken(model):
    """Gates and heads that start at zero would hide everything."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    return model


def pixels(count=3, seed=0):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_every_prefix_decodes_and_more_tokens_change_the_picture(tok):
    tokens = tok.encode(pixels(1))
    assert tokens.codes.shape == (1, 16)
    assert list(tok.spec.prefixes) == list(range(1, 17))
    pictures = [tok.decode(tokens.prefix(k), steps=2) for k in tok.spec.prefixes]
    assert all(picture.shape == (1, 3, 32, 32) for picture in pictures)
    assert all(not torch.equal(a, b) for a, b in pairwise(pictures))


def test_a_token_depends_on_no_later_register(tok):
    """Registers are causal: what a shorter model would give is the prefix of what this one gives."""
    short = FlexTok(replace(tok.config, registers=5))
    state = tok.state_dict()
    for name in ("encoder.registers", "decoder.register_positions"):
        state[name] = state[name][:5]
    short.load_state_dict(state)
    assert torch.equal(short.eval().encode(pixels()).codes, tok.encode(pixels()).codes[:, :5])


def test_noise_comes_from_the_items_seed_whatever_the_batch(tok):
    tokens = tok.encode(pixels())
    together = tok.decode(tokens, seed=[5, 6, 7], steps=2)
    for row in range(3):
        torch.testing.assert_close(tok.decode(tokens[row], seed=5 + row, steps=2)[0], together[row])
    assert not torch.equal(tok.decode(tokens, seed=8, steps=2), tok.decode(tokens, seed=9, steps=2))
    assert torch.equal(tok.decode(tokens, seed=8, steps=2), tok.decode(tokens, seed=8, steps=2))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_mixed_lengths_give_what_each_gives_alone(tok, guidance):
    tokens = tok.encode(pixels(4))
    mixed = tokens.prefix([1, 16, 7, 2])
    assert mixed.lengths.tolist() == [1, 16, 7, 2]
    together = tok.decode(mixed, seed=[1, 2, 3, 4], steps=3, guidance=guidance)
    for row, length in enumerate((1, 16, 7, 2)):
        alone = tok.decode(tokens[row].prefix(length), seed=row + 1, steps=3, guidance=guidance)
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-4)


def test_one_evaluation_per_step_for_both_branches_and_registers_once(tok, monkeypatch):
    calls = []
    tok.decoder.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    embedded = []
    handle = tok.decoder.embed_codes.register_forward_hook(lambda module, args, out: embedded.append(1))
    tokens = tok.encode(pixels(2))
    tok.decode(tokens, steps=5, guidance=4.0)
    assert calls == [4] * 5
    assert len(embedded) == 1
    calls.clear()
    tok.decode(tokens, steps=5, guidance=1.0)
    assert calls == [2] * 5
    handle.remove()


def test_a_prefix_is_cheaper_than_the_whole(tok):
    """The network sees patches, the prefix and one stand-in; never the registers that are not there."""
    widths = []
    handle = tok.decoder.blocks[0].mlp.register_forward_hook(lambda module, args, out: widths.append(out.shape))
    tokens = tok.encode(pixels(2))
    tok.decode(tokens.prefix(3), steps=1, guidance=1.0)
    tok.decode(tokens.prefix(3), steps=1, guidance=2.0)
    tok.decode(tokens.prefix([3, 9]), steps=1, guidance=1.0)
    handle.remove()
    cells = tok.config.cells
    assert widths[0][:2] == (2, cells + 4)
    assert widths[1][0] == 2 * (cells + 4) + 2 * (cells + 1)
    assert widths[2][0] == 2 * (cells + 1) + 3 + 9


def test_errors_name_what_is_wrong(tok):
    tokens = tok.encode(pixels(2))
    for how, word in (({"steps": 0}, "steps"), ({"guidance": -1.0}, "guidance"), ({"guide": "afg"}, "'apg' or 'cfg'")):
        with pytest.raises(InputError, match=word):
            tok.decode(tokens, **how)
    gap = replace(tokens, keep=torch.tensor([[True] * 16, [True, False] * 8]))
    with pytest.raises(InputError, match="prefix"):
        tok.decode(gap)
    with pytest.raises(InputError):
        tokens.prefix([1, 17])
    with pytest.raises(InputError):
        tokens.prefix([1, 2, 3])
    with pytest.raises(ConfigError, match="multiples"):
        replace(VARIANTS["flextok-tiny"], size=(30, 32))
    with pytest.raises(ConfigError, match="alignment=0"):
        tok.align(lambda x: x)


def test_files_keep_the_mixed_lengths(tok):
    mixed = tok.encode(pixels(2)).prefix([4, 9])
    again = vistok.Tokens.from_bytes(mixed.to_bytes())
    assert again.lengths.tolist() == [4, 9]
    assert torch.equal(tok.decode(again, steps=1), tok.decode(mixed, steps=1))


# -- training --------------------------------------------------------------------------------------------------------


def test_training_learns_and_gradients_reach_every_part():
    torch.manual_seed(0)
    tok = vistok.create("flextok-tiny").train()
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(tok.parameters(), 2e-3)
    losses = []
    for step in range(30):
        terms = tok.loss({"pixels": pixels(8)}, step, rng)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        losses.append(float(terms["flow"].detach()))
    assert set(terms) == {"flow"}
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    silent = [name for name, parameter in tok.named_parameters() if parameter.grad is None]
    assert not silent


def test_nested_dropout_and_the_null_condition_are_drawn_per_item(monkeypatch):
    tok = vistok.create("flextok-tiny").train()
    seen = []
    registers = tok.decoder.registers

    def watch(vectors, cells, lengths, absent):
        seen.append((lengths, absent))
        return registers(vectors, cells, lengths, absent)

    monkeypatch.setattr(tok.decoder, "registers", watch)
    rng = torch.Generator().manual_seed(0)
    for step in range(40):
        tok.loss({"pixels": pixels(16)}, step, rng)
    lengths, absent = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert (int(lengths.min()), int(lengths.max())) == (1, 16)
    assert abs(lengths.float().mean() - 8.5) < 0.7
    assert abs(absent.float().mean() - 0.2) < 0.06


def test_stages_train_what_they_do_not_freeze():
    pytest.importorskip("diffusers")
    tok = vistok.create("flextok-tiny-vae").train()
    rng = torch.Generator().manual_seed(0)
    tok.encoder.requires_grad_(False)
    tok.decoder.requires_grad_(False)
    batch = {"pixels": pixels(2)}
    before = tok.vae.running_var.clone()
    assert set(tok.loss(batch, 0, rng)) == {"reconstruction", "kl"}
    assert batch["reconstruction"].shape == (2, 3, 32, 32)
    assert not torch.equal(tok.vae.running_var, before)
    tok.vae.requires_grad_(False)
    tok.vae.eval()
    tok.encoder.requires_grad_(True)
    tok.decoder.requires_grad_(True)
    before = tok.vae.running_var.clone()
    assert set(tok.loss({"pixels": pixels(2)}, 0, rng)) == {"flow"}
    assert torch.equal(tok.vae.running_var, before)


def test_early_patches_learn_a_teachers_features():
    torch.manual_seed(0)
    tok = vistok.create("flextok-tiny", alignment=6, alignment_block=1).train()
    teacher = torch.nn.Conv2d(3, 6, 8, stride=8).requires_grad_(False)
    tok.align(lambda image: teacher(image).permute(0, 2, 3, 1))
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(tok.parameters(), 2e-3)
    values = []
    for step in range(25):
        term = tok.loss({"pixels": pixels(4)}, step, rng)["alignment"]
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
        values.append(float(term.detach()))
    assert values[-1] < values[0] - 0.2
    assert values[-1] >= -1
    assert not any("teacher" in name for name in tok.state_dict())


# -- the authors' files ----------------------------------------------------------------------------------------------


def test_a_published_file_tells_by_its_header_what_shapes_do_not(tmp_path):
    """Heads of 32, other levels, the VAE's scale; without a header the error says what is missing."""
    from safetensors.torch import save_file

    from vistok import checkpoints
    from vistok.tokenizers._flextok_network import TrunkSize
    from vistok.tokenizers.flextok import FlexTokConfig, key_table

    trunk = {"_target_": "flextok.model.trunks.transformers.FlexTransformer", "dim": 64, "depth": 2, "head_dim": 32}
    encoder = {
        "enc_patch_emb": {"patch_sizes": [2, 2]},
        "enc_posemb_module": {"max_sizes": [2, 2]},
        "enc_register_module": {"n_max": 8},
        "enc_transformer": trunk,
    }
    tree = {
        "vae": {"latent_channels": 4, "scaling_factor": 0.4},
        "encoder": {"module_dict": encoder},
        "decoder": {"module_dict": {"dec_transformer": trunk, "dec_to_patches": {"adaLN_emb_read_key": "t"}}},
        "regularizer": {"levels": [8, 5, 5]},
    }
    told, bare = tmp_path / "told.safetensors", tmp_path / "bare.safetensors"
    size = TrunkSize(64, 2, 32)
    config = FlexTokConfig(
        size, size, registers=8, levels=(8, 5, 5), vae=VAEConfig(4, scale=0.4), size=(32, 32), grid=(2, 2)
    )
    save_file({"a": torch.zeros(1)}, told, {name: str(value) for name, value in tree.items()})
    assert checkpoints.described(told, "flextok") == config
    model = vistok.create("flextok-tiny")
    theirs = key_table(model.config).to_theirs(model.state_dict())
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, bare)
    assert checkpoints.described(bare, "flextok") is None
    with pytest.raises(vistok.errors.MismatchError, match="heads do not show"):
        checkpoints.convert_file(bare, "flextok", tmp_path / "out")


# -- the VAE ---------------------------------------------------------------------------------------------------------


def test_the_vaes_latents_are_divided_by_their_deviation():
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = VAE(VAEConfig(4, (8, 16), 1, groups=8, scale=0.25)).eval()
    with torch.no_grad():
        mean, _ = vae.posterior(pixels(1))
        torch.testing.assert_close(vae.encode(pixels(1)), 0.25 * mean)
        torch.testing.assert_close(vae.decode(vae.encode(pixels(1))), (vae.model.decode(mean).sample + 1) / 2)
    with pytest.raises(ConfigError, match="scale"):
        VAEConfig(scale=0.0)
    with pytest.raises(ConfigError, match="groups"):
        VAEConfig(widths=(8,), groups=32)


def test_a_draw_of_the_posterior_comes_from_the_items_seed():
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    tok = shaken(vistok.create("flextok-tiny-vae"))
    mode = tok.encode(pixels(2))
    drawn = tok.encode(pixels(2), sample=True, seed=[1, 2])
    assert torch.equal(tok.encode(pixels(2)).codes, mode.codes)
    assert torch.equal(tok.encode(pixels(2)[1:], sample=True, seed=2).codes, drawn.codes[1:])
    assert not torch.equal(drawn.codes, mode.codes)


def test_without_diffusers_the_error_says_how_to_get_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(vistok.errors.MissingExtraError, match=r"vistok\[models\]"):
        vistok.create("flextok-tiny-vae")
    assert vistok.create("flextok-tiny").config.vae is None
