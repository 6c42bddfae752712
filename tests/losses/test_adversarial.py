"""The adversarial loss where no published number reaches: gates, bends, weights, and what it remembers."""

import pytest
import torch
from torch import nn

from vistok.errors import ConfigError
from vistok.losses.adversarial import (
    KINDS,
    AdversarialLoss,
    adaptive_weight,
    discriminator_hinge,
    gradient_penalty,
    lecam,
)
from vistok.losses.patchgan import PatchDiscriminator


def critic(width: int = 4) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(width=width, layers=1)


class Linear(nn.Module):
    """A judge whose gradient is known: the sum of pixels times a number."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, pixels):
        return self.factor * pixels.flatten(1).sum(1, keepdim=True)


def test_hinge_is_flat_beyond_the_margin():
    real = torch.tensor([3.0, 0.5], requires_grad=True)
    fake = torch.tensor([-4.0, 0.25], requires_grad=True)
    loss = discriminator_hinge(real, fake)
    assert loss.item() == pytest.approx(0.5 * (0.5 / 2 + 1.25 / 2))
    loss.backward()
    assert real.grad.tolist() == [0.0, -0.25]
    assert fake.grad.tolist() == [0.0, 0.25]


def test_every_kind_rewards_what_it_should():
    sure, unsure = torch.tensor([4.0]), torch.tensor([-4.0])
    for generator, discriminator in KINDS.values():
        assert generator(sure) < generator(unsure)
        assert discriminator(sure, unsure) < discriminator(unsure, sure)
    leaky = KINDS["leaky_hinge"][1](torch.tensor([5.0]), torch.tensor([-3.0]))
    assert leaky.item() == pytest.approx(0.5 * (-0.04 - 0.02))
    logistic = KINDS["non_saturating"][1](torch.tensor([0.0]), torch.tensor([0.0]))
    assert logistic.item() == pytest.approx(torch.log(torch.tensor(2.0)).item())


def test_nothing_acts_before_its_start():
    adversary = AdversarialLoss(critic(), start=10, lecam=1.0)
    layer = nn.Conv2d(3, 3, 1)
    image = layer(torch.rand(1, 3, 16, 16))
    before = adversary.generator_loss(image, image.mean(), layer.weight, 9)
    assert before.item() == 0
    assert adversary.discriminator_loss(image, image, 9).item() == 0
    assert adversary.terms == {}
    assert adversary.lecam_real.item() == 0
    assert adversary.generator_loss(image, image.mean(), layer.weight, 10).item() != 0
    assert adversary.discriminator_loss(image, image, 10).item() > 0


def test_adaptive_weight_balances_gradients_at_the_last_layer_and_is_clamped():
    layer = nn.Parameter(torch.tensor([1.0, 2.0]))
    assert adaptive_weight(4 * layer.sum(), 2 * layer.sum(), layer).item() == pytest.approx(2.0, rel=1e-3)
    assert adaptive_weight(1e9 * layer.sum(), 1e-9 * layer.sum(), layer).item() == pytest.approx(1e4)
    assert not adaptive_weight(layer.sum(), layer.sum(), layer).requires_grad


def test_the_generators_gradient_is_that_of_the_plain_formula():
    torch.manual_seed(0)
    judge, layer = critic().eval(), nn.Conv2d(3, 3, 1)
    pixels = torch.rand(2, 3, 16, 16)
    adversary = AdversarialLoss(judge, weight=0.5)
    image = layer(pixels)
    rebuilt = (image - pixels).square().mean()
    adversary.generator_loss(image, rebuilt, layer.weight, 0).backward()
    found = layer.weight.grad.clone()
    assert all(parameter.grad is None for parameter in judge.parameters())
    layer.weight.grad = None
    image = layer(pixels)
    term = -judge(image).mean()
    ratio = adaptive_weight((image - pixels).square().mean(), term, layer.weight)
    (0.5 * ratio * term).backward()
    torch.testing.assert_close(found, layer.weight.grad)
    assert adversary.terms["adaptive_weight"].item() == pytest.approx(ratio.item())


def test_fixed_weight_scales_both_losses_where_asked():
    judge = critic().eval()
    plain = AdversarialLoss(judge, weight=1.0, adaptive=False)
    half = AdversarialLoss(judge, weight=0.5, adaptive=False, scales_both=True)
    image, layer = torch.rand(1, 3, 16, 16), torch.ones(1)
    assert half.generator_loss(image, image.mean(), layer, 0) == plain.generator_loss(image, image.mean(), layer, 0) / 2
    assert half.discriminator_loss(image, image, 0) == plain.discriminator_loss(image, image, 0) / 2


def test_the_discriminators_loss_does_not_reach_the_generator():
    adversary = AdversarialLoss(critic())
    fake = torch.rand(1, 3, 16, 16, requires_grad=True)
    adversary.discriminator_loss(torch.rand(1, 3, 16, 16), fake, 0).backward()
    assert fake.grad is None
    assert adversary.discriminator.main[0].weight.grad.abs().sum() > 0


def test_lecam_compares_with_what_was_before_and_remembers():
    adversary = AdversarialLoss(Linear(1.0), lecam=0.5, lecam_decay=0.9)
    real, fake = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), -2.0)
    first = adversary.discriminator_loss(real, fake, 0)
    assert first.item() == pytest.approx(0.5 * (9 + 4))  # the means before are 0; the hinge is satisfied
    assert (adversary.lecam_real.item(), adversary.lecam_fake.item()) == pytest.approx((0.3, -0.2))
    second = adversary.discriminator_loss(real, fake, 1)
    assert second.item() == pytest.approx(0.5 * (3.2**2 + 2.3**2))
    copy = AdversarialLoss(Linear(1.0), lecam=0.5)
    copy.load_state_dict(adversary.state_dict())
    assert copy.lecam_real == adversary.lecam_real
    assert lecam(torch.tensor(-1.0), torch.tensor(5.0), torch.tensor(2.0), torch.tensor(0.0)).item() == 0


def test_gradient_penalty_is_r1_on_its_steps_alone():
    adversary = AdversarialLoss(Linear(2.0), kind="non_saturating", penalty=10.0, penalty_every=4)
    real = torch.rand(2, 3, 4, 4)
    plain = AdversarialLoss(Linear(2.0), kind="non_saturating")
    for step in range(5):
        extra = adversary.discriminator_loss(real, real, step) - plain.discriminator_loss(real, real, step)
        expected = 0.5 * 10 * 4 * (4 * 48) if step % 4 == 0 else 0.0  # |gradient|^2 of 2 * sum over 48 pixels
        assert extra.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    leaf = real.clone().requires_grad_()
    judge = Linear(2.0)
    gradient_penalty(leaf, judge(leaf)).backward()
    assert judge.factor.grad.item() == pytest.approx(2 * 2 * 48)  # d (f^2 48) / d f


def test_terms_tell_who_is_winning():
    adversary = AdversarialLoss(Linear(1.0), adaptive=False)
    real, fake = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), -2.0)
    adversary.generator_loss(fake, fake.mean(), torch.ones(1), 0)
    adversary.discriminator_loss(real, fake, 0)
    told = {name: value.item() for name, value in adversary.terms.items()}
    assert told == {
        "generator": 2.0,
        "discriminator": 0.0,
        "real_logits": 3.0,
        "fake_logits": -2.0,
        "real_accuracy": 1.0,
        "fake_accuracy": 1.0,
    }


@pytest.mark.parametrize(
    "options", [{"kind": "hing"}, {"weight": -1.0}, {"lecam_decay": 1.0}, {"penalty_every": 0}, {"start": -1}]
)
def test_values_that_cannot_be_meant_are_refused(options):
    with pytest.raises(ConfigError):
        AdversarialLoss(critic(), **options)
