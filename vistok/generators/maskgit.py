"""MaskGIT and MaskBit: all tokens are predicted at once, the surest are kept, and again, in 8 to 256 steps.

"MaskGIT: Masked Generative Image Transformer" (arXiv:2202.04200)
"MaskBit: Embedding-free Image Generation via Bit Tokens" (arXiv:2409.16211)

What is new in MaskBit: the generator reads the tokenizer's bits themselves, through one linear map, in place of a table
of vectors, and a code's K bits are cut into m groups that are masked and predicted each by itself.

    codes (B, N) --> groups (B, N, m), group i = bits i K/m .. (i+1) K/m of the code, lowest bit first; 2^(K/m) = masked
      bits       +-1 of every bit, 0 where masked, (B, N, K) -> linear           |  + positions, class LAST: (B, N+1, W)
      embedding  sum of m tables' rows                                           |
    -> norm -> post-norm transformer -> linear, GELU, norm -> logits (B, N, m, 2^(K/m))
      bits       a linear map                   embedding  the tables again, and a bias for every position

Generation is `vistok.sampling.masked`; training predicts groups that are masked at random.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.generator import Generator, Known, drop_labels, fixed_spec
from vistok.generators import _maskgit_keys
from vistok.keys import KeyTable
from vistok.layout import Segment
from vistok.losses.masked import masked_cross_entropy
from vistok.nn.transformer import PostNormBlock
from vistok.registry import System
from vistok.sampling.masked import Draws, MaskedSampling, SeededDraws, sample_masked
from vistok.sampling.masking import Schedule, bernoulli_masks, counted_masks
from vistok.sampling.tokens import Sampling
from vistok.tokens import Source

EPS = 1e-12  # of all layer norms, as in BERT
MASKBIT = MaskedSampling(
    guidance=8.1,
    steps=64,
    schedule="arccos",
    choice_temperature=7.8,
    guidance_curve="cosine",
    guidance_power=3.0,
)
MASKGIT = MaskedSampling(steps=8, schedule="cosine", choice_temperature=4.5)


@dataclass(frozen=True)
class MaskGITConfig:
    """Sizes of one model, and how it is trained and sampled.

    reads            "bits" (MaskBit) or "embedding" (MaskGIT, and MaskBit's baseline)
    bits, groups     K and m; there are 2^K codes, and m divides K
    grid, factor     rows and columns of positions, and pixels per position along a side
    prenorm          norms before the branches, and one more after the blocks; no published model has it
    classes          of the condition; one more row stands for none
    class_dropout    share of labels that training replaces by none
    masks            "bernoulli": every group by itself (MaskBit); "counted": exactly a share of them (MaskGIT)
    schedule         of the training masks
    unmasked         weight in the loss of what is not masked: 1 in MaskBit, 0 in MaskGIT
    smoothing        of the labels
    sampling         published settings of the sampler; its guidance is 1 + the authors' scale (`sampling/masked.py`)
    tokenizer        whose tokens these are, as far as it is known
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    hidden: int = 4096
    reads: Literal["bits", "embedding"] = "bits"
    bits: int = 14
    groups: int = 2
    grid: tuple[int, int] = (16, 16)
    factor: int = 16
    dropout: float = 0.1
    prenorm: bool = False
    classes: int = 1000
    class_dropout: float = 0.1
    masks: Literal["bernoulli", "counted"] = "bernoulli"
    schedule: Schedule = "arccos"
    unmasked: float = 1.0
    smoothing: float = 0.1
    sampling: MaskedSampling = MASKBIT
    tokenizer: Source | None = None
    version: int = 1

    def __post_init__(self) -> None:
        if self.reads not in ("bits", "embedding") or self.masks not in ("bernoulli", "counted"):
            raise ConfigError(f"reads={self.reads!r}, masks={self.masks!r}; see MaskGITConfig for what there is")
        if self.groups < 1 or self.bits < 1 or self.bits % self.groups:
            raise ConfigError(f"{self.groups} groups do not divide a code of {self.bits} bits")
        if self.bits // self.groups > 18:
            raise ConfigError(f"groups of {self.bits // self.groups} bits; expected at most 18: cut the code into more")

    @property
    def options(self) -> int:
        """2^(K/m), the values of a group."""
        return 2 ** (self.bits // self.groups)


class BitInput(nn.Module):
    """Groups (B, N, m) to (B, N, W): their bits as +-1, 0 where masked, through a linear map."""

    shifts: Tensor

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        self.mask_id = config.options
        self.register_buffer("shifts", torch.arange(config.bits // config.groups), persistent=False)
        self.project = nn.Linear(config.bits, config.width)

    def bits(self, groups: Tensor) -> Tensor:
        """(B, N, K): group by group, lowest bit first."""
        ones = ((groups[..., None] >> self.shifts) & 1) * 2 - 1
        return ones.masked_fill((groups == self.mask_id)[..., None], 0).flatten(2)

    def forward(self, groups: Tensor) -> Tensor:
        return self.project(self.bits(groups).to(self.project.weight.dtype))


class BitOutput(nn.Module):
    """Features (B, N, W) to logits (B, N, m, options)."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        self.groups = config.groups
        self.project = nn.Linear(config.width, config.groups * config.options)

    def forward(self, features: Tensor) -> Tensor:
        return self.project(features).unflatten(-1, (self.groups, -1))


class EmbeddingInput(nn.Module):
    """Groups (B, N, m) to (B, N, W): the sum of a row of each group's table; the last row stands for masked."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(config.options + 1, config.width) for _ in range(config.groups))

    def forward(self, groups: Tensor) -> Tensor:
        rows = [table(column) for table, column in zip(self.tables, groups.unbind(-1), strict=True)]
        return torch.stack(rows).sum(0)


class EmbeddingOutput(nn.Module):
    """Features (B, N, W) to logits (B, N, m, options): products with the input's tables, and a bias."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        length = config.grid[0] * config.grid[1]
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(length, config.options)) for _ in range(config.groups))

    def forward(self, features: Tensor, tables: nn.ModuleList) -> Tensor:
        logits = [
            features @ table.weight[:-1].T + bias  # type: ignore[index]
            for table, bias in zip(tables, self.biases, strict=True)
        ]
        return torch.stack(logits, 2)


class PreNormBlock(PostNormBlock):
    """The same block with its norms before the branches."""

    def forward(self, x: Tensor, *, only: slice | None = None) -> Tensor:
        kept = x if only is None else x[:, only]
        x = kept + self.attention(self.norm1(x), only=only)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class MaskGIT(Generator):
    """See the module's docstring. `generate(classes, steps=, choice_temperature=)` gives codes (B, N); what is `known`
    stays. `steps` and `choice_temperature` as in `vistok.sampling.masked.MaskedSampling`.
    """

    system = "maskgit"
    config: MaskGITConfig
    sampling: MaskedSampling

    def __init__(self, config: MaskGITConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        width, length = config.width, config.grid[0] * config.grid[1]
        self.class_table = nn.Embedding(config.classes + 1, width)
        self.read: BitInput | EmbeddingInput
        self.predict: BitOutput | EmbeddingOutput
        if config.reads == "bits":
            self.read, self.predict = BitInput(config), BitOutput(config)
        else:
            self.read, self.predict = EmbeddingInput(config), EmbeddingOutput(config)
        self.positions = nn.Parameter(torch.empty(1, length + 1, width))
        self.norm_in = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(config.dropout)
        block = PreNormBlock if config.prenorm else PostNormBlock
        self.blocks = nn.ModuleList(
            block(width, config.heads, hidden=config.hidden, eps=EPS, dropout=config.dropout)
            for _ in range(config.layers)
        )
        self.norm_after = nn.LayerNorm(width, eps=EPS) if config.prenorm else nn.Identity()
        self.mix = nn.Linear(width, width)
        self.norm_out = nn.LayerNorm(width, eps=EPS)
        self._initialise()
        self.classes, self.sampling = config.classes, config.sampling
        self.spec = fixed_spec((Segment("grid", config.grid, (2**config.bits,)),), config.grid[0] * config.factor)

    def _initialise(self) -> None:
        """Normal numbers of deviation 0.02 cut at 2, but queries, keys and values as PyTorch's attention has them."""
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            nn.init.xavier_uniform_(block.attention.qkv.weight)  # type: ignore[union-attr, arg-type]

    @property
    def null(self) -> int:
        """The class that stands for none."""
        return self.config.classes

    @property
    def mask_id(self) -> int:
        """What a masked group holds."""
        return self.config.options

    def split(self, codes: Tensor) -> Tensor:
        """Codes (B, N) to their groups (B, N, m), the lowest bits first."""
        width = self.config.bits // self.config.groups
        shifts = torch.arange(0, self.config.bits, width, device=codes.device)
        return (codes[..., None] >> shifts) & (self.config.options - 1)

    def join(self, groups: Tensor) -> Tensor:
        """The inverse of `split`."""
        width = self.config.bits // self.config.groups
        return (groups << torch.arange(0, self.config.bits, width, device=groups.device)).sum(-1)

    def logits(self, groups: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, N, m, options) of groups (B, N, m), `mask_id` where masked, for classes (B,), `null` for none."""
        x = torch.cat([self.read(groups), self.class_table(labels)[:, None]], 1) + self.positions
        x = self.dropout(self.norm_in(x))
        for block in self.blocks:
            x = block(x)
        x = self.norm_out(F.gelu(self.mix(self.norm_after(x[:, :-1]))))
        if isinstance(self.predict, EmbeddingOutput):
            assert isinstance(self.read, EmbeddingInput)
            return self.predict(x, self.read.tables)
        return self.predict(x)

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """{"code": cross-entropy of the groups}, in nats a group. Masks and dropped labels are drawn from `rng`.

        `batch` as in `Generator.loss`.
        """
        config = self.config
        groups = self.split(self.batch_tokens(batch))
        labels = self.batch_labels(batch, len(groups))
        if self.training:
            labels = drop_labels(labels, config.class_dropout, self.null, rng)
        draw = bernoulli_masks if config.masks == "bernoulli" else counted_masks
        masked = draw(groups.shape, config.schedule, rng).to(groups.device)
        logits = self.logits(groups.masked_fill(masked, self.mask_id), labels)
        return {"code": masked_cross_entropy(logits, groups, masked, config.unmasked, config.smoothing)}

    # -- sampling ------------------------------------------------------------------------------------------------

    def sample(  # type: ignore[override]
        self,
        conditions: Tensor | None,
        *,
        seeds: list[int],
        sampling: Sampling,
        known: Known | None,
        steps: int | None = None,
        choice_temperature: float | None = None,
    ) -> Tensor:
        """Codes (B, N)."""
        assert isinstance(sampling, MaskedSampling)
        given: dict[str, Any] = {"steps": steps, "choice_temperature": choice_temperature}
        sampling = replace(sampling, **{name: value for name, value in given.items() if value is not None})
        codes = None
        if known is not None:
            codes = self.split(known.data.clamp_min(0)).masked_fill(~known.present[..., None], self.mask_id)
        return self.join(self.sample_groups(conditions, len(seeds), sampling, SeededDraws(seeds, self.device), codes))

    def sample_groups(
        self,
        conditions: Tensor | None,
        items: int,
        sampling: MaskedSampling,
        draws: Draws,
        groups: Tensor | None = None,
    ) -> Tensor:
        """Groups (B, N, m), from `groups` that hold `mask_id` where they are wanted, or from nothing."""
        if groups is None:
            shape = (items, self.spec.length, self.config.groups)
            groups = torch.full(shape, self.mask_id, dtype=torch.long, device=self.device)
        nothing = torch.full((items,), self.null, device=self.device)
        if conditions is None:
            sampling = replace(sampling, guidance=1.0, guidance_start=1.0)
        labels = nothing if conditions is None else conditions
        both = torch.cat([labels, nothing])

        def network(groups: Tensor, guided: bool) -> Tensor:
            return self.logits(groups.repeat(2, 1, 1), both) if guided else self.logits(groups, labels)

        return sample_masked(network, groups, self.mask_id, sampling, draws)


# -- variants --------------------------------------------------------------------------------------------------------


def maskbit(bits: int, scale: float, choice: float, power: float) -> MaskGITConfig:
    """MaskBit of so many bits with its published settings: guidance scale, choice temperature, power of the curve."""
    sampling = replace(MASKBIT, guidance=1 + scale, choice_temperature=choice, guidance_power=power)
    return MaskGITConfig(bits=bits, sampling=sampling)


SMALL = MaskGITConfig(
    width=64,
    layers=2,
    heads=4,
    hidden=128,
    bits=8,
    grid=(8, 8),
    factor=4,
    dropout=0.0,
    classes=10,
    sampling=replace(MASKBIT, guidance=3.0, steps=8, choice_temperature=4.5),
)

VARIANTS = {
    "maskgit-cifar10": replace(
        SMALL,
        width=128,
        layers=6,
        heads=2,
        hidden=512,
        reads="embedding",
        bits=9,
        groups=1,
        prenorm=True,
        masks="counted",
        schedule="cosine",
        unmasked=0.0,
        sampling=replace(MASKGIT, steps=12, guidance=2.0),
    ),
    "maskbit-10bit": maskbit(10, 6.4, 10.5, 2.5),
    "maskbit-12bit": maskbit(12, 7.1, 8.2, 3.0),
    "maskbit-14bit": maskbit(14, 7.1, 7.8, 3.0),
    "maskbit-16bit": maskbit(16, 6.5, 7.5, 2.5),
    "maskbit-18bit": maskbit(18, 5.7, 8.5, 2.5),
    "maskgit": MaskGITConfig(
        width=768,
        layers=24,
        heads=8,
        hidden=3072,
        reads="embedding",
        bits=10,
        groups=1,
        masks="counted",
        schedule="cosine",
        unmasked=0.0,
        sampling=MASKGIT,
    ),
    "maskbit-tiny": SMALL,
    "maskgit-tiny": replace(
        SMALL,
        reads="embedding",
        bits=6,
        groups=1,
        masks="counted",
        schedule="cosine",
        unmasked=0.0,
        sampling=MASKGIT,
    ),
}


# -- the authors' checkpoints ----------------------------------------------------------------------------------------


def key_table(config: MaskGITConfig) -> KeyTable:
    """Their state dict to ours, of `LFQBert` ("bits") and `Bert` ("embedding")."""
    return _maskgit_keys.key_table(config.reads, config.bits // config.groups)


def recognise(state: Mapping[str, Tensor]) -> MaskGITConfig | None:
    """The config of an authors' state dict, from its names and shapes alone; None if it is none of these.

    Of as many bits as a published model, its settings of the sampler. Heads are taken to be 64 numbers wide.
    """
    fields = _maskgit_keys.seen(state)
    if fields is None:
        return None
    known = VARIANTS.get(f"maskbit-{fields['bits']}bit") if fields["reads"] == "bits" else None
    return replace(known or MaskGITConfig(), **fields)


def configure(plain: Mapping[str, Any]) -> MaskGITConfig:
    """Our config from the authors': their YAML, or the arguments of `LFQBert` or `Bert` with `decode`'s settings.

    Raises ConfigError where it is neither.
    """
    return MaskGITConfig(**_maskgit_keys.told(plain))


SYSTEM = System("maskgit", MaskGIT, MaskGITConfig, VARIANTS, keys=key_table, recognise=recognise, configure=configure)
