"""Files at given rates: budgets, means, and BD-rate of curves whose distance is known."""

import pytest
import torch
import torch.nn.functional as F

import vistok
from vistok.compressed import compress, decompress
from vistok.errors import InputError
from vistok.evaluation.file_rates import File, bd_rate, means, measure_files
from vistok.metrics.ms_ssim import ms_ssim
from vistok.metrics.psnr import psnr


def test_every_coder_is_measured_within_the_budget() -> None:
    torch.manual_seed(0)
    tokenizer = vistok.create("vistok-progressive-tiny")
    coarse = torch.rand(2, 3, 6, 6)
    pixels = (F.interpolate(coarse, size=(176, 192), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    seen: list[int] = []
    files = measure_files(pixels.split(1), tokenizer, ["jpeg", "webp"], (0.1, 0.3), seen.append)
    assert seen == [1, 2]
    assert [(file.picture, file.coder, file.rate) for file in files[:6]] == [
        (0, coder, rate) for coder in ("vistok", "jpeg", "webp") for rate in (0.1, 0.3)
    ]
    assert all(file.bpp <= file.rate for file in files if file.fits)
    rebuilt = decompress(tokenizer, compress(tokenizer, pixels[1:], bpp=0.3))
    ours = files[7]
    assert ours.psnr == pytest.approx(float(psnr(rebuilt, pixels[1:])[0]))
    assert ours.ms_ssim == pytest.approx(float(ms_ssim(rebuilt, pixels[1:])[0]))
    rows = means(files)
    assert len(rows) == 6
    assert rows[1]["psnr"] == pytest.approx((files[1].psnr + files[7].psnr) / 2)
    with pytest.raises(InputError, match="no pictures"):
        measure_files([], tokenizer, ["jpeg"])


def test_bd_rate_of_known_curves() -> None:
    def curve(coder: str, picture: int, factor: float) -> list[File]:
        return [File(coder, picture, rate, factor * rate, 30 + 5 * k, 0.9) for k, rate in enumerate((0.1, 0.2, 0.4))]

    files = [*curve("a", 0, 0.8), *curve("b", 0, 1.0), *curve("a", 1, 0.8), *curve("b", 1, 1.0)]
    assert bd_rate(files, "a", "b") == pytest.approx(-20)
    assert bd_rate(files, "b", "a") == pytest.approx(25)
    apart = [*curve("a", 0, 1.0), *(File("b", 0, 0.1, 0.1, 60 + k, 0.9) for k in range(3))]
    assert bd_rate(apart, "a", "b") is None
