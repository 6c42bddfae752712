"""ToMe: laws that merging obeys, partitions, plans, training through the averages."""

import pytest
import torch
import torch.nn.functional as F

import vistok
from vistok.errors import ConfigError, InputError
from vistok.reducer import Context, take
from vistok.reducers import _tome_matching, tome
from vistok.reducers.tome import ToMe, ToMeConfig, match, match_random, merge, merge_weighted, unmerge


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plainly(metric, r, protected):
    """The rule of the paper, one item and one token at a time: {source: destination}."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    found = {}
    for source in range(0, len(unit), 2):
        others = [other for other in range(1, len(unit), 2) if other >= protected]
        if source >= protected:
            scores = [float(unit[source] @ unit[other]) for other in others]
            found[source] = (max(scores), others[scores.index(max(scores))])
    best = sorted(found, key=lambda source: -found[source][0])[: min(r, (len(unit) - protected) // 2)]
    return {source: found[source][1] for source in best}


@pytest.mark.parametrize(("length", "r", "protected"), [(12, 3, 0), (13, 4, 1), (17, 50, 2), (18, 5, 5), (9, 0, 1)])
def test_matching_follows_the_rule(length, r, protected):
    metric = drawn(3, length, 6)
    state = match(metric, r, protected=protected)
    for item in range(3):
        expected = plainly(metric[item], r, protected)
        into = state.index[item][state.into[item]]
        assert dict(zip(state.source[item].tolist(), into.tolist(), strict=True)) == expected
        assert sorted([*state.index[item].tolist(), *state.source[item].tolist()]) == list(range(length))
        assert state.index[item][:protected].tolist() == list(range(protected))


def test_chunks_of_the_similarity_matrix_change_nothing(monkeypatch):
    metric = drawn(5, 40, 8)
    whole = match(metric, 9, protected=1)
    monkeypatch.setitem(_tome_matching.AT_ONCE, "cpu", 50)
    parts = match(metric, 9, protected=1)
    assert torch.equal(whole.index, parts.index)
    assert torch.equal(whole.into, parts.into)


@pytest.mark.parametrize("protected", [0, 1])
def test_averages_weigh_by_size_and_lose_nothing(protected):
    tokens, sizes = drawn(2, 15, 4), torch.randint(1, 5, (2, 15), generator=torch.Generator().manual_seed(1)).float()
    state = match(drawn(2, 15, 6, seed=2), 5, protected=protected)
    merged, new = merge_weighted(tokens, state, sizes)
    groups = F.one_hot(state.slot, state.count).mT.float()  # (B, M, N)
    torch.testing.assert_close(new, (groups @ sizes[..., None])[..., 0])
    torch.testing.assert_close(merged, groups @ (tokens * sizes[..., None]) / new[..., None])
    torch.testing.assert_close((merged * new[..., None]).sum(1), (tokens * sizes[..., None]).sum(1))
    torch.testing.assert_close(merge(tokens, state, "sum"), groups @ tokens)
    torch.testing.assert_close(merge(tokens, state, "mean"), groups @ tokens / groups.sum(-1, keepdim=True))
    highest = torch.where(groups[..., None] > 0, tokens[:, None], -torch.inf).amax(2)
    assert torch.equal(merge(tokens, state, "amax"), highest)
    back = unmerge(merged, state)
    assert torch.equal(back, take(merged, state.slot))
    assert torch.equal(merge(back, state, "amax"), merged)


def test_a_random_partition_has_random_sources_and_nearest_destinations():
    metric = drawn(4, 20, 6)
    state = match_random(metric, 7, protected=2, rng=torch.Generator().manual_seed(0))
    again = match_random(metric, 7, protected=2, rng=torch.Generator().manual_seed(0))
    other = match_random(metric, 7, protected=2, rng=torch.Generator().manual_seed(1))
    assert torch.equal(state.source, again.source)
    assert not torch.equal(state.source, other.source)
    assert int(state.source.min()) >= 2
    unit = F.normalize(metric, dim=-1)
    for item in range(4):
        rest = state.index[item][2:]
        nearest = rest[(unit[item][state.source[item]] @ unit[item][rest].T).argmax(-1)]
        assert torch.equal(state.index[item][state.into[item]], nearest)


def test_half_precision_and_gradients():
    tokens = drawn(2, 10, 4).requires_grad_()
    reducer = ToMe(ToMeConfig(r=3))
    merged, state = reducer.reduce(tokens)
    merged.square().sum().backward()
    expected = 2 * take(merged.detach(), state.slot) / take(state.sizes[..., None], state.slot)
    torch.testing.assert_close(tokens.grad, expected)
    half, _ = reducer.reduce(tokens.detach().bfloat16(), Context(metric=tokens.detach()))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), merged.detach(), atol=0.03, rtol=0.02)


def test_reduce_and_restore_by_partition():
    tokens = drawn(2, 14, 5)
    for partition, left in (("alternating", 10), ("random", 10), ("kth", 5)):
        reducer = ToMe(ToMeConfig(r=4, k=3, partition=partition))
        merged, state = reducer.reduce(tokens, Context(protected=1))
        assert merged.shape == (2, left, 5), partition
        assert reducer.plan(14, 1, protected=1) == (left,)
        assert torch.equal(merged[:, 0], tokens[:, 0])
        restored = reducer.restore(merged, state)
        assert restored.shape[1] == state.length
        assert float(state.sizes.sum(1).min()) == state.length


def test_plans():
    assert ToMe(ToMeConfig(r=13)).plan(197, 12, protected=1)[-1] == 197 - 12 * 13
    assert ToMe(ToMeConfig(r=100)).plan(20, 3, protected=1) == (11, 6, 4)  # at most half goes
    assert ToMe(ToMeConfig(r=(4, 2))).plan(20, 4) == (16, 14, 14, 14)
    falling = ToMe(ToMeConfig(r=4, inflect=-1.0)).plan(100, 5)
    assert falling == (92, 86, 82, 80, 80)


def test_a_network_of_its_own_trains_with_merging():
    torch.manual_seed(0)
    model = vistok.create("tome-tiny").train()
    pixels, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(12):
        loss = sum(model.loss({"pixels": pixels, "label": labels}, step, torch.Generator()).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    logits, run = model.eval().run(pixels)
    assert logits.shape == (8, 10)
    assert run.counts == list(model.plan(64, 4)) == [58, 52, 46, 40]
    assert run.restore(torch.zeros(8, 40, 3)).shape == (8, 64, 3)


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="at least 0"):
        ToMeConfig(r=-1)
    with pytest.raises(ConfigError, match="says every block's r itself"):
        ToMeConfig(r=(1, 2), inflect=1.0)
    with pytest.raises(InputError, match="reducer alone"):
        vistok.create("tome")(torch.rand(1, 3, 32, 32))
    with pytest.raises(InputError, match="this network takes"):
        vistok.create("tome-tiny")(torch.rand(1, 3, 40, 40))
    with pytest.raises(InputError, match="labels from 0 to 9"):
        vistok.create("tome-tiny").loss({"pixels": torch.rand(1, 3, 32, 32), "label": torch.tensor([10])}, 0, None)
    with pytest.raises(InputError, match="would keep 0 of 1"):
        ToMe(ToMeConfig(partition="kth", k=4)).plan(1)
    with pytest.raises(InputError, match="one length"):
        ToMe(ToMeConfig()).reduce(drawn(1, 4, 2), Context(keep=torch.tensor([[True, True, True, False]])))


def test_the_tiny_recipe_trains(tmp_path):
    import yaml
    from PIL import Image

    from vistok.data.sources import open_source
    from vistok.inventory import PACKAGE
    from vistok.training.recipe import check as checked
    from vistok.training.trainer import train

    rng = torch.Generator().manual_seed(0)
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(6):
            picture = torch.randint(0, 256, (32, 32, 3), generator=rng, dtype=torch.uint8).numpy()
            Image.fromarray(picture).save(tmp_path / "data" / label / f"{index}.png")
    recipe = yaml.safe_load((PACKAGE / "recipes" / "tome" / "tiny.yaml").read_text())
    recipe["train"] |= {"steps": 2, "batch_size": 4, "log_every": 1, "checkpoint_every": 2, "tensorboard": False}
    folder = train(checked(recipe, "tome/tiny"), open_source(tmp_path / "data"), tmp_path / "run")
    model = vistok.load(folder)
    assert isinstance(model, ToMe)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def screened(metric, r, protected):
    norms = metric.norm(dim=-1, keepdim=True).clamp_min(_tome_matching.EPS)
    return _tome_matching.screened(metric, norms, r, protected)


@pytest.mark.parametrize("protected", [1, 2])
@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_screening_in_bfloat16_chooses_as_float32_does(protected, shared, monkeypatch):
    rng = torch.Generator().manual_seed(3)
    metric = torch.randn(3, 301, 32, generator=rng) + shared * torch.randn(3, 1, 32, generator=rng)
    state = tome.match(metric, 12, protected=protected)
    for at_once in (_tome_matching.SCREENED, 4000):
        monkeypatch.setattr(_tome_matching, "SCREENED", at_once)
        chosen, into = screened(metric, 12, protected)
        assert torch.equal(2 * chosen, state.source)
        assert torch.equal(into + protected // 2 + 301 - 12 - 301 // 2, state.into)


def test_screening_steps_aside_where_it_decides_nothing():
    rng = torch.Generator().manual_seed(4)
    one = torch.randn(1, 1, 16, generator=rng)
    alike = one + 1e-3 * torch.randn(1, 80, 16, generator=rng)  # all within bfloat16's error of each other
    assert screened(alike, 4, 1) is None
    unlike = torch.cat([one, -one], 1).repeat(1, 40, 1)  # every source is opposite to every destination
    assert screened(unlike, 4, 1) is None
