"""The contrastive term, teachers' input and the teacher without weights."""

import pytest
import torch

from vistok.errors import UnknownNameError
from vistok.losses.representation import GradientHistogram, contrastive, load_teacher, teacher_input


def test_contrastive_against_its_formula():
    a, b = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.randn(5, 7)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (a, b)]
    m = (unit[0] @ unit[1].T).exp()
    expected = -(m.diagonal() / m.sum(1)).log().mean()
    torch.testing.assert_close(contrastive(a, b), expected)
    assert contrastive(a, a) < contrastive(a, a.flip(0))


def test_no_gradient_reaches_the_teacher():
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    contrastive(a, b).backward()
    assert a.grad is not None
    assert b.grad is None


def test_teacher_input_repeats_pixels():
    pixels = torch.rand(1, 3, 112, 112)
    seen = teacher_input(pixels, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    assert torch.equal(seen, pixels.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_gradients_tell_pictures_apart_and_not_noise():
    teacher = GradientHistogram(64)
    ramp = torch.linspace(0, 1, 32)
    across, down = ramp.expand(3, 32, 32), ramp[:, None].expand(3, 32, 32)
    features = teacher(torch.stack([across, down, across + 0.01 * torch.rand(3, 32, 32)]))
    assert features.shape == (3, 64)
    distance = torch.cdist(features, features)
    assert distance[0, 2] < 0.5 * distance[0, 1]
    assert torch.equal(teacher(across[None]), GradientHistogram(64)(across[None]))
    assert GradientHistogram(500)(across[None]).shape == (1, 500)


def test_an_unknown_teacher_names_the_nearest():
    with pytest.raises(UnknownNameError, match="clip-l14"):
        load_teacher("clip-l15", 8)
