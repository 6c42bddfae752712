"""The authors' names inside VAR's transformer, and ours; their files may hold the tokenizer beside it.

Their module keeps three things that ours makes: a bias of the keys that is always zero, the scale of every position
(`lvl_1L`), and the mask as numbers (`attn_bias_for_masking`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vistok.keys import Drop, KeyTable, Rename, Rule, State
from vistok.nn.scale_transformer import coarser_or_same, level_of
from vistok.tokenizers.var import phi_rules

OURS_ALONE = "quantizer."  # the tokenizer's, which their files of the transformer do not hold


class VARKeys(KeyTable):
    """The table of one size. Of a tokenizer in the same state dict the quantizer is taken; without one it stays empty,
    and is left out on the way out.
    """

    def __init__(
        self,
        scales: Sequence[int],
        depth: int,
        width: int,
        codebook_size: int,
        code_dim: int,
        phis: int,
        ratio: float,
    ) -> None:
        self.lengths = [side * side for side in scales]
        self.depth, self.width = depth, width
        self.convs = (len(scales) if phis == 0 else phis) if ratio else 0
        self.codebook = (codebook_size, code_dim)
        super().__init__(*self._rules(phis))

    def to_ours(self, state: State) -> dict[str, Tensor]:
        """As `KeyTable.to_ours`."""
        return self._empty() | super().to_ours(state)

    def to_theirs(self, state: State) -> dict[str, Tensor]:
        """As `KeyTable.to_theirs`."""
        return super().to_theirs({name: value for name, value in state.items() if not name.startswith(OURS_ALONE)})

    def _empty(self) -> dict[str, Tensor]:
        dim = self.codebook[1]
        found = {f"{OURS_ALONE}codebook": torch.zeros(self.codebook)}
        for index in range(self.convs):
            found[f"{OURS_ALONE}convs.{index}.weight"] = torch.zeros(dim, dim, 3, 3)
            found[f"{OURS_ALONE}convs.{index}.bias"] = torch.zeros(dim)
        return found

    def _made(self, ours: State) -> dict[str, Tensor]:
        level = level_of(self.lengths)
        hidden = ~coarser_or_same(level)
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
        bias = {f"blocks.{block}.attn.zero_k_bias": torch.zeros(self.width) for block in range(self.depth)}
        return {"lvl_1L": level[None], "attn_bias_for_masking": mask[None, None], **bias}

    def _rules(self, phis: int) -> list[Rule]:
        block = [
            Rename("blocks.#.attn.mat_qkv.weight", "trunk.blocks.#.attention.qkv.weight"),
            Rename("blocks.#.attn.q_bias", "trunk.blocks.#.attention.qkv.q_bias"),
            Rename("blocks.#.attn.v_bias", "trunk.blocks.#.attention.qkv.v_bias"),
            Rename(
                "blocks.#.attn.scale_mul_1H11", "trunk.blocks.#.attention.q_norm.log_length", into=_first, back=_one
            ),
            Rename("blocks.#.attn.proj.*", "trunk.blocks.#.attention.out.*"),
            Rename("blocks.#.ffn.fc1.*", "trunk.blocks.#.mlp.expand.*"),
            Rename("blocks.#.ffn.fc2.*", "trunk.blocks.#.mlp.contract.*"),
            Rename("blocks.#.ada_lin.1.*", "trunk.blocks.#.modulation.project.*"),
            Rename("blocks.#.ada_gss", "trunk.blocks.#.offsets", into=lambda t: t[0, 0], back=lambda t: t[None, None]),
        ]
        tokenizer = ("encoder.*", "decoder.*", "quant_conv.*", "post_quant_conv.*", "quantize.ema_vocab_hit_SV")
        return [
            Rename("class_emb.weight", "class_table.weight"),
            Rename("pos_start", "start", into=_first, back=_one),
            Rename("pos_1LC", "positions", into=_first, back=_one),
            Rename("lvl_embed.weight", "levels.weight"),
            Rename("word_embed.*", "words.*"),
            *block,
            Rename("shared_ada_lin.1.*", "trunk.modulation.project.*"),
            Rename("head_nm.ada_lin.1.*", "head_modulation.project.*"),
            Rename("head.*", "head.*"),
            Drop("lvl_1L", restore=self._made),
            Drop("attn_bias_for_masking"),
            Drop("blocks.#.attn.zero_k_bias"),
            *phi_rules(phis),
            *(Drop(name) for name in tokenizer),
        ]


def _first(tensor: Tensor) -> Tensor:
    return tensor[0]


def _one(tensor: Tensor) -> Tensor:
    return tensor[None]
