"""Strata: layout, prefixes, windows that equal the whole, and a loss that trains every part."""

import pytest
import torch

import vistok
from vistok.errors import InputError
from vistok.metrics.psnr import psnr


@pytest.fixture(scope="module")
def pictures():
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(32, 3, 5, 5, generator=rng)
    base = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic")
    return (base + 0.05 * torch.randn(base.shape, generator=rng)).clamp(0, 1)


@pytest.fixture(scope="module")
def tok(pictures):
    torch.manual_seed(0)
    model = vistok.create("strata-tiny")
    batches = iter([{"pixels": pictures}] * 4)
    model.initialise(batches, torch.Generator().manual_seed(0))
    return model


def test_layout_and_bits(tok):
    spec = tok.spec.at((96, 64))
    assert [segment.shape for segment in spec.segments] == [(3, 2), (6, 4), (6, 4)]
    assert list(spec.prefixes) == [6, 30, 54]
    assert spec.bits == 54 * 6


def test_quality_rises_with_every_level(tok, pictures):
    tokens = tok.encode(pictures)
    quality = [psnr(tok.decode(tokens.prefix(k)), pictures).mean().item() for k in tok.spec.at((64, 64)).prefixes]
    assert quality == sorted(quality)
    assert quality[-1] > quality[0] + 2


def test_any_size_comes_back(tok):
    for size in ((1, 1), (33, 70), (64, 31)):
        image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
        assert tok.decode(tok.encode(image)).shape == image.shape


def test_windows_equal_the_whole(tok, monkeypatch):
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 9), size=(256, 320), mode="bicubic").clamp(0, 1)
    whole = tok.encode(image)
    pixels = tok.decode(whole)
    monkeypatch.setattr(type(tok), "window", 4)
    parts = tok.encode(image)
    assert (parts.codes == whole.codes).float().mean() > 0.999  # float rounding may move a tie
    torch.testing.assert_close(tok.decode(whole), pixels, atol=1e-5, rtol=0)


def test_uint8_and_float_pixels_give_the_same_codes(tok):
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(tok.encode(image).codes, tok.encode(image.float() / 255).codes)
    out = tok.decode(tok.encode(image), dtype=torch.uint8)
    assert out.dtype == torch.uint8


def test_loss_reaches_every_parameter_and_falls(pictures):
    torch.manual_seed(0)
    model = vistok.create("strata-tiny").train()
    rng = torch.Generator().manual_seed(0)
    model.initialise(iter([{"pixels": pictures}] * 4), rng)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    losses = []
    for step in range(30):
        rng.manual_seed(1)  # the same prefixes in every step, so that losses compare
        loss = sum(model.loss({"pixels": pictures}, step, rng).values())
        optimizer.zero_grad()
        loss.backward()
        if step == 5:  # outputs that start at zero hold back what is before them for a few steps
            silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
            assert silent == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_embed_sums_to_the_latent(tok, pictures):
    tokens = tok.encode(pictures[:2])
    vectors = tok.embed(tokens)
    assert vectors.shape == (2, 4 + 16 + 16, 12 * 4)
    assert not vectors[:, 4:, 32:].any()


def test_prefix_in_the_middle_of_a_level_is_refused(tok, pictures):
    with pytest.raises(InputError, match=r"\[4, 20, 36\]"):
        tok.decode(tok.encode(pictures[:1]).prefix(7))
