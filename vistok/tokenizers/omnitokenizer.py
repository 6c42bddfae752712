"""OmniTokenizer: pictures and clips through one transformer, windows in space, causal attention in time.

"OmniTokenizer: A Joint Image-Video Tokenizer for Visual Generation" (arXiv:2406.09399)

What is new: one set of weights serves both. The first frame has patches of its own, so a picture is a clip of one
frame; windows make the encoder's spatial attention cheap; training goes from pictures to pictures and clips of several
sizes, and from codes to continuous tokens.

    pixels (B, 3, [1 + k p,] H, W) in [0, 1]
      -> patches 1 x 8 x 8 of the first frame, p x 8 x 8 of the others (B, 1 + k, H/8, W/8, D)
      -> space: t t w w -> time: t t t t -> linear -> latent (B, N, 8), of unit length
      -> codes (B, N), or a Gaussian's mean (B, N, 8)
      -> linear -> time: t t t t -> space: t t t t -> patches of pixels

    clip, rate = read_clip("clip.mp4")
    tok = vistok.load("omnitokenizer-imagenet-k600")
    tokens = tok.encode(clip, rate=rate)      # codes (1, 1024 (1 + 4) ...) in windows of 17 frames
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.keys import KeyTable, State
from vistok.layout import Clips, Segment, Sizes, TokenSpec
from vistok.losses.adversarial import AdversarialLoss
from vistok.nn.space_time import SpaceTimeSize, SpaceTimeTransformer
from vistok.quantize import GaussianQuantizer, Quantized, VectorQuantizer
from vistok.registry import System
from vistok.tokenizer import TokenData
from vistok.tokenizers import _omnitokenizer_keys as keys
from vistok.tokenizers._judged import JudgedTokenizer, Perceptual

SCALES = (0.5, 0.75, 1.0, 1.25)  # by which the joint stage resizes each batch


@dataclass(frozen=True)
class OmniTokenizerConfig:
    """Sizes and kind of one OmniTokenizer.

    encoder_blocks, decoder_blocks  letters of the spatial transformers' blocks (see nn/space_time.py)
    time_blocks         blocks of each temporal transformer
    patch, frames       pixels of a patch along a side; frames of a patch after the first frame
    latent              "vq", or "kl" for continuous tokens
    token_dim           of a token; `normalize` scales latents to unit length before the codebook
    rotary              2D rotation in space; `biased` adds learned (without `rotary`) and ALiBi biases to the scores:
                        the checkpoint `imagenet_only` alone was trained with them
    scrambled           the temporal convolutions mix up their axes, as all released models have it: a clip's first
                        codes then depend on its last frames. False is causal
    window              frames that the model sees at once, at most
    resizes             training resizes each batch by one of 0.5, 0.75, 1 and 1.25
    rebuilt, matched    weights of the L1 term and of feature matching
    """

    size: SpaceTimeSize = field(default_factory=SpaceTimeSize)
    encoder_blocks: str = "ttww"
    decoder_blocks: str = "tttt"
    time_blocks: int = 4
    patch: int = 8
    frames: int = 4
    latent: Literal["vq", "kl"] = "vq"
    codebook_size: int = 8192
    token_dim: int = 8
    normalize: bool = True
    kl_weight: float = 1e-6
    space_window: int = 8
    rotary: bool = True
    biased: bool = False
    causal: bool = True
    causal_conv: bool = True
    scrambled: bool = True
    window: int = 17
    resolution: int = 256
    resizes: bool = False
    rebuilt: float = 4.0
    matched: float = 4.0
    version: int = 1

    def __post_init__(self) -> None:
        if self.window < 1 + self.frames or (self.window - 1) % self.frames:
            raise ConfigError(f"window {self.window} is not 1 + k * {self.frames} frames")
        if self.resolution % self.side:
            raise ConfigError(f"resolution {self.resolution} is not a multiple of {self.side}, patch times window")

    @property
    def side(self) -> int:
        """What sides of pictures are multiples of: a patch, or a window of patches."""
        windowed = "w" in self.encoder_blocks + self.decoder_blocks
        return self.patch * (self.space_window if windowed else 1)

    def transformer(self, axis: Literal["space", "time"], kinds: str) -> SpaceTimeTransformer:
        """One of the four transformers."""
        return SpaceTimeTransformer(
            kinds,
            self.size,
            axis=axis,
            window=self.space_window,
            causal=self.causal,
            causal_conv=self.causal_conv,
            rotary=self.rotary and axis == "space",
            biased=self.biased,
            scrambled=self.scrambled,
        )


class ClipEncoder(nn.Module):
    """Clips (B, 3, T, H, W) in [0, 1] to the latent (B, t, h, w, D), of a Gaussian 2 D."""

    def __init__(self, config: OmniTokenizerConfig) -> None:
        super().__init__()
        self.patch, self.frames, width = config.patch, config.frames, config.size.width
        self.normalize = config.normalize and config.latent == "vq"
        self.first, self.rest = (
            nn.Sequential(nn.LayerNorm(values), nn.Linear(values, width), nn.LayerNorm(width))
            for values in (3 * config.patch**2, 3 * config.frames * config.patch**2)
        )
        self.space = config.transformer("space", config.encoder_blocks)
        self.time = config.transformer("time", "t" * config.time_blocks)
        self.project = nn.Linear(width, config.token_dim * (2 if config.latent == "kl" else 1))

    def patches(self, clip: Tensor) -> Tensor:
        """Embedded patches (B, t, h, w, W)."""
        x, side = clip - 0.5, self.patch
        pattern = "b c (t f) (h p) (w q) -> b t h w (c f p q)"
        first = self.first(rearrange(x[:, :, :1], pattern, f=1, p=side, q=side))
        if x.shape[2] == 1:
            return first
        rest = self.rest(rearrange(x[:, :, 1:], pattern, f=self.frames, p=side, q=side))
        return torch.cat([first, rest], 1)

    def forward(self, clip: Tensor) -> Tensor:
        latent = self.project(self.time(self.space(self.patches(clip))))
        return F.normalize(latent, dim=-1) if self.normalize else latent


class ClipDecoder(nn.Module):
    """Vectors (B, t, h, w, D) to clips (B, 3, T, H, W), near [0, 1] but not clamped."""

    def __init__(self, config: OmniTokenizerConfig) -> None:
        super().__init__()
        self.patch, self.frames, width = config.patch, config.frames, config.size.width
        self.project = nn.Linear(config.token_dim, width)
        self.time = config.transformer("time", "t" * config.time_blocks)
        self.space = config.transformer("space", config.decoder_blocks)
        self.first = nn.Linear(width, 3 * config.patch**2)
        self.rest = nn.Linear(width, 3 * config.frames * config.patch**2)

    def forward(self, vectors: Tensor) -> Tensor:
        x = self.space(self.time(self.project(vectors)))
        pattern, side = "b t h w (c f p q) -> b c (t f) (h p) (w q)", self.patch
        clip = rearrange(self.first(x[:, :1]), pattern, f=1, p=side, q=side)
        if x.shape[1] > 1:
            rest = rearrange(self.rest(x[:, 1:]), pattern, f=self.frames, p=side, q=side)
            clip = torch.cat([clip, rest], 2)
        return clip + 0.5


class OmniTokenizer(JudgedTokenizer):
    """See the module's docstring. Sides are multiples of 64 pixels for windows of 8 patches of 8."""

    system = "omnitokenizer"
    config: OmniTokenizerConfig
    encoder: ClipEncoder
    decoder: ClipDecoder
    quantizer: VectorQuantizer | GaussianQuantizer

    def __init__(self, config: OmniTokenizerConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.encoder, self.decoder = ClipEncoder(config), ClipDecoder(config)
        if config.latent == "kl":
            self.quantizer = GaussianQuantizer(config.token_dim, weight=config.kl_weight)
        else:
            self.quantizer = VectorQuantizer(
                config.token_dim, config.codebook_size, learning="ema", commitment=0.25, decay=0.99, eps=1e-7
            )
        self.spec = TokenSpec(
            size=(config.resolution, config.resolution),
            layout=self._layout,
            sizes=Sizes(multiple=config.side, minimum=config.side),
            modality="video",
            clips=Clips(first=1, step=config.frames, maximum=config.window),
        )
        self._clip_judge: tuple[AdversarialLoss | None] = (None,)  # in a tuple, so that it is no part of the model

    def _layout(self, size: tuple[int, int], frames: int | None) -> tuple[Segment, ...]:
        config = self.config
        grid = (size[0] // config.patch, size[1] // config.patch)
        kind: dict[str, Any] = (
            {"dim": config.token_dim} if config.latent == "kl" else {"codebooks": (config.codebook_size,)}
        )
        first = Segment("first", (1, *grid), **kind)
        rest = ((frames or 1) - 1) // config.frames
        return (first, Segment("rest", (rest, *grid), **kind)) if rest else (first,)

    def tokenize(  # type: ignore[override]
        self, pixels: Tensor, spec: TokenSpec, *, seeds: list[int], sample: bool = False
    ) -> TokenData:
        """Codes (B, N), or of a Gaussian the mean (B, N, D); with `sample` a draw from each item's own seed."""
        latent = self.encoder(as_clip(self.prepare(pixels))).flatten(1, 3)
        if isinstance(self.quantizer, VectorQuantizer):
            return TokenData(codes=self.quantizer.encode(latent))
        return TokenData(vectors=self.quantizer.encode(latent, seed=seeds if sample else None).to(self.dtype))

    def detokenize(  # type: ignore[override]
        self, data: TokenData, spec: TokenSpec, *, seeds: list[int], dtype: torch.dtype
    ) -> Tensor:
        """Codes or vectors of all positions to pixels in [0, 1]: a picture where the spec has no frames."""
        vectors = self.quantizer.decode(data.codes) if data.vectors is None else data.vectors  # type: ignore[arg-type]
        grid = spec.single[0].shape[1:]
        clip = self.decoder(vectors.to(self.dtype).unflatten(1, (-1, *grid))).clamp(0, 1)
        return clip[:, :, 0] if spec.frames is None else clip

    def forward(self, pixels: Tensor, seed: int | None = None) -> Tensor:  # type: ignore[override]
        """Reconstruction, not clamped, of pictures (B, 3, H, W) or clips (B, 3, T, H, W) in [0, 1]."""
        clip, _ = self.rebuild(as_clip(self.prepare(pixels)), seed)
        return clip if pixels.ndim == 5 else clip[:, :, 0]

    def rebuild(self, clip: Tensor, seed: Any = None) -> tuple[Tensor, Quantized]:
        """Clips (B, 3, T, H, W) of legal size and frame count through all stages, and what the quantizer said."""
        latent = self.encoder(clip)
        flat = latent.flatten(1, 3)
        if isinstance(self.quantizer, GaussianQuantizer):
            quantized = self.quantizer(flat, seed=seed)
        else:
            quantized = self.quantizer(flat)
        vectors = quantized.vectors.to(latent.dtype).unflatten(1, latent.shape[1:4])
        return self.decoder(vectors), quantized

    # -- training ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, batches: Iterator[dict[str, Any]], rng: torch.Generator) -> None:
        """The codebook begins as latents of a first batch, drawn at random, as the authors' does."""
        if not isinstance(self.quantizer, VectorQuantizer):
            return
        latents = self.encoder(as_clip(self.prepare(next(batches)["pixels"]))).flatten(0, 3).float()
        chosen = torch.randint(len(latents), (self.config.codebook_size,), generator=rng, device=rng.device)
        rows = latents[chosen.to(latents.device)]
        self.quantizer.codebook.copy_(rows)
        self.quantizer.sums.copy_(rows)
        self.quantizer.counts.fill_(1)

    @torch.no_grad()
    def started(self) -> None:
        """Weights have been taken from a model of pictures: those for later frames follow from the first frame's.

        They are repeated and divided by the number of frames (the authors' "average").
        """
        table = key_table(self.config)
        theirs = table.to_theirs(self.state_dict())
        self.load_state_dict(table.to_ours(theirs | keys.inflate(theirs, self.config.frames)))

    def judge(  # type: ignore[override]
        self,
        adversary: AdversarialLoss | None = None,
        perceptual: Perceptual | None = None,
        clip_adversary: AdversarialLoss | None = None,
    ) -> None:
        """Set what judges reconstructions: pictures, and one random frame of each clip, by `adversary` and
        `perceptual`; whole clips by `clip_adversary`. Neither becomes part of the model.
        """
        super().judge(adversary, perceptual)
        self._clip_judge = (clip_adversary,)

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Training terms for `batch["pixels"]`, pictures (B, 3, H, W) or clips (B, 3, T, H, W) in [0, 1].

        "reconstruction": 4 L1; the quantizer's "commitment" or "kl"; with judges "perceptual", "adversarial",
        "clip_adversarial" and "matching". The reconstruction, detached, goes into `batch["reconstruction"]`, the frames
        that were judged into `batch["judged"]`, (real, fake).
        """
        clip = as_clip(self.prepare(batch["pixels"]))
        if self.config.resizes and self.training:
            clip = resized(clip, self.config.side, rng)
        seed = None
        if self.config.latent == "kl":
            seed = torch.randint(2**62, (len(clip),), generator=rng, device=rng.device).tolist()
        rebuilt, quantized = self.rebuild(clip, seed)
        batch["reconstruction"] = rebuilt.detach() if batch["pixels"].ndim == 5 else rebuilt.detach()[:, :, 0]
        terms = {"reconstruction": self.config.rebuilt * (rebuilt.float() - clip.float()).abs().mean()}
        frames = torch.randint(clip.shape[2], (len(clip),), generator=rng, device=rng.device).to(clip.device)
        rows = torch.arange(len(clip), device=clip.device)
        real, fake = clip[rows, :, frames], rebuilt[rows, :, frames]
        batch["judged"] = (real.detach(), fake.detach())
        batch["judged_clips"] = (clip.detach(), rebuilt.detach())
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(fake, real).mean()
        return terms | self._adversaries(terms, (real, fake), (clip, rebuilt), step) | quantized.losses

    def _adversaries(
        self, terms: dict[str, Tensor], frame: tuple[Tensor, Tensor], clips: tuple[Tensor, Tensor], step: int
    ) -> dict[str, Tensor]:
        """Terms of the judges of frames and of clips, and of matching their features."""
        found: dict[str, Tensor] = {}
        rebuilt, matching = torch.stack(list(terms.values())).sum(), []
        pairs = {"adversarial": (self._judges[0], *frame)}
        if clips[0].shape[2] > 1:
            pairs["clip_adversarial"] = (self._clip_judge[0], *clips)
        for name, (adversary, real, fake) in pairs.items():
            if adversary is None:
                continue
            found[name] = adversary.generator_loss(fake, rebuilt, self.decoder.first.weight, step)
            if hasattr(adversary.discriminator, "feature_distance") and self.config.matched and step >= adversary.start:
                judge: Any = adversary.discriminator
                matching.append(judge.feature_distance(real, fake))
        if matching:
            found["matching"] = self.config.matched * torch.stack(matching).sum()
        return found

    def discriminator_loss(self, batch: dict[str, Any], step: int) -> Tensor:
        """What the discriminators' optimiser minimises on the same batch, after `loss`."""
        if self._judges[0] is None and self._clip_judge[0] is None:
            raise ConfigError("no adversary: call judge(AdversarialLoss(...)) first")
        pairs = [(self._judges[0], batch["judged"])]
        if batch["judged_clips"][0].shape[2] > 1:
            pairs.append((self._clip_judge[0], batch["judged_clips"]))
        losses = [judge.discriminator_loss(pair[0], pair[1], step) for judge, pair in pairs if judge is not None]
        return torch.stack(losses).sum() if losses else batch["pixels"].new_zeros(())


def as_clip(pixels: Tensor) -> Tensor:
    """Pictures (B, C, H, W) as clips of one frame; clips pass."""
    return pixels if pixels.ndim == 5 else pixels[:, :, None]


def resized(clip: Tensor, side: int, rng: torch.Generator) -> Tensor:
    """All of a batch (B, C, T, H, W) by one random factor of SCALES, bilinear with aligned corners, to legal sides."""
    factor = SCALES[int(torch.randint(len(SCALES), (1,), generator=rng, device=rng.device))]
    size = [max(side, round(length * factor / side) * side) for length in clip.shape[-2:]]
    frames = clip.transpose(1, 2)
    scaled = F.interpolate(frames.flatten(0, 1), size=size, mode="bilinear", align_corners=True)
    return scaled.unflatten(0, frames.shape[:2]).transpose(1, 2)


# -- variants --------------------------------------------------------------------------------------------------------

IMAGES = OmniTokenizerConfig(frames=2, rotary=False)
JOINT = OmniTokenizerConfig(resizes=True)
_TINY = OmniTokenizerConfig(
    SpaceTimeSize(32, 2, 16), "tw", "tt", 1, frames=2, codebook_size=64, space_window=2, window=5, resolution=32
)

VARIANTS = {
    "omnitokenizer-imagenet-only": replace(IMAGES, biased=True),
    "omnitokenizer-celebahq-only": IMAGES,
    "omnitokenizer-ffhq-only": IMAGES,
    **{
        f"omnitokenizer-{pictures}-{clips}": JOINT
        for pictures, sets in (
            ("imagenet", ("ucf", "k600", "mit", "sthv2")),
            ("celebahq", ("ucf", "k600")),
            ("ffhq", ("ucf", "k600")),
        )
        for clips in sets
    },
    "omnitokenizer-imagenet-ucf-vae": replace(JOINT, latent="kl"),
    "omnitokenizer-imagenet-k600-vae": replace(JOINT, latent="kl"),
    "omnitokenizer-tiny": _TINY,
    "omnitokenizer-tiny-vae": replace(_TINY, latent="kl"),
    "omnitokenizer-tiny-biased": replace(_TINY, rotary=False, biased=True),
    "omnitokenizer-tiny-causal": replace(_TINY, scrambled=False),
    "omnitokenizer-clips": OmniTokenizerConfig(
        SpaceTimeSize(128, 4, 32), "tw", "tt", 1, codebook_size=1024, space_window=4, window=5, resolution=64
    ),
}


# -- published checkpoints -------------------------------------------------------------------------------------------


def key_table(config: OmniTokenizerConfig) -> KeyTable:
    """The authors' keys to ours, for a model of this config."""
    return keys.key_table(config)


def recognise(state: State) -> OmniTokenizerConfig | None:
    """The config that an authors' state dict fits; None where it is no OmniTokenizer.

    Whether it was trained with biases cannot be seen: of the released ones `imagenet_only.ckpt` alone was.
    """
    fields = keys.fields_of_state(state)
    return None if fields is None else OmniTokenizerConfig(**fields)


def configure(plain: Mapping[str, Any]) -> OmniTokenizerConfig:
    """The config that the authors' arguments describe, in either spelling of "causal". Raises ConfigError."""
    return OmniTokenizerConfig(**keys.fields_of_config(plain))


SYSTEM = System(
    "omnitokenizer",
    OmniTokenizer,
    OmniTokenizerConfig,
    VARIANTS,
    keys=key_table,
    recognise=recognise,
    configure=configure,
)
