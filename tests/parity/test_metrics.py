"""PSNR and SSIM give the numbers of scikit-image, torchmetrics and the evaluation scripts that papers used."""

import torch
from einops import rearrange
from torch import Tensor

from tests.parity.cases import Case, assert_close, parametrize
from vistok.losses.perceptual import Lpips
from vistok.metrics.eight_bit import llamagen_uint8, seed_voken_uint8
from vistok.metrics.psnr import batch_psnr, psnr
from vistok.metrics.ssim import ssim


def planes(pixels: Tensor) -> Tensor:
    return rearrange(pixels, "b h w c -> b c h w").contiguous()


@parametrize("metrics", kinds=("images",))
def test_eight_bit_rules(case: Case) -> None:
    original = case.io["gt_uint8"].float() / 127.5 - 1
    assert torch.equal(llamagen_uint8(case.io["recon_float_m1_1"]), case.io["llamagen_recon_uint8"])
    assert torch.equal(seed_voken_uint8(case.io["recon_float_m1_1"]), case.io["seedvoken_recon_uint8"])
    assert torch.equal(seed_voken_uint8(original), case.io["seedvoken_gt_uint8"])


@parametrize("metrics", kinds=("images",))
def test_psnr_and_ssim_of_every_convention(case: Case) -> None:
    io = case.io
    truth = planes(io["gt_uint8"])
    llamagen = planes(io["llamagen_recon_uint8"])
    voken = planes(io["seedvoken_gt_uint8"]), planes(io["seedvoken_recon_uint8"])
    unit = planes(((io["recon_float_m1_1"] + 1) / 2).clamp(0, 1)), truth.float() / 255
    found = {
        "llamagen_psnr_each": psnr(llamagen, truth),
        "llamagen_ssim_each_dr2": ssim(llamagen, truth, "skimage-u7-dr2"),
        "ssim_each_dr1_on_same": ssim(llamagen, truth, "skimage-u7-dr1"),
        "seedvoken_psnr_each": psnr(*voken),
        "seedvoken_ssim_each": ssim(*voken, "skimage-u7-dr1"),
        "skimage_psnr_uint8_each": psnr(*voken),
        "skimage_ssim_gaussian_wang_each": ssim(*voken, "wang"),
        "batch_psnr_unit_range": batch_psnr(*unit),
        "torchmetrics_psnr_dr1": batch_psnr(*unit),
        "torchmetrics_ssim_each_dr1": ssim(*unit, "torchmetrics"),
        "torchmetrics_ssim_dr1": ssim(*unit, "torchmetrics").mean(),
    }
    for name, value in found.items():
        assert_close(value, io[name], name=f"{case.name}/{name}")
    inputs = {"gt_uint8", "recon_float_m1_1"}
    bits = {"llamagen_recon_uint8", "seedvoken_gt_uint8", "seedvoken_recon_uint8"}
    resizes = {name for name in io if name.startswith(("tf1_", "cleanfid_", "legacy_"))}
    assert set(io) == inputs | bits | resizes | set(found)


@parametrize("metrics", kinds=("lpips",))
def test_lpips(case: Case) -> None:
    io = case.io
    judge = Lpips(case.config["net"], case.weights)
    first, second = (io["img0"] + 1) / 2, (io["img1"] + 1) / 2
    assert_close(judge(first, second), io["lpips"], name="lpips")
    assert_close(judge(second, first), io["lpips_normalize_flag_on_01_inputs"], name="lpips of [0, 1]")
    assert_close(judge.map(first, second), io["spatial_map"], name="map")
    scores = judge.scores(judge.features(first), judge.features(second))
    for level, tap in enumerate(judge.taps(first)):
        assert_close(scores[level], io[f"layer{level}_score"], name=f"score {level}")
        assert_close(tap.mean((2, 3)), io[f"layer{level}_feature_mean"], name=f"mean {level}")
