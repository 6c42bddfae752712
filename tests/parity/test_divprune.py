"""DivPrune against its authors' numbers: distances, the order of selection, and the splice into LLaVA's prompt."""

import torch

from tests.parity.cases import Case, assert_close, parametrize
from vistok.prompts import Prompt, prune
from vistok.reducers.divprune import DivPrune, DivPruneConfig, distances, select


@parametrize("divprune", kinds=("select",))
def test_selection(case: Case) -> None:
    tokens = case.io["tokens"][None]
    assert_close(distances(tokens)[0], case.io["distance"], name="distance")
    for ratio in case.config["ratios"]:
        expected = case.io[f"selected_{ratio}"]
        reducer = DivPrune(DivPruneConfig(ratio=ratio, repeats=True))
        count = reducer.count(tokens.shape[1])
        assert count == len(expected)
        assert_close(select(tokens, count, repeats=True)[0], expected, name=f"{ratio}")
        kept, state = reducer.reduce(tokens)
        unique = expected.unique()
        assert torch.equal(state.index[0], unique)
        assert torch.equal(kept[0], tokens[0, unique])
        if len(unique) == count:  # no token twice: then nothing depends on `repeats`
            assert_close(select(tokens, count)[0], expected, name=f"{ratio}, each once")


@parametrize("divprune", kinds=("splice",))
def test_splice(case: Case) -> None:
    config, io, weights = case.config, case.io, case.weights
    features = io["vision_features"]
    for layer in (0, 2):
        name = f"model.mm_projector.{layer}"
        features = torch.nn.functional.linear(features, weights[f"{name}.weight"], weights[f"{name}.bias"])
        if layer == 0:
            features = torch.nn.functional.gelu(features)
    ids = io["input_ids"]
    image = ids == config["image_token_index"]
    if config.get("anyres"):
        length = io["embeds_full"].shape[1] - ids.shape[1] + int(image.sum())
        start = int(image[0].nonzero()[0])
        features = io["embeds_full"][:, start : start + length]
    # the placeholder of the authors' prompt stands for all tokens of the picture; ours has one for each
    counts = torch.where(image, features.shape[1], 1)[0]
    expanded = ids[0].repeat_interleave(counts)[None]
    marks = expanded == config["image_token_index"]
    embeds = torch.nn.functional.embedding(expanded.masked_fill(marks, 0), weights["model.embed_tokens.weight"])
    embeds = embeds.masked_scatter(marks[..., None], features)
    assert_close(embeds, io["embeds_full"], name="embeds_full")
    reducer = DivPrune(DivPruneConfig(ratio=config["keep_ratio"], repeats=True))
    prompt, states = prune(reducer, Prompt(embeds, torch.ones_like(expanded), marks, [features.shape[1]]))
    assert_close(prompt.embeds, io["embeds_pruned"], name="embeds_pruned")
    assert_close(prompt.mask.long(), io["attention_mask_pruned"], name="attention_mask_pruned")
    assert_close(prompt.positions[0], io["kept_positions"], name="kept_positions")
    assert_close(states[0].order[0], io["selected_order"], name="selected_order")
