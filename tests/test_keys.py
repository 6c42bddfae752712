"""Key tables: patterns both ways, and what they refuse."""

import pytest
import torch

from vistok.errors import MismatchError
from vistok.keys import Drop, Fuse, KeyTable, Rename, Split

TABLE = KeyTable(
    Fuse(("#.q.*", "#.k.*", "#.v.*"), "blocks.#.qkv.*"),
    Split("#.in_proj", ("blocks.#.gate", "blocks.#.value"), sizes=(1, 3)),
    Rename("head.weight", "head.weight", into=lambda w: w[:, :, 0, 0], back=lambda w: w[:, :, None, None]),
    Rename("embed.*", "tokens.*"),
    Drop("loss.*"),
    Drop("mask", restore=lambda ours: {"mask": torch.ones(len(ours["tokens.weight"]))}),
)


def authors():
    torch.manual_seed(0)
    state = {f"{layer}.{part}.weight": torch.randn(2, 4) for layer in (0, 11) for part in "qkv"}
    state |= {"0.in_proj": torch.randn(4, 2), "head.weight": torch.randn(3, 4, 1, 1), "embed.weight": torch.randn(5, 2)}
    return state | {"mask": torch.ones(5)}


def test_there_and_back():
    state = authors()
    ours = TABLE.to_ours({**state, "loss.vgg.0.weight": torch.zeros(1)})
    assert ours["blocks.11.qkv.weight"].shape == (6, 4)
    assert torch.equal(ours["blocks.11.qkv.weight"][2:4], state["11.k.weight"])
    assert ours["blocks.0.value"].shape == (3, 2)
    assert ours["head.weight"].shape == (3, 4)
    back = TABLE.to_theirs(ours)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_renaming_shares_memory():
    state = authors()
    assert TABLE.to_ours(state)["tokens.weight"].data_ptr() == state["embed.weight"].data_ptr()


def test_keys_without_a_rule_and_missing_parts_are_named():
    with pytest.raises(MismatchError, match=r"do not belong here: x\.q\.weight"):
        TABLE.to_ours({**authors(), "x.q.weight": torch.zeros(1)})
    state = authors()
    del state["0.k.weight"]
    with pytest.raises(MismatchError, match=r"lacks 0\.k\.weight"):
        TABLE.to_ours(state)
    assert TABLE.left_over(["embed.weight", "other"]) == ["other"]


def test_uneven_cut_is_refused():
    table = KeyTable(Split("a", ("b", "c")))
    with pytest.raises(MismatchError, match="cannot be cut"):
        table.to_ours({"a": torch.zeros(3, 2)})


def test_a_constant_is_ours_alone():
    from vistok.keys import Constant

    table = KeyTable(Rename("a.*", "b.*"), Constant("scale", lambda: torch.tensor([2.0])))
    ours = table.to_ours({"a.w": torch.ones(3)})
    assert ours["scale"].tolist() == [2.0]
    assert table.to_theirs(ours).keys() == {"a.w"}
    assert table.left_over(["a.w", "scale"]) == ["scale"]
