"""Reproductions of FQGAN, TokenBridge and binary latent diffusion: their rules, and that they run to the end."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.reproductions import binary_latent_diffusion, fqgan, tokenbridge
from vistok.reproductions._small import probe

PSNR = {"continuous": 24.0, "2": 21.0, "3": 23.0, "4": 23.8, "5": 23.95, "6": 23.99, "7": 24.0, "8": 24.0}
TOKENBRIDGE = {"psnr": PSNR, "cross_entropy": {"autoregressive": [2.0, 2.0], "parallel": [2.2, 2.1]}}
FQGAN = {
    "one": [{"mse": 1.0}],
    "one-4096": [{"mse": 0.8}],
    "dual": [{"mse": 0.8, "used": [1.0, 0.95], "cos2": 0.2}],
    "apart": [{"mse": 0.81, "cos2": 0.05}],
    "taught": [{"probe_sem": 40.0, "probe_vis": 30.0}],
}
BINARY = {
    "mse": {"bits-16": [0.8, 0.8], "codes": [1.0, 0.9]},
    "distance": {
        "bits-16": {"64": [{"E": 1.0}], "16": [{"E": 1.1, "D": 2.0}], "4": [{"E": 1.5}]},
        "codes": {"16": [{"D": 2.5}]},
    },
}
CASES = [(tokenbridge, TOKENBRIDGE), (fqgan, FQGAN), (binary_latent_diffusion, BINARY)]
BROKEN = [
    (tokenbridge, TOKENBRIDGE, ("psnr", "6"), 23.8, "six bits lose at most 0.1 dB"),
    (tokenbridge, TOKENBRIDGE, ("psnr", "2"), 23.0, "two bits lose at least 1.5 dB"),
    (tokenbridge, TOKENBRIDGE, ("psnr", "7"), 23.9, "the loss never grows with the bits"),
    (fqgan, FQGAN, ("dual", 0, "used"), [1.0, 0.5], "each sub-codebook is in use"),
    (fqgan, FQGAN, ("one", 0, "mse"), 0.85, "two codebooks of 64 beat one of 128"),
    (fqgan, FQGAN, ("apart", 0, "cos2"), 0.15, "disentanglement halves cos^2 at no cost"),
    (fqgan, FQGAN, ("taught", 0, "probe_sem"), 33.0, "meaning goes into the semantic codes"),
    (binary_latent_diffusion, BINARY, ("mse", "codes"), [1.0, 0.8], "16 bits beat 1024 codes"),
    (binary_latent_diffusion, BINARY, ("distance", "bits-16", "4"), [{"E": 1.2}], "4 steps are not"),
]


@pytest.mark.parametrize(("module", "found"), CASES, ids=lambda part: getattr(part, "__name__", ""))
def test_what_is_shown(module, found):
    assert all(module.judge(found).values())


@pytest.mark.parametrize(("module", "found", "place", "value", "claim"), BROKEN, ids=[case[4] for case in BROKEN])
def test_what_is_not(module, found, place, value, claim):
    changed = copy.deepcopy(found)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    assert not module.judge(changed)[claim]


def test_both_seeds_must_agree():
    changed = copy.deepcopy(TOKENBRIDGE)
    changed["cross_entropy"]["parallel"][1] = 2.01
    assert sum(tokenbridge.judge(changed).values()) == 3


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
    return folder


def quiet(text):
    assert text


@pytest.mark.slow
def test_tokenbridge_runs(labelled):
    found = tokenbridge.measure(labelled, labelled, vae_steps=3, head_steps=2, seeds=(0,), tell=quiet)
    assert set(found["psnr"]) == set(PSNR)
    assert found["psnr"]["8"] == pytest.approx(found["psnr"]["continuous"], abs=0.05)
    assert 0 <= found["r2"] <= 1
    assert set(tokenbridge.judge(found).values()) <= {True, False}


@pytest.mark.slow
def test_fqgan_runs(labelled):
    found = fqgan.measure(labelled, labelled, steps=2, teacher_steps=2, seeds=(0,), tell=quiet)
    assert found["taught"][0]["probe_sem"] >= 0
    assert len(found["dual"][0]["used"]) == 2
    assert len(fqgan.judge(found)) == 5


@pytest.mark.slow
def test_binary_latent_diffusion_runs(labelled):
    found = binary_latent_diffusion.measure(
        labelled, labelled, steps=2, diffusion_steps=2, teacher_steps=2, seeds=(0,), samples=12, tell=quiet
    )
    assert set(found["distance"]["codes"]) == {"64", "16", "4"}
    assert len(binary_latent_diffusion.judge(found)) == 4
    fewer = binary_latent_diffusion.measure(
        labelled, labelled, steps=1, diffusion_steps=0, teacher_steps=1, seeds=(0,), tell=quiet
    )
    assert len(binary_latent_diffusion.judge(fewer)) == 1
