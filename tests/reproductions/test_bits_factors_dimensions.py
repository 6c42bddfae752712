"""Reproductions of FQGAN, TokenBridge and binary latent diffusion: their rules, and that they run to the end."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.data.sources import open_source
from vistok.evaluation.reproducing import Data, reproduce
from vistok.evaluation.reproduction import find, judged
from vistok.reproductions import binary_latent_diffusion, fqgan, tokenbridge
from vistok.reproductions._small import probe

GOOD = {
    "tokenbridge": {
        "rounded": {"loss_2": 3.0, "loss_6": 0.02, "largest_rise": -0.001},
        "parallel": {"cross_entropy": 2.2},
        "autoregressive": {"cross_entropy": 2.1},
    },
    "fqgan": {
        "one": {"mse": 1.0},
        "one-4096": {"mse": 0.8},
        "dual": {"mse": 0.8, "used": 0.95, "cos2": 0.2},
        "apart": {"mse": 0.81, "cos2": 0.05},
        "taught": {"probe_gain": 10.0},
    },
    "binary-latent-diffusion": {
        "bits-16": {"mse": 0.8, "few": 1.1, "fewest": 1.4, "D_16": 2.0},
        "codes": {"mse": 1.0, "D_16": 2.5},
    },
}
BAD = [
    ("tokenbridge", "rounded", "loss_6", 0.2),
    ("tokenbridge", "rounded", "loss_2", 1.0),
    ("tokenbridge", "rounded", "largest_rise", 0.1),
    ("tokenbridge", "autoregressive", "cross_entropy", 2.19),
    ("fqgan", "dual", "used", 0.5),
    ("fqgan", "one", "mse", 0.85),
    ("fqgan", "one-4096", "mse", 0.7),
    ("fqgan", "apart", "cos2", 0.15),
    ("fqgan", "apart", "mse", 0.9),
    ("fqgan", "taught", "probe_gain", 3.0),
    ("binary-latent-diffusion", "codes", "mse", 0.8),
    ("binary-latent-diffusion", "bits-16", "few", 1.3),
    ("binary-latent-diffusion", "bits-16", "fewest", 1.1),
    ("binary-latent-diffusion", "codes", "D_16", 2.0),
]


def numbers_of(slug, second=None):
    """The same good numbers for two seeds, the second of them changed."""
    return {arm: {0: values, 1: values if second is None else second[arm]} for arm, values in GOOD[slug].items()}


@pytest.mark.parametrize("slug", GOOD)
def test_what_is_shown(slug):
    assert judged(find(slug), numbers_of(slug))["verdict"] == "shown"


@pytest.mark.parametrize(("slug", "arm", "metric", "value"), BAD, ids=lambda part: str(part))
def test_one_seed_is_enough_to_refute(slug, arm, metric, value):
    changed = copy.deepcopy(GOOD[slug])
    changed[arm][metric] = value
    found = judged(find(slug), numbers_of(slug, changed))
    assert found["verdict"] == "not shown"
    assert sum(not condition["holds"] for condition in found["rule"]) == 1


def test_a_probe_finds_what_is_linear():
    torch.manual_seed(0)
    labels, test_labels = torch.arange(500) % 10, torch.arange(200) % 10
    directions = torch.randn(10, 32)
    noisy = [directions[which] + 0.3 * torch.randn(len(which), 32) for which in (labels, test_labels)]
    assert probe(noisy[0], labels, noisy[1], test_labels) > 95
    assert probe(torch.randn(500, 32), labels, torch.randn(200, 32), test_labels) < 30


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    random = np.random.RandomState(0)
    for label in range(10):
        (folder / f"class{label}").mkdir()
        for index in range(8):
            small = random.randint(0, 256, (4, 4, 3), dtype=np.uint8)
            picture = Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC)
            picture.save(folder / f"class{label}" / f"{index}.png")
    source = open_source(folder)
    return Data(source, source)


def small(slug, monkeypatch):
    """The reproduction, two steps for everything."""
    for module in (binary_latent_diffusion, fqgan, tokenbridge):
        for name in ("VAE_STEPS", "TEACHER_STEPS", "DIFFUSION_STEPS"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, 2)
        monkeypatch.setattr(module, "TEST_ITEMS", 12)
    found = find(slug)
    return replace(found, steps=2, arms={name: replace(arm, steps=2) for name, arm in found.arms.items()})


@pytest.mark.slow
@pytest.mark.parametrize("slug", GOOD)
def test_it_runs_to_the_end(slug, labelled, monkeypatch, tmp_path):
    result = reproduce(small(slug, monkeypatch), labelled, tmp_path / "run")
    assert result["verdict"] in ("shown", "not shown")
    for metric in result["report"]:
        assert any(metric in arm["numbers"] for arm in result["arms"].values()), metric
    assert all(condition["values"] for condition in result["rule"])
    if slug == "tokenbridge":
        losses = result["arms"]["rounded"]["numbers"]
        assert losses["loss_8"]["mean"] == pytest.approx(0, abs=0.05)
        assert 0 <= losses["r2"]["mean"] <= 1
