"""TiTok beyond the authors' numbers: the contract, sizes, ranges, sampling, captions, and what each stage trains."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vistok
from vistok.checkpoints import convert_file
from vistok.errors import ConfigError, InputError, MismatchError, MissingExtraError
from vistok.nn import clip_text
from vistok.tokenizers._titok_keys import fields_of_state
from vistok.tokenizers.titok import VARIANTS, TiTok, TiTokConfig, configure, key_table, recognise

TINY = [name for name in VARIANTS if "tiny" in name]
DECODING = [name for name in TINY if not name.endswith("proxy")]


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def make(name, **changes):
    """A tiny model whose weights are large enough that everything shows in its output."""
    torch.manual_seed(0)
    model = vistok.create(name, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def conditions(model, items=2):
    return {"text": draw(items, *model.config.text, seed=9)} if model.config.text else {}


# -- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODING)
def test_tokens_and_pixels(name):
    model, pixels = make(name), draw(2, 3, 32, 32)
    tokens = model.encode(pixels)
    assert tokens.data.shape == ((2, 8, 6) if "vae" in name else (2, 8))
    assert tokens.bits().tolist() == [8 * 6 * 32 if "vae" in name else 8 * 6] * 2
    out = model.decode(tokens, **conditions(model))
    assert out.shape == pixels.shape
    assert out.min() >= 0
    assert out.max() <= 1
    raw = model(pixels, **conditions(model))
    torch.testing.assert_close(out, raw.detach().clamp(0, 1))
    assert raw.std() > 0.01
    assert model.embed(tokens).shape == (2, 8, 6)


@pytest.mark.parametrize("name", DECODING)
@pytest.mark.parametrize("on_size", ["pad", "resize", "tile"])
def test_any_size_and_aspect_ratio_comes_back(name, on_size):
    model = make(name)
    sizes = [(32, 32), (20, 31), (32, 9)] if on_size == "pad" else [(20, 31), (32, 70), (75, 40)]
    for height, width in sizes:
        tokens = model.encode(draw(1, 3, height, width), on_size=on_size)
        assert model.decode(tokens, **conditions(model, 1)).shape == (1, 3, height, width)


def test_a_size_that_does_not_fit_is_refused_with_the_way_out():
    with pytest.raises(InputError, match=r"takes 32x32.*resize"):
        make("titok-tiny").encode(draw(1, 3, 48, 48))
    with pytest.raises(InputError, match="pad"):
        make("titok-tiny").encode(draw(1, 3, 16, 16), on_size="refuse")


def test_value_ranges():
    model = make("titok-tiny")
    bytes_ = np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8)
    floats = torch.from_numpy(bytes_).permute(2, 0, 1).float() / 255
    assert torch.equal(model.encode(bytes_).codes, model.encode(floats).codes)
    with pytest.raises(InputError, match=r"\(x \+ 1\) / 2"):
        model.encode(floats * 2 - 1)
    out = model.decode(model.encode(floats), dtype=torch.uint8)
    assert out.dtype == torch.uint8


@pytest.mark.parametrize("name", ["titok-tiny", "titok-tiny-vae"])
def test_only_the_whole_sequence_decodes(name):
    model = make(name)
    tokens = model.encode(draw(1, 3, 32, 32))
    assert tuple(model.spec.prefixes) == (8,)
    with pytest.raises(InputError, match="5 tokens"):
        model.decode(tokens.prefix(5))


def test_an_item_does_not_depend_on_its_batch():
    model, pixels = make("titok-tiny"), draw(4, 3, 32, 32)
    together = model.encode(pixels).codes
    assert torch.equal(together, torch.cat([model.encode(one[None]).codes for one in pixels]))
    assert len(together.unique()) > 4


@pytest.mark.parametrize("name", TINY)
def test_a_folder_is_a_model(name, tmp_path):
    model, pixels = make(name), draw(1, 3, 32, 32)
    model.save(tmp_path / "model")
    again = vistok.load(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(again.encode(pixels).data, model.encode(pixels).data)


@pytest.mark.parametrize("name", DECODING)
def test_bfloat16_models_run_throughout(name):
    model = make(name).bfloat16()
    tokens = model.encode(draw(2, 3, 32, 32))
    out = model.decode(tokens, **conditions(model))
    assert out.dtype == torch.bfloat16
    assert tokens.vectors is None or tokens.vectors.dtype == torch.bfloat16


# -- continuous tokens -----------------------------------------------------------------------------------------------


def test_the_mean_is_the_default_and_a_sample_follows_its_own_seed():
    model, pixels = make("titok-tiny-vae"), draw(3, 3, 32, 32)
    mean = model.encode(pixels).vectors
    assert torch.equal(mean, model.encode(pixels, seed=5).vectors)
    sample = model.encode(pixels, sample=True, seed=[3, 4, 5]).vectors
    assert not torch.equal(sample, mean)
    alone = model.encode(pixels[1:2], sample=True, seed=4).vectors
    torch.testing.assert_close(sample[1:2], alone)
    assert not torch.allclose(sample[1], model.encode(pixels[1:2], sample=True, seed=6).vectors[0])


def test_log_variance_is_clamped():
    """The authors' fixture never reaches the clamp at -30..20."""
    model, pixels = make("titok-tiny-vae"), draw(1, 3, 32, 32)
    with torch.no_grad():
        model.encoder.project.bias[6:] = 500.0
    mean, deviation = model.encode(pixels).vectors, model.encode(pixels, sample=True).vectors
    noise = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(deviation[0], mean[0] + np.exp(10.0) * noise, rtol=1e-4, atol=1)
    with torch.no_grad():
        model.encoder.project.bias[6:] = -500.0
    torch.testing.assert_close(model.encode(pixels, sample=True).vectors, mean, rtol=1e-4, atol=1e-4)
    kl = model.quantize(pixels).losses["kl"]
    expected = 0.5 * 1e-6 * (mean.square() + np.exp(-30.0) - 1 + 30).sum()
    torch.testing.assert_close(kl, expected)


# -- captions --------------------------------------------------------------------------------------------------------


def test_a_caption_is_asked_for_and_changes_the_picture_not_the_codes():
    model, pixels = make("titok-tiny-ta"), draw(2, 3, 32, 32)
    tokens = model.encode(pixels)
    assert model.spec.needs.decode == ("text",)
    with pytest.raises(InputError, match="text"):
        model.decode(tokens)
    one, other = 10 * draw(2, 5, 12, seed=1), -10 * draw(2, 5, 12, seed=2)
    assert (model.decode(tokens, text=one) - model.decode(tokens, text=other)).abs().max() > 1e-3
    torch.testing.assert_close(model.decode(tokens, text=one[:1])[0], model.decode(tokens, text=one)[0])
    with pytest.raises(InputError, match=r"\(2, 4, 12\)"):
        model.decode(tokens, text=one[:, :4])
    with pytest.raises(InputError, match="ta-titok"):
        make("titok-tiny").decode(make("titok-tiny").encode(pixels), text=one)


def fake_transformers(monkeypatch):
    """CLIP's interface with features that show the ids: what matters is what we feed it."""

    class CLIPTokenizer:
        from_pretrained = staticmethod(lambda name: CLIPTokenizer())

        def __call__(self, texts, truncation, max_length):
            rows = [[98, *(ord(letter) % 90 + 1 for letter in text), 99] for text in texts]
            return {"input_ids": [row if len(row) <= max_length else [*row[: max_length - 1], 99] for row in rows]}

    class CLIPTextModel(torch.nn.Module):
        config = SimpleNamespace(max_position_embeddings=5)
        from_pretrained = staticmethod(lambda name: CLIPTextModel())

        def forward(self, input_ids):
            return SimpleNamespace(last_hidden_state=input_ids[..., None].double().expand(-1, -1, 12) / 100)

    module = ModuleType("transformers")
    module.CLIPTokenizer, module.CLIPTextModel = CLIPTokenizer, CLIPTextModel
    monkeypatch.setitem(sys.modules, "transformers", module)
    monkeypatch.setattr(clip_text, "_loaded", {})


def test_captions_are_filled_up_with_zeros_and_cut(monkeypatch):
    fake_transformers(monkeypatch)
    features = clip_text.clip_text_features(["a", "abcdefgh"])
    assert features.dtype == torch.float32
    ids = (features[..., 0] * 100).round().long()
    assert ids[0].tolist() == [98, 8, 99, 0, 0]
    assert ids[1].tolist() == [98, 8, 9, 10, 99]
    with pytest.raises(InputError, match="list of strings"):
        clip_text.clip_text_features("a")


def test_captions_go_through_clip(monkeypatch):
    fake_transformers(monkeypatch)
    model, pixels = make("titok-tiny-ta"), draw(2, 3, 32, 32)
    tokens = model.encode(pixels)
    both = model.decode(tokens, text=["a cat", "a dog"])
    torch.testing.assert_close(both[1:], model.decode(tokens[1], text="a dog"))
    features = clip_text.clip_text_features(["a cat", "a dog"])
    torch.testing.assert_close(both, model.decode(tokens, text=features))


def test_captions_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(clip_text, "_loaded", {})
    model = make("titok-tiny-ta")
    with pytest.raises(MissingExtraError, match=r"vistok\[models\]"):
        model.decode(model.encode(draw(1, 3, 32, 32)), text="a cat")


# -- training --------------------------------------------------------------------------------------------------------


def gradients(model, batch, seed=0):
    model.zero_grad()
    terms = model.loss(batch, 0, torch.Generator().manual_seed(seed))
    sum(terms.values()).backward()
    return terms, {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_first_stage_learns_proxy_codes():
    model = make("titok-tiny-proxy").train()
    codes = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    terms, moved = gradients(model, {"pixels": draw(2, 3, 32, 32), "proxy_codes": codes})
    assert terms.keys() == {"proxy", "commitment", "codebook"}
    assert moved == {name for name, _ in model.named_parameters()}
    with pytest.raises(InputError, match="proxy_codes"):
        model.loss({"pixels": draw(2, 3, 32, 32)}, 0, torch.Generator())
    with pytest.raises(InputError, match="predicts codes of MaskGIT-VQGAN"):
        model.eval().decode(model.encode(draw(1, 3, 32, 32)))


def test_first_stage_decodes_through_its_teacher():
    """As docs/systems/titok.md shows it."""
    teacher = vistok.create("vqgan-maskgit-tiny")
    first_stage = make("titok-tiny-proxy", decoder_patch=4, proxy_codes=64)
    logits = first_stage.decoder.logits(first_stage.embed(first_stage.encode(draw(2, 3, 32, 32))))
    codes = vistok.Tokens(teacher.spec.at((32, 32)).segments, codes=logits.argmax(-1))
    assert teacher.decode(codes).shape == (2, 3, 32, 32)


def test_second_stage_leaves_the_encoding_side_alone():
    model = make("titok-tiny").train()
    assert not model.encoder.training
    assert not model.quantizer.training
    assert model.decoder.training
    pixels = draw(2, 3, 32, 32)
    terms, moved = gradients(model, {"pixels": pixels})
    assert terms.keys() == {"reconstruction"}
    torch.testing.assert_close(terms["reconstruction"], (model(pixels) - pixels).square().mean())
    assert moved == {name for name, _ in model.named_parameters() if name.startswith("decoder.")}


def test_single_stage_trains_everything_and_clusters():
    model = make("titok-tiny-vq").train()
    before = model.quantizer.codebook.detach().clone()
    terms, moved = gradients(model, {"pixels": draw(2, 3, 32, 32)})
    assert terms.keys() == {"reconstruction", "commitment", "codebook"}
    assert moved == {name for name, _ in model.named_parameters()}
    assert (model.quantizer.codebook - before).abs().amax(1).gt(0).float().mean() > 0.8


def test_continuous_training_draws_its_noise_from_rng():
    model, batch = make("titok-tiny-vae").train(), {"pixels": draw(2, 3, 32, 32)}
    terms, moved = gradients(model, batch, seed=1)
    assert terms.keys() == {"reconstruction", "kl"}
    assert moved == {name for name, _ in model.named_parameters()}
    assert torch.equal(terms["reconstruction"], gradients(model, batch, seed=1)[0]["reconstruction"])
    assert not torch.equal(terms["reconstruction"], gradients(model, batch, seed=2)[0]["reconstruction"])


def test_text_aware_training_reads_the_caption():
    model = make("titok-tiny-ta").train()
    batch = {"pixels": draw(2, 3, 32, 32), "text": draw(2, 5, 12)}
    assert "decoder.trunk.text.weight" in gradients(model, batch)[1]
    with pytest.raises(InputError, match="caption"):
        model.loss({"pixels": batch["pixels"]}, 0, torch.Generator())


def test_clustering_moves_normalised_codes_to_latents_of_any_length():
    """The authors compare by angle but move rows to the latent as it came; no fixture has both options."""
    model = make("titok-tiny-vq", normalize=True).train()
    latent = model.encoder(draw(4, 3, 32, 32)).detach()
    old = model.quantizer.codebook.detach().clone()
    codes = model.quantizer(latent).codes
    rows = latent.flatten(0, 1)
    nearest = (torch.nn.functional.normalize(old, dim=1) @ torch.nn.functional.normalize(rows, dim=1).T).argmax(1)
    usage = 0.01 * torch.bincount(codes.flatten(), minlength=64) / codes.numel()
    move = torch.exp(-usage * 64 * 10 / 0.01 - 1e-3)[:, None]
    torch.testing.assert_close(model.quantizer.codebook.detach(), old * (1 - move) + rows[nearest] * move)


# -- configs and checkpoints -----------------------------------------------------------------------------------------


def authors_config(**changes):
    model = {
        "codebook_size": 4096,
        "token_size": 12,
        "use_l2_norm": True,
        "commitment_cost": 0.25,
        "vit_enc_model_size": "large",
        "vit_dec_model_size": "large",
        "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
        "num_latent_tokens": 32,
    }
    return {"model": {"vq_model": model | changes}, "dataset": {"preprocessing": {"crop_size": 256}}}


def test_what_the_authors_configs_leave_out():
    assert configure(authors_config()) == VARIANTS["titok-l-32"]
    one_stage = authors_config(
        is_legacy=False, finetune_decoder=False, token_size=16, use_l2_norm=False, quantize_mode="vae"
    )
    assert configure(one_stage) == replace(VARIANTS["titok-ll-32-vae"], codebook_size=TiTokConfig.codebook_size)
    assert configure(authors_config(text_context_length=77, is_legacy=False, finetune_decoder=False)).text == (77, 768)
    with pytest.raises(ConfigError, match="quantize_mode 'fsq'"):
        configure(authors_config(quantize_mode="fsq"))
    with pytest.raises(ConfigError, match="vit_enc_model_size"):
        configure({"model": {"vq_model": {}}, "dataset": {"preprocessing": {"crop_size": 256}}})


def test_impossible_configs():
    with pytest.raises(ConfigError, match="pixel_decoder"):
        TiTokConfig(legacy=False)
    with pytest.raises(ConfigError, match="patches of 16"):
        TiTokConfig(image_size=250)


@pytest.mark.parametrize("name", TINY)
def test_checkpoints_go_out_and_come_back(name):
    """Through the authors' keys, for every kind of model; the fixtures hold only three."""
    model = make(name)
    table = key_table(model.config)
    theirs = table.to_theirs(model.state_dict())
    with pytest.raises(ConfigError, match="widths 32 and 32"):
        recognise(theirs)
    seen = TiTokConfig(**fields_of_state(theirs))
    assert (seen.tokens, seen.latent, seen.legacy, seen.text) == (
        model.config.tokens,
        model.config.latent,
        model.config.legacy,
        model.config.text,
    )
    assert seen.pixel_decoder is None or seen.pixel_decoder.widths == model.config.pixel_decoder.widths
    again = TiTok(model.config)
    again.load_state_dict(table.to_ours(theirs))
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())


def test_other_systems_are_not_recognised():
    assert recognise({"encoder.conv_in.weight": torch.zeros(1)}) is None
    theirs = key_table(VARIANTS["titok-tiny"]).to_theirs(make("titok-tiny").state_dict())
    del theirs["latent_tokens"]
    assert fields_of_state(theirs) is None


@pytest.mark.parametrize("name", TINY)
def test_an_authors_file_becomes_a_model_folder(name, tmp_path):
    model, pixels = make(name), draw(2, 3, 32, 32)
    save_file(key_table(model.config).to_theirs(model.state_dict()), tmp_path / "authors.safetensors")
    model.save(tmp_path / "ours")
    with pytest.raises(MismatchError, match="pass its config"):
        convert_file(tmp_path / "authors.safetensors", "titok", tmp_path / "new")
    told = convert_file(
        tmp_path / "authors.safetensors", "titok", tmp_path / "new", config=tmp_path / "ours" / "config.json"
    )
    assert told["variants"] == [name]
    again = vistok.load(tmp_path / "new")
    assert again.fingerprint == model.fingerprint
    assert torch.equal(again.encode(pixels).data, model.encode(pixels).data)


def test_counts_of_code_use_are_dropped_where_nothing_clusters():
    """Training checkpoints of TA-TiTok hold them, the published files do not."""
    clustering, plain = make("titok-tiny-vq"), make("titok-tiny-vq", clustering=False)
    theirs = key_table(clustering.config).to_theirs(clustering.state_dict())
    assert "quantize.embed_prob" in theirs
    plain.load_state_dict(key_table(plain.config).to_ours(theirs))


def test_two_patch_sizes():
    """Encoder and decoder may cut differently; no fixture does."""
    model = make("titok-tiny-vq", decoder_patch=4)
    pixels = draw(1, 3, 32, 32)
    assert model.decoder.grid == (8, 8)
    assert model.decode(model.encode(pixels)).shape == pixels.shape
    seen = TiTokConfig(**fields_of_state(key_table(model.config).to_theirs(model.state_dict())))
    assert (seen.encoder_patch, seen.decoder_patch, seen.image_size) == (8, 4, 32)


@pytest.mark.parametrize("name", TINY)
def test_training_under_autocast(name):
    """Recipes train in bf16: terms stay finite and near those of float32."""
    model = make(name).train()
    codes = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    batch = {"pixels": draw(2, 3, 32, 32), "proxy_codes": codes, **conditions(model)}
    model.quantizer.eval()  # so that no codebook moves between the two
    exact = model.loss(batch, 0, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.loss(batch, 0, torch.Generator().manual_seed(0))
    sum(rounded.values()).backward()
    for term in exact:
        torch.testing.assert_close(rounded[term].float(), exact[term], rtol=0.1, atol=0.02)
