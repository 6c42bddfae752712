"""DivPrune: batches choose as single pictures do, lengths that differ, duplicates, what is refused."""

import pytest
import torch

import vistok
from vistok.errors import ConfigError, InputError
from vistok.reducer import Context
from vistok.reducers import divprune
from vistok.reducers.divprune import DivPrune, DivPruneConfig, distances, select


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plainly(tokens, count):
    """The rule, one picture and one token at a time, in double precision."""
    unit = tokens.double() / tokens.double().norm(dim=-1, keepdim=True)
    apart = 1 - unit @ unit.T
    others = apart + torch.diag(torch.full((len(apart),), torch.inf, dtype=torch.double))
    chosen = [int(others.amin(1).argmax())]
    while len(chosen) < count:
        score = apart[chosen].amin(0)
        score[chosen] = -1
        chosen.append(int(score.argmax()))
    return chosen


@pytest.mark.parametrize(("length", "dim", "count"), [(30, 8, 7), (11, 300, 11), (400, 16, 40), (1, 4, 1)])
def test_a_batch_chooses_as_single_pictures_do(length, dim, count):
    tokens = drawn(3, length, dim)
    assert select(tokens, count).tolist() == [plainly(one, count) for one in tokens]


def test_distances_are_those_of_all_pairs():
    tokens = drawn(2, 450, 20)  # several blocks of rows
    expected = 1 - torch.nn.functional.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)
    torch.testing.assert_close(distances(tokens), expected, atol=2e-6, rtol=0)


def test_few_pictures_at_a_time_change_nothing(monkeypatch):
    tokens = drawn(5, 20, 6)
    whole = select(tokens, 5)
    monkeypatch.setattr(divprune, "MATRICES", 1000)
    assert torch.equal(select(tokens, 5), whole)


def test_pictures_of_several_lengths_are_one_batch():
    lengths, tokens = [12, 7, 20], drawn(3, 20, 6)
    keep = torch.arange(20) < torch.tensor(lengths)[:, None]
    tokens[1, 7:] = torch.nan  # what is absent may hold anything
    reducer = DivPrune(DivPruneConfig(ratio=0.5))
    kept, state = reducer.reduce(tokens, Context(keep=keep))
    assert kept.shape == (3, 10, 6)
    assert state.keep.sum(1).tolist() == [6, 4, 10]
    for item, length in enumerate(lengths):
        expected = plainly(tokens[item, :length], reducer.count(length))
        assert state.order[item][: len(expected)].tolist() == expected
        assert state.index[item][state.keep[item]].tolist() == sorted(expected)
    dense = reducer.restore(kept.nan_to_num(0), state)
    for item in range(3):
        there = state.index[item][state.keep[item]]
        assert torch.equal(dense[item, there], tokens[item, there])
        assert int((dense[item] != 0).any(-1).sum()) == len(there)


def test_duplicates_are_chosen_once_or_as_the_authors_do():
    tokens = drawn(1, 4, 5)[:, [0, 1, 1, 2, 2, 2, 3]]
    each_once = DivPrune(DivPruneConfig(keep=6)).reduce(tokens)[1]
    assert each_once.index[0].unique().tolist() == each_once.index[0].tolist()
    assert each_once.count == 6
    published, state = DivPrune(DivPruneConfig(keep=6, repeats=True)).reduce(tokens)
    assert state.order.shape == (1, 6)
    assert published.shape[1] == state.count == len(state.order[0].unique())


def test_protected_tokens_stay():
    tokens = drawn(2, 21, 6)
    reducer = DivPrune(DivPruneConfig(ratio=0.25))
    kept, state = reducer.reduce(tokens, Context(protected=1))
    assert torch.equal(kept[:, 0], tokens[:, 0])
    assert state.index[:, 1:].tolist() == [sorted(one + 1 for one in plainly(item[1:], 5)) for item in tokens]
    assert reducer.plan(21, protected=1) == (6,)
    assert torch.equal(reducer.restore(kept, state).gather(1, state.index[..., None].expand_as(kept)), kept)


def test_the_published_share_keeps_56_of_576():
    assert vistok.create("divprune").plan(576) == (56,)
    assert DivPrune(DivPruneConfig(ratio=0.25)).count(10) == 2  # 2.5, to the even number


def test_half_precision_chooses_as_single_precision_of_the_same_numbers():
    tokens = drawn(2, 50, 32).bfloat16()
    assert torch.equal(select(tokens, 12), select(tokens.float(), 12))


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="above 0"):
        DivPruneConfig(ratio=0.0)
    with pytest.raises(ConfigError, match="at least 1"):
        DivPruneConfig(keep=0)
    reducer = DivPrune(DivPruneConfig())
    with pytest.raises(InputError, match="would keep 0 of 4"):
        reducer.reduce(drawn(1, 4, 3))
    with pytest.raises(InputError, match="would keep 9 of 4 tokens; there are no more than 4"):
        DivPrune(DivPruneConfig(keep=9)).reduce(drawn(1, 4, 3))
    tokens = drawn(2, 30, 3)
    tokens[1, 4] = 0
    with pytest.raises(InputError, match="token 4 of item 1 is 0 everywhere"):
        reducer.reduce(tokens)
    tokens[1, 4, 0] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite values, first in item 1 at 4"):
        reducer.reduce(tokens)
    with pytest.raises(InputError, match="expected float"):
        reducer.reduce(torch.zeros(1, 4, 3, dtype=torch.long))
    with pytest.raises(InputError, match=r"context\.keep"):
        reducer.reduce(drawn(2, 30, 3), Context(keep=torch.ones(2, 29, dtype=torch.bool)))
