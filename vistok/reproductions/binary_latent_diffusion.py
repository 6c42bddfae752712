"""Binary latent diffusion's claims at small scale: bits beat a codebook, and few steps sample them.

A small convolutional autoencoder with 4x4 positions on 32x32 pictures, squared error, two seeds.

1. 16 bits a position against one of 1024 codes (VQ whose dead codes restart): shown if the bits' error on test pictures
   is at most 0.9 of the codes' in both seeds. 10 bits, the same rate, are reported for one seed.
2. Bernoulli diffusion over the bits, 64 steps, sampled in 64, 16 and 4; the rival is absorbing-state (masked) diffusion
   with the same transformer on the codes. Frechet distances in the pooled features of a small classifier trained here,
   of unconditional samples: E to the autoencoder's own reconstructions, D to the test pictures. Shown if in both seeds
   E(16) <= 1.15 E(64), E(4) >= 1.2 E(16), and D(16) of the bits is at most 0.95 of the rival's.

That an oracle gives the data back at any number of steps is a test of its own (`tests/sampling/test_bernoulli.py`).
Probabilities are calibrated by plain cross-entropy, not the balanced one. Few training steps blur everything: the
distance of plain reconstructions, the floor of both systems, is reported.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import cos, pi
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.generators.binary_latent_diffusion import VARIANTS, BinaryDiffusion
from vistok.metrics.frechet import frechet_distance
from vistok.nn.positions import sincos_2d
from vistok.nn.transformer import Block
from vistok.quantize import Quantizer, VectorQuantizer
from vistok.quantize.bernoulli import BernoulliQuantizer
from vistok.reproductions._small import SmallDecoder, SmallEncoder, batches, fit, pictures
from vistok.reproductions.fqgan import Teacher
from vistok.sampling.noise import uniforms
from vistok.sampling.tokens import Sampling, draw

WIDTHS, DIM, CODES = (32, 64, 64), 32, 1024
VISITED = (64, 16, 4)


class Small(nn.Module):
    """An autoencoder around a quantizer."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.encoder, self.decoder = SmallEncoder(WIDTHS, DIM), SmallDecoder(WIDTHS, DIM)
        self.quantizer = quantizer

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes of pixels."""
        return self.quantizer.encode(self.encoder(pixels).flatten(2).transpose(1, 2))

    def decode(self, vectors: Tensor) -> Tensor:
        """Pixels of vectors (B, N, D)."""
        return self.decoder(vectors.transpose(1, 2).unflatten(2, (4, 4)))

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Squared error in [-1, 1] and the quantizer's terms."""
        if isinstance(self.quantizer, BernoulliQuantizer):
            self.quantizer.rng = rng
        out = self.quantizer(self.encoder(batch["pixels"]).flatten(2).transpose(1, 2))
        return {"squared": 4 * (self.decode(out.vectors) - batch["pixels"]).square().mean(), **out.losses}


def quantizer_of(arm: str) -> Quantizer:
    """ "bits-16", "bits-10", or "codes"."""
    if arm == "codes":
        return VectorQuantizer(DIM, CODES, restart_below=1.0)
    return BernoulliQuantizer(DIM, int(arm.removeprefix("bits-")))


class MaskedDiffusion(nn.Module):
    """Absorbing-state diffusion over codes (B, N) with the denoiser's transformer: the rival."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.table = nn.Embedding(CODES + 1, width)  # the last row is the mask
        self.positions = nn.Parameter(sincos_2d(4, 4, width)[None])
        self.blocks = nn.ModuleList(Block(width, heads, layer_scale=1.0) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CODES)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.table(codes) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy at masked positions, weighted by one over their share."""
        codes = batch["codes"]
        share = torch.rand(len(codes), 1, generator=rng).clamp(min=1 / codes.shape[1])
        masked = torch.rand(codes.shape, generator=rng) < share
        logits = self(torch.where(masked, CODES, codes))
        each = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none") * masked / share
        return {"cross_entropy": each.mean()}

    @torch.no_grad()
    def sample(self, count: int, steps: int, seed: int) -> Tensor:
        """Codes (count, 16), some more of them uncovered in each of at most 16 steps, in a random order."""
        noise = uniforms(range(seed, seed + count), (16, 2))
        order, codes, hidden = noise[..., 0].argsort(1), torch.full((count, 16), CODES), 16
        for step in range(steps):
            left = min(hidden, int(16 * cos(pi / 2 * (step + 1) / steps))) if step + 1 < steps else 0
            places = order[:, left:hidden]
            if places.shape[1]:
                logits = self(codes).gather(1, places[..., None].expand(-1, -1, CODES))
                codes = codes.scatter(1, places, draw(logits, noise[..., 1].gather(1, places), Sampling()))
            hidden = left
        return codes


def measure(
    train: Any,
    test: Any,
    *,
    steps: int = 1200,
    diffusion_steps: int = 3000,
    teacher_steps: int = 1500,
    seeds: tuple[int, ...] = (0, 1),
    items: int = 50_000,
    test_items: int = 2000,
    samples: int = 2000,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """All numbers of the docstring, lists over seeds. `train` and `test` are what `open_source` takes, with labels."""
    pixels, labels = pictures(train, items)
    test_pixels, _ = pictures(test, test_items)
    torch.manual_seed(0)
    teacher = Teacher()
    tell(f"feature network: {teacher_steps} steps")
    fit(teacher, teacher.loss, batches(pixels, labels, 64, 0), teacher_steps, tell=tell)
    seen = features(teacher, test_pixels)
    found: dict[str, Any] = {"mse": {}, "distance": {}, "floor": {}}
    for seed in seeds:
        for arm in ("bits-16", "codes", *(("bits-10",) if seed == seeds[0] else ())):
            torch.manual_seed(seed)
            model = Small(quantizer_of(arm))
            tell(f"{arm}, seed {seed}: {steps} steps")
            fit(model, model.loss, batches(pixels, labels, 64, seed), steps, seed=seed, tell=tell)
            rebuilt = decoded(model, encoded(model, test_pixels))
            error = float((rebuilt - test_pixels.float() / 255).square().mean())
            found["mse"].setdefault(arm, []).append(error)
            tell(f"{arm}, seed {seed}: squared error {error:.5f}")
            if arm == "bits-10" or not diffusion_steps:
                continue
            own = features(teacher, rebuilt)
            found["floor"].setdefault(arm, []).append(frechet_distance(own, seen))
            tell(f"diffusion on {arm}: {diffusion_steps} steps")
            sample = prior(arm, encoded(model, pixels), diffusion_steps, seed, tell)
            for count in VISITED:
                drawn = features(teacher, decoded(model, sample(samples, count, 10_000 * seed)))
                numbers = {"E": frechet_distance(drawn, own), "D": frechet_distance(drawn, seen)}
                found["distance"].setdefault(arm, {}).setdefault(str(count), []).append(numbers)
                tell(f"{arm}, seed {seed}, {count} steps: {numbers}")
    return found


def prior(arm: str, codes: Tensor, steps: int, seed: int, tell: Any) -> Callable[[int, int, int], Tensor]:
    """A diffusion trained on codes; gives a function of (count, steps, seed) to codes."""
    torch.manual_seed(seed)

    def data() -> Iterator[dict[str, Any]]:
        rng = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(len(codes), generator=rng).split(64):
                yield {"codes": codes[rows]}

    config = replace(VARIANTS["binary-latent-diffusion-generator-tiny"], classes=None, focal=-1.0)
    if arm == "codes":
        rival = MaskedDiffusion(config.width, config.depth, config.heads)
        fit(rival, rival.loss, data(), steps, lr=5e-4, seed=seed, tell=tell)
        return rival.sample
    model = BinaryDiffusion(config)
    fit(model, model.loss, data(), steps, lr=5e-4, seed=seed, tell=tell)

    def sample(count: int, visited: int, first: int) -> Tensor:
        found = []
        for rows in torch.arange(first, first + count).split(200):
            codes = model.generate(count=len(rows), steps=visited, seed=int(rows[0])).codes
            assert codes is not None
            found.append(codes)
        return torch.cat(found)

    return sample


@torch.no_grad()
def encoded(model: Small, pixels: Tensor) -> Tensor:
    """Codes of uint8 pixels, 200 at a time."""
    return torch.cat([model.encode(part.float() / 255) for part in pixels.split(200)])


@torch.no_grad()
def decoded(model: Small, codes: Tensor) -> Tensor:
    """Pixels in [0, 1] of codes, 200 at a time."""
    return torch.cat([model.decode(model.quantizer.decode(part)).clamp(0, 1) for part in codes.split(200)])


@torch.no_grad()
def features(teacher: Teacher, pixels: Tensor) -> Tensor:
    """Pooled features (n, 64) of pixels, uint8 or in [0, 1]."""
    floating = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    return torch.cat([teacher(part) for part in floating.split(200)])


def judge(found: dict[str, Any]) -> dict[str, bool]:
    """The rules of the docstring, applied to what `measure` gave."""
    bits, codes = found["mse"]["bits-16"], found["mse"]["codes"]
    shown = {"16 bits beat 1024 codes": all(a <= 0.9 * b for a, b in zip(bits, codes, strict=True))}
    if not found["distance"]:
        return shown
    ours, theirs = found["distance"]["bits-16"], found["distance"]["codes"]
    fewer = zip(ours["16"], ours["64"], strict=True)
    fewest = zip(ours["4"], ours["16"], strict=True)
    rivals = zip(ours["16"], theirs["16"], strict=True)
    return shown | {
        "16 steps are enough": all(a["E"] <= 1.15 * b["E"] for a, b in fewer),
        "4 steps are not": all(a["E"] >= 1.2 * b["E"] for a, b in fewest),
        "bits are sampled better than codes": all(a["D"] <= 0.95 * b["D"] for a, b in rivals),
    }
