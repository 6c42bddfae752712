"""vistok-progressive: the tokenizer made for disks. One embedded stream per picture, cut anywhere.

New here; it builds on embedded bit-plane coding (EZW, Shapiro 1993; JPEG 2000), time-domain lapped transforms (Tran,
Liang and Tu 2003) and learned entropy models (Balle et al. 2018). The analysis is fixed; what is learned is how likely
each bit is (`prior`) and what a picture looks like whose coefficients are only roughly known (`decoder`).

    pixels (B, 3, H, W)                            H, W multiples of 16
       |  colour KLT, lapped DCT at stride 16, the C channels of highest variance               `encoder`
    latent (B, C, H/16, W/16), in 8-bit levels
       |  plane p: step FIRST / 2^p; a coefficient is still zero, or becomes + or -, or is halved  `quantizer`
    codes (B, P h w, C), ternary: 0, 1 (+), 2 (-) before a coefficient is significant, 0 or 1 (upper half) after
       |  the middle of what is known of each coefficient
    latent (B, C, H/16, W/16)
       |  inverse transform + step x residual network at 1/16, 1/8 and 1/4                      `decoder`
    pixels (B, 3, H, W)

A segment is a plane, so every whole number of planes is a prefix. In a compressed file (`_progressive_coding`) a plane
is written most rewarding bits first, and every prefix of the file's bytes decodes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.layout import Segment, Size, Sizes, TokenSpec
from vistok.nn.lapped import BLOCK, LappedDct
from vistok.nn.windows import scaled, windows
from vistok.pixels import as_uint8
from vistok.registry import System
from vistok.tokenizer import TokenData, Tokenizer
from vistok.tokenizers._progressive_losses import draw_known, prior_loss
from vistok.tokenizers._progressive_prior import CENTRE, PlanePrior
from vistok.tokenizers._progressive_stream import PlaneStream
from vistok.tokenizers.strata import Block


@dataclass(frozen=True)
class ProgressiveConfig:
    """Sizes. `first`: step of the first plane, in 8-bit levels; each plane's is half of the one before.

    `groups`: channels of the prior's heads, the strongest first; their sum is C. `signed`: how many channels show the
    prior their signs. `widths`, `depths`: of the decoder at 1/16, 1/8 and 1/4. `rates`: bits per pixel that training
    draws from, evenly on a log scale. `init_pictures`: crops that the transform and the first probabilities are fitted
    to.
    """

    planes: int = 10
    first: float = 2048.0
    groups: tuple[int, ...] = (8, 24, 72, 152)
    signed: int = 64
    prior_width: int = 192
    prior_depth: int = 3
    head_width: int = 80
    widths: tuple[int, int, int] = (192, 96, 32)
    depths: tuple[int, int, int] = (4, 2, 2)
    rates: tuple[float, float] = (0.02, 0.9)
    init_pictures: int = 800
    version: int = 1

    def __post_init__(self) -> None:
        if not 1 <= sum(self.groups) <= 3 * BLOCK**2:
            raise ConfigError(f"groups hold {sum(self.groups)} channels; expected 1 to {3 * BLOCK**2}")
        if not 1 <= self.planes <= 16:
            raise ConfigError(f"{self.planes} planes; expected 1 to 16")

    @property
    def channels(self) -> int:
        """C, the coefficients at each position."""
        return sum(self.groups)

    def step(self, plane: int) -> float:
        """Step of a plane in 8-bit levels."""
        return self.first / 2**plane


# -- modules ---------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Pixels in [0, 1] (B, 3, H, W) -> latent (B, C, H/16, W/16) in 8-bit levels: the transform alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.transform = LappedDct(channels)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.transform(pixels) * 255


class PlaneQuantizer(nn.Module):
    """Latent <-> signed indices of a plane, (B, C, h, w): the number of whole steps in it, towards zero."""

    def __init__(self, config: ProgressiveConfig) -> None:
        super().__init__()
        self.planes = config.planes
        self.register_buffer("steps", torch.tensor([config.step(plane) for plane in range(config.planes)]), False)

    steps: Tensor

    def index(self, latent: Tensor, plane: Tensor) -> Tensor:
        """Signed whole steps of a plane, long (B,), in the latent (B, C, h, w), as floats."""
        return (latent / self.steps[plane][:, None, None, None]).trunc()

    def value(self, index: Tensor, step: Tensor) -> Tensor:
        """What an index stands for: the middle (`CENTRE`) of its interval, zero for zero."""
        return (index + CENTRE * index.sign()) * step

    def encode(self, latent: Tensor) -> list[Tensor]:
        """Codes of every plane, (B, C, h, w) each: int8."""
        last = (latent / self.steps[-1]).trunc().to(torch.int32)
        sign, size, found = last < 0, last.abs(), []
        for plane in range(self.planes):
            here = size >> (self.planes - 1 - plane)
            fresh = (here == 1) * (1 + sign.to(torch.int8))
            found.append(torch.where(here > 1, (here & 1).to(torch.int8), fresh.to(torch.int8)))
        return found

    def decode(self, codes: list[Tensor]) -> Tensor:
        """Codes of the first planes, (B, C, h, w) each -> signed indices of the last of them, int32."""
        total = torch.zeros_like(codes[0], dtype=torch.int32)
        for plane in codes:
            bits = plane.to(torch.int32).clamp_min(0)
            fresh = torch.where(bits == 2, -1, bits)
            total = torch.where(total == 0, fresh, 2 * total + bits * total.sign())
        return total


class Decoder(nn.Module):
    """Indices of a plane, in part still those of the plane before -> pixels (B, 3, 16 h, 16 w), not clipped.

    latent: (B, C, h, w) in 8-bit levels. known: (B, C, h, w), 1 where it is known to this plane's step, else 0.
    plane: long (B,); its step scales the residual.
    """

    steps: Tensor

    def __init__(self, config: ProgressiveConfig) -> None:
        super().__init__()
        (w16, w8, w4), (d16, d8, d4), planes = config.widths, config.depths, config.planes
        self.transform = LappedDct(config.channels)
        self.register_buffer("steps", torch.tensor([config.step(plane) for plane in range(planes)]), False)
        self.stem = nn.Conv2d(config.channels, w16, 3, padding=1)
        self.known = nn.Conv2d(config.channels, w16, 1, bias=False)
        self.blocks16 = nn.ModuleList(Block(w16, planes) for _ in range(d16))
        self.refine = nn.Conv2d(w16, config.channels, 1)
        self.up8 = nn.Conv2d(w16, 4 * w8, 1)
        self.blocks8 = nn.ModuleList(Block(w8, planes) for _ in range(d8))
        self.up4 = nn.Conv2d(w8, 4 * w4, 1)
        self.blocks4 = nn.ModuleList(Block(w4, planes) for _ in range(d4))
        self.head = nn.Conv2d(w4, 3 * 16, 3, padding=1)
        for layer in (self.head, self.refine):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            self.known.weight.mul_(0.3)

    def forward(self, latent: Tensor, known: Tensor, plane: Tensor) -> Tensor:
        step = self.steps[plane][:, None, None, None]
        h = self.stem(torch.asinh(latent / step)) + self.known(known)
        for block in self.blocks16:
            h = block(h, plane)
        latent = latent + 0.1 * step * self.refine(F.gelu(h)).to(latent.dtype)
        h = F.pixel_shuffle(self.up8(h), 2)
        for block in self.blocks8:
            h = block(h, plane)
        h = F.pixel_shuffle(self.up4(h), 2)
        for block in self.blocks4:
            h = block(h, plane)
        residual = F.pixel_shuffle(self.head(F.gelu(h)), 4).to(latent.dtype)
        return self.transform.inverse(latent / 255) + (0.1 / 255) * step * residual


# -- the tokenizer ---------------------------------------------------------------------------------------------------


class VistokProgressive(Tokenizer):
    """Encoder, quantizer, decoder and prior, with the losses of the two that are trained."""

    system: ClassVar[str] = "vistok-progressive"
    window = 96  # positions at 1/16 that are decoded at once, a side
    margin = 10  # at least the receptive field of the decoder

    def __init__(self, config: ProgressiveConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.encoder = Encoder(config.channels)
        self.quantizer = PlaneQuantizer(config)
        self.decoder = Decoder(config)
        self.prior = PlanePrior(
            config.planes, config.groups, config.signed, config.prior_width, config.prior_depth, config.head_width
        )

        def layout(size: Size) -> tuple[Segment, ...]:
            shape = (size[0] // BLOCK, size[1] // BLOCK)
            return tuple(Segment(f"plane{p}", shape, (3,) * config.channels) for p in range(config.planes))

        sizes = Sizes(multiple=BLOCK, minimum=BLOCK)
        self.spec = TokenSpec(size=(256, 256), layout=layout, sizes=sizes, prefix_rule="segments")

    @property
    def stream(self) -> PlaneStream:
        """What compressed files are made of."""
        return PlaneStream(self)

    # -- tokens ------------------------------------------------------------------------------------------------------

    def tokenize(self, pixels: Tensor, spec: TokenSpec, *, seeds: list[int], **conditions: Any) -> TokenData:
        """Codes of every plane."""
        codes = self.quantizer.encode(self.latent(pixels))  # type: ignore[operator]
        return TokenData(codes=torch.cat([plane.flatten(2).transpose(1, 2) for plane in codes], 1))

    def latent(self, pixels: Tensor) -> Tensor:
        """Coefficients in 8-bit levels, (B, C, H/16, W/16), of pixels of a legal size, window by window."""
        grid = (pixels.shape[2] // BLOCK, pixels.shape[3] // BLOCK)
        latent = torch.empty(len(pixels), self.config.channels, *grid, dtype=self.dtype, device=self.device)
        for outer, inner, cut in windows(grid, self.window, 1):
            part = self.encoder(self.prepare(pixels[(..., *scaled(outer, BLOCK))]))
            latent[(..., *inner)] = part[(..., *cut)]
        return latent

    def detokenize(
        self, data: TokenData, spec: TokenSpec, *, seeds: list[int], dtype: torch.dtype, **conditions: Any
    ) -> Tensor:
        """Pixels from the codes of the first planes; -1 in the last of them is a code that was not sent."""
        assert data.codes is not None
        (shape, *_), count = (segment.shape for segment in spec.segments), spec.segments[0].count
        codes = [part.transpose(1, 2).unflatten(2, shape) for part in data.codes.split(count, 1)]
        known = codes[-1] >= 0
        fine = self.quantizer.decode(codes)  # type: ignore[operator]
        coarse = self.quantizer.decode(codes[:-1]) if len(codes) > 1 else torch.zeros_like(fine)  # type: ignore[operator]
        return self.render(fine, coarse, known, len(codes) - 1, dtype)

    def render(self, fine: Tensor, coarse: Tensor, known: Tensor, plane: int, dtype: torch.dtype) -> Tensor:
        """Pixels from signed indices (B, C, h, w) of a plane, where `known`, and of the plane before elsewhere."""
        grid = (fine.shape[2], fine.shape[3])
        pixels = torch.empty(len(fine), 3, grid[0] * BLOCK, grid[1] * BLOCK, dtype=dtype, device=self.device)
        step, value = self.config.step(plane), self.quantizer.value
        planes = torch.full((len(fine),), plane, device=self.device)
        for outer, inner, cut in windows(grid, self.window, self.margin):
            here = (..., *outer)
            seen = known[here].to(self.device)
            indices = (part[here].to(self.device, self.dtype) for part in (fine, coarse))
            latent = torch.where(seen, value(next(indices), step), value(next(indices), 2 * step))  # type: ignore[operator]
            part = self.decoder(latent, seen.to(self.dtype), planes).clamp(0, 1)[(..., *scaled(cut, BLOCK))]
            pixels[(..., *scaled(inner, BLOCK))] = as_uint8(part) if dtype == torch.uint8 else part.to(dtype)
        return pixels

    def embed(self, tokens: Any) -> Tensor:
        """What each plane adds to the latent, float (B, n, C) in 8-bit levels: the planes of a prefix sum to it."""
        self._check_source(tokens)
        count, codes = tokens.segments[0].count, tokens.codes.to(self.device)
        total, found = torch.zeros(len(codes), count, codes.shape[2], device=self.device), []
        planes = codes.split(count, 1)
        for plane, part in enumerate(planes):
            index = self.quantizer.decode(list(planes[: plane + 1])).float()  # type: ignore[operator]
            value = self.quantizer.value(index, self.config.step(plane))  # type: ignore[operator]
            value = torch.where(part < 0, total, value)  # not sent: nothing is added
            found.append(value - total)
            total = value
        return torch.cat(found, 1).to(self.dtype)

    def forward(self, pixels: Tensor, **conditions: Any) -> Tensor:
        """Reconstruction from all planes, (B, 3, H, W), not clipped."""
        plane = torch.full((len(pixels),), self.config.planes - 1, device=self.device)
        index = self.quantizer.index(self.encoder(self.prepare(pixels)), plane)  # type: ignore[operator]
        latent = self.quantizer.value(index, self.config.step(self.config.planes - 1))  # type: ignore[operator]
        return self.decoder(latent, torch.ones_like(latent), plane)

    # -- training ----------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """The terms of whichever of prior and decoder is not frozen; they do not touch each other.

        Each picture is seen at one plane: the one whose step its k-th largest coefficient has, where k is what a rate
        drawn from `config.rates` pays for. `rng` draws rate, pass, and how much of the plane is known.
        """
        pixels = batch["pixels"]
        with torch.autocast(pixels.device.type, enabled=False), torch.no_grad():
            latent = self.encoder(pixels.float())
        plane = self._draw_planes(latent, rng)
        terms: dict[str, Tensor] = {}
        if any(parameter.requires_grad for parameter in self.prior.parameters()):
            terms |= prior_loss(self.prior, self.quantizer, latent, plane, rng)  # type: ignore[arg-type]
        if any(parameter.requires_grad for parameter in self.decoder.parameters()):
            terms["decoder"] = self._decoder_loss(pixels, latent, plane, rng)
        return terms

    def _draw_planes(self, latent: Tensor, rng: torch.Generator) -> Tensor:
        """The plane that each picture is seen at, long (B,)."""
        count, pixels = len(latent), latent[0, 0].numel() * BLOCK**2
        low, high = (torch.tensor(rate).log() for rate in self.config.rates)
        rate = torch.rand(count, generator=rng, device=rng.device).to(latent) * (high - low) + low
        kth = (rate.exp() * pixels / BITS_A_COEFFICIENT).long().clamp(1, latent[0].numel())
        sizes = latent.abs().flatten(1).sort(1, descending=True).values
        reach = sizes.gather(1, kth[:, None] - 1)[:, 0].clamp_min(1e-3)
        dither = torch.rand(count, generator=rng, device=rng.device).to(latent)
        plane = (self.config.first / reach).log2() + dither
        any_plane = torch.randint(self.config.planes, (count,), generator=rng, device=rng.device).to(latent.device)
        rare = torch.rand(count, generator=rng, device=rng.device).to(latent) < 0.1
        return torch.where(rare, any_plane, plane.floor().long().clamp(0, self.config.planes - 1))

    def _decoder_loss(self, pixels: Tensor, latent: Tensor, plane: Tensor, rng: torch.Generator) -> Tensor:
        """Mean log of each picture's mean squared error: the natural loss for mean PSNR."""
        with torch.no_grad():
            step = self.quantizer.steps[plane][:, None, None, None]  # type: ignore[index]
            fine = self.quantizer.index(latent, plane)  # type: ignore[operator]
            coarse = (fine / 2).trunc()
            known = draw_known(latent, coarse, step, rng)
            value = self.quantizer.value  # type: ignore[operator]
            rough = torch.where(known, value(fine, step), value(coarse, 2 * step))  # type: ignore[operator]
        rebuilt = self.decoder(rough, known.to(rough), plane).float()
        return ((rebuilt - pixels).square().mean((1, 2, 3)) + 1e-6).log().mean()

    @torch.no_grad()
    def initialise(self, batches: Iterator[dict[str, Any]], rng: torch.Generator) -> None:
        """Fit the transform, then the prior's offsets: how often each channel becomes nonzero at each plane."""
        pictures: list[Tensor] = []
        while sum(len(part) for part in pictures) < self.config.init_pictures:
            pictures.append(next(batches)["pixels"].to(self.device))
        transform: LappedDct = self.encoder.transform  # type: ignore[assignment]
        transform.fit(pictures)
        self.decoder.transform.load_state_dict(transform.state_dict())  # type: ignore[union-attr]
        latent = torch.cat([self.encoder(part) for part in pictures])
        for plane in range(self.config.planes):
            step = self.config.step(plane)
            open_ = (latent.abs() < 2 * step).float().sum((0, 2, 3))
            fresh = ((latent.abs() < 2 * step) & (latent.abs() >= step)).float().sum((0, 2, 3))
            odds = ((fresh + 0.02) / (open_ - fresh + 1)).log()
            self.prior.offset[plane, : self.config.channels] = odds


BITS_A_COEFFICIENT = 6.0  # of a file, for each coefficient that is not zero: turns a rate into a step


TINY = ProgressiveConfig(
    planes=6,
    first=1024.0,
    groups=(4, 12, 32),
    signed=16,
    prior_width=32,
    prior_depth=1,
    head_width=16,
    widths=(24, 16, 8),
    depths=(1, 1, 1),
    init_pictures=64,
)

SYSTEM = System(
    slug="vistok-progressive",
    model=VistokProgressive,
    config=ProgressiveConfig,
    variants={"vistok-progressive": ProgressiveConfig(), "vistok-progressive-tiny": TINY},
)
