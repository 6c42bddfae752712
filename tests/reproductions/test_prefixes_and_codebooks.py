"""Reproductions of VQGAN, TiTok and One-D-Piece: their rules, and that every arm runs to the end."""

import copy
import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from vistok.evaluation.reproducing import find_data, reproduce
from vistok.evaluation.reproduction import find, judged

GOOD = {
    "vqgan": {"low-dim": {"mse": 0.01, "usage": 0.5}, "plain": {"mse": 0.01, "usage": 0.2}},
    "titok": {"sequence": {"mse": 0.9}, "grid": {"mse": 1.0}, "short": {"mse": 1.5}},
    "one-d-piece": {
        "tail drop": {"smallest rise": 0.2, "psnr@2": 15.0, "psnr@4": 17.0, "psnr@8": 18.0, "psnr@16": 19.0},
        "whole": {"psnr@2": 13.0, "psnr@4": 15.0, "psnr@8": 17.0, "psnr@16": 19.5},
    },
}
BROKEN = [
    ("vqgan", "low-dim", "usage", 0.39),
    ("vqgan", "low-dim", "mse", 0.0106),
    ("titok", "sequence", "mse", 0.96),
    ("titok", "short", "mse", 1.0),
    ("one-d-piece", "tail drop", "smallest rise", 0.05),
    ("one-d-piece", "tail drop", "psnr@2", 14.4),
    ("one-d-piece", "tail drop", "psnr@4", 16.4),
    ("one-d-piece", "tail drop", "psnr@8", 17.4),
    ("one-d-piece", "tail drop", "psnr@16", 18.4),
]


def numbers_of(slug):
    found = find(slug)
    return found, {
        arm: {seed: dict(numbers) for seed in range(found.arms[arm].seeds or 2)} for arm, numbers in GOOD[slug].items()
    }


@pytest.mark.parametrize("slug", GOOD)
def test_what_is_shown(slug):
    found, numbers = numbers_of(slug)
    assert judged(found, numbers)["verdict"] == "shown"


@pytest.mark.parametrize(("slug", "arm", "metric", "value"), BROKEN)
def test_what_is_not(slug, arm, metric, value):
    found, numbers = numbers_of(slug)
    changed = copy.deepcopy(numbers)
    changed[arm][max(changed[arm])][metric] = value  # in one seed alone
    result = judged(found, changed)
    assert result["verdict"] == "not shown"
    assert sum(not clause["holds"] for clause in result["rule"]) == 1


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("labelled")
    random = np.random.RandomState(0)
    for half in ("train", "test"):
        for label in range(10):
            (root / half / f"class{label}").mkdir(parents=True)
            for index in range(3):
                small = random.randint(0, 256, (4, 4, 3), dtype=np.uint8)
                picture = Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC)
                picture.save(root / half / f"class{label}" / f"{index}.png")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("slug", GOOD)
def test_every_arm_runs(slug, labelled, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    module = importlib.import_module(f"vistok.reproductions.{slug.replace('-', '_')}")
    for name in ("TESTED", "PROBED", "CHANGED"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, 20)
    found = find(slug)
    arms = {name: replace(arm, steps=None) for name, arm in found.arms.items()}
    short = replace(found, arms=arms, steps=2, batch=4, train="train", test="test")
    result = reproduce(short, find_data(short, labelled), tmp_path / "run")
    torch.set_num_threads(threads)
    for arm in result["arms"].values():
        assert set(found.report) <= set(arm["numbers"])
        assert all(np.isfinite(number["mean"]) for number in arm["numbers"].values())


def test_sequence_and_grid_have_equal_parameters_and_the_grid_no_less_work():
    """Parameters within 2 % but for the queries; the grid, the baseline, has no fewer floating-point operations."""
    import vistok.reproductions.titok as module
    from vistok.registry import create

    sequence, grid = create("titok-sequence"), create("titok-grid")
    count = [sum(parameter.numel() for parameter in model.parameters()) for model in (sequence, grid)]
    assert count[1] == pytest.approx(count[0], rel=0.02)
    cost = []
    for model in (sequence, grid):
        with FlopCounterMode(display=False) as counter:
            model(torch.rand(1, 3, 32, 32))
        cost.append(counter.get_total_flops())
    arms = module.REPRODUCTION.arms
    assert 1.0 <= arms["grid"].steps * cost[1] / (module.REPRODUCTION.steps * cost[0]) < 1.3
