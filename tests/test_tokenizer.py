"""The contract, on a toy tokenizer whose right answers are known."""

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from tests import toy  # noqa: F401  (registers the toy system)
from vistok.errors import InputError, MismatchError


@pytest.fixture
def tok():
    return vistok.create("toy")


def test_round_trip_gives_back_the_size_that_went_in(tok):
    image = torch.rand(2, 3, 13, 22, generator=torch.Generator().manual_seed(0))
    tokens = tok.encode(image)
    assert tokens.codes.shape == (2, 4 * 6, 3)
    assert tokens.canvas[0].size == (13, 22)
    assert tok.decode(tokens).shape == image.shape


def test_images_of_several_sizes(tok):
    images = [Image.new("RGB", (20, 12), "red"), np.zeros((12, 20, 3), np.uint8), torch.zeros(3, 8, 8)]
    tokens = tok.encode(images)
    assert [len(part) for part in tokens] == [1, 1, 1]
    assert [image.shape for image in tok.decode(tokens)] == [(3, 12, 20), (3, 12, 20), (3, 8, 8)]
    together = tok.encode(images[:2])
    assert len(together) == 2
    assert together[0].codes[0, 0].tolist() == [7, 0, 0]


def test_one_layout_with_several_canvases_decodes_to_each_size(tok):
    tokens = tok.encode([torch.rand(3, 15, 16), torch.rand(3, 16, 14)])
    assert [image.shape for image in tok.decode(tokens)] == [(3, 15, 16), (3, 16, 14)]


@pytest.mark.parametrize("on_size", ["resize", "tile"])
def test_fixed_size_model_takes_any_picture(on_size):
    tok = vistok.create("toy-16")
    image = torch.linspace(0, 1, 40).expand(1, 3, 23, 40)
    tokens = tok.encode(image, on_size=on_size)
    out = tok.decode(tokens)
    assert out.shape == image.shape
    assert (out - image).abs().mean() < 0.15
    if on_size == "tile":
        assert tokens.segments[0].shape == (4, 4, 2, 3)
        alone = tok.encode(image[..., :16, :16])
        assert torch.equal(tokens["grid"][0, :, :, 0, 0], alone["grid"][0])


def test_sizes_that_do_not_fit_are_refused_with_the_way_out():
    tok = vistok.create("toy-16")
    with pytest.raises(InputError, match="on_size='resize' or on_size='tile'"):
        tok.encode(torch.zeros(3, 40, 40))
    with pytest.raises(InputError, match="pad"):
        tok.encode(torch.zeros(3, 10, 10), on_size="refuse")


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (torch.full((3, 8, 8), 1.5), "clamp"),
        (torch.rand(3, 8, 8) * 255, "divide by 255"),
        (torch.linspace(-1, 1, 192).reshape(3, 8, 8), r"\(x \+ 1\) / 2"),
        (torch.full((3, 8, 8), float("nan")), "NaN"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), "uint8 in 0..255 or float"),
        (torch.zeros(1, 8, 8), "C = 3"),
        ("picture.png", "cannot take str"),
    ],
)
def test_wrong_pixels_are_refused_never_guessed(tok, bad, told):
    with pytest.raises(InputError, match=told):
        tok.encode(bad)


def test_decode_refuses_tokens_of_other_weights(tok):
    tokens = tok.encode(torch.rand(3, 8, 8))
    with torch.no_grad():
        tok.encoder.gain.mul_(0.5)
    with pytest.raises(MismatchError, match="load the model that made them"):
        tok.decode(tokens)


def test_decode_refuses_codes_outside_the_codebook_and_illegal_prefixes(tok):
    tokens = tok.encode(torch.rand(3, 8, 8))
    with pytest.raises(InputError, match="do not decode"):
        tok.decode(tokens.prefix(2))
    tokens.codes[0, 0, 0] = 8
    with pytest.raises(InputError, match="codebook has 8"):
        tok.decode(tokens)


def test_encoding_leaves_training_mode_as_it_was(tok):
    tok.train()
    tok.encode(torch.rand(3, 8, 8))
    assert tok.training
    assert tok.encoder.training


def test_uint8_out(tok):
    image = Image.new("RGB", (8, 8), (255, 0, 255))
    out = tok.decode(tok.encode(image), dtype=torch.uint8)
    assert out.dtype == torch.uint8
    assert out[0, :, 0, 0].tolist() == [255, 0, 255]


def test_unknown_names_point_to_the_nearest():
    with pytest.raises(vistok.VistokError, match="'toy'"):
        vistok.create("toi")


def test_save_and_load(tok, tmp_path):
    with torch.no_grad():
        tok.encoder.gain.fill_(0.75)
    tok.save(tmp_path / "model")
    again = vistok.load(tmp_path / "model")
    assert again.fingerprint == tok.fingerprint
    image = torch.rand(3, 8, 8)
    assert torch.equal(again.decode(tok.encode(image)), tok.decode(tok.encode(image)))
    half = vistok.load(tmp_path / "model", dtype=torch.bfloat16)
    assert half.fingerprint == tok.fingerprint
    assert half.dtype == torch.bfloat16


def test_models_that_take_squares_pad_and_resize_to_squares():
    from vistok.layout import Sizes
    from vistok.pixels import fit, plan

    sizes = Sizes(square=True)
    assert sizes.legal((7, 7))
    assert not sizes.legal((7, 8))
    assert plan((20, 30), sizes).padding == (0, 0, 0, 10)
    assert plan((20, 45), sizes, "resize").resized == (30, 30)
    assert "squares" in sizes.describe()
    padded = fit(torch.ones(1, 1, 2, 3), plan((2, 3), sizes), blank=True)
    assert padded[0, 0].tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
