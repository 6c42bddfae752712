"""The KL autoencoder of the Stable Diffusion line, from the `diffusers` package, as a frozen space to work in.

    pixels (B, 3, H, W) in [0, 1] -> posterior's mean, or a draw, / deviation -> latent (B, C, H / f, W / f) -> back

`AutoencoderKL` and its names in checkpoints are diffusers'. It is imported when a model with one is built
(`pip install 'vistok[models]'`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.extras import import_extra
from vistok.processes import sum_over_processes

MOMENTUM = 0.02  # share of a batch in the running variance


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of an AutoencoderKL.

    latent_dim   C
    widths       channels of each level, full resolution first; f = 2^(levels - 1)
    blocks       residual blocks per level of the encoder; the decoder has one more
    groups       of its group norms
    scale        1 / deviation of the latents, which are multiplied by it
    """

    latent_dim: int = 16
    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ConfigError(f"a VAE's scale must be above 0, got {self.scale}")
        if not self.widths or any(width % self.groups for width in self.widths):
            raise ConfigError(f"widths {self.widths} must be multiples of the {self.groups} groups")

    @property
    def factor(self) -> int:
        """f: pixels per latent position, along one side."""
        return 2 ** (len(self.widths) - 1)


class VAE(nn.Module):
    """See the module's docstring. Raises MissingExtraError without diffusers."""

    running_var: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        levels = len(config.widths)
        self.model = import_extra("diffusers", "models").AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.widths,
            layers_per_block=config.blocks,
            latent_channels=config.latent_dim,
            norm_num_groups=config.groups,
            scaling_factor=config.scale,
        )

        self.register_buffer("running_var", torch.tensor(config.scale**-2))

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, (B, C, h, w) each and not scaled, of pixels (B, 3, H, W) in [0, 1]."""
        found = self.model.encode(pixels * 2 - 1).latent_dist
        return found.mean, found.logvar

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (B, C, h, w) of pixels in [0, 1]: the posterior's mean, or a draw by standard normal `noise`."""
        mean, log_variance = self.posterior(pixels)
        if noise is not None:
            mean = mean + torch.exp(log_variance / 2) * noise.to(mean)
        return mean / self.deviation

    def decode(self, latent: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), near [0, 1] but not clamped, of latents (B, C, h, w)."""
        return (self.model.decode(latent * self.deviation).sample + 1) / 2

    def rebuild(self, pixels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """For training: pixels of a draw, and the mean over items of the KL divergence to a standard normal.

        In training mode the variance of the latents is followed, so that they stay of deviation 1 for who works here.
        """
        mean, log_variance = self.posterior(pixels)
        noise = torch.randn(mean.shape, generator=rng, device=rng.device).to(mean)
        latent = mean + torch.exp(log_variance / 2) * noise
        if self.training:
            self._observe(latent.detach().double())
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1).mean()
        return (self.model.decode(latent).sample + 1) / 2, kl

    @torch.no_grad()
    def _observe(self, latent: Tensor) -> None:
        count = latent.new_tensor(latent.numel())
        total, square, count = sum_over_processes(torch.stack([latent.sum(), latent.square().sum(), count])).unbind()
        variance = square / count - (total / count).square()
        self.running_var.lerp_(variance.to(self.running_var), MOMENTUM)

    @property
    def deviation(self) -> Tensor:
        """What latents are divided by, a scalar: 1 / scale, or that of the latents seen in training."""
        return self.running_var.sqrt()

    @property
    def last_layer(self) -> Tensor:
        """The weight at which an adaptive adversarial weight compares gradients."""
        return self.model.decoder.conv_out.weight


class PixelSpace(nn.Module):
    """Stands where a VAE would: the latent is the pixels in [-1, 1]."""

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] to [-1, 1]."""
        return pixels * 2 - 1

    def decode(self, latent: Tensor) -> Tensor:
        """The inverse of `encode`."""
        return (latent + 1) / 2
