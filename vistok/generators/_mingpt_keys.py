"""Keys of minGPT as taming-transformers saves it: shared by the generators that stand on it."""

import torch
from torch import Tensor

from vistok.keys import Drop, Fuse, Rename, Rule, State


def mingpt_rules(theirs: str, ours: str, positions: int) -> list[Rule]:
    """Rules from taming's names below the prefix `theirs` to those of a `MinGPT` below `ours`."""
    a, b = f"{theirs}blocks.#", f"{ours}blocks.#"
    visible = torch.ones(positions, positions).tril()[None, None]

    def masks(state: State) -> dict[str, Tensor]:
        stem = f"{ours}blocks."
        depth = len({key.removeprefix(stem).split(".")[0] for key in state if key.startswith(stem)})
        return {f"{theirs}blocks.{index}.attn.mask": visible for index in range(depth)}

    return [
        Rename(f"{theirs}tok_emb.weight", f"{ours}table.weight"),
        Rename(f"{theirs}pos_emb", f"{ours}positions", lambda table: table[0], lambda table: table[None]),
        Drop(f"{a}.attn.mask", restore=masks),
        Rename(f"{a}.ln#.*", f"{b}.norm#.*"),
        *(
            Fuse(tuple(f"{a}.attn.{part}.{kind}" for part in ("query", "key", "value")), f"{b}.attention.qkv.{kind}")
            for kind in ("weight", "bias")
        ),
        Rename(f"{a}.attn.proj.*", f"{b}.attention.out.*"),
        Rename(f"{a}.mlp.0.*", f"{b}.mlp.expand.*"),
        Rename(f"{a}.mlp.2.*", f"{b}.mlp.contract.*"),
        Rename(f"{theirs}ln_f.*", f"{ours}norm.*"),
        Rename(f"{theirs}head.weight", f"{ours}head.weight"),
    ]
