"""TiTok's generators: per-item draws, known tokens anywhere, conditions of both kinds, that they learn, their files."""

import json
from dataclasses import replace

import pytest
import torch

import vistok
from tests.golden import draw_weights
from vistok import checkpoints
from vistok.errors import ConfigError, InputError, MismatchError
from vistok.generators.titok import VARIANTS, TiTokGenerator, configure, key_table
from vistok.nn.clip_text import TextFeatures
from vistok.tokens import Tokens

CLASSES = ("titok-generator-tiny", "titok-generator-tiny-uvit")
TEXTS = ("maskgen-tiny-vq", "maskgen-tiny-kl")


def make(name, **changes) -> TiTokGenerator:
    torch.manual_seed(0)
    model = vistok.create(name, **changes)
    draw_weights(model)
    return model


def features(items, seed=0) -> TextFeatures:
    rng = torch.Generator().manual_seed(seed)
    return TextFeatures(torch.randn(items, 5, 12, generator=rng), torch.randn(items, 12, generator=rng))


def some(features, *items) -> TextFeatures:
    return TextFeatures(features.states[list(items)], features.pooled[list(items)])


EMPTY = features(1, seed=9)


def generate(model, items, **options) -> Tokens:
    """Of items' own classes or texts."""
    if model.classes is not None:
        return model.generate(list(items), **options)
    return model.generate(some(features(5), *items), empty=EMPTY, **options)


def assert_alike(a, b) -> None:
    """Codes equal; vectors to 1e-4 of their size, which an untrained head lets grow without bound."""
    if a.is_floating_point():
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    else:
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [*CLASSES, *TEXTS])
def test_an_item_does_not_depend_on_its_batch(name):
    model = make(name)
    together, alone = generate(model, [3, 1, 4], seed=10), generate(model, [1], seed=11)
    assert_alike(together.data[1], alone.data[0])
    assert not torch.allclose(generate(model, [1], seed=12).data.float(), alone.data.float())
    assert not torch.allclose(generate(model, [2], seed=11).data.float(), alone.data.float())
    assert together.segments == model.spec.segments
    assert model.training is False


@pytest.mark.parametrize("name", [*CLASSES, *TEXTS])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_any_number_of_steps_finds_everything(name, steps):
    data = generate(make(name), [0, 1], steps=steps).data
    assert data.isfinite().all()
    assert data.is_floating_point() or (0 <= int(data.min()) <= int(data.max()) < 64)


@pytest.mark.parametrize("name", [*CLASSES, *TEXTS])
def test_what_is_known_stays_wherever_it_is(name):
    """Inpainting: other tokens are found around those that are given, as many as each item lacks."""
    model = make(name)
    whole = generate(model, [3, 1], seed=2)
    keep = torch.tensor([[1, 0, 0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    known = replace(whole, keep=keep)
    again = generate(model, [3, 1], seed=5, known=known)
    assert_alike(again.data[keep], whole.data[keep])
    assert not torch.equal(again.data[~keep], whole.data[~keep])
    assert_alike(generate(model, [3, 1], seed=5, known=whole).data, whole.data)
    prefix = generate(model, [3, 1], seed=5, known=whole.prefix(3))
    assert_alike(prefix.data[:, :3], whole.data[:, :3])


@pytest.mark.parametrize("name", [*CLASSES, *TEXTS])
def test_guidance_of_one_costs_no_second_branch(name):
    model, seen = make(name), []
    last = model.network.trunk.norm if model.classes is None else model.network.head
    last.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    generate(model, [0, 1, 2], guidance=1.0, steps=3)
    assert seen == [3, 3, 3]
    seen.clear()
    generate(model, [0, 1, 2], guidance=3.0, steps=3)
    first = 3 if model.classes is not None else 6  # the class models' guidance begins at none
    assert seen == [first, 6, 6]


def test_without_a_condition_nothing_is_guided():
    model = make("titok-generator-tiny")
    null = torch.full((2, 8), model.mask_id)
    assert model.generate(count=2).codes.shape == null.shape
    text, read = make("maskgen-tiny-vq"), []
    text.attach_text(lambda texts: read.append(list(texts)) or EMPTY)
    assert text.generate(count=2).codes.shape == (2, 8)
    assert read == [[""]]


def test_strings_go_through_what_is_attached():
    model, read = make("maskgen-tiny-kl"), []

    def encoder(texts):
        read.append(list(texts))
        return features(len(texts), seed=len(texts[0]))

    model.attach_text(encoder)
    one = model.generate("a dog", count=2, seed=3)
    assert read == [["a dog"], [""]]
    two = model.generate(["a dog", "a dog"], seed=3)
    assert read[2:] == [["a dog", "a dog"], [""]]
    assert one.vectors.shape == two.vectors.shape == (2, 8, 6)
    with pytest.raises(InputError, match="takes classes"):
        make("titok-generator-tiny").attach_text(encoder)


def test_options_and_conditions_that_do_not_fit_are_told():
    model, text, vectors = make("titok-generator-tiny"), make("maskgen-tiny-vq"), make("maskgen-tiny-kl")
    with pytest.raises(InputError, match=r"0\.\.9"):
        model.generate(10)
    with pytest.raises(InputError, match="no class 'dog'"):
        model.generate("dog")
    for option in ({"aesthetic": 5.0}, {"diffusion_steps": 3}, {"empty": EMPTY}):
        with pytest.raises(InputError, match=f"takes no {next(iter(option))}"):
            model.generate(0, **option)
    with pytest.raises(InputError, match="takes no choice_temperature"):
        vectors.generate(features(1), choice_temperature=1.0)
    with pytest.raises(InputError, match="did you mean 'steps'"):
        model.generate(0, step=3)
    for wrong in ({"steps": 0}, {"guidance": -1.0}, {"temperature": float("nan")}, {"choice_temperature": -1.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            model.generate(0, **wrong)
    for wrong in ({"steps": 0}, {"diffusion_steps": 0}, {"diffusion_steps": 1001}, {"aesthetic": 11.0}):
        with pytest.raises(InputError, match=next(iter(wrong)).replace("_", " ")):
            vectors.generate(features(1), empty=EMPTY, **wrong)
    with pytest.raises(InputError, match="for codes"):
        vectors.generate(features(1), empty=EMPTY, top_k=3)
    for wrong in (3, [1, 2], {"a": 1}):
        with pytest.raises(InputError, match="generates from texts"):
            text.generate(wrong, count=2)
    with pytest.raises(InputError, match=r"reads \(B, 5, 12\)"):
        text.generate(TextFeatures(torch.randn(1, 4, 12), torch.randn(1, 12)))
    with pytest.raises(InputError, match="expected"):
        TextFeatures(torch.randn(2, 5, 12), torch.randn(1, 12))
    with pytest.raises(InputError, match="captions"):
        text.loss({"codes": torch.zeros(2, 8, dtype=torch.long)}, 0, torch.Generator())
    with pytest.raises(ConfigError, match="mmdit"):
        replace(model.config, latent="kl")
    with pytest.raises(ConfigError, match="the other None"):
        replace(text.config, text=None)


def test_the_aesthetic_score_is_heard():
    model = make("maskgen-tiny-kl")
    low, high = (generate(model, [0], seed=1, aesthetic=score).vectors for score in (1.0, 9.0))
    assert not torch.allclose(low, high)
    torch.testing.assert_close(
        generate(model, [0], seed=1, aesthetic=6.5).vectors, generate(model, [0], seed=1).vectors
    )
    deaf = make("maskgen-tiny-vq", aesthetic=0)
    assert generate(deaf, [0]).codes.shape == (1, 8)
    with pytest.raises(InputError, match="takes no aesthetic"):
        generate(deaf, [0], aesthetic=5.0)


def test_masks_of_training_are_as_published():
    """Vectors: one share for the batch, ceil(N acos(u) / (pi / 2)), at places of each item's own."""
    model, counts = make("maskgen-tiny-kl"), []
    model.network.register_forward_hook(lambda module, args, output: counts.append(args[1].sum(1).tolist()))
    batch = {"codes": torch.randn(3, 8, 6), "text": features(3)}
    for seed in range(60):
        model.loss(batch, 0, torch.Generator().manual_seed(seed))
    assert all(len(set(count)) == 1 for count in counts)
    assert {count[0] for count in counts} == set(range(1, 9))


def test_conditions_are_dropped_in_training_alone():
    model, read = make("maskgen-tiny-vq", condition_dropout=0.5), []
    model.network.trunk.register_forward_hook(lambda module, args, output: read.append(args[1].states))
    batch = {"codes": torch.zeros(64, 8, dtype=torch.long), "text": features(64), "empty_text": EMPTY}
    model.loss(batch, 0, torch.Generator().manual_seed(0))
    model.train().loss(batch, 0, torch.Generator().manual_seed(0))
    empty = model.network.trunk.text(EMPTY.states)
    shares = [float((states - empty).abs().amax((1, 2)).lt(1e-5).float().mean()) for states in read]
    assert shares[0] == 0
    assert 0.3 < shares[1] < 0.7


@pytest.mark.parametrize("name", [*CLASSES, *TEXTS])
def test_it_learns(name):
    torch.manual_seed(0)
    model = vistok.create(name, condition_dropout=0.0).train()
    rng = torch.Generator().manual_seed(1)
    vectors = model.config.latent == "kl"
    data = torch.randn(4, 8, 6, generator=rng) if vectors else torch.randint(0, 64, (4, 8), generator=rng)
    batch = {"codes": data, "label": torch.arange(4)} if model.classes else {"codes": data, "text": features(4)}
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    totals = []
    for step in range(120 if vectors else 60):
        total = torch.stack(list(model.loss(batch, step, rng).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert sum(totals[-10:]) < 0.75 * sum(totals[:10])


def test_its_tokens_decode_and_pixels_teach_it():
    tok, model = vistok.create("titok-tiny-vq"), make("titok-generator-tiny")
    model.attach(tok)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(0)
    terms = model.loss({"pixels": pixels, "label": torch.tensor([1, 2])}, 0, rng)
    codes = tok.encode(pixels).codes
    rng.manual_seed(0)
    assert torch.equal(terms["cross_entropy"], model.loss({"codes": codes, "label": [1, 2]}, 0, rng)["cross_entropy"])
    tokens = model.generate([0, 1])
    assert tokens.source == tok.source
    assert tok.decode(tokens).shape == (2, 3, 32, 32)
    with pytest.raises(MismatchError, match="8"):
        model.attach(vistok.create("one-d-piece-tiny"))


def test_vectors_are_drawn_from_the_tokenizers_gaussian():
    tok, model = vistok.create("titok-tiny-vae"), make("maskgen-tiny-kl")
    model.attach(tok)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    drawn = [model.batch_tokens({"pixels": pixels}, rng=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    mode = model.batch_tokens({"pixels": pixels})
    assert torch.equal(mode, tok.encode(pixels).vectors)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2])
    assert not torch.allclose(drawn[0], mode)
    assert tok.decode(generate(model, [0, 1])).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("name", [*CLASSES, *TEXTS])
def test_an_authors_file_converts(name, tmp_path):
    """As published: the same file, with or without the config that the authors keep beside it."""
    model = make(name)
    path, config = tmp_path / "generator.bin", tmp_path / "config.json"
    theirs = key_table(model.config).to_theirs(model.state_dict())
    torch.save({key: tensor.clone() for key, tensor in theirs.items()}, path)
    plain = authors_config(model)
    config.write_text(json.dumps(plain))
    assert configure(plain).heads == model.config.heads
    done = checkpoints.convert_file(path, "titok", tmp_path / "model", config=config)
    assert done["role"] == "generator"
    back = vistok.load(tmp_path / "model")
    assert back.config.network == model.config.network
    back.sampling, back.diffusion = model.sampling, model.diffusion
    back.config = replace(back.config, diffusion_steps=model.config.diffusion_steps)
    if model.classes is None:
        back.config = replace(back.config, text=(5, 12))
    assert_alike(generate(back, [1, 2], seed=1).data, generate(model, [1, 2], seed=1).data)
    assert checkpoints.convert(checkpoints.read(path), "titok").model is TiTokGenerator
    checkpoints.export_file(tmp_path / "model", tmp_path / "back.safetensors")
    again = checkpoints.read(tmp_path / "back.safetensors")
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[key], theirs[key]) for key in theirs)


def authors_config(model) -> dict:
    """One file describes tokenizer and generator, as the authors' do."""
    ours = model.config
    tokenizer = {
        "codebook_size": 64, "token_size": 6, "num_latent_tokens": 8, "scale_factor": ours.scale,
        "quantize_mode": "vae" if ours.latent == "kl" else "vq", "text_embed_dim": 12, "text_context_length": 5,
        "vit_enc_model_size": "small", "vit_dec_model_size": "small", "vit_enc_patch_size": 8, "vit_dec_patch_size": 8,
    }  # fmt: skip
    if model.classes is None:
        generator = {
            "maskgen": {
                "decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2, "micro_condition": True,
                "micro_condition_embed_dim": 16, "text_drop_prob": 0.1, "condition_num_classes": 0,
                "sample_aesthetic_score": 6.5,
            }
        }  # fmt: skip
    else:
        generator = {
            "generator": {
                "model_type": "ViT" if ours.network == "bert" else "UViT", "hidden_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 2, "intermediate_size": 64, "condition_num_classes": 10,
                "image_seq_len": "${model.vq_model.num_latent_tokens}",
            }
        }  # fmt: skip
    return {
        "model": {"vq_model": tokenizer, **generator},
        "losses": {"diffloss_d": 2, "diffloss_w": 32},
        "dataset": {"preprocessing": {"crop_size": 32}},
    }


def test_what_cannot_be_configured_is_told():
    plain = authors_config(make("titok-generator-tiny"))
    plain["model"]["generator"]["model_type"] = "GPT"
    with pytest.raises(ConfigError, match="'GPT'"):
        configure(plain)
    with pytest.raises(ConfigError, match=r"model\.generator"):
        configure({"model": {"vq_model": {}}})
    del plain["model"]["generator"]["condition_num_classes"], plain["model"]["generator"]["model_type"]
    with pytest.raises(ConfigError, match="condition_num_classes"):
        configure(plain)


def test_published_settings():
    """Steps, guidance (1 + w of the paper's c + w (c - u)) and temperatures of the published models."""
    sampling = VARIANTS["titok-generator-l-32"].sampling
    assert (sampling.steps, sampling.guidance, sampling.choice_temperature) == (8, 5.5, 9.5)
    assert [sampling.guidance_at(step) for step in (0, 4)] == [1.0, 1 + 4.5 / 2]
    sampling = VARIANTS["maskgen-vq-l"].sampling
    assert (sampling.steps, sampling.guidance, sampling.choice_temperature) == (16, 13.0, 2.0)
    assert sampling.guidance_at(15) == pytest.approx(13.0)
    assert sampling.guidance_at(7) == pytest.approx(1 + (12 - 1) / 2 + 1)
    assert VARIANTS["titok-generator-s-128"].sampling.guidance_at(0) == 1.0
    assert VARIANTS["maskgen-kl-l"].diffusion_steps == 100


@pytest.mark.parametrize("name", [*CLASSES, *TEXTS])
def test_it_runs_in_half_precision(name):
    torch.manual_seed(0)
    half = vistok.create(name, dtype=torch.bfloat16)
    data = generate(half, [0, 1], steps=3).data
    assert data.isfinite().all()
