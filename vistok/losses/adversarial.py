"""The adversarial loss: a discriminator, its own loss and the generator's, and how much they count.

    fake  ---> discriminator ---> generator's loss   x weight [x adaptive weight]
    real, fake ---> discriminator ---> its own loss [+ LeCAM] [+ gradient penalty]

Sources: hinge (arXiv:1705.02894), non-saturating (1406.2661) and R1 (1801.04406) losses; the adaptive weight of VQGAN
(2012.09841, eq. 7) with the constants of its code (delta 1e-4 where the paper has 1e-6; the ratio is clamped to 1e4);
LeCAM (2104.03310) in the form of the published tokenizers.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from vistok.errors import ConfigError, nearest
from vistok.losses.frozen import at_once
from vistok.processes import mean_over_processes, sum_over_processes, world_size


def generator_hinge(fake_logits: Tensor) -> Tensor:
    """-mean D(fake)."""
    return -fake_logits.mean()


def discriminator_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(mean relu(1 - D(real)) + mean relu(1 + D(fake))) / 2."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def discriminator_leaky_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge with a slope of 0.01 beyond the margin (DualToken), so that a sure discriminator still learns."""
    return 0.5 * (F.leaky_relu(1 - real_logits, 0.01).mean() + F.leaky_relu(1 + fake_logits, 0.01).mean())


def generator_non_saturating(fake_logits: Tensor) -> Tensor:
    """-mean log sigmoid D(fake)."""
    return F.softplus(-fake_logits).mean()


def discriminator_logistic(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(mean softplus(-D(real)) + mean softplus(D(fake))) / 2, the half as in VQGAN's code."""
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


# the generator's loss of fake logits, the discriminator's of real and fake ones
KINDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "hinge": (generator_hinge, discriminator_hinge),
    "leaky_hinge": (generator_hinge, discriminator_leaky_hinge),
    "non_saturating": (generator_non_saturating, discriminator_logistic),
    "non_saturating_hinge": (generator_non_saturating, discriminator_hinge),  # Hita, D-AR
}


class AdversarialLoss(nn.Module):
    """A discriminator and how much it counts. It is trained by an optimiser of its own: minimise `discriminator_loss`
    over `parameters()`.

    kind        one of KINDS
    start       training step from which it acts; before, both of its losses are 0
    weight      of the generator's term, and of the discriminator's own loss too if `scales_both`
    adaptive    scale the generator's term so that its gradient at the last layer is as large as the reconstruction's,
                by at most `limit`
    lecam       weight of LeCAM's term, null for none; its means of the logits forget with `lecam_decay`
    penalty     gamma of R1, the squared gradient on real pixels, null for none; taken every `penalty_every` steps and
                multiplied by that number

    `terms` holds detached scalars for logs. The generator's turn, which empties it first, sets "generator" (unweighted)
    and "adaptive_weight"; the discriminator's "discriminator", "real_logits", "fake_logits" (means), "real_accuracy",
    "fake_accuracy" (shares of logits on the right side of 0), and "lecam" and "penalty" where there are any.
    Before `start` nothing is set.
    """

    lecam_real: Tensor
    lecam_fake: Tensor

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        kind: str = "hinge",
        start: int = 0,
        weight: float = 0.8,
        adaptive: bool = True,
        scales_both: bool = False,
        limit: float = 1e4,
        lecam: float | None = None,
        lecam_decay: float = 0.999,
        penalty: float | None = None,
        penalty_every: int = 16,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(
                f"no adversarial loss {kind!r}{nearest(kind, list(KINDS)) or '; known: ' + ', '.join(KINDS)}"
            )
        if min(start, weight, limit, lecam or 0, penalty or 0) < 0 or penalty_every < 1 or not 0 <= lecam_decay < 1:
            raise ConfigError(
                "an adversarial loss needs start, weight, limit, lecam and penalty of at least 0, penalty_every of at "
                "least 1 and lecam_decay in [0, 1)"
            )
        self.discriminator, self.kind = discriminator, kind
        self.start, self.weight, self.adaptive, self.scales_both, self.limit = (
            start,
            weight,
            adaptive,
            scales_both,
            limit,
        )
        self.lecam, self.lecam_decay, self.penalty, self.penalty_every = lecam, lecam_decay, penalty, penalty_every
        self.terms: dict[str, Tensor] = {}
        self.register_buffer("lecam_real", torch.zeros(()))
        self.register_buffer("lecam_fake", torch.zeros(()))

    def generator_loss(self, fake: Tensor, rebuilt_loss: Tensor, last_layer: Tensor, step: int) -> Tensor:
        """The weighted term, a scalar. `fake` (B, 3, ...), pixels in [0, 1], carries its graph to `last_layer`.

        `rebuilt_loss`: what the reconstruction costs otherwise, a scalar whose gradient at `last_layer` is the measure
        of the adaptive weight. The discriminator's own weights get no gradient.
        """
        self.terms = {}
        if step < self.start:
            return fake.new_zeros(())
        weights = {name: tensor.detach() for name, tensor in self.discriminator.named_parameters()}
        term = at_once(fake, lambda x: KINDS[self.kind][0](functional_call(self.discriminator, weights, (x,)).float()))
        self.terms["generator"] = term.detach()
        weight: float | Tensor = self.weight
        if self.adaptive and torch.is_grad_enabled():
            ratio = adaptive_weight(rebuilt_loss, term, last_layer, self.limit)
            self.terms["adaptive_weight"] = ratio
            weight = self.weight * ratio
        return weight * term

    def discriminator_loss(self, real: Tensor, fake: Tensor, step: int) -> Tensor:
        """What the discriminator minimises, a scalar, of real and generated pixels in [0, 1]; none reaches `fake`."""
        if step < self.start:
            return real.new_zeros(())
        real, fake = real.detach(), fake.detach()
        punishes = bool(self.penalty) and torch.is_grad_enabled() and (step - self.start) % self.penalty_every == 0
        if punishes:
            real = real.requires_grad_()
        real_logits, fake_logits = self.discriminator(real).float(), self.discriminator(fake).float()
        loss = KINDS[self.kind][1](real_logits, fake_logits)
        self.terms |= {
            "discriminator": loss.detach(),
            "real_logits": real_logits.detach().mean(),
            "fake_logits": fake_logits.detach().mean(),
            "real_accuracy": (real_logits.detach() > 0).float().mean(),
            "fake_accuracy": (fake_logits.detach() < 0).float().mean(),
        }
        if self.lecam is not None:
            term = self._lecam(real_logits, fake_logits)
            self.terms["lecam"] = term.detach()
            loss = loss + self.lecam * term
        if punishes:
            term = gradient_penalty(real, real_logits)
            self.terms["penalty"] = term.detach()
            loss = loss + 0.5 * self.penalty * self.penalty_every * term  # type: ignore[operator]
        return self.weight * loss if self.scales_both else loss

    def _lecam(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """The term against the means before this step, which then follow. Means are over all processes."""
        real = mean_over_processes(real_logits.sum().reshape(1), real_logits.numel()).squeeze(0)
        fake = mean_over_processes(fake_logits.sum().reshape(1), fake_logits.numel()).squeeze(0)
        term = lecam(real, fake, self.lecam_real.clone(), self.lecam_fake.clone())
        if self.training:
            self.lecam_real.lerp_(real.detach(), 1 - self.lecam_decay)
            self.lecam_fake.lerp_(fake.detach(), 1 - self.lecam_decay)
        return term


def lecam(real: Tensor, fake: Tensor, past_real: Tensor, past_fake: Tensor) -> Tensor:
    """relu(D(real) - past fake)^2 + relu(past real - D(fake))^2, of mean logits and their moving averages."""
    return F.relu(real - past_fake).square() + F.relu(past_real - fake).square()


def gradient_penalty(real: Tensor, real_logits: Tensor) -> Tensor:
    """R1 without its factor: mean over items of the squared gradient of their logits' sum at the real pixels."""
    (gradient,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean()


def adaptive_weight(rebuilt_loss: Tensor, generator_loss: Tensor, last_layer: Tensor, limit: float = 1e4) -> Tensor:
    """lambda = |d rebuilt / d last| / (|d generator / d last| + 1e-4), clamped to [0, limit]; no gradient.

    Gradients are those of the batches of all processes together.
    """
    reference = sum_over_processes(torch.autograd.grad(rebuilt_loss, last_layer, retain_graph=True)[0]) / world_size()
    adversarial = sum_over_processes(torch.autograd.grad(generator_loss, last_layer, retain_graph=True)[0])
    adversarial = adversarial / world_size()
    return (reference.norm() / (adversarial.norm() + 1e-4)).clamp(0, limit).detach()
