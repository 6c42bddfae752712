"""The adversarial loss of the VQGAN line: a patch discriminator, hinge losses, and the adaptive weight.

    pixels (B, 3, H, W) -> 4x4 convolutions, stride 2, .. -> logits (B, 1, H/8 - 2, W/8 - 2), one per overlapping patch

Sources: pix2pix (arXiv:1611.07004) for the discriminator; VQGAN (2012.09841, eq. 7) for the weight, with the constants
of its code (delta 1e-4 where the paper has 1e-6; the ratio is clamped to 1e4).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError


class PatchDiscriminator(nn.Module):
    """PatchGAN: `layers` strided stages, then logits per patch, (B, C, H, W) -> (B, 1, h, w).

    The first stage has no normalisation; later ones have BatchNorm. Weights start at N(0, 0.02).
    """

    def __init__(self, channels: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        if width < 1 or layers < 1:
            raise ConfigError(f"a patch discriminator needs width and layers of at least 1, got {width} and {layers}")
        stages: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        entering = width
        for stage in range(1, layers + 1):
            leaving = width * min(2**stage, 8)
            stride = 2 if stage < layers else 1
            stages += [
                nn.Conv2d(entering, leaving, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(leaving),
                nn.LeakyReLU(0.2),
            ]
            entering = leaving
        self.main = nn.Sequential(*stages, nn.Conv2d(entering, 1, 4, stride=1, padding=1))
        self.apply(_start_small)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W), in the range that the generator works in, to logits (B, 1, h, w)."""
        return self.main(pixels)


class AdversarialLoss(nn.Module):
    """A discriminator and how much it counts.

    start     training step from which it acts; before, both of its losses are 0
    weight    of the generator's term, and with `adaptive` false of the discriminator's own loss too if `scales_both`
    adaptive  scale the generator's term so that its gradient at the last layer is as large as the reconstruction's,
              by at most `limit`

    The discriminator is trained by an optimiser of its own: minimise `discriminator_loss` over `parameters()`.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        start: int = 0,
        weight: float = 0.8,
        adaptive: bool = True,
        scales_both: bool = False,
        limit: float = 1e4,
    ) -> None:
        super().__init__()
        self.discriminator, self.limit = discriminator, limit
        self.start, self.weight, self.adaptive, self.scales_both = start, weight, adaptive, scales_both

    def generator_loss(self, fake: Tensor, reconstruction_loss: Tensor, last_layer: Tensor, step: int) -> Tensor:
        """The weighted term, a scalar: -weight * lambda * mean D(fake). `fake` (B, C, H, W) carries its graph."""
        if step < self.start:
            return fake.new_zeros(())
        term = generator_hinge(self.discriminator(fake))
        weight: float | Tensor = self.weight
        if self.adaptive and torch.is_grad_enabled():
            weight = self.weight * adaptive_weight(reconstruction_loss, term, last_layer, self.limit)
        return weight * term

    def discriminator_loss(self, real: Tensor, fake: Tensor, step: int) -> Tensor:
        """Hinge loss on real and generated pixels; no gradient reaches `fake`."""
        if step < self.start:
            return real.new_zeros(())
        loss = discriminator_hinge(self.discriminator(real.detach()), self.discriminator(fake.detach()))
        return self.weight * loss if self.scales_both else loss


def generator_hinge(fake_logits: Tensor) -> Tensor:
    """-mean D(fake)."""
    return -fake_logits.mean()


def discriminator_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(mean relu(1 - D(real)) + mean relu(1 + D(fake))) / 2."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def adaptive_weight(
    reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor, limit: float = 1e4
) -> Tensor:
    """lambda = |d reconstruction / d last| / (|d generator / d last| + 1e-4), clamped to [0, limit]; no gradient."""
    reference = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)[0]
    adversarial = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)[0]
    return (reference.norm() / (adversarial.norm() + 1e-4)).clamp(0, limit).detach()


def _start_small(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
