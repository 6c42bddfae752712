"""Inception score, KID, precision and recall, sliced distance: values that are known, and input that does not fit."""

import pytest
import torch

from vistok.errors import InputError, UnknownNameError
from vistok.metrics.inception_score import Splits, inception_score
from vistok.metrics.kernel import Subsets, kernel_distance
from vistok.metrics.manifold import manifolds
from vistok.metrics.sliced import sliced_distance


def normal(n, width=4, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def test_inception_score_of_known_logits():
    sure = 50.0 * torch.eye(5).repeat(20, 1)  # each class as often, each image certain
    assert inception_score(sure, Splits(1))[0] == pytest.approx(5, rel=1e-6)
    assert inception_score(torch.zeros(100, 5), "torch-fidelity") == pytest.approx((1, 0), abs=1e-9)
    assert inception_score(500.0 * torch.eye(5).repeat(20, 1), "adm")[0] == pytest.approx(5, rel=1e-6)
    with pytest.raises(UnknownNameError, match="torch-fidelity"):
        inception_score(sure, "torch-fidelty")
    with pytest.raises(InputError, match="at least 10"):
        inception_score(sure[:9])


def test_adm_takes_chunks_in_order():
    logits = normal(70, 5)
    chunks = [inception_score(logits[low : low + 30], Splits(1))[0] for low in (0, 30, 60)]
    assert inception_score(logits, Splits(None, size=30))[0] == pytest.approx(sum(chunks) / 3, rel=1e-9)


def test_kid_is_unbiased_and_sees_a_shift():
    a, b = normal(600), normal(600, seed=1)
    mean, deviation = kernel_distance(a, b, Subsets(50, 200))
    assert abs(mean) < 3 * deviation / 50**0.5 + 0.01
    assert kernel_distance(a, b + 1, Subsets(50, 200))[0] > mean + 1
    with pytest.raises(InputError, match="subsets of 1000 from 600"):
        kernel_distance(a, b)
    assert kernel_distance(a, b, "clean-fid")[0] == pytest.approx(mean, abs=0.2)
    with pytest.raises(UnknownNameError):
        kernel_distance(a, b, "cleanfid-x")


def test_manifolds_in_one_dimension():
    real = torch.tensor([[-0.5], [1.0], [2.0], [3.0], [10.0]])
    generated = torch.tensor([[0.2], [0.4], [0.6], [100.0]])
    found = manifolds(generated, real, 1)
    assert found.precision == 0.75  # 100 lies in no ball: that of 10 reaches down to 3 and up to 17
    assert found.coverage == 0.4  # the balls of -0.5 and 1 hold generated points, and no other does
    assert found.density == 1.5  # each of three lies in the balls of -0.5 and 1
    # balls of 0.2, 0.4, 0.6 reach 0.2 far and hold no real point; that of 100 reaches 99.4, down to 0.6
    assert found.recall == 0.8
    same = manifolds(real, real, 1)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)


def test_manifolds_do_not_depend_on_the_block():
    a, b = normal(150), normal(130, seed=1) + 0.5
    assert manifolds(a, b, 3, block=17) == manifolds(a, b, 3)
    with pytest.raises(InputError, match="neighbours"):
        manifolds(a[:3], b, 3)


def test_sliced_distance_of_a_shift():
    a = normal(400, 8)
    # a shift by d moves every projection by d.l, whose square is |d|^2 / W in the mean
    assert sliced_distance(a, a + 1, 4000) == pytest.approx(3 * 8 * 1.0, rel=0.05)
    assert sliced_distance(a, a[torch.randperm(400, generator=torch.Generator().manual_seed(1))]) == 0
    assert sliced_distance(a, normal(300, 8, 1)) > 0
    with pytest.raises(InputError):
        sliced_distance(a, normal(10, 7))
