import pytest
import torch

from tests.data.pictures import picture
from vistok.errors import InputError
from vistok.evaluation.codecs import Ladder, available, encode_within
from vistok.metrics.psnr import psnr
from vistok.pixels import from_pil


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """A smooth picture with some texture, 96 x 128."""
    noise = torch.randint(-12, 13, (1, 3, 96, 128), generator=torch.Generator().manual_seed(0))
    return (from_pil(picture(4, (96, 128))).int() + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("codec", available())
def test_the_best_that_fits(codec: str, pixels: torch.Tensor) -> None:
    ladder = Ladder(pixels, codec)
    found = [ladder.best(budget) for budget in (700, 1500, 4000)]
    for coded, budget in zip(found, (700, 1500, 4000), strict=True):
        assert coded.fits
        assert coded.bytes <= budget
        assert coded.pixels.shape == pixels.shape
        assert coded.psnr == float(psnr(coded.pixels, pixels)[0])
        assert coded.encode_seconds > 0
    assert found[0].psnr < found[1].psnr < found[2].psnr
    again = encode_within(pixels, codec, 1500)
    assert (again.bytes, again.quality, again.scale) == (found[1].bytes, found[1].quality, found[1].scale)


@pytest.mark.parametrize("codec", available())
def test_one_step_more_quality_would_not_fit(codec: str, pixels: torch.Tensor) -> None:
    ladder = Ladder(pixels, codec)
    coded = ladder.best(2500)
    assert len(ladder._file(coded.scale, coded.quality)) <= 2500
    assert coded.quality == ladder.codec.qualities[1] or len(ladder._file(coded.scale, coded.quality + 1)) > 2500


def test_low_rates_are_reached_by_scaling_down(pixels: torch.Tensor) -> None:
    ladder = Ladder(pixels, "jpeg")
    coded = ladder.best(500)
    assert coded.scale > 1
    quality = ladder._highest_quality(1, 500)
    assert quality is None or ladder._decoded(1, quality).psnr < coded.psnr


def test_a_budget_below_every_file_is_said(pixels: torch.Tensor) -> None:
    coded = encode_within(pixels, "jpeg", 20)
    assert not coded.fits
    assert coded.bytes > 20


def test_unknown_codec(pixels: torch.Tensor) -> None:
    with pytest.raises(InputError, match="jpeg, webp, avif"):
        encode_within(pixels, "gif", 1000)
