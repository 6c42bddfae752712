"""Classifier-free and adaptive projected guidance."""

import pytest
import torch

from vistok.errors import InputError
from vistok.sampling.guidance import AdaptiveProjectedGuidance, make_guidance, project


def outputs(seed=0):
    return torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


def test_scale_one_is_the_condition():
    for kind in ("apg", "cfg"):
        torch.testing.assert_close(make_guidance(kind, 1.0)(outputs()), outputs()[:2])


def test_cfg():
    conditional, unconditional = outputs().chunk(2)
    torch.testing.assert_close(make_guidance("cfg", 3.0)(outputs()), unconditional + 3 * (conditional - unconditional))


def test_without_limits_apg_is_cfg():
    whole = AdaptiveProjectedGuidance(3.0, momentum=0.0, threshold=0.0, eta=1.0)
    conditional, unconditional = outputs().chunk(2)
    torch.testing.assert_close(whole(outputs()), conditional + 2 * (conditional - unconditional))


def test_apg_adds_nothing_along_the_condition_and_no_more_than_its_threshold():
    steer = AdaptiveProjectedGuidance(5.0, threshold=0.1)
    conditional = outputs()[:2]
    added = steer(outputs()) - conditional
    dots = (added * conditional).flatten(1).sum(1)
    torch.testing.assert_close(dots, torch.zeros(2), atol=1e-6, rtol=0)
    assert (added.flatten(1).norm(dim=1) <= 4 * 0.1 + 1e-6).all()


def test_apg_remembers_the_last_difference():
    steer = AdaptiveProjectedGuidance(2.0, momentum=-0.5, threshold=0.0, eta=1.0)
    first, second = outputs(0), outputs(1)
    steer(first)
    a, b = first[:2] - first[2:], second[:2] - second[2:]
    torch.testing.assert_close(steer(second), second[:2] + (b - 0.5 * a))


def test_projection_of_nothing_is_nothing():
    assert project(outputs()[:2], torch.zeros(2, 3, 2, 2)).abs().max() == 0


def test_unknown_guidance_is_refused():
    with pytest.raises(InputError, match="expected 'apg' or 'cfg'"):
        make_guidance("agp", 2.0)
    for scale in (-1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="guidance"):
            make_guidance("cfg", scale)
