"""OmniTokenizer: pictures and clips in one model, causality, sizes, training, and its language model."""

import pytest
import torch

import vistok
from vistok.errors import ConfigError, MismatchError
from vistok.nn.space_time import PositionBias, WindowAttention, alibi, grid_rotation
from vistok.tokenizers._omnitokenizer_keys import inflate
from vistok.tokenizers.omnitokenizer import SCALES, key_table, resized


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def make(name="omnitokenizer-tiny", **changes):
    torch.manual_seed(0)
    model = vistok.create(name, **changes)
    if hasattr(model, "quantizer") and hasattr(model.quantizer, "codebook"):
        model.quantizer.codebook.copy_(torch.nn.functional.normalize(torch.randn(64, 8), dim=1))
    return model


@pytest.mark.parametrize("name", ["tiny", "tiny-vae", "tiny-biased", "tiny-causal"])
def test_pictures_and_clips_come_back_in_their_size(name):
    model = make(f"omnitokenizer-{name}")
    for shape in ((2, 3, 32, 32), (1, 3, 20, 45), (2, 3, 5, 32, 32), (1, 3, 4, 24, 40), (1, 3, 12, 32, 32)):
        pixels = draw(*shape)
        tokens = model.encode(pixels, rate=8.0)
        rebuilt = model.decode(tokens)
        assert rebuilt.shape == pixels.shape
        assert rebuilt.min() >= 0
        assert rebuilt.max() <= 1
        assert tokens.length == model.spec.of(tokens.canvas[0]).length


def test_a_picture_is_a_clip_of_one_frame():
    model = make()
    pixels = draw(2, 3, 32, 32)
    assert torch.equal(model.encode(pixels).codes, model.encode(pixels[:, :, None]).codes)


def test_the_corrected_order_is_causal_and_the_released_one_is_not():
    for name, expected in (("tiny-causal", True), ("tiny", False)):
        model = make(f"omnitokenizer-{name}")
        clip = draw(1, 3, 5, 32, 32)
        changed = clip.clone()
        changed[:, :, 3:] = draw(1, 3, 2, 32, 32, seed=1)
        with torch.no_grad():
            first, second = (model.encoder(one)[:, :2] for one in (clip, changed))
        assert torch.equal(first, second) is expected


def test_a_batch_is_its_items():
    model = make()
    clips = draw(3, 3, 5, 32, 32)
    whole = model.encode(clips).codes
    assert torch.equal(whole, torch.cat([model.encode(clip[None]).codes for clip in clips]))


def test_window_attention_sees_its_window_alone():
    torch.manual_seed(0)
    attention = WindowAttention(make().config.size, 2)
    x = torch.randn(1, 4, 4, 32)
    changed = x.clone()
    changed[:, :2, 2:] += 1
    difference = (attention(x) - attention(changed)).abs().amax((0, 3)) > 0
    assert difference.tolist() == [[False, False, True, True]] * 2 + [[False] * 4] * 2
    with pytest.raises(ConfigError, match="do not tile"):
        attention(torch.randn(1, 3, 4, 32))


def test_biases_and_rotations_of_positions():
    assert alibi(8, 3)[0].tolist() == [[0, -0.5, -1], [-0.5, 0, -0.5], [-1, -0.5, 0]]
    slopes = [-alibi(5, 2)[head, 0, 1].item() for head in range(5)]
    assert slopes == pytest.approx([1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2])
    torch.manual_seed(0)
    net = PositionBias(8, 2)
    bias = net(3, 4)
    steps = torch.tensor([[1.0, -2.0]])
    direct = net.net(steps.sign() * (steps.abs() + 1).log())[0]
    assert torch.allclose(bias[:, 1 * 4 + 1, 0 * 4 + 3], direct)  # from (1, 1) to (0, 3)
    turned = grid_rotation(2, 3, 8)
    assert turned.cos.shape == (6, 4)
    assert torch.allclose(turned.cos[5], torch.tensor([2.0, 1.0, 0.02, 0.01]).cos())


@pytest.mark.parametrize("name", ["tiny", "tiny-vae"])
def test_training_learns_pictures_and_clips(name):
    model = make(f"omnitokenizer-{name}").train()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    totals = {4: [], 5: []}
    for step in range(40):
        shape = (2, 3, 16, 16) if step % 2 else (2, 3, 5, 16, 16)
        coarse = draw(*shape[:2], 4, 4)
        pixels = torch.nn.functional.interpolate(coarse, shape[-2:], mode="bilinear")
        pixels = pixels[:, :, None].expand(shape) if len(shape) == 5 else pixels
        batch = {"pixels": pixels}
        terms = model.loss(batch, step, torch.Generator().manual_seed(step))
        assert batch["reconstruction"].shape == pixels.shape
        total = sum(terms.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals[len(shape)].append(total.item())
    assert all(sum(values[-4:]) < 0.8 * sum(values[:4]) for values in totals.values())


def test_batches_are_resized_together_to_legal_sides():
    seen = set()
    for seed in range(30):
        clip = resized(draw(1, 3, 2, 64, 64), 16, torch.Generator().manual_seed(seed))
        seen.add(clip.shape[-1])
    assert seen == {round(64 * scale) for scale in SCALES}


def test_inflated_weights_load():
    images = make("omnitokenizer-tiny")
    theirs = key_table(images.config).to_theirs(images.state_dict())
    clips = make("omnitokenizer-tiny")
    clips.load_state_dict(key_table(clips.config).to_ours(theirs | inflate(theirs, 2)))
    assert torch.allclose(clips.decoder.rest.weight, clips.decoder.first.weight.repeat(2, 1) / 2)
    with pytest.raises(ConfigError, match="middle"):
        inflate(theirs, 2, "middle")


def test_configs_that_contradict_themselves():
    for change in ({"window": 4}, {"window": 6}, {"resolution": 40}, {"encoder_blocks": "tx"}):
        with pytest.raises(ConfigError):
            vistok.create("omnitokenizer-tiny", **change)


# -- the language model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "tiny-clips", "tiny-frames"])
def test_generated_tokens_decode(name):
    tokenizer, lm = make(), make(f"omnitokenizer-lm-{name}")
    lm.attach(tokenizer)
    condition = None if name == "tiny-frames" else [3, 7]
    tokens = lm.generate(condition, count=2, seed=1)
    assert torch.equal(tokens.codes, lm.generate(condition, count=2, seed=1).codes)
    assert not torch.equal(tokens.codes, lm.generate(condition, count=2, seed=5).codes)
    alone = lm.generate(None if condition is None else [7], count=1, seed=2)
    assert torch.equal(alone.codes[0], tokens.codes[1])
    expected = (2, 3, 32, 32) if name == "tiny" else (2, 3, 5, 32, 32)
    assert tokenizer.decode(tokens).shape == expected


def test_frames_are_continued():
    tokenizer, lm = make(), make("omnitokenizer-lm-tiny-frames")
    lm.attach(tokenizer)
    tokens = tokenizer.encode(draw(2, 3, 5, 32, 32))
    going_on = lm.generate(known=tokens.prefix(16), seed=0)
    assert torch.equal(going_on.codes[:, :16], tokens.codes[:, :16])


def test_the_cache_gives_what_the_whole_sequence_gives():
    """Greedy codes by the cache are the likeliest of the teacher-forced logits, guided and not."""
    for name, label in (("tiny", torch.tensor([3])), ("tiny-clips", torch.tensor([3]))):
        lm = make(f"omnitokenizer-lm-{name}")
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.mul_(3)
        offset = lm.config.offset
        for guidance in (1.0, 2.0):
            codes = lm.generate(label, guidance=guidance, temperature=0.0).codes
            with torch.no_grad():
                conditional, without = lm.logits(codes, label), lm.logits(codes, torch.tensor([-1]))
            expected = (without + guidance * (conditional - without))[..., offset:].argmax(-1)
            assert torch.equal(codes, expected)


def test_the_language_model_learns_and_refuses_other_layouts():
    lm = make("omnitokenizer-lm-tiny").train()
    codes = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8)
    optimizer = torch.optim.Adam(lm.parameters(), 3e-3)
    losses = []
    for step in range(40):
        total = sum(lm.loss({"codes": codes, "label": labels}, step, torch.Generator().manual_seed(step)).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(MismatchError, match="tokens of"):
        make("omnitokenizer-lm-tiny-clips").attach(vistok.create("vqgan-tiny"))
