"""ToMe against its authors' numbers: matching, merging, schedules, and a ViT with merging in every block."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from tests.parity.cases import Case, assert_close, parametrize
from vistok.reducer import by_layer
from vistok.reducers.tome import (
    Merged,
    ToMe,
    configure,
    key_table,
    match,
    match_kth,
    merge,
    merge_weighted,
    recognise,
    unmerge,
)
from vistok.sites import Run, site_of

PROTECTED = {"plain": 0, "cls": 1, "cls_distill": 2}


def source_matrix(state: Merged) -> torch.Tensor:
    """(B, M, N): 1 where a token of the input is in an output."""
    return F.one_hot(state.slot, state.count).mT.float()


@parametrize("tome", kinds=("matching",))
def test_matching(case: Case) -> None:
    io, r = case.io, case.config["r"]
    tags = [tag for tag in PROTECTED if f"{tag}_wavg" in io]
    assert tags
    for tag in tags:
        state = match(io["metric"], r, protected=PROTECTED[tag])
        assert_close(merge(io["x"], state, "sum"), io[f"{tag}_merge_sum"], name=f"{tag} sum")
        assert_close(merge(io["x"], state, "mean"), io[f"{tag}_merge_mean"], name=f"{tag} mean")
        merged, sizes = merge_weighted(io["x"], state, io["size"][..., 0])
        assert_close(merged, io[f"{tag}_wavg"], name=f"{tag} weighted")
        assert_close(sizes[..., None], io[f"{tag}_new_size"], name=f"{tag} sizes")
        unit, units = merge_weighted(io["x"], state)
        assert_close(unit, io[f"{tag}_wavg_unit"], name=f"{tag} of size 1")
        assert_close(units[..., None], io[f"{tag}_new_size_unit"], name=f"{tag} sizes of 1")
        assert torch.equal(source_matrix(state), io[f"{tag}_source"]), tag
        if f"{tag}_unmerged" in io:
            assert_close(unmerge(merged, state), io[f"{tag}_unmerged"], name=f"{tag} unmerged")


@parametrize("tome", kinds=("matching",))
def test_kth(case: Case) -> None:
    io, k = case.io, case.config["kth"]
    whole = case.config["tokens"] // k * k
    state = match_kth(io["metric"][:, :whole], k)
    merged = merge(io["x"][:, :whole], state, "mean")
    assert_close(merged, io["kth_merge_mean"], name="kth")
    assert_close(unmerge(merged, state), io["kth_unmerged"], name="kth unmerged")
    assert torch.equal(match_kth(io["metric"], k).slot, state.slot)  # the rest is left out


@parametrize("tome", kinds=("matching",))
def test_schedules(case: Case) -> None:
    schedules = dict(case.config["schedules"])
    layers = schedules.pop("layers")
    for name, value in schedules.items():
        r, inflect = value if isinstance(value, list) and name != "list" else (value, 0.0)
        expected = case.io[f"schedule_{name}"]
        assert_close(torch.tensor(by_layer(r, layers, inflect)), expected, name=name)


def build(case: Case, **changes: object) -> ToMe:
    config = replace(configure(case.config), **changes)  # type: ignore[arg-type]
    model = ToMe(config)
    model.load_state_dict(key_table(config).to_ours(case.weights))
    return model.eval()


@parametrize("tome", kinds=("vit",))
@torch.no_grad()
def test_vit(case: Case) -> None:
    model, io = build(case), case.io
    net = model.network
    assert net is not None
    run = Run(model, len(net.blocks), protected=net.config.prefix)
    x = net.embed(net.normed(io["image"]))
    length = x.shape[1]
    for layer, block in enumerate(net.blocks):
        x = run.block(site_of(block), x)
        assert_close(x, io[f"block_{layer}"], name=f"block {layer}")
    assert_close(torch.tensor(run.counts), io["token_counts"], name="counts")
    assert run.counts == list(model.plan(length, len(net.blocks), protected=net.config.prefix))
    assert run.sizes is not None
    assert_close(run.sizes[..., None], io["final_size"], name="sizes")
    assert torch.equal(F.one_hot(run.source, run.counts[-1]).mT.float(), io["final_source"])
    logits, _ = model.run(io["image"])
    assert_close(logits, io["logits"], name="logits")
    if "logits_r0" in io:
        still = build(case, r=0, inflect=0.0)
        assert_close(still(io["image"]), io["logits_r0"], name="r = 0")
        assert_close(still.network(io["image"]), io["logits_r0"], name="the network alone")
    if "logits_no_prop_attn" in io:
        assert_close(build(case, proportional=False)(io["image"]), io["logits_no_prop_attn"], name="without log sizes")


@parametrize("tome", kinds=("vit",))
def test_checkpoint_there_and_back(case: Case) -> None:
    model = build(case)
    back = key_table(model.config).to_theirs(model.state_dict())
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[key], case.weights[key]) for key in back)
    seen = recognise(case.weights)
    assert seen is not None
    assert seen.network is not None
    told = model.config.network
    free = {"heads": told.heads, "image": told.image, "eps": told.eps, "mean": told.mean, "std": told.std}
    assert replace(seen.network, **free) == told
