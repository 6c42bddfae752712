"""The adversarial loss where no published number reaches: gates, the hinge's bend, shapes, weights."""

import pytest
import torch

from vistok.errors import ConfigError
from vistok.losses.adversarial import AdversarialLoss, PatchDiscriminator, adaptive_weight, discriminator_hinge


def test_patch_discriminator_shapes_and_widths():
    critic = PatchDiscriminator(width=8, layers=3)
    assert critic(torch.rand(2, 3, 64, 48)).shape == (2, 1, 6, 4)
    assert [m.out_channels for m in critic.main if isinstance(m, torch.nn.Conv2d)] == [8, 16, 32, 64, 1]
    deep = PatchDiscriminator(width=4, layers=5)
    assert [m.out_channels for m in deep.main if isinstance(m, torch.nn.Conv2d)] == [4, 8, 16, 32, 32, 32, 1]
    with pytest.raises(ConfigError):
        PatchDiscriminator(layers=0)


def test_hinge_is_flat_beyond_the_margin():
    real = torch.tensor([3.0, 0.5], requires_grad=True)
    fake = torch.tensor([-4.0, 0.25], requires_grad=True)
    loss = discriminator_hinge(real, fake)
    assert loss.item() == pytest.approx(0.5 * (0.5 / 2 + 1.25 / 2))
    loss.backward()
    assert real.grad.tolist() == [0.0, -0.25]
    assert fake.grad.tolist() == [0.0, 0.25]


def test_nothing_acts_before_its_start():
    adversary = AdversarialLoss(PatchDiscriminator(width=4, layers=1), start=10)
    layer = torch.nn.Conv2d(3, 3, 1)
    image = layer(torch.rand(1, 3, 16, 16))
    before = adversary.generator_loss(image, image.mean(), layer.weight, 9)
    assert before.item() == 0
    assert adversary.discriminator_loss(image, image, 9).item() == 0
    assert adversary.generator_loss(image, image.mean(), layer.weight, 10).item() != 0
    assert adversary.discriminator_loss(image, image, 10).item() > 0


def test_adaptive_weight_balances_gradients_at_the_last_layer_and_is_clamped():
    layer = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    assert adaptive_weight(4 * layer.sum(), 2 * layer.sum(), layer).item() == pytest.approx(2.0, rel=1e-3)
    assert adaptive_weight(1e9 * layer.sum(), 1e-9 * layer.sum(), layer).item() == pytest.approx(1e4)
    assert not adaptive_weight(layer.sum(), layer.sum(), layer).requires_grad


def test_fixed_weight_scales_both_losses_where_asked():
    torch.manual_seed(0)
    critic = PatchDiscriminator(width=4, layers=1).eval()
    plain = AdversarialLoss(critic, weight=1.0, adaptive=False)
    half = AdversarialLoss(critic, weight=0.5, adaptive=False, scales_both=True)
    image, layer = torch.rand(1, 3, 16, 16), torch.ones(1)
    assert half.generator_loss(image, image.mean(), layer, 0) == plain.generator_loss(image, image.mean(), layer, 0) / 2
    assert half.discriminator_loss(image, image, 0) == plain.discriminator_loss(image, image, 0) / 2


def test_the_discriminators_loss_does_not_reach_the_generator():
    adversary = AdversarialLoss(PatchDiscriminator(width=4, layers=1))
    fake = torch.rand(1, 3, 16, 16, requires_grad=True)
    adversary.discriminator_loss(torch.rand(1, 3, 16, 16), fake, 0).backward()
    assert fake.grad is None
    assert adversary.discriminator.main[0].weight.grad.abs().sum() > 0
