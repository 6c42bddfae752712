"""The contract of reducers: what it hands to systems, what it refuses, the kinds that it can hold."""

from dataclasses import dataclass

import pytest
import torch

import vistok
from vistok.catalogue import list_models
from vistok.cli.info import collect
from vistok.errors import InputError
from vistok.reducer import Context, Reducer, Reduction, by_layer, scatter, take
from vistok.registry import System, find_system, register, systems


@dataclass(frozen=True)
class LeavingConfig:
    keep: int = 2
    version: int = 1


@dataclass(frozen=True, kw_only=True)
class Left(Reduction):
    canvas: torch.Tensor


class Leaving(Reducer):
    """Of kind route: tokens that leave are kept as they were, and stand in their places again at the end."""

    system, kind = "leaving-early", "route"

    def plan(self, tokens, layers=1, *, protected=0):
        return (self.config.keep,) * layers

    def reduced(self, tokens, context):
        index = tokens.norm(dim=-1).topk(self.config.keep, 1).indices.sort(1).values
        return take(tokens, index), Left(tokens.shape[1], index, canvas=tokens)

    def restore(self, tokens, state):
        return state.canvas.scatter(1, state.index[..., None].expand_as(tokens), tokens)


class Sparse(Reducer):
    """Of kind attention: every token sees itself alone."""

    system, kind = "sparse-attention", "attention"

    def attend(self, q, k, v, context=None):
        return v.clone()


def test_a_route_puts_those_back_that_left():
    tokens = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    reducer = Leaving(LeavingConfig())
    kept, state = reducer.reduce(tokens)
    back = reducer.restore(kept + 100, state)
    changed = (back != tokens).all(-1)
    assert changed.sum(1).tolist() == [2, 2]
    assert torch.equal(back[~changed], tokens[~changed])


def test_a_system_of_ones_own_goes_into_a_model_by_name():
    from vistok.nn.vit import ViT, ViTConfig

    register(System("leaving-early", Leaving, LeavingConfig, {"leaving-early": LeavingConfig(keep=4)}))
    model = ViT(ViTConfig(image=32, patch=8, width=16, depth=2, heads=2)).eval()
    with vistok.reduce(model, "leaving-early", at=(1,), keep=3) as applied, torch.no_grad():
        assert model(torch.rand(1, 3, 32, 32)).shape == (1, 3, 16)
        assert applied.plan(17) == (17, 3)
        assert applied.restore(torch.zeros(1, 3, 16)).shape == (1, 17, 16)


def test_verbs_that_a_kind_does_not_have_say_so():
    sparse = Sparse(LeavingConfig())
    v = torch.rand(1, 2, 3, 4)
    assert torch.equal(sparse.attend(v, v, v), v)
    with pytest.raises(TypeError, match="kind 'attention': it does not change the tokens"):
        sparse.reduce(torch.rand(1, 3, 4))
    with pytest.raises(TypeError, match="kind 'map': it leaves the attention"):
        vistok.create("tome").attend(v, v, v)


def test_reducers_are_listed_and_load_without_weights():
    assert {"tome", "divprune"} <= set(systems("reducer"))
    assert {"tome", "divprune", "tome-deit-small"} <= set(list_models())
    assert find_system("tome").model.role == "reducer"
    facts = collect("divprune")
    assert (facts["role"], facts["kind"], facts["places"]) == ("reducer", "map", ["prompt", "block"])
    assert isinstance(vistok.load("divprune"), Reducer)
    with pytest.raises(vistok.VistokError, match="tome-tiny"):
        vistok.load("tome-tiny")  # which has weights, and none are published


def test_a_reducer_is_saved_and_loaded(tmp_path):
    vistok.create("divprune", ratio=0.3).save(tmp_path / "reducer")
    again = vistok.load(tmp_path / "reducer")
    assert again.config.ratio == 0.3
    assert again.role == "reducer"


def test_take_and_scatter_are_each_others_inverse():
    rng = torch.Generator().manual_seed(0)
    tokens, index = torch.randn(3, 7, 4, generator=rng), torch.rand(3, 7, generator=rng).argsort(1)[:, :5]
    taken = take(tokens, index)
    assert torch.equal(taken, tokens.gather(1, index[..., None].expand(-1, -1, 4)))
    back = scatter(taken, index, 7)
    assert torch.equal(take(back, index), taken)
    assert int((back == 0).all(-1).sum()) == 6


def test_amounts_by_layer():
    assert by_layer(3, 4) == (3, 3, 3, 3)
    assert by_layer((3, 1), 4) == (3, 1, 0, 0)
    assert by_layer((3, 1, 2), 2) == (3, 1)
    assert by_layer(4, 5, 1.0) == (0, 2, 4, 6, 8)
    assert by_layer(4, 1, -1.0) == (8,)


def test_bad_input_is_refused():
    reducer = Leaving(LeavingConfig())
    tokens = torch.rand(2, 5, 3)
    for wrong in (tokens[0], tokens[:, :0], tokens.long()):
        with pytest.raises(InputError, match=r"expected float \(B, N, D\)"):
            reducer.reduce(wrong)
    with pytest.raises(InputError, match="6 protected tokens of 5"):
        reducer.reduce(tokens, Context(protected=6))
    with pytest.raises(InputError, match=r"context\.metric"):
        reducer.reduce(tokens, Context(metric=torch.rand(2, 4, 3)))
    with pytest.raises(InputError, match=r"context\.metric hold NaN"):
        reducer.reduce(tokens, Context(metric=torch.full((2, 5, 3), torch.inf)))
    tokens[1, 2] = torch.nan
    there = torch.ones(2, 5, dtype=torch.bool)
    there[1, 2] = False
    reducer.reduce(tokens, Context(keep=there))  # what is absent may hold anything
