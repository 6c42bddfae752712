"""The reproduction of VAR: its rule, that the rival is a fair one, and that it runs to the end."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.golden import draw_weights
from tests.reproductions.test_bits_factors_dimensions import labelled as labelled
from vistok.evaluation.reproducing import reproduce
from vistok.evaluation.reproduction import find, judged
from vistok.generators.var import VAR
from vistok.registry import create
from vistok.reproductions import _generation, var
from vistok.reproductions.var import CONFIG, Raster, seconds

GOOD = {"scales": {"ms_alone": 10.0, "fd": 1.0}, "raster": {"ms_alone": 100.0, "fd": 1.0}}
BAD = [("scales", "ms_alone", 25.0), ("scales", "fd", 1.1)]


def verdict(second):
    return judged(find("var"), {arm: {0: values, 1: second[arm]} for arm, values in GOOD.items()})


def test_what_is_shown():
    assert verdict(GOOD)["verdict"] == "shown"


@pytest.mark.parametrize(("arm", "metric", "value"), BAD, ids=str)
def test_one_seed_is_enough_to_refute(arm, metric, value):
    changed = copy.deepcopy(GOOD)
    changed[arm][metric] = value
    found = verdict(changed)
    assert found["verdict"] == "not shown"
    assert sum(not condition["holds"] for condition in found["rule"]) == 1


@pytest.fixture
def raster():
    torch.manual_seed(0)
    model = Raster(CONFIG)
    draw_weights(model)
    tokenizer = create("vq-vae-small", codebook_size=512, code_dim=8)
    return model.eval().attach(tokenizer)


def test_the_rival_goes_token_by_token(raster):
    seen = []
    raster.trunk.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    tokens = raster.generate([3, 1], guidance=2.0, temperature=0.0)
    assert seen == [1] * 64
    assert tokens.segments[0].shape == (8, 8)
    with torch.no_grad():
        labels = torch.tensor([3, 1])
        with_class, without = raster.logits(tokens.codes, labels), raster.logits(tokens.codes, torch.tensor([10, 10]))
    guided = 2 * with_class - without
    chosen = guided.gather(-1, tokens.codes[..., None])[..., 0]
    assert (guided.amax(-1) - chosen).max() < 1e-4 * guided.abs().max()
    changed = tokens.codes.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 512
    with torch.no_grad():
        moved = (raster.logits(changed, labels) != with_class).any(-1).any(0)
    assert not moved[:41].any()
    assert moved[41:].all()


def test_both_have_the_same_size(raster):
    scales = VAR(CONFIG)
    counts = [sum(value.numel() for value in model.trunk.parameters()) for model in (scales, raster)]
    assert counts[0] == counts[1]
    assert find("var").steps_of("raster") * 64 == pytest.approx(find("var").steps_of("scales") * 85, rel=0.01)


def test_the_tokenizers_have_the_same_networks():
    ours = create("vq-vae-small-scales", codebook_size=512, code_dim=8, restart=1.0)
    plain = create("vq-vae-small", codebook_size=512, code_dim=8)
    shapes = [
        [tuple(value.shape) for part in (model.encoder, model.decoder) for value in part.parameters()]
        for model in (ours, plain)
    ]
    assert shapes[0] == shapes[1]
    assert ours.quantizer.scales == tuple((side, side) for side in CONFIG.scales)
    assert ours.quantizer.restart_below == 1.0
    assert seconds(VAR(CONFIG).attach(ours), 2, 2) > 0


@pytest.mark.slow
def test_it_runs_to_the_end(labelled, monkeypatch, tmp_path):
    monkeypatch.setitem(_generation.trained_judge.__kwdefaults__, "batch", 16)
    sizes = {"TOKENIZER_STEPS": 2, "JUDGE_STEPS": 2, "TRIED": 20, "SAMPLES": 20, "REAL": 40, "TIMED": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(var, name, value)
    found = find("var")
    arms = {name: replace(arm, steps=2) for name, arm in found.arms.items()}
    result = reproduce(replace(found, arms=arms, steps=2, batch=16), labelled, tmp_path / "run")
    assert result["verdict"] in ("shown", "not shown")
    assert set(result["report"]) <= set(result["arms"]["raster"]["numbers"])
