"""HiMTok: masks of any size in and out, prefixes, training, and the language model's side."""

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from vistok.errors import ConfigError, FormatError, InputError
from vistok.tokenizers._himtok_language import (
    MaskWords,
    box_text,
    draw_prefixes,
    mask_loss,
    place_codes,
    read_box,
    shortened,
    soft_tokens,
)
from vistok.tokenizers.himtok import distorted


def make(name="himtok-tiny"):
    torch.manual_seed(0)
    return vistok.create(name)


def disks(count, size=32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, 1, 1, generator=rng) * 0.5 + 0.25
    radius = torch.rand(count, 1, 1, generator=rng) * 0.2 + 0.1
    line = (torch.arange(size) + 0.5) / size
    near = (line[None, :, None] - centre[:, 0]) ** 2 + (line[None, None, :] - centre[:, 1]) ** 2
    return (near < radius**2).float()[:, None]


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (32, 32), (7, 300)])
def test_masks_come_back_in_their_own_size(size):
    model = make()
    mask = torch.zeros(2, 1, *size)
    mask[:, :, : size[0] // 2] = 1
    tokens = model.encode(mask)
    assert tokens.codes.shape == (2, 8)
    soft = model.decode(tokens)
    assert soft.shape == mask.shape
    assert soft.min() >= 0
    assert soft.max() <= 1
    hard = model.decode(tokens.prefix(3), threshold=0.5)
    assert hard.shape == mask.shape
    assert set(hard.unique().tolist()) <= {0.0, 1.0}


def test_what_a_picture_file_gives_is_a_mask_where_it_is_black_and_white():
    model = make()
    array = np.zeros((32, 32), np.uint8)
    array[5:20, 8:30] = 255
    codes = model.encode(torch.from_numpy(array / 255).float()[None, None]).codes
    assert torch.equal(model.encode(Image.fromarray(array)).codes, codes)
    assert torch.equal(model.encode(array).codes, codes)
    assert torch.equal(model.encode(np.stack([array] * 3, -1)).codes, codes)
    with pytest.raises(InputError, match="black and white"):
        model.encode(np.stack([array, array // 2, array], -1))
    with pytest.raises(InputError, match="threshold"):
        model.decode(model.encode(array), threshold=1.5)


def test_a_tail_of_tokens_has_no_say_and_lengths_are_prefixes():
    model = make()
    tokens = model.encode(disks(3))
    vectors = model.embed(tokens)
    with torch.no_grad():
        together = model.decoder(vectors, torch.tensor([2, 5, 8]))
        alone = [model.decoder(vectors[i : i + 1, :k]) for i, k in enumerate((2, 5, 8))]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


@pytest.mark.parametrize("name", ["himtok-tiny", "himtok-tiny-direct"])
def test_training_learns_masks(name):
    model = make(name).train()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    masks = disks(8)
    totals = []
    for step in range(25):
        terms = model.loss({"pixels": masks.expand(-1, 3, -1, -1)}, step, torch.Generator().manual_seed(step))
        assert set(terms) == {"reconstruction", "dice", "bce", "commitment", "codebook"}
        total = sum(terms.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert sum(totals[-5:]) < 0.8 * sum(totals[:5])
    assert model.quantizer.transform.weight.grad is not None


def test_distortion_grows_or_shrinks_about_the_share_that_it_should():
    masks = disks(200)
    changed = distorted(masks, 0.7, torch.Generator().manual_seed(0))
    area, before = changed.sum((1, 2, 3)), masks.sum((1, 2, 3))
    assert 0.6 < (area != before).float().mean() < 0.8
    assert (area > before).any()
    assert (area < before).any()


def test_configs_that_contradict_themselves():
    for change in ({"pixel_decoder": None}, {"features": 20}, {"distort": 1.5}, {"encoder_patch": 5}):
        with pytest.raises(ConfigError):
            vistok.create("himtok-tiny", **change)


# -- beside a language model -----------------------------------------------------------------------------------------

WORDS = MaskWords(start=100, end=101, first=10, codes=64, length=8)


def test_codes_take_their_places_and_rows_without_them_are_left_out():
    ids = torch.full((2, 12), 1)
    ids[:, 2] = 100
    codes = torch.arange(16).view(2, 8)
    placed = place_codes(ids, codes, WORDS)
    assert torch.equal(placed[:, 3:11], codes + 10)
    assert (placed[:, 11] == 1).all()
    logits = torch.randn(2, 12, 120, generator=torch.Generator().manual_seed(0))
    cut = placed.clone()
    cut[1, 2] = 1
    soft, valid = soft_tokens(logits, cut, WORDS)
    assert valid.tolist() == [True, False]
    assert not soft[1].any()
    assert torch.allclose(soft[0], (2 * logits[0, 3:11, 10:74]).softmax(-1))
    with pytest.raises(InputError, match="row 1"):
        place_codes(cut, codes, WORDS)
    late = torch.full((1, 12), 1)
    late[0, 5] = 100
    assert not soft_tokens(logits[:1], late, WORDS)[1].any()
    with pytest.raises(ConfigError):
        MaskWords(start=20, end=101, first=10, codes=64)


def test_confident_soft_tokens_decode_like_their_codes_where_lengths_agree():
    """Soft decoding skips the unit length; with codebook rows of unit length both are one."""
    model = make()
    with torch.no_grad():
        model.quantizer.transform.weight.copy_(torch.eye(6))
        model.quantizer.codebook.copy_(torch.nn.functional.normalize(torch.randn(64, 6), dim=1))
    tokens = model.encode(disks(2))
    one_hot = torch.nn.functional.one_hot(tokens.codes, 64).float().requires_grad_()
    found = model.soft_decode(one_hot)
    assert torch.allclose(found, model.decode(tokens)[:, 0], atol=1e-5)
    mask_loss(found, disks(2)[:, 0]).backward()
    assert one_hot.grad.abs().sum() > 0


def test_a_batch_without_a_valid_row_costs_nothing():
    found = torch.rand(2, 4, 4, requires_grad=True)
    mask_loss(found, torch.ones(2, 4, 4), torch.tensor([False, False])).backward()
    assert found.grad.abs().sum() == 0


def test_prefixes_are_short_more_often_than_long():
    rng = torch.Generator().manual_seed(0)
    drawn = [draw_prefixes(32, rng) for _ in range(500)]
    assert all(len(set(three)) == 3 for three in drawn)
    flat = [length for three in drawn for length in three]
    assert min(flat) == -1
    assert max(flat) == 30
    assert sum(length < 15 for length in flat) > 0.55 * len(flat)
    soft = torch.ones(1, 4, 2)
    assert shortened(soft, 2).sum() == 4
    assert shortened(soft, -1).sum() == 6


def test_boxes_go_through_text():
    text = f"It is here: {box_text((16, 0, 64, 48), (48, 64))}."
    assert "<box>[[250, 0, 1000, 1000]]</box>" in text
    assert read_box(text, (48, 64)) == (16, 0, 64, 48)
    with pytest.raises(FormatError):
        read_box("nowhere", (48, 64))
    with pytest.raises(InputError):
        box_text((0, 0, 70, 10), (48, 64))


def test_a_fresh_codebook_is_made_of_latents_that_it_tells_apart():
    model = make("himtok-tiny")
    masks = disks(16)
    with torch.no_grad():
        latents = torch.nn.functional.normalize(model.encoder(model.prepare(masks)), dim=-1).flatten(0, 1)
    before = model.encode(masks).codes.unique().numel()
    model.initialise(iter([{"pixels": masks.expand(-1, 3, -1, -1)}]), torch.Generator().manual_seed(0))
    assert torch.cdist(model.quantizer.table(), latents).min(1).values.max() < 1e-3
    assert model.encode(masks).codes.unique().numel() > before


def test_training_moves_every_channel_that_decoding_reads():
    model = make("himtok-tiny-direct").train()
    terms = model.loss({"pixels": disks(4)}, 0, torch.Generator().manual_seed(0))
    sum(terms.values()).backward()
    moved = model.decoder.smooth.weight.grad.flatten(1).abs().sum(1)
    assert (moved > 0.1 * moved.max()).all()


def test_validation_and_sample_grids_of_masks():
    from vistok.training.validation import measure, sample_grid

    model = make("himtok-tiny")
    pixels = (disks(4) * 255).to(torch.uint8).expand(-1, 3, -1, -1)  # as pictures are read
    assert {"psnr", "psnr@2"} <= measure(model, pixels).keys()
    assert sample_grid(model, pixels).shape == (3, 5 * 34, 4 * 34)
