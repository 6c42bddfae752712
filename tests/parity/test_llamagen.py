"""LlamaGen against its authors' numbers: training logits, masks, loss and gradient, and decodes with a cache."""

import re
from dataclasses import replace
from typing import Any

import torch

from tests.parity.cases import Case, assert_all_close, assert_close, parametrize
from vistok.generators.llamagen import LlamaGen, configure, key_table, recognise
from vistok.hub import fill
from vistok.nn.t5_text import T5Features
from vistok.sampling.tokens import Sampling, probabilities

OPTIONS = {  # where a case has no README that says them
    "greedy_cfg": {"guidance": 2.5, "temperature": 0},
    "greedy_nocfg": {"guidance": 1.0, "temperature": 0},
    "greedy_interval": {"guidance": 3.0, "temperature": 0, "cfg_interval": 3},
    "topk_topp": {"guidance": 2.0, "temperature": 0.9, "top_k": 12, "top_p": 0.8},
}
NAMES = {"cfg_scale": ("guidance", float), "cfg_interval": ("cfg_interval", int), "temperature": ("temperature", float)}
NAMES |= {"top_k": ("top_k", int), "top_p": ("top_p", float)}


def options_of(case: Case, mode: str) -> dict[str, Any]:
    """The settings of a decode, from the sentence on it in the case's README: `mode: cfg_scale 2.5, argmax; ..`."""
    readme = case.path / "README.md"
    told = re.search(rf"\b{mode}: ([^;(\n]*)", readme.read_text()) if readme.exists() else None
    if told is None:
        return OPTIONS[mode]
    found = re.findall(r"(\w+) (-?\d+(?:\.\d+)?)", told.group(1))
    options = {NAMES[name][0]: NAMES[name][1](value) for name, value in found}
    return options if "sampled" in told.group(1) else options | {"temperature": 0}


def build(case: Case) -> LlamaGen:
    config = configure(case.config["official_model_args"])
    seen = recognise(case.weights)
    assert seen is not None
    same = {"width": config.trunk.width, "depth": config.trunk.depth, "swiglu": config.trunk.swiglu}
    assert {name: getattr(seen.trunk, name) for name in same} == same
    assert seen.text == config.text
    assert seen.segments[0].codebooks == config.segments[0].codebooks
    model = LlamaGen(config)
    table = key_table(config)
    fill(model, table.to_ours(case.weights), case.name)
    back = table.to_theirs(model.state_dict())
    theirs = {key: value for key, value in case.weights.items() if key != "freqs_cis"}
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], value) for key, value in theirs.items())
    return model.eval()


def condition_of(case: Case, model: LlamaGen):
    given = case.io["condition"]
    return given if model.config.text is None else T5Features(given, case.io["condition_mask"].bool())


def dropped(case: Case, model: LlamaGen):
    drop = case.io["train_drop"].bool()
    condition = condition_of(case, model)
    if isinstance(condition, T5Features):
        return model.without_text(condition, drop)
    return torch.where(drop, model.null, condition) if bool(drop.any()) else condition


@parametrize("llamagen", kinds=("gpt",))
def test_training(case: Case) -> None:
    io, model = case.io, build(case)
    condition = dropped(case, model)
    logits = model.logits(io["codes"], condition)
    assert_close(logits, io["train_logits"], name="train_logits")
    if "train_attention_mask" in io:
        mask = model.visible(condition, io["train_attention_mask"].shape[1])
        assert mask is not None
        assert torch.equal(mask[:, 0], io["train_attention_mask"].bool())
    batch = {"codes": io["codes"], "label": io["condition"]}
    if isinstance(condition, T5Features):
        batch = {"codes": io["codes"], "text": condition, "valid": torch.ones(len(io["codes"]))}
    elif bool(io["train_drop"].any()):  # the null class is none of the data's: dropped here by the model itself
        model._batch_condition = lambda batch, items: condition  # type: ignore[method-assign]
    loss = model.loss(batch, 0, torch.Generator())["cross_entropy"]
    assert_close(loss, io["train_loss"], name="train_loss")
    if "train_grad_wqkv0" in io:
        weight = model.trunk[0].attention.qkv.weight
        assert_close(torch.autograd.grad(loss, weight)[0], io["train_grad_wqkv0"], name="train_grad_wqkv0")


@parametrize("llamagen", kinds=("gpt",))
def test_all_positions(case: Case) -> None:
    if "eval_full_logits" in case.io:
        model = build(case)
        with torch.no_grad():
            logits = model.output(model.features(case.io["codes"], condition_of(case, model)))
        assert_close(logits, case.io["eval_full_logits"], name="eval_full_logits")


@parametrize("llamagen", kinds=("gpt",))
def test_decodes(case: Case) -> None:
    io, model = case.io, build(case)
    condition = condition_of(case, model)
    modes = sorted(key.removesuffix("_step_logits") for key in io if key.endswith("_step_logits"))
    assert len(modes) >= 1
    for mode in modes:
        options, steps = options_of(case, mode), []
        handle = model.output.register_forward_hook(lambda module, args, output, steps=steps: steps.append(output))
        if options["temperature"] == 0:
            found = model.generate(condition, **options)
            assert torch.equal(found.codes, io[f"{mode}_codes"]), mode
        else:  # their random stream is not ours: their codes are fed back, one more each time
            whole = model.generate(condition)
            steps.clear()
            for length in range(model.spec.length):
                codes = io[f"{mode}_codes"].clone()
                model.generate(condition, known=replace(whole, codes=codes[:, :length]), **options)
                del steps[length + 1 :]
        handle.remove()
        logits = torch.stack(steps, 1)
        assert_close(logits, io[f"{mode}_step_logits"], name=f"{mode}_step_logits")
        if f"{mode}_step_probabilities" in io:
            sampling = Sampling(**{key: value for key, value in options.items() if key != "cfg_interval"})
            actual = {f"{mode}_step_probabilities": probabilities(io[f"{mode}_step_logits"], sampling)}
            assert_all_close(actual, io)
