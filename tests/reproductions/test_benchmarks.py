"""Reproductions of TokBench, VTBench and of RobustTok's pFID: rules, what they draw, and that they run to the end."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.reproductions.test_bits_factors_dimensions import labelled as labelled
from vistok.data.sources import open_source
from vistok.evaluation.reproducing import Data, reproduce
from vistok.evaluation.reproduction import find, judged
from vistok.metrics.psnr import psnr
from vistok.reproductions import _scenes, robusttok_pfid, tokbench, vtbench
from vistok.reproductions._scenes import SIDE, SceneConfig, SceneTokenizer, Unrounded, read, scene, squares
from vistok.reproductions.robusttok_pfid import ARMS, Perturbed, rank_correlation
from vistok.reproductions.tokbench import at_psnr, blurred, noisy
from vistok.tokenizers.robusttok import Perturbation
from vistok.tokenizers.vq_vae import VQVAEConfig

BINS = {"t-acc_small": 0.2, "t-acc_medium": 0.5, "t-acc_large": 0.8}
LEVEL = {"natural_psnr": 24.0, "patterns_psnr": 20.0, "words_psnr": 22.0, "natural_distance": 0.8}
LEVEL |= {"patterns_distance": 0.8, "cer": 0.3}
FLAT = {"natural_psnr": 22.0, "patterns_psnr": 17.0, "words_psnr": 19.0, "natural_distance": 1.0}
FLAT |= {"patterns_distance": 1.0, "cer": 0.6}
ORDER = dict(zip(ARMS, range(8), strict=True))
GOOD = {
    "tokbench": {
        "continuous": {"t-acc": 0.8, "kept": 0.95, **BINS},
        "vq": {"t-acc": 0.5, "noise_t-acc": 0.9, **BINS},
        "vq-16": {"t-acc": 0.1, **BINS},
    },
    "vtbench": {"continuous": LEVEL, "vq": FLAT, "fsq": {**FLAT, "natural_psnr": 21.0}},
    "robusttok-pfid": {
        name: {"gfd": float(place), "pfd": float(place), "rfd": float((place * 3) % 8)} for name, place in ORDER.items()
    },
}
BAD = [
    ("tokbench", "continuous", "kept", 0.5),
    ("tokbench", "vq", "t-acc_small", 0.6),
    ("tokbench", "vq", "noise_t-acc", 0.55),
    ("tokbench", "continuous", "t-acc", 0.55),
    ("tokbench", "vq-16", "t-acc", 0.48),
    ("vtbench", "fsq", "natural_psnr", 23.5),
    ("vtbench", "vq", "cer", 0.35),
    ("vtbench", "fsq", "natural_distance", 0.81),
    ("vtbench", "vq", "patterns_distance", 0.81),
    ("robusttok-pfid", "plain", "pfd", 9.0),
]


def verdict(slug, second):
    numbers = {arm: {0: values, 1: second[arm]} for arm, values in GOOD[slug].items()}
    return judged(find(slug), numbers)


@pytest.mark.parametrize("slug", GOOD)
def test_what_is_shown(slug):
    assert verdict(slug, GOOD[slug])["verdict"] == "shown"


@pytest.mark.parametrize(("slug", "arm", "metric", "value"), BAD, ids=lambda part: str(part))
def test_one_seed_is_enough_to_refute(slug, arm, metric, value):
    changed = copy.deepcopy(GOOD[slug])
    changed[arm][metric] = value
    assert verdict(slug, changed)["verdict"] == "not shown"


def test_a_lead_that_is_the_same_everywhere_does_not_show_that_detail_suffers_most():
    changed = copy.deepcopy(GOOD["vtbench"])
    changed["vq"] |= {"patterns_psnr": 18.0, "words_psnr": 20.0}
    found = verdict("vtbench", changed)
    assert [clause["holds"] for clause in found["rule"]] == [True, True, True, True, True, False]


def test_ranks():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)


# -- scenes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one():
    return scene(torch.full((3, SIDE, SIDE), 120, dtype=torch.uint8), np.random.default_rng(5))


def test_a_word_is_in_its_box_and_nowhere_else(one):
    left, top, right, bottom = one.box
    drawn = (one.pixels != 120).any(0)
    assert drawn[top:bottom, left:right].float().mean() > 0.1
    drawn[top:bottom, left:right] = False
    assert not drawn.any()
    again = scene(torch.full((3, SIDE, SIDE), 120, dtype=torch.uint8), np.random.default_rng(5))
    assert torch.equal(one.pixels, again.pixels)


def test_a_reader_is_given_the_box_and_two_pixels_around(one):
    sizes = read(lambda crops: [str(crop.shape) for crop in crops], [one], one.pixels[None])
    left, top, right, bottom = one.box
    assert sizes == [str((bottom - top + 4, right - left + 4, 3))]


@pytest.mark.parametrize("bottleneck", ["continuous", "vq", "fsq"])
def test_bottlenecks(bottleneck):
    torch.manual_seed(0)
    tokenizer = SceneTokenizer(SceneConfig(widths=(4, 8), blocks=(0, 1), bottleneck=bottleneck), bottleneck)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokenizer.loss({"pixels": pixels}, 0, torch.Generator())["reconstruction"].backward()
    assert tokenizer.encoder.shrink[0].weight.grad.abs().sum() > 0
    tokens = tokenizer.eval().encode(pixels)
    assert tokens.bits().tolist() == [64 * (16 * 32 if bottleneck == "continuous" else 10)] * 2
    with tokenizer.inference():
        assert tokenizer.decode(tokens) == pytest.approx(tokenizer(pixels).clamp(0, 1).detach(), abs=1e-5)


def test_numbers_of_two_bits_have_four_values():
    quantizer = Unrounded(2)
    quantizer.mean.copy_(torch.tensor([1.0, 0.0]))
    quantizer.deviation.copy_(torch.tensor([2.0, 1.0]))
    z = torch.randn(1, 500, 2, generator=torch.Generator().manual_seed(0)) * quantizer.deviation + quantizer.mean
    found = quantizer.rounded(z)
    assert sorted(found[..., 0].unique().tolist()) == pytest.approx([-2, 0, 2, 4])
    assert sorted(found[..., 1].unique().tolist()) == pytest.approx([-1.5, -0.5, 0.5, 1.5])
    within = z[..., 1].abs() < 1.5
    assert (found - z)[..., 1][within].abs().max() <= 0.5


def test_squares_are_cut_from_the_pictures():
    pixels = torch.arange(SIDE * SIDE).remainder(251).view(1, 1, SIDE, SIDE).expand(3, 3, -1, -1).to(torch.uint8)
    first, second = (next(squares(pixels, 4, seed))["pixels"] for seed in (0, 0))
    assert first.shape == (4, 3, 64, 64)
    assert torch.equal(first, second)


@pytest.mark.parametrize("change", [noisy, blurred])
def test_changes_reach_a_psnr(change):
    pixels = torch.randint(256, (6, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(pixels.float(), 5, 1, 2).to(torch.uint8)
    assert float(psnr(at_psnr(smooth, 24.0, change), smooth).mean()) == pytest.approx(24, abs=0.1)


# -- pFID --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_perturbed_and_plain_differ_in_the_reconstruction_alone(metric):
    pixels = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, rule in {"plain": None, "still": Perturbation(1.0, 0.5, 1), "moved": Perturbation(1.0, 0.5, 8)}.items():
        torch.manual_seed(0)
        model = Perturbed(VQVAEConfig(widths=(4, 8), blocks=(0, 0), codebook_size=32, code_dim=4, metric=metric))
        model.rule = rule
        losses = model.loss({"pixels": pixels}, 0, torch.Generator().manual_seed(1))
        found[name] = {key: value.item() for key, value in losses.items()}
    assert found["moved"]["commitment"] == found["plain"]["commitment"]
    assert found["moved"]["reconstruction"] != found["plain"]["reconstruction"]
    assert found["still"]["reconstruction"] == pytest.approx(found["plain"]["reconstruction"], rel=1e-5)


# -- to the end --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Six pictures of 140 pixels, in two halves."""
    where = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for half in ("train", "test"):
        (where / half).mkdir()
        for number in range(3):
            low = rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)
            Image.fromarray(low).resize((140, 140), Image.Resampling.BICUBIC).save(where / half / f"{number}.png")
    return Data(open_source(where / "train"), open_source(where / "test"))


@pytest.mark.parametrize("slug", ["tokbench", "vtbench"])
def test_scenes_run_to_the_end(slug, photographs, monkeypatch, tmp_path):
    module = {"tokbench": tokbench, "vtbench": vtbench}[slug]
    monkeypatch.setattr(module, "build_reader", lambda name: lambda crops: [next(words) for _ in crops])
    monkeypatch.setattr(_scenes, "LETTERS", "a")
    monkeypatch.setattr(module, "WORDS", 9)
    for name, value in {"PATTERNS": 4, "NATURAL": 3, "CHOOSING_WORDS": 15}.items():
        monkeypatch.setattr(module, name, value, raising=False)
    monkeypatch.setattr(_scenes, "SCENES", 6)
    words = iter(["aaaa"] * 10_000)
    found = find(slug)
    result = reproduce(replace(found, steps=2, batch=2), photographs, tmp_path / "run")
    assert result["verdict"] == "not shown"
    known = {metric for arm in result["arms"].values() for metric in arm["numbers"]}
    assert set(result["report"]) <= known
    if slug == "tokbench":
        assert result["arms"]["vq"]["numbers"]["t-acc"]["mean"] == 1.0
        assert result["arms"]["vq"]["numbers"]["smallest"]["mean"] == 10
    else:
        assert result["arms"]["vq"]["numbers"]["cer"]["mean"] == 0.0


@pytest.mark.slow
def test_pfid_runs_to_the_end(labelled, monkeypatch, tmp_path):
    for name, value in {"TEACHER_STEPS": 2, "TEST_ITEMS": 12, "SAMPLES": 250, "GENERATOR_STEPS": 2}.items():
        monkeypatch.setattr(robusttok_pfid, name, value)
    found = find("robusttok-pfid")
    result = reproduce(replace(found, steps=2, batch=8), labelled, tmp_path / "run")
    assert set(result["report"]) <= set(result["arms"]["plain"]["numbers"])
