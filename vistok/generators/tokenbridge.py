"""TokenBridge's generator: masked positions in random order, and the codes of one position one after another.

"Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation" (arXiv:2503.16430, section 3.3), on the
masked encoder and decoder of MAR (2406.11838).

What is new: MAR's diffusion head becomes a small transformer over the 16 dimensions of a token, with plain
cross-entropy over 64 levels each, from coarse dimensions to fine ones.

    codes (B, N, D) -> levels (B, N, D) -> W; 64 copies of the class before them; masked ones taken out
      -> encoder -> masks put in -> decoder -> z (B, N, W)
    each masked position: [z | e(code of the 1st dimension) | ..] (D, C) -> causal blocks -> 2^b logits a dimension

    generation: all masked; in each of S steps some more positions, drawn in a random order, get their codes

Guidance acts on z, growing with the share of positions that are done.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, cos, floor, isqrt, pi
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError, InputError
from vistok.generator import Generator, Known, drop_labels, fixed_spec
from vistok.generators import _tokenbridge_keys
from vistok.generators._tokenbridge_head import EPS, ChannelHead
from vistok.keys import KeyTable
from vistok.layout import Segment
from vistok.nn.transformer import Block, Modulation
from vistok.quantize.normal import NormalLevels
from vistok.registry import System
from vistok.sampling.noise import uniforms
from vistok.sampling.tokens import Sampling, guide
from vistok.tokens import Source

# Dimensions of KL-16 from low to high frequency: the order in which they are predicted.
KL16_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)


@dataclass(frozen=True)
class TokenBridgeGeneratorConfig:
    """Sizes of one model.

    width, depth, heads                  of encoder and decoder alike, `depth` blocks each
    head_width, head_depth, head_heads   of the transformer over dimensions
    order             dimensions of a token in the order of their prediction
    bits, low, high, clamp    levels of the tokenizer
    grid, factor      rows and columns of positions; pixels per position along a side
    buffer            copies of the class before the positions
    channel_head      "parallel" predicts all dimensions at once, from the same blocks without codes: the paper's
                      ablation
    class_dropout     share of labels that training replaces by none; `dropout` of encoder and decoder
    steps             of generation; `guidance` and `temperature` as published
    tokenizer         whose tokens these are, as far as it is known
    """

    width: int = 1024
    depth: int = 16
    heads: int = 16
    head_width: int = 1024
    head_depth: int = 4
    head_heads: int = 8
    order: tuple[int, ...] = KL16_ORDER
    bits: int = 6
    low: float = -5.0
    high: float = 5.0
    clamp: float = 3.0
    grid: tuple[int, int] = (16, 16)
    factor: int = 16
    buffer: int = 64
    channel_head: Literal["autoregressive", "parallel"] = "autoregressive"
    classes: int = 1000
    class_dropout: float = 0.1
    dropout: float = 0.1
    steps: int = 256
    guidance: float = 3.1
    temperature: float = 0.96
    tokenizer: Source | None = None
    version: int = 1

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            raise ConfigError(f"order must name each of {len(self.order)} dimensions once, got {self.order}")
        if self.grid[0] != self.grid[1]:
            raise ConfigError(f"the grid is square, got {self.grid}")

    @property
    def positions(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]


class TokenBridgeGenerator(Generator):
    """See the module's docstring. `generate(classes, steps=, schedule=)` gives codes (B, N, D)."""

    system = "tokenbridge"
    config: TokenBridgeGeneratorConfig

    def __init__(self, config: TokenBridgeGeneratorConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        width, count = config.width, config.positions
        self.levels = NormalLevels(config.bits, config.low, config.high, config.clamp)
        self.class_table = nn.Embedding(config.classes, width)
        self.null_class = nn.Parameter(torch.empty(1, width))
        self.project = nn.Linear(len(config.order), width)
        self.project_norm = nn.LayerNorm(width, eps=EPS)
        self.encoder_positions = nn.Parameter(torch.empty(1, config.buffer + count, width))
        self.encoder = nn.ModuleList(
            Block(width, config.heads, eps=EPS, dropout=config.dropout) for _ in range(config.depth)
        )
        self.encoder_norm = nn.LayerNorm(width, eps=EPS)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_positions = nn.Parameter(torch.empty(1, config.buffer + count, width))
        self.decoder = nn.ModuleList(
            Block(width, config.heads, eps=EPS, dropout=config.dropout) for _ in range(config.depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=EPS)
        self.output_positions = nn.Parameter(torch.empty(1, count, width))
        self.head = ChannelHead(
            width,
            config.head_width,
            config.head_depth,
            config.head_heads,
            count=len(config.order),
            levels=2**config.bits,
            sequential=config.channel_head == "autoregressive",
        )
        self._initialise()
        self.classes = config.classes
        self.sampling = Sampling(guidance=config.guidance, temperature=config.temperature)
        segment = Segment("grid", config.grid, (2**config.bits,) * len(config.order))
        self.spec = fixed_spec((segment,), config.grid[0] * config.factor)

    def _initialise(self) -> None:
        """Xavier-uniform maps with zero biases, N(0, 0.02) tables, modulations at zero."""
        closed = {module.project for module in self.modules() if isinstance(module, Modulation)}
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in closed:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for head in self.head.weight:
            nn.init.xavier_uniform_(head)
        tables = (self.null_class, self.encoder_positions, self.mask_token, self.decoder_positions)
        for table in (*tables, self.output_positions, self.class_table.weight):
            nn.init.normal_(table, std=0.02)

    def class_vectors(self, labels: Tensor) -> Tensor:
        """Class embeddings (B, W) of labels (B,); the number of classes stands for none."""
        known = self.class_table(labels.clamp(max=self.config.classes - 1))
        return torch.where((labels == self.config.classes)[:, None], self.null_class, known)

    def encode(self, codes: Tensor, visible: Tensor, classes: Tensor) -> Tensor:
        """Encoder outputs (B, buffer + n, W) of the visible ones among codes (B, N, D).

        `visible` long (B, n), ascending, are their positions; `classes` (B, W) their class embeddings.
        """
        buffer = self.config.buffer
        values = self.project(self.levels.decode(_gather(codes, visible)).to(self.dtype))
        positions = torch.cat(
            [
                self.encoder_positions[:, :buffer].expand(len(codes), -1, -1),
                _gather(self.encoder_positions[:, buffer:].expand(len(codes), -1, -1), visible),
            ],
            1,
        )
        x = torch.cat([classes[:, None].expand(-1, buffer, -1), values], 1)
        x = self.project_norm(x + positions)
        for block in self.encoder:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, encoded: Tensor, visible: Tensor) -> Tensor:
        """What is known of every position, z (B, N, W), from what `encode` gave."""
        buffer, count = self.config.buffer, self.config.positions
        x = self.decoder_embed(encoded)
        masks = self.mask_token.to(x.dtype).expand(len(x), count, -1)
        filled = masks.scatter(1, visible[..., None].expand(-1, -1, x.shape[-1]), x[:, buffer:])
        x = torch.cat([x[:, :buffer], filled], 1) + self.decoder_positions
        for block in self.decoder:
            x = block(x)
        return self.decoder_norm(x)[:, buffer:] + self.output_positions

    def logits(self, codes: Tensor, masked: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced logits (B, m, D, 2^b), dimensions in the order of prediction, at masked positions (B, m).

        `codes` (B, N, D) and `masked` long (B, m); the other positions are seen. `labels` (B,).
        """
        visible = _others(masked, self.config.positions)
        z = self.decode(self.encode(codes, visible, self.class_vectors(labels)), visible)
        at = _gather(z, masked).flatten(0, 1)
        targets = _gather(codes, masked)[..., list(self.config.order)].flatten(0, 1)
        return self.head(at, targets).unflatten(0, masked.shape)

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """ "cross_entropy": mean over masked positions and dimensions. `batch` as in `Generator.loss`.

        The share of masked positions is one draw for the batch, from a normal around 1 with deviation 0.25, cut to
        0.7..1; which ones is drawn for each item. `batch["masked"]` (B, m) may name them instead.
        """
        codes = self.batch_tokens(batch)
        labels = self.batch_labels(batch, len(codes))
        if self.training:
            labels = drop_labels(labels, self.config.class_dropout, self.config.classes, rng)
        masked = batch.get("masked")
        if masked is None:
            masked = self._draw_masked(len(codes), rng)
        logits = self.logits(codes, masked, labels)
        targets = _gather(codes, masked)[..., list(self.config.order)]
        return {"cross_entropy": F.cross_entropy(logits.flatten(0, 2), targets.flatten())}

    def _draw_masked(self, items: int, rng: torch.Generator) -> Tensor:
        count = self.config.positions
        low = torch.special.ndtr(torch.tensor(-0.3 / 0.25, dtype=torch.float64))
        place = torch.rand((), generator=rng, device=rng.device).double().cpu()
        ratio = 1 + 0.25 * torch.special.ndtri(low + place * (0.5 - low))
        order = torch.rand(items, count, generator=rng, device=rng.device).argsort(1).to(self.device)
        return order[:, : min(ceil(count * float(ratio)), count)]

    # -- sampling ------------------------------------------------------------------------------------------------

    def sample(  # type: ignore[override]
        self,
        conditions: Tensor | None,
        *,
        seeds: list[int],
        sampling: Sampling,
        known: Known | None,
        steps: int | None = None,
        schedule: Literal["linear", "constant"] = "linear",
        orders: Tensor | None = None,
    ) -> Tensor:
        """Codes (B, N, D).

        steps       of generation; some find nothing to do where there are as many as positions
        schedule    of the guidance: "linear" grows it with the share of positions that are done
        orders      long (B, N): the reverse of the order in which positions are predicted, drawn from the seeds if None
        """
        if schedule not in ("linear", "constant"):
            raise InputError(f"schedule={schedule!r}; expected 'linear' or 'constant'")
        steps = self.config.steps if steps is None else steps
        if steps < 1:
            raise InputError(f"steps={steps}; expected at least 1")
        items, length, width = len(seeds), self.config.positions, len(self.config.order)
        noise = uniforms(seeds, (length, 1 + width), self.device)
        orders = noise[..., 0].argsort(1) if orders is None else orders.to(self.device)
        codes = torch.zeros(items, length, width, dtype=torch.long, device=self.device)
        remaining = length
        if known is not None:
            codes, remaining = torch.where(known.present[..., None], known.data, 0), _hidden(known, self.name)
            first = known.present.gather(1, orders).to(torch.uint8).argsort(dim=1, stable=True)
            orders = orders.gather(1, first)  # what is known comes last, so it is there from the beginning
        null = torch.full((items,), self.config.classes, device=self.device)
        guided = sampling.guided and conditions is not None
        labels = null if conditions is None else torch.cat([conditions, null]) if guided else conditions
        classes, back = self.class_vectors(labels), torch.tensor(self.config.order, device=self.device).argsort()
        for step in range(steps):
            left = max(1, min(remaining - 1, floor(length * cos(pi / 2 * (step + 1) / steps))))
            drawn = orders[:, :remaining] if step + 1 == steps else orders[:, left:remaining]
            if not drawn.shape[1]:
                continue
            visible = orders[:, remaining:].sort(1).values
            seen, seen_codes = (torch.cat([part, part]) if guided else part for part in (visible, codes))
            z = self.decode(self.encode(seen_codes, seen, classes), seen)
            if guided:
                share = (length - left) / length if schedule == "linear" else 1.0
                z = guide(z, 1 + (sampling.guidance - 1) * share)
            uniform = _gather(noise[..., 1:], drawn).flatten(0, 1)
            found = self.head.sample(_gather(z, drawn).flatten(0, 1), uniform, sampling)
            found = found[:, back].unflatten(0, drawn.shape)
            codes = codes.scatter(1, drawn[..., None].expand(-1, -1, width), found)
            remaining = left
        return codes


def _gather(data: Tensor, positions: Tensor) -> Tensor:
    """(B, n, ..) of data (B, N, ..) at positions (B, n)."""
    return data.gather(1, positions[..., None].expand(-1, -1, data.shape[-1]))


def _others(masked: Tensor, count: int) -> Tensor:
    """The positions (B, N - m), ascending, that are not among `masked` (B, m)."""
    hidden = torch.zeros(len(masked), count, dtype=torch.uint8, device=masked.device).scatter(1, masked, 1)
    return hidden.argsort(dim=1, stable=True)[:, : count - masked.shape[1]]


def _hidden(known: Known, name: str) -> int:
    """How many positions of each item are still to be found."""
    counts = (~known.present).sum(1)
    if bool((counts != counts[0]).any()):
        raise InputError(f"{name} goes on from as many known positions in every item; generate the others separately")
    return int(counts[0])


# -- variants --------------------------------------------------------------------------------------------------------

LARGE = TokenBridgeGeneratorConfig()
VARIANTS = {
    "tokenbridge-generator-base": replace(LARGE, width=768, depth=12, heads=12, head_width=768),
    "tokenbridge-generator-large": LARGE,
    "tokenbridge-generator-huge": replace(LARGE, width=1280, depth=20, head_depth=6, guidance=3.45, temperature=0.91),
    "tokenbridge-generator-tiny": replace(
        LARGE,
        width=96,
        depth=3,
        heads=4,
        head_width=64,
        head_depth=2,
        head_heads=4,
        order=tuple(range(8)),
        grid=(4, 4),
        factor=8,
        buffer=4,
        classes=10,
        dropout=0.0,
        steps=8,
        guidance=1.5,
        temperature=1.0,
    ),
}


# -- the authors' checkpoints ----------------------------------------------------------------------------------------


def key_table(config: TokenBridgeGeneratorConfig) -> KeyTable:
    """Their state dict to ours, with or without the buffers, which averaged weights lack."""
    return KeyTable(
        *_tokenbridge_keys.rules(
            len(config.order), lambda: NormalLevels(config.bits, config.low, config.high, config.clamp)
        )
    )


def recognise(state: Mapping[str, Tensor]) -> TokenBridgeGeneratorConfig | None:
    """The config of an authors' state dict, from its names and shapes; None if it is none.

    Heads of encoder and decoder cannot be seen: 12 for the published width of 768, else 16. Neither can the range of
    the levels, the order of 16 dimensions and the settings of generation: they are those of KL-16 and of size L.
    """
    if "timesteps_embeddings" not in state or "encoder_pos_embed_learned" not in state:
        return None
    width, dim = state["z_proj.weight"].shape
    count = state["output_pos_embed"].shape[1]
    found = replace(
        LARGE,
        width=width,
        depth=_count(state, "encoder_blocks"),
        heads=12 if width == 768 else 16,
        head_width=state["channel_embed"].shape[2],
        head_depth=_count(state, "channel_blocks"),
        head_heads=state["channel_embed"].shape[2] // state["channel_blocks.0.attn.q_norm.weight"].shape[0],
        order=KL16_ORDER if dim == 16 else tuple(range(dim)),
        bits=state["channel_heads.0.weight"].shape[0].bit_length() - 1,
        grid=(isqrt(count), isqrt(count)),
        buffer=state["encoder_pos_embed_learned"].shape[1] - count,
        classes=state["class_emb.weight"].shape[0],
    )
    huge = VARIANTS["tokenbridge-generator-huge"]
    return huge if found == replace(huge, guidance=LARGE.guidance, temperature=LARGE.temperature) else found


def _count(state: Mapping[str, Tensor], stack: str) -> int:
    return next(index for index in range(len(state) + 1) if f"{stack}.{index}.norm1.weight" not in state)


def configure(plain: Mapping[str, Any]) -> TokenBridgeGeneratorConfig:
    """Our config from the arguments of the authors' class. Raises KeyError where it is none."""
    side = plain["img_size"] // plain["vae_stride"] // plain.get("patch_size", 1)
    dim = plain.get("vae_embed_dim", 16)
    if plain["encoder_embed_dim"] != plain["decoder_embed_dim"] or plain["encoder_depth"] != plain["decoder_depth"]:
        raise ConfigError("encoder and decoder of another size, which no published model has")
    return TokenBridgeGeneratorConfig(
        width=plain["encoder_embed_dim"],
        depth=plain["encoder_depth"],
        heads=plain["encoder_num_heads"],
        head_width=plain["channel_embed_dim"],
        head_depth=plain["channel_depth"],
        head_heads=plain["channel_heads"],
        order=tuple(plain.get("channel_order", KL16_ORDER if dim == 16 else range(dim))),
        bits=(plain["quant_levels"] - 1).bit_length() if "quant_levels" in plain else plain.get("quant_bits", 6),
        low=plain.get("quant_min", -5.0),
        high=plain.get("quant_max", 5.0),
        clamp=plain.get("std_range", 3.0),
        grid=(side, side),
        factor=plain["vae_stride"],
        buffer=plain.get("buffer_size", 64),
        classes=plain["class_num"],
        steps=plain.get("num_iter", 256),
        guidance=plain.get("cfg", 3.1),
    )


SYSTEM = System(
    "tokenbridge",
    TokenBridgeGenerator,
    TokenBridgeGeneratorConfig,
    VARIANTS,
    keys=key_table,
    recognise=recognise,
    configure=configure,
)
