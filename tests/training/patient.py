"""A small tokenizer with a codebook, and one switch for each disease that a model can have."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vistok.layout import Segment, Sizes, TokenSpec
from vistok.losses.adversarial import AdversarialLoss
from vistok.quantize import EntropyTerm, VectorQuantizer
from vistok.registry import System, register
from vistok.tokenizer import Tokenizer


@dataclass(frozen=True)
class PatientConfig:
    width: int = 4
    codebook_size: int = 32
    restart_below: float = 0.0
    learning: str = "gradient"
    entropy: float = 0.0
    normalised: bool = True  # latents of deviation 1, as the codebook's rows have it at first
    spread: float = 1.0  # of the codebook's rows at first
    signed: bool = False  # the loss compares in [-1, 1], and nobody brings the output back
    idle: bool = False  # a term that is always zero
    detached: bool = False  # a term without gradient
    saturated: bool = False  # an activation far out on its flat side before the codebook
    blocked: bool = False  # no gradient to the encoder
    version: int = 1


class Patient(Tokenizer):
    system = "patient"

    def __init__(self, config: PatientConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        width = config.width
        scale = nn.BatchNorm2d(width, affine=False) if config.normalised else nn.Identity()
        self.encoder = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.GELU(), nn.Conv2d(32, width, 1), scale)
        self.quantizer = VectorQuantizer(
            width,
            config.codebook_size,
            learning=config.learning,  # type: ignore[arg-type]
            restart_below=config.restart_below,
            entropy=EntropyTerm(weight=config.entropy, temperature=1.0) if config.entropy else None,
        )
        self.decoder = nn.Sequential(nn.Conv2d(width, 64, 1), nn.GELU(), nn.ConvTranspose2d(64, 3, 4, 4))
        self.spec = TokenSpec(
            size=(16, 16),
            layout=lambda size: (Segment("grid", (size[0] // 4, size[1] // 4), (config.codebook_size,)),),
            sizes=Sizes(multiple=4, minimum=4),
        )
        with torch.no_grad():
            self.quantizer.codebook.normal_(0, config.spread)

        self._judge: list[AdversarialLoss | None] = [None]

    def judge(self, adversary: AdversarialLoss | None = None, perceptual: Any = None) -> None:
        self._judge = [adversary]  # in a list: no part of the model

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        pixels, config = batch["pixels"], self.config
        latent = self.encoder(pixels)
        if config.saturated:
            latent = torch.tanh(latent * 1e6)
        if config.blocked:
            latent = latent.detach()
        quantized = self.quantizer(latent.flatten(2).transpose(1, 2))
        image = self.decoder(quantized.vectors.transpose(1, 2).unflatten(2, latent.shape[2:]))
        target = pixels * 2 - 1 if config.signed else pixels
        terms = {"reconstruction": (image - target).square().mean(), **quantized.losses}
        batch["reconstruction"] = image.detach()
        adversary = self._judge[0]
        if adversary is not None:
            last = self.decoder[-1].weight
            terms["adversarial"] = adversary.generator_loss(image, terms["reconstruction"], last, step)
        if config.idle:
            terms["perceptual"] = image.new_zeros(())
        if config.detached:
            terms["edges"] = (image.detach().diff(dim=-1) - target.diff(dim=-1)).abs().mean()
        return terms

    def discriminator_loss(self, batch: dict[str, Any], step: int) -> Tensor:
        assert self._judge[0] is not None
        return self._judge[0].discriminator_loss(batch["pixels"], batch["reconstruction"], step)


register(System("patient", Patient, PatientConfig, {"patient": PatientConfig()}))
