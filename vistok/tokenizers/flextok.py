"""FlexTok: a picture as 1 to 256 ordered tokens, decoded by a generative model that never blurs.

"FlexTok: Resampling Images into 1D Token Sequences of Flexible Length" (arXiv:2502.13967)

What is new: the tail of the tokens is dropped at random in training (nested dropout), so any prefix decodes; and the
decoder is a rectified flow, which samples a sharp picture of what the prefix says and invents the rest.

    pixels (B, 3, 256, 256) in [0, 1] -> VAE (frozen, diffusers) -> latent (B, 16, 32, 32) -> 2x2 patches
      -> transformer over [256 patches | 256 registers, causal] -> (B, 256, 6) -> FSQ -> codes (B, 256) of 64000
    codes (B, k) -> registers 1 .. k | stand-in for the others
    noise (B, 16, 32, 32), from each item's seed -> N Euler steps, each one pass of the flow transformer over
      [patches | registers], with and without condition in one batch (APG or CFG) -> latent -> VAE -> pixels

    tok = vistok.load("flextok-d18-d28")
    rough = tok.decode(tok.encode(images).prefix(8), steps=20, guidance=7.5, seed=0)

The networks are in `_flextok_network.py`. The authors released no training code; `loss` is the paper's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError, InputError
from vistok.keys import KeyTable, State
from vistok.layout import Segment, Sizes, TokenSpec
from vistok.losses.representation import load_teacher
from vistok.nn.vae import VAE, PixelSpace, VAEConfig
from vistok.quantize import FSQ
from vistok.registry import System
from vistok.sampling.flow import Times, draw_times, euler, interpolate
from vistok.sampling.guidance import Guidance, make_guidance
from vistok.sampling.noise import normals
from vistok.tokenizer import TokenData
from vistok.tokenizers import _flextok_keys
from vistok.tokenizers._flextok_network import FlowDecoder, RegisterEncoder, TrunkSize
from vistok.tokenizers._judged import JudgedTokenizer


@dataclass(frozen=True)
class FlexTokConfig:
    """Sizes, training and sampling of one FlexTok.

    registers, levels    N tokens, and FSQ's levels of each
    vae                  the space it works in; None for the pixels themselves
    size, patch, grid    (height, width) of pictures; side of a patch of the latent; rows and columns of the table of
                         positions, whose upper left corner a smaller grid of patches takes
    modulated_head       the last norm too is scaled and shifted by the time
    null_dropout         share of items trained without a condition
    times, mode_scale    which times training sees (`vistok.sampling.flow.draw_times`)
    kl_weight            of the VAE's divergence, where a VAE is trained here
    alignment            width of a teacher's patch features that the patches should predict before block
                         `alignment_block` of the decoder (REPA); 0 without
    teacher              its name (`vistok.losses.representation`)
    steps, guidance      of `decode`, unless it is told others
    """

    encoder: TrunkSize = field(default=TrunkSize(1152, 18))
    decoder: TrunkSize = field(default=TrunkSize(1792, 28))
    registers: int = 256
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    vae: VAEConfig | None = field(default_factory=VAEConfig)
    size: tuple[int, int] = (256, 256)
    patch: int = 2
    grid: tuple[int, int] = (16, 16)
    modulated_head: bool = True
    null_dropout: float = 0.2
    times: Times = "mode"
    mode_scale: float = 0.25
    kl_weight: float = 1e-6
    alignment: int = 0
    alignment_block: int = 4
    teacher: str = "dinov2-l14"
    steps: int = 20
    guidance: float = 7.5
    version: int = 1

    def __post_init__(self) -> None:
        step = self.factor * self.patch
        rows, columns = (side // step for side in self.size)
        if self.alignment and not 0 <= self.alignment_block < self.decoder.depth:
            raise ConfigError(f"alignment_block={self.alignment_block} of {self.decoder.depth} blocks")
        if any(side % step for side in self.size) or rows > self.grid[0] or columns > self.grid[1]:
            raise ConfigError(
                f"pictures of {self.size} need sides that are multiples of {step}, and at most {self.grid} patches"
            )

    @property
    def factor(self) -> int:
        """Pixels per position of the latent, along one side."""
        return self.vae.factor if self.vae else 1

    @property
    def channels(self) -> int:
        """Channels of the latent."""
        return self.vae.latent_dim if self.vae else 3

    @property
    def latent(self) -> tuple[int, int, int]:
        """Shape of one latent, (C, h, w)."""
        return self.channels, self.size[0] // self.factor, self.size[1] // self.factor

    @property
    def cells(self) -> int:
        """Number of patches."""
        return self.latent[1] * self.latent[2] // self.patch**2


class FlexTok(JudgedTokenizer):
    """See the module's docstring.

    `encode(images, sample=True, seed=...)` draws from the VAE's posterior, as the authors do; the default is its mean.
    `decode(tokens, steps=, guidance=, guide="apg" or "cfg", seed=)`: the noise of an item comes from its seed alone.
    Tokens of mixed lengths (`tokens.prefix([8, 64, 256])`) decode in one batch.
    """

    system = "flextok"
    config: FlexTokConfig
    encoder: RegisterEncoder
    quantizer: FSQ
    decoder: FlowDecoder

    def __init__(self, config: FlexTokConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.vae: VAE | PixelSpace = VAE(config.vae) if config.vae else PixelSpace()
        dim = len(config.levels)
        sizes = (config.channels, config.patch, config.grid, config.registers)
        self.encoder = RegisterEncoder(*sizes, config.encoder, dim)
        self.quantizer = FSQ(config.levels)
        self.decoder = FlowDecoder(*sizes, config.decoder, dim, config.modulated_head)
        self.align_head: nn.Sequential | None = None
        if config.alignment:
            width = config.decoder.width
            layers = [nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width), nn.SiLU()]
            self.align_head = nn.Sequential(nn.LayerNorm(width), *layers, nn.Linear(4 * width, config.alignment))
        self._teacher: tuple[Any, ...] = ()
        segment = Segment("sequence", (config.registers,), self.quantizer.codebooks)
        self.spec = TokenSpec(
            size=config.size,
            layout=lambda size: (segment,),
            sizes=Sizes(only=(config.size,)),
            prefix_rule="any",
        )

    def tokenize(  # type: ignore[override]
        self, pixels: Tensor, spec: TokenSpec, *, seeds: list[int], sample: bool = False
    ) -> TokenData:
        """Codes (B, N) of the VAE's mean, or with `sample` of a draw from each item's own seed."""
        noise = normals(seeds, self.config.latent) if sample else None
        latent = self.vae.encode(self.prepare(pixels), noise)
        return TokenData(codes=self.quantizer.encode(self.encoder(latent)))

    def detokenize(  # type: ignore[override]
        self,
        data: TokenData,
        spec: TokenSpec,
        *,
        seeds: list[int],
        dtype: torch.dtype,
        steps: int | None = None,
        guidance: float | None = None,
        guide: Guidance = "apg",
    ) -> Tensor:
        """Codes (B, k), of which `keep` may name a prefix for each item, to pixels in [0, 1]."""
        lengths = None if data.keep is None else prefix_lengths(data.keep)
        vectors = self.quantizer.decode(data.codes).to(self.dtype)  # type: ignore[arg-type]
        noise = normals(seeds, self.config.latent, self.device).to(self.dtype)
        latent = self.sample(vectors, noise, lengths, steps=steps, guidance=guidance, guide=guide)
        return self.vae.decode(latent).clamp(0, 1)

    def sample(
        self,
        vectors: Tensor,
        noise: Tensor,
        lengths: Tensor | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        guide: Guidance = "apg",
    ) -> Tensor:
        """Latents (B, C, h, w) of code vectors (B, k, D), the first `lengths` (B,) of each, from such `noise`."""
        steps = self.config.steps if steps is None else steps
        scale = self.config.guidance if guidance is None else guidance
        steer = make_guidance(guide, scale)
        guided = scale != 1.0
        if guided:
            batch, k = vectors.shape[:2]
            lengths = torch.full((batch,), k, device=vectors.device) if lengths is None else lengths.to(vectors.device)
            absent = torch.arange(2 * batch, device=vectors.device) >= batch
            known = self.decoder.registers(vectors.repeat(2, 1, 1), self.config.cells, lengths.repeat(2), absent)
        else:
            known = self.decoder.registers(vectors, self.config.cells, lengths)

        def velocity(x: Tensor, t: float) -> Tensor:
            found = self.decoder(x, torch.full((1,), t, device=x.device), known)
            return steer(found) if guided else found

        return euler(velocity, noise, steps)

    def forward(  # type: ignore[override]
        self, pixels: Tensor, seed: int | Sequence[int] = 0, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        """Reconstruction (B, 3, H, W), not clamped, through all tokens; differentiable, at the cost of every step."""
        seeds = [seed] * len(pixels) if isinstance(seed, int) else list(seed)
        latent = self.vae.encode(self.prepare(pixels))
        noise = normals(seeds, self.config.latent, self.device).to(self.dtype)
        vectors = self.quantizer(self.encoder(latent)).vectors
        return self.vae.decode(self.sample(vectors, noise, steps=steps, guidance=guidance))

    # -- training ------------------------------------------------------------------------------------------------

    def align(self, teacher: Any) -> None:
        """Set the frozen model whose patch features the decoder's early patches should predict: pixels (B, 3, H, W) in
        [0, 1] to (B, rows, columns, `config.alignment`). It becomes no part of this model or of its weights. Without
        this call the teacher that the config names is loaded when `loss` first needs it.
        """
        if self.align_head is None:
            raise ConfigError("alignment=0: this FlexTok was built without a head for a teacher's features")
        self._teacher = (teacher,)

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Terms for `batch["pixels"]` in [0, 1], of whatever is not frozen (a recipe's stages say what is).

        encoder, decoder   "flow": squared error of the velocity, at one time per item, from a prefix of random length
                           (uniform in 1..N; nothing at all for a share of `null_dropout`); with a teacher "alignment"
        a VAE              "reconstruction" (absolute error in [-1, 1]), "kl"; "perceptual" and "adversarial" where
                           `judge` set them. The paper trains it first, then freezes it.
        """
        pixels = self.prepare(batch["pixels"])
        terms: dict[str, Tensor] = {}
        if any(parameter.requires_grad for parameter in self.vae.parameters()):
            terms |= self._vae_terms(batch, pixels, step, rng)
        if any(parameter.requires_grad for part in (self.encoder, self.decoder) for parameter in part.parameters()):
            with torch.no_grad():
                latent = self.vae.encode(pixels)
            terms |= self._flow_terms(pixels, latent, rng)
        return terms

    def _flow_terms(self, pixels: Tensor, latent: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        count, config = len(latent), self.config
        vectors = self.quantizer(self.encoder(latent)).vectors.to(self.dtype)
        lengths = self.draw_lengths(count, rng)
        absent = torch.rand(count, generator=rng, device=rng.device) < config.null_dropout
        t = draw_times(count, rng, config.times, config.mode_scale).to(latent.device)
        noise = torch.randn(latent.shape, generator=rng, device=rng.device).to(latent)
        known = self.decoder.registers(vectors, config.cells, lengths.to(latent.device), absent.to(latent.device))
        noisy, target = interpolate(latent, noise, t)
        found, features = self.decoder.look(noisy, t, known, config.alignment_block)
        terms = {"flow": F.mse_loss(found.float(), target.float())}
        if self.align_head is not None:
            terms["alignment"] = self._alignment(features, pixels)
        return terms

    def draw_lengths(self, count: int, rng: torch.Generator) -> Tensor:
        """Nested dropout (section 3.1): how many tokens each item keeps, uniform in 1..N."""
        return torch.randint(1, self.config.registers + 1, (count,), generator=rng, device=rng.device)

    def _alignment(self, features: Tensor, pixels: Tensor) -> Tensor:
        """-mean cosine of predicted and the teacher's patch features, the teacher's resampled to our grid."""
        assert self.align_head is not None
        if not self._teacher:
            named = load_teacher(self.config.teacher, self.config.alignment).to(self.device)
            self.align(named.patches)
        with torch.no_grad():
            target = self._teacher[0](pixels).permute(0, 3, 1, 2).float()
            _, height, width = self.config.latent
            grid = height // self.config.patch, width // self.config.patch
            target = F.interpolate(target, size=grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
        return -F.cosine_similarity(self.align_head(features).float(), target, dim=-1).mean()

    def _vae_terms(self, batch: dict[str, Any], pixels: Tensor, step: int, rng: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(self.vae, VAE)
        image, kl = self.vae.rebuild(pixels, rng)
        batch["reconstruction"] = image.detach()
        terms = {"reconstruction": 2 * (image - pixels).abs().mean()}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(image, pixels).mean()
        terms |= self.adversarial_terms(image, terms, self.vae.last_layer, step)
        return terms | {"kl": self.config.kl_weight * kl / pixels[0].numel()}


def prefix_lengths(keep: Tensor) -> Tensor:
    """How many leading positions each item of `keep` (B, n) has. Raises InputError where others are kept too."""
    if bool((keep[:, 1:] & ~keep[:, :-1]).any()) or not bool(keep[:, 0].all()):
        raise InputError("keep must name a prefix of at least one token for each item: these tokens are ordered")
    return keep.sum(1)


# -- variants --------------------------------------------------------------------------------------------------------


def _published(encoder: int, decoder: int) -> FlexTokConfig:
    return FlexTokConfig(TrunkSize(64 * encoder, encoder), TrunkSize(64 * decoder, decoder))


_TINY = FlexTokConfig(
    TrunkSize(96, 3, 32), TrunkSize(96, 4, 32), registers=16, levels=(8, 5, 5, 5), vae=None, size=(32, 32), patch=4,
    grid=(8, 8), times="logit-normal", steps=10, guidance=1.0,
)  # fmt: skip

VARIANTS = {
    "flextok-d12-d12": _published(12, 12),
    "flextok-d18-d18": _published(18, 18),
    "flextok-d18-d28": _published(18, 28),
    "flextok-d18-d28-dfn": _published(18, 28),
    "flextok-tiny": _TINY,
    "flextok-tiny-vae": replace(
        _TINY, vae=VAEConfig(4, (16, 32, 32), 1, groups=8), size=(32, 32), patch=2, grid=(4, 4), guidance=2.5,
        kl_weight=1e-4,
    ),
}  # fmt: skip


# -- published checkpoints -------------------------------------------------------------------------------------------


def key_table(config: FlexTokConfig) -> KeyTable:
    """The authors' keys to ours. The head that learns from a teacher is ours alone and has none."""
    return _flextok_keys.key_table(config.vae.scale if config.vae else None, config.modulated_head)


def recognise(state: State) -> FlexTokConfig | None:
    """The config that an authors' state dict fits; None where it is no FlexTok.

    Raises ConfigError where width is not 64 times the depth, as in every published size: heads do not show in shapes.
    """
    fields = _flextok_keys.fields_of_state(state)
    if fields is None:
        return None
    sizes = fields["encoder"], fields["decoder"]
    if any(size.width != 64 * size.depth for size in sizes):
        raise ConfigError(
            f"a FlexTok of widths {sizes[0].width} and {sizes[1].width}, no published size: heads do not show, pass "
            "its config"
        )
    return FlexTokConfig(**fields)


def configure(plain: Mapping[str, Any]) -> FlexTokConfig:
    """The config that the authors' configuration tree describes. Raises ConfigError."""
    return FlexTokConfig(**_flextok_keys.fields_of_config(plain))


SYSTEM = System("flextok", FlexTok, FlexTokConfig, VARIANTS, keys=key_table, recognise=recognise, configure=configure)
