"""LlamaGen's names of a GPT block, and ours: shared by the generators that stand on its `gpt.py`."""

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import Any

from torch import Tensor

from vistok.keys import Fuse, Rename, Rule
from vistok.nn.gpt import GPTSize


def block_rules(theirs: str, ours: str) -> list[Rule]:
    """Rules of the stack of blocks called `theirs` by the authors, `ours` here."""
    gate = (f"{theirs}.#.feed_forward.w1.weight", f"{theirs}.#.feed_forward.w3.weight")
    return [
        Rename(f"{theirs}.#.attention.wqkv.weight", f"{ours}.#.attention.qkv.weight"),
        Rename(f"{theirs}.#.attention.wo.weight", f"{ours}.#.attention.out.weight"),
        Fuse(gate, f"{ours}.#.mlp.expand.weight"),
        Rename(f"{theirs}.#.feed_forward.w2.weight", f"{ours}.#.mlp.contract.weight"),
        Rename(f"{theirs}.#.attention_norm.weight", f"{ours}.#.norm1.weight"),
        Rename(f"{theirs}.#.ffn_norm.weight", f"{ours}.#.norm2.weight"),
    ]


def count_blocks(state: Mapping[str, Tensor], stack: str) -> int:
    """How many blocks the stack of that name has in an authors' state dict."""
    return next(index for index in range(len(state) + 1) if f"{stack}.{index}.attention_norm.weight" not in state)


def size_of_args(plain: Mapping[str, Any]) -> GPTSize:
    """The trunk that the authors' `ModelArgs` describe. Raises KeyError where they describe none."""
    width, multiple = plain["dim"], plain.get("multiple_of", 256)
    hidden = int(2 * (4 * width) / 3)
    if plain.get("ffn_dim_multiplier") is not None:
        hidden = int(plain["ffn_dim_multiplier"] * hidden)
    size = GPTSize(
        width,
        plain["n_layer"],
        plain["n_head"],
        dropout=plain.get("resid_dropout_p", 0.1),
        eps=plain.get("norm_eps", 1e-5),
        kv_heads=plain.get("n_kv_head"),
    )
    return sized(size, ceil(hidden / multiple) * multiple)


def sized(size: GPTSize, hidden: int) -> GPTSize:
    """`size` with so many hidden values, left unsaid where they follow from the width."""
    return size if size.swiglu == hidden else replace(size, hidden=hidden)
