import torch

from vistok.metrics.eight_bit import llamagen_uint8, seed_voken_uint8


def test_every_level_comes_back_through_rounding_but_not_through_truncation() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = levels.float() / 127.5 - 1
    assert torch.equal(llamagen_uint8(pixels), levels)
    lost = levels.int() - seed_voken_uint8(pixels).int()
    assert set(lost.tolist()) == {0, 1}


def test_overshoots_are_cut_off() -> None:
    ends = torch.tensor([-1.7, 1.7])
    assert llamagen_uint8(ends).tolist() == [0, 255]
    assert seed_voken_uint8(ends).tolist() == [0, 255]
