"""The straight path between data and noise, and its solver."""

import pytest
import torch

from vistok.errors import ConfigError, InputError
from vistok.sampling.flow import draw_times, euler, interpolate
from vistok.sampling.noise import normals


def test_euler_walks_a_straight_line_exactly_in_any_number_of_steps():
    data, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for steps in (1, 2, 7):
        torch.testing.assert_close(euler(lambda x, t: noise - data, noise, steps), data)


def test_euler_asks_once_per_step_at_the_times_of_the_paper():
    asked = []

    def velocity(x, t):
        asked.append(t)
        return x

    euler(velocity, torch.ones(1, 1), 4)
    assert asked == [1.0, 0.75, 0.5, 0.25]
    for steps in (0, -1, 1.5):
        with pytest.raises(InputError, match="steps"):
            euler(velocity, torch.ones(1, 1), steps)


def test_interpolation_ends_in_data_and_noise():
    data, noise = torch.randn(2, 3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    x, velocity = interpolate(data, noise, torch.tensor([0.0, 1.0, 0.5]))
    torch.testing.assert_close(x[0], data[0])
    torch.testing.assert_close(x[1], noise[1])
    torch.testing.assert_close(x[2] - 0.5 * velocity[2], data[2])


def test_times_have_the_laws_of_their_names():
    rng = torch.Generator().manual_seed(0)
    uniform, normal, mode = (draw_times(20000, rng, kind) for kind in ("uniform", "logit-normal", "mode"))
    for times in (uniform, normal, mode):
        assert ((times >= 0) & (times <= 1)).all()
        assert abs(times.mean() - 0.5) < 0.02
    assert abs(normal.logit().std() - 1) < 0.02
    # mode sampling at s = 0.25 is flatter than logit-normal and prefers the middle to uniform
    middle = [((times > 0.4) & (times < 0.6)).float().mean() for times in (uniform, mode, normal)]
    assert middle[0] < middle[1] < middle[2]
    assert torch.allclose(draw_times(5, torch.Generator().manual_seed(1), "mode", 0.0),
                          1 - torch.rand(5, generator=torch.Generator().manual_seed(1)))  # fmt: skip
    with pytest.raises(ConfigError, match="times"):
        draw_times(1, rng, "late")


def test_noise_belongs_to_the_item():
    both = normals([3, 4], (2, 5))
    assert torch.equal(normals([4], (2, 5))[0], both[1])
    assert not torch.equal(both[0], both[1])
    assert normals([], (2, 5)).shape == (0, 2, 5)
