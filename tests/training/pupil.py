"""A small tokenizer that trains: 4x4 patches, a codebook kept as a buffer, and every kind of randomness a model has."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.layout import Segment, Sizes, TokenSpec
from vistok.registry import System, register
from vistok.tokenizer import Tokenizer


@dataclass(frozen=True)
class PupilConfig:
    width: int = 8
    codebook: int = 16
    dropout: float = 0.1
    noise: float = 0.05
    pace: float = 0.1  # of the codebook
    broken_at: int = -1  # the step whose loss is not a number
    version: int = 1


class Codebook(nn.Module):
    """Nearest neighbours in a codebook that follows the latents as a running mean, as EMA quantizers do."""

    vectors: Tensor

    def __init__(self, size: int, width: int, pace: float) -> None:
        super().__init__()
        self.pace = pace
        self.register_buffer("vectors", torch.randn(size, width))

    def encode(self, latent: Tensor) -> Tensor:
        return torch.cdist(latent, self.vectors[None].expand(len(latent), -1, -1)).argmin(-1)

    def decode(self, codes: Tensor) -> Tensor:
        return self.vectors[codes]

    @torch.no_grad()
    def follow(self, latent: Tensor, codes: Tensor) -> None:
        flat, chosen = latent.detach().float().flatten(0, 1), codes.flatten()
        count = torch.zeros(len(self.vectors)).index_add_(0, chosen, torch.ones(len(chosen)))
        total = torch.zeros_like(self.vectors).index_add_(0, chosen, flat)
        used = count > 0
        self.vectors[used] += self.pace * (total[used] / count[used, None] - self.vectors[used])


class Pupil(Tokenizer):
    system = "pupil"

    def __init__(self, config: PupilConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.encoder = nn.Sequential(nn.Conv2d(3, config.width, 4, 4), nn.BatchNorm2d(config.width))
        self.quantizer = Codebook(config.codebook, config.width, config.pace)
        self.decoder = nn.ConvTranspose2d(config.width, 3, 4, 4)
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.long))
        self.spec = TokenSpec(
            size=(16, 16),
            layout=lambda size: (Segment("grid", (size[0] // 4, size[1] // 4), (config.codebook,)),),
            sizes=Sizes(multiple=4, minimum=4),
        )

    def initialise(self, batches: Iterator[dict[str, Any]], rng: torch.Generator) -> None:
        latent = self.encoder(next(batches)["pixels"]).flatten(2).transpose(1, 2).flatten(0, 1)
        self.quantizer.vectors.copy_(latent[torch.randperm(len(latent), generator=rng)[: len(self.quantizer.vectors)]])

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        pixels = batch["pixels"]
        noise = torch.randn(pixels.shape, generator=rng) * self.config.noise
        latent = F.dropout(self.encoder(pixels + noise), self.config.dropout, self.training)
        sequence = latent.flatten(2).transpose(1, 2)
        codes = self.quantizer.encode(sequence.float())
        self.quantizer.follow(sequence, codes)
        chosen = self.quantizer.decode(codes).transpose(1, 2).unflatten(2, latent.shape[-2:])
        rebuilt = self.decoder(latent + (chosen - latent).detach())
        broken = float("nan") if step == self.config.broken_at else 1.0
        return {"pixels": F.mse_loss(rebuilt, pixels), "commitment": 0.1 * broken * F.mse_loss(latent, chosen.detach())}

    def after_step(self, step: int) -> None:
        self.steps_seen += 1


register(System("pupil", Pupil, PupilConfig, {"pupil": PupilConfig(), "pupil-wide": PupilConfig(width=32)}))
