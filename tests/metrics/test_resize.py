"""Resizes on pictures whose result is known."""

import pytest
import torch

from vistok.errors import InputError, UnknownNameError
from vistok.metrics.resize import RESIZES, resize


@pytest.mark.parametrize("name", RESIZES)
def test_a_flat_picture_stays_flat_and_the_same_size_is_the_same(name):
    flat = torch.full((2, 3, 9, 7), 77, dtype=torch.uint8)
    torch.testing.assert_close(resize(flat, (13, 5), name), torch.full((2, 3, 13, 5), 77.0), atol=1e-4, rtol=0)
    some = torch.randint(0, 256, (1, 3, 6, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    torch.testing.assert_close(resize(some, (6, 8), name), some.float(), atol=1e-4, rtol=0)


def test_tensorflow_reads_from_the_corner_and_torch_from_the_centre():
    ramp = torch.arange(4.0).view(1, 1, 1, 4)
    assert resize(ramp, (1, 2), "tensorflow").flatten().tolist() == [0, 2]
    assert resize(ramp, (1, 2), "torch").flatten().tolist() == [0.5, 2.5]


def test_clean_overshoots_are_clipped():
    edge = torch.zeros(1, 1, 8, 8)
    edge[..., 4:] = 255
    found = resize(edge, (32, 32), "clean")
    assert found.min() == 0
    assert found.max() == 255


def test_bad_input():
    with pytest.raises(UnknownNameError, match="tensorflow"):
        resize(torch.zeros(1, 3, 4, 4), (2, 2), "tensorflw")
    with pytest.raises(InputError):
        resize(torch.zeros(3, 4, 4), (2, 2), "torch")
