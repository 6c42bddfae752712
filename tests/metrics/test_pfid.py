"""pFID: grid and mean as asked for, independent of batches, larger where more is perturbed."""

import pytest
import torch

import vistok
from tests.golden import draw_weights
from vistok.errors import InputError
from vistok.metrics.frechet import frechet_distance
from vistok.metrics.pfid import RATES, STRENGTHS, pfid


@pytest.fixture(scope="module")
def tok():
    torch.manual_seed(0)
    tok = vistok.create("robusttok-tiny")
    draw_weights(tok)
    return tok


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def features(pixels):
    assert pixels.dtype == torch.uint8
    return torch.nn.functional.avg_pool2d(pixels.float() / 255, 16).flatten(1)


def test_the_grid_is_the_arguments_and_the_mean_is_theirs(tok, images):
    found = pfid(tok, [images], features, rates=(0.9, 0.3), strengths=(2, 40))
    assert [(rate, strength) for rate, strength, _ in found.grid] == [(0.9, 2), (0.9, 40), (0.3, 2), (0.3, 40)]
    values = [value for _, _, value in found.grid]
    assert found.mean == pytest.approx(sum(values) / 4)
    assert found.items == 24
    worst = pfid(tok, [images], features, rates=(0.9, 0.3), strengths=(2, 40), average=max)
    assert worst.mean == max(values)
    clean = features((tok.decode(tok.encode(images)) * 255 + 0.5).to(torch.uint8))
    assert found.clean == pytest.approx(frechet_distance(clean, features(images)), rel=0.02)
    assert (RATES, STRENGTHS) == ((0.9, 0.8, 0.7, 0.6, 0.5), (200, 280, 360))


def test_it_does_not_depend_on_batches_but_on_the_seed(tok, images):
    options = {"rates": (0.5,), "strengths": (20,)}
    whole = pfid(tok, [images], features, **options)
    parts = pfid(tok, images.split(7), features, **options)
    assert parts.mean == pytest.approx(whole.mean, rel=1e-3)
    assert pfid(tok, [images], features, seed=1, **options).mean != pytest.approx(whole.mean, rel=1e-3)


def test_no_perturbation_is_the_clean_distance(tok, images):
    found = pfid(tok, [images], features, rates=(1.0, 0.0), strengths=(1,))
    assert all(value == pytest.approx(found.clean, rel=1e-4) for _, _, value in found.grid)


def test_what_it_cannot_take(tok, images):
    with pytest.raises(InputError, match="neighbourhoods"):
        pfid(tok, [images], features, strengths=(500,))
    with pytest.raises(InputError, match="two"):
        pfid(tok, [images[:1]], features, strengths=(5,))
    with pytest.raises(InputError, match="VectorQuantizer"):
        pfid(vistok.create("titok-tiny-vae"), [images], features)
