"""KARL: as many tokens as a picture needs for a requested error, decided in one pass.

"Single-pass Adaptive Image Tokenization for Minimum Program Search" (arXiv:2507.07995)

What is new: the encoder is told the error that is wanted and says of each of its tokens whether it is needed. Training
shows it pairs: reconstruct from T tokens, see what error that gives, then reach this error with T + more tokens and
learn to halt the surplus. The number of tokens kept approximates the picture's (Kolmogorov) complexity.

    pixels (B, 3, 256, 256) in [0, 1] -> frozen VQGAN -> latent (B, 256, 256), beside embedded patches
      -> transformer over [wanted error | 256 grid | T queries] -> latent (B, T, 12), halting probability (B, T)
      -> VQ codes (B, T) of 4096, `keep` (B, T): those whose probability is at most 0.75
    kept codes -> transformer over [256 masks | kept codes] -> logits (B, 256, 1024) over the VQGAN's codes
      -> expected code vectors -> VQGAN decoder -> pixels

    tok = vistok.load("karl-small")
    tokens = tok.encode(images, quality=0.05)      # a mean absolute error of 0.05
    tokens.lengths                                 # how many each picture needed

The networks are in `_karl_network.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError, InputError
from vistok.keys import KeyTable, State
from vistok.layout import Segment, Sizes, TokenSpec
from vistok.losses.by_length import ByLength
from vistok.nn.cnn import CNNConfig
from vistok.nn.query_vit import INIT_STD, ViTSize
from vistok.processes import max_over_processes
from vistok.quantize import VectorQuantizer
from vistok.registry import System
from vistok.sampling.noise import normals
from vistok.tokenizer import TokenData
from vistok.tokenizers import _karl_keys
from vistok.tokenizers._judged import JudgedTokenizer
from vistok.tokenizers._karl_network import (
    BINS,
    Base,
    CodeBase,
    Decoder,
    Encoder,
    LatentBase,
    PixelBase,
    first_probabilities,
)
from vistok.tokenizers.vqgan import VQGANConfig

MAGE = VQGANConfig("maskgit", CNNConfig(multipliers=(1, 1, 2, 2, 4), style="maskgit", middle_blocks=2))
KL16 = CNNConfig(multipliers=(1, 1, 2, 2, 4), latent_dim=16, double_latent=True)
DECAY = 0.99


@dataclass(frozen=True)
class KARLConfig:
    """Sizes and training of one KARL.

    tokens          N, the largest budget of `encode`, and the second call's in training
    budgets         budgets of training's first call
    rows            queries that exist; budgets can be no larger
    quantized       VQ codes; else the tokens are vectors of `token_dim` numbers
    base, vqgan, vae    what the decoder predicts: a VQGAN's codes, a VAE's latents, or pixels
    table           side of the table of positions, from which the grid takes the nearest
    halting         hidden width of the halting head
    threshold       tokens with a higher probability of halting are dropped
    init_std        of the first weights, as published 0.02 at a width of 1024. Narrower models pass on as much of the
                    picture with 0.02 sqrt(512 / width); with less, halting drowns what the reconstruction asks for
    """

    encoder: ViTSize = field(default=ViTSize(1024, 8, 8))
    decoder: ViTSize = field(default=ViTSize(1024, 8, 8))
    tokens: int = 256
    budgets: tuple[int, ...] = tuple(range(16, 369, 16))
    rows: int = 512
    token_dim: int = 12
    codebook_size: int = 4096
    quantized: bool = True
    base: Literal["vqgan", "vae", "pixels"] = "vqgan"
    vqgan: VQGANConfig = field(default_factory=lambda: MAGE)
    vae: CNNConfig = field(default=KL16)
    image_size: int = 256
    patch: int = 16
    table: int = 64
    halting: int = 512
    threshold: float = 0.75
    commitment: float = 0.25
    init_std: float = INIT_STD
    version: int = 1

    def __post_init__(self) -> None:
        factor = {"vqgan": self.vqgan.cnn.factor, "vae": self.vae.factor, "pixels": self.patch}[self.base]
        if self.image_size % self.patch or factor != self.patch:
            raise ConfigError(
                f"patches of {self.patch} must divide pictures of {self.image_size} and be the base's cells of {factor}"
            )
        if not self.budgets or max(*self.budgets, self.tokens) > self.rows or min(*self.budgets, self.tokens) < 1:
            raise ConfigError(f"budgets {self.budgets} and {self.tokens} tokens; expected 1 to {self.rows} (rows)")

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the grid."""
        return self.image_size // self.patch, self.image_size // self.patch


class KARL(JudgedTokenizer):
    """See the module's docstring.

    `encode(images, quality=0.05, budget=None)`: `quality` is the wanted mean absolute error in [0, 1], one for all or
    one for each picture; smaller is finer, 0 keeps nearly everything. `budget` limits the number of tokens.
    """

    system = "karl"
    config: KARLConfig
    encoder: Encoder
    decoder: Decoder
    quantizer: VectorQuantizer | nn.Identity
    probabilities: Tensor

    def __init__(self, config: KARLConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.base = _base(config)
        dim = config.token_dim
        std = config.init_std
        self.encoder = Encoder(
            config.encoder, config.patch, self.base.channels, dim, config.rows, config.table, config.halting, BINS, std
        )
        self.quantizer = nn.Identity()
        segment = Segment("sequence", (config.tokens,), dim=dim)
        if config.quantized:
            self.quantizer = VectorQuantizer(dim, config.codebook_size, metric="cosine", commitment=config.commitment)
            segment = Segment("sequence", (config.tokens,), (config.codebook_size,))
        self.decoder = Decoder(config.decoder, config.cells, dim, config.rows, config.table, self.base.outputs, std)
        self.register_buffer("probabilities", first_probabilities())
        side = config.image_size
        self.spec = TokenSpec(
            size=(side, side), layout=lambda size: (segment,), sizes=Sizes(only=((side, side),)), prefix_rule="none"
        )

    def tokenize(  # type: ignore[override]
        self,
        pixels: Tensor,
        spec: TokenSpec,
        *,
        seeds: list[int],
        quality: float | Sequence[float] | Tensor = 0.05,
        budget: int | None = None,
        sample: bool = False,
    ) -> TokenData:
        """Codes (B, N), or vectors (B, N, D), and `keep` (B, N): those that were not halted, of the first `budget`."""
        pixels, count = self.prepare(pixels), self.config.tokens if budget is None else budget
        if isinstance(count, bool) or int(count) != count or not 1 <= count <= self.config.tokens:
            raise InputError(f"budget={count}; expected a whole number of 1 to {self.config.tokens}")
        noise = normals(seeds, (self.config.cells[0] * self.config.cells[1], self.base.channels)) if sample else None
        target = targets(quality, len(pixels), self.device)
        latent = self.encoder(pixels, self.base.latent(pixels, noise), target, count)
        keep = latent.halting.sigmoid() <= self.config.threshold
        missing = self.config.tokens - count
        keep = F.pad(keep, (0, missing))
        if isinstance(self.quantizer, VectorQuantizer):
            return TokenData(codes=F.pad(self.quantizer.encode(latent.tokens), (0, missing)), keep=keep)
        return TokenData(vectors=F.pad(latent.tokens, (0, 0, 0, missing)), keep=keep)

    def detokenize(  # type: ignore[override]
        self, data: TokenData, spec: TokenSpec, *, seeds: list[int], dtype: torch.dtype
    ) -> Tensor:
        """The tokens that `keep` names, all without it, to pixels in [0, 1]."""
        vectors = data.vectors
        if vectors is None:
            vectors = self.quantizer.decode(data.codes)  # type: ignore[operator, arg-type]
        return self.reconstruct(vectors, data.keep).clamp(0, 1)

    def reconstruct(self, vectors: Tensor, keep: Tensor | None = None) -> Tensor:
        """Pixels (B, 3, S, S), not clamped, of vectors (B, T, D); differentiable."""
        return self.base.rebuild(self.decoder(vectors.to(self.dtype), keep), self.config.cells)

    def forward(  # type: ignore[override]
        self, pixels: Tensor, quality: float | Sequence[float] | Tensor = 0.05
    ) -> Tensor:
        """Reconstruction (B, 3, S, S), not clamped, at a wanted error; differentiable but for what is kept."""
        pixels = self.prepare(pixels)
        target = targets(quality, len(pixels), self.device)
        latent = self.encoder(pixels, self.base.latent(pixels), target, self.config.tokens)
        keep = latent.halting.sigmoid() <= self.config.threshold
        return self.reconstruct(self._quantize(latent.tokens)[0], keep)

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Terms for `batch["pixels"]` in [0, 1]; a recipe's stages freeze parts, which says what is learned.

        encoder and decoder frozen   the base VQGAN's own terms
        base frozen (stage 1)        both calls' distillation: "nll" and "code" of the base's codes
        nothing frozen (stage 2)     both calls' "reconstruction" (absolute error), "perceptual", "adversarial"

        The first call estimates: a random budget, a wanted error from a table that decays towards 0, no halting. The
        second learns to halt: all tokens, the error that the first call reached, halted tokens left out. Terms of the
        calls end in "_estimate" and "_halting"; beside the above there are "active" and "halt", the cross-entropy of
        the halting head, and the quantizer's "commitment" and "codebook".
        """
        if not _trains(self.encoder, self.decoder):
            assert isinstance(self.base, CodeBase), "the base without codes has nothing to learn alone"
            self.base.vqgan.judge(*self._judges)
            return self.base.vqgan.loss(batch, step, rng)
        pixels = self.prepare(batch["pixels"])
        budget = self.config.budgets[
            int(torch.randint(len(self.config.budgets), (1,), generator=rng, device=rng.device))
        ]
        drawn = torch.multinomial(self.probabilities.to(rng.device), len(pixels), replacement=True, generator=rng).to(
            self.device
        )
        return self.two_calls(batch, pixels, budget, self.encoder.bins[drawn], step)

    def two_calls(
        self, batch: dict[str, Any], pixels: Tensor, budget: int, wanted: Tensor, step: int = 0
    ) -> dict[str, Tensor]:
        """The terms of one step whose first call has `budget` tokens and wanted errors (B,); updates the table."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trains(self.base)):
            seen = self.base.latent(pixels)
        terms, reached, shown = self._call(pixels, seen, wanted, budget, 0, False, step)
        found = {f"{name}_estimate": term for name, term in terms.items()}
        if self.training:
            self._decay(reached.min())
        total = self.config.tokens
        surplus = max(0, total - budget)
        batch["wanted"] = reached
        terms, _, again = self._call(pixels, seen, reached, total, surplus, True, step)
        if again is not None:
            batch["reconstruction"], batch["reconstructions"] = again, [(budget, shown), (total - surplus, again)]
        return found | {f"{name}_halting": term for name, term in terms.items()}

    def _call(
        self, pixels: Tensor, seen: Tensor, wanted: Tensor, count: int, surplus: int, halts: bool, step: int
    ) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """One call's terms, the error of each picture (B,), and its reconstruction where one was made."""
        latent = self.encoder(pixels, seen, wanted, count)
        vectors, terms = self._quantize(latent.tokens)
        keep = latent.halting.detach().sigmoid() <= self.config.threshold if halts else None
        output = self.decoder(vectors.to(self.dtype), keep)
        image: Tensor | None = None
        if _trains(self.base):
            image = self.base.rebuild(output, self.config.cells)
            terms |= self._judged_terms(image, pixels, count - surplus, step)
        else:
            terms |= self.base.distil(output, seen, pixels)
            if not halts:
                with torch.no_grad():
                    image = self.base.rebuild(output, self.config.cells)
        terms |= halting_terms(latent.halting, surplus)
        reached = wanted if image is None else (image.detach() - pixels).abs().flatten(1).mean(1)
        return terms, reached, None if image is None else image.detach()

    def _judged_terms(self, image: Tensor, pixels: Tensor, kept: int, step: int) -> dict[str, Tensor]:
        assert not isinstance(self.base, PixelBase)
        terms = {"reconstruction": (image - pixels).abs().mean()}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(image, pixels).mean()
        self._choose(kept)
        return terms | self.adversarial_terms(image, terms, self.base.last_layer, step)

    def _choose(self, kept: int) -> None:
        """The discriminator of this number of tokens, where the adversary has several."""
        discriminator = getattr(self._judges[0], "discriminator", None)
        if isinstance(discriminator, ByLength):
            discriminator.choose(kept)

    def discriminator_loss(self, batch: dict[str, Any], step: int) -> Tensor:
        """The sum over the reconstructions of both calls, each judged by the discriminator of its length."""
        adversary = self._judges[0]
        if adversary is None or "reconstructions" not in batch:
            return super().discriminator_loss(batch, step)
        losses = []
        for kept, image in batch["reconstructions"]:
            self._choose(kept)
            losses.append(adversary.discriminator_loss(self.prepare(batch["pixels"]), image, step))
        return torch.stack(losses).sum()

    def _quantize(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if not isinstance(self.quantizer, VectorQuantizer):
            return tokens, {}
        quantized = self.quantizer(tokens)
        return quantized.vectors, dict(quantized.losses)

    @torch.no_grad()
    def _decay(self, reached: Tensor) -> None:
        """Wanted errors that the first call reaches anyway are drawn more rarely."""
        least = -max_over_processes(-reached.detach().float())
        decayed = torch.where(self.encoder.bins >= least, DECAY * self.probabilities, self.probabilities)
        self.probabilities.copy_(decayed / decayed.sum())


def targets(quality: float | Sequence[float] | Tensor, items: int, device: torch.device) -> Tensor:
    """Wanted errors (B,), float32. Raises InputError unless they are finite, at least 0, and one or one for each."""
    wanted = torch.as_tensor(quality, dtype=torch.float32, device=device)
    if wanted.ndim > 1 or (wanted.ndim == 1 and len(wanted) not in (1, items)):
        raise InputError(
            f"quality of shape {tuple(wanted.shape)} for {items} pictures; expected one number, or {items}"
        )
    if not bool((torch.isfinite(wanted) & (wanted >= 0)).all()):
        raise InputError(f"quality={quality}; expected a mean absolute error of at least 0, such as 0.05")
    return wanted.expand(items)


def halting_terms(logits: Tensor, surplus: int) -> dict[str, Tensor]:
    """Cross-entropy of halting logits (B, T): the last `surplus` tokens should halt, the others not."""
    logits = logits.float()
    active, halted = logits[:, : logits.shape[1] - surplus], logits[:, logits.shape[1] - surplus :]
    terms = {"active": F.binary_cross_entropy_with_logits(active, torch.zeros_like(active))}
    if surplus:
        terms["halt"] = F.binary_cross_entropy_with_logits(halted, torch.ones_like(halted))
    return terms


def _trains(*parts: nn.Module) -> bool:
    return any(parameter.requires_grad for part in parts for parameter in part.parameters())


def _base(config: KARLConfig) -> Base:
    if config.base == "vqgan":
        return CodeBase(config.vqgan)
    return LatentBase(config.vae) if config.base == "vae" else PixelBase(config.patch)


# -- variants --------------------------------------------------------------------------------------------------------

SMALL = KARLConfig()
_TINY_CNN = CNNConfig(32, (1, 1, 2), 1, 16, style="maskgit", middle_blocks=2)
_TINY = KARLConfig(
    ViTSize(64, 3, 4), ViTSize(64, 3, 4), tokens=16, budgets=tuple(range(2, 17, 2)), rows=16, token_dim=6,
    codebook_size=256, vqgan=VQGANConfig("maskgit", _TINY_CNN, 64, 16, resolution=32), image_size=32, patch=4, table=16,
    halting=64,
)  # fmt: skip

VARIANTS = {
    "karl-small": SMALL,
    "karl-small-in100": SMALL,
    "karl-small-in100-continuous": replace(SMALL, quantized=False),
    "karl-small-in100-vae": replace(SMALL, base="vae"),
    "karl-small-in100-vae-continuous": replace(SMALL, base="vae", quantized=False),
    "karl-tiny": _TINY,
    "karl-tiny-continuous": replace(_TINY, quantized=False),
    "karl-tiny-vae": replace(_TINY, base="vae", vae=CNNConfig(32, (1, 1, 2), 1, 4, double_latent=True)),
    "karl-tiny-pixels": replace(_TINY, base="pixels", quantized=False, patch=8, token_dim=4),
}


# -- published checkpoints -------------------------------------------------------------------------------------------


def key_table(config: KARLConfig) -> KeyTable:
    """The authors' keys to ours, for a model of this config."""
    cnn = config.vqgan.cnn if config.base == "vqgan" else config.vae
    return _karl_keys.key_table(config.base, len(cnn.multipliers))


def recognise(state: State) -> KARLConfig | None:
    """The config that an authors' state dict fits; None where it is no KARL.

    Raises ConfigError for widths that are not the authors' named ones: the number of heads cannot be seen.
    """
    fields = _karl_keys.fields_of_state(state)
    if fields is None:
        return None
    for side in ("encoder", "decoder"):
        if fields[side].width not in _karl_keys.HEADS:
            raise ConfigError(f"a KARL of width {fields[side].width}, no published size: heads do not show")
    return KARLConfig(**fields)


def configure(plain: Mapping[str, Any]) -> KARLConfig:
    """The config that the authors' arguments describe. Raises ConfigError."""
    return KARLConfig(**_karl_keys.fields_of_config(plain))


SYSTEM = System("karl", KARL, KARLConfig, VARIANTS, keys=key_table, recognise=recognise, configure=configure)
