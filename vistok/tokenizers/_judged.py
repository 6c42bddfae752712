"""Tokenizers whose reconstructions are judged in training by a perceptual distance and a discriminator."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vistok.errors import ConfigError
from vistok.losses.adversarial import AdversarialLoss
from vistok.tokenizer import Tokenizer

Perceptual = Callable[[Tensor, Tensor], Tensor]


class JudgedTokenizer(Tokenizer):
    """Adds `judge` and the discriminator's turn. Judges take pixels in [0, 1] and shift them to their own range.

    `loss` of a system puts its reconstruction in [0, 1], detached, into `batch["reconstruction"]`.
    """

    _judges: tuple[AdversarialLoss | None, Perceptual | None] = (None, None)

    def judge(self, adversary: AdversarialLoss | None = None, perceptual: Perceptual | None = None) -> None:
        """Set what judges reconstructions in `loss`. Neither becomes part of the model or of its weights.

        `perceptual` takes reconstruction and target and gives distances whose mean is the term (LPIPS).
        """
        self._judges = (adversary, perceptual)

    @property
    def perceptual(self) -> Perceptual | None:
        """The perceptual judge."""
        return self._judges[1]

    def adversarial_terms(
        self, image: Tensor, terms: dict[str, Tensor], last_layer: Tensor, step: int
    ) -> dict[str, Tensor]:
        """{"adversarial": ..} of a reconstruction (B, 3, H, W) in [0, 1] that carries its graph; {} without adversary.

        `terms` are those of the reconstruction, against whose gradient at `last_layer` the term is weighed.
        """
        adversary = self._judges[0]
        if adversary is None:
            return {}
        rebuilt = torch.stack(list(terms.values())).sum()
        return {"adversarial": adversary.generator_loss(image, rebuilt, last_layer, step)}

    def discriminator_loss(self, batch: dict[str, Any], step: int) -> Tensor:
        """What the discriminator's optimiser minimises on the same batch, after `loss`."""
        adversary = self._judges[0]
        if adversary is None:
            raise ConfigError("no adversary: call judge(AdversarialLoss(...)) first")
        real, fake = self.prepare(batch["pixels"]), batch["reconstruction"]
        return adversary.discriminator_loss(real, fake, step)
