"""Metrics give the numbers of scikit-image, torchmetrics, torch-fidelity, clean-fid, lpips and the papers' scripts."""

import re

import torch
from einops import rearrange
from torch import Tensor

from tests.parity.cases import Case, assert_close, parametrize
from vistok.losses.perceptual import Lpips
from vistok.metrics.eight_bit import llamagen_uint8, seed_voken_uint8
from vistok.metrics.frechet import frechet_distance
from vistok.metrics.inception_score import Splits, inception_score
from vistok.metrics.kernel import Subsets, gaussian_kernel, kernel_distance
from vistok.metrics.manifold import manifolds
from vistok.metrics.moments import gaussian
from vistok.metrics.psnr import batch_psnr, psnr
from vistok.metrics.resize import resize
from vistok.metrics.sliced import sliced_distance
from vistok.metrics.ssim import ssim
from vistok.nn.inception import ConvNorm, average, maximum


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


@parametrize("metrics", kinds=("images",))
def test_resizes(case: Case) -> None:
    pixels = planes(case.io["gt_uint8"])
    found = 0
    for name, wanted in case.io.items():
        if name.startswith("tf1_bilinear"):
            height, width = map(int, re.findall(r"(\d+)x(\d+)$", name)[0])
            got = resize(pixels, (height, width), "tensorflow")
        elif name.startswith(("cleanfid_bicubic", "legacy_pytorch_bilinear")):
            sides = {side: int(value) for side, value in re.findall(r"_([hw])(\d+)", name)}
            got = resize(pixels, (sides["h"], sides["w"]), "clean" if name.startswith("clean") else "torch")
            got = rearrange(got, "b c h w -> b h w c") if wanted.shape[-1] == 3 else got
        else:
            continue
        assert_close(got, wanted, name=f"{case.name}/{name}")
        found += 1
    assert found == sum(name.startswith(("tf1_", "cleanfid_", "legacy_")) for name in case.io)


@parametrize("metrics", kinds=("features",))
def test_distributions(case: Case) -> None:
    io, config = case.io, case.config
    generated, real, logits = io["features_1"], io["features_2"], io["logits_1"]
    own = gaussian(generated)
    subsets = Subsets(config["kid_subsets"], config["kid_subset_size"], config["rng_seed"])
    kid, deviation = kernel_distance(generated, real, subsets)
    clean = Subsets(config["kid_subsets"], config["kid_subset_size"], 123, second_first=True, clip=True)
    score, spread = inception_score(logits, Splits(config["isc_splits"], shuffle=config["rng_seed"]))
    shares = manifolds(generated, real, config["prc_neighborhood"])
    distance = frechet_distance(generated, real)
    found = {
        "mu_1": own.mean,
        "sigma_1_f64": own.covariance,
        "cov_streaming_f64": own.covariance,
        "fid_torch_fidelity_f64": distance,
        "fid_cleanfid_sqrtm_f64": distance,
        "fvd_style_svd_f64": distance,
        "fvd_style_svd_double_f64": distance,
        "isc_mean_f64": score,
        "isc_std_f64": spread,
        "isc_1split_noshuffle_f64": inception_score(logits, "1d-tokenizer")[0],
        "kid_mean_f64": kid,
        "kid_std_f64": deviation,
        "kid_rbf_sigma3_mean_f64": kernel_distance(generated, real, subsets, gaussian_kernel(3.0))[0],
        "kid_cleanfid_seed123_f64": kernel_distance(generated, real, clean)[0],
        "precision_f64": shares.precision,
        "recall_f64": shares.recall,
        "f_score_f64": shares.f_score,
        "mind_f64": sliced_distance(generated, real, config["mind_projections"], config["rng_seed"]),
    }
    for name, value in found.items():
        # KID is a difference of kernel means of about 1 and more, which the authors take in float32
        scale = 1.0 if name.startswith("kid") else None
        assert_close(torch.as_tensor(value, dtype=io[name].dtype), io[name], name=f"{case.name}/{name}", scale=scale)
    assert set(io) == set(found) | {"features_1", "features_2", "logits_1"}


@parametrize("metrics", kinds=("inception-blocks",))
def test_inception_blocks(case: Case) -> None:
    x, weights = case.io["x"], case.weights
    outputs, inputs, kernel, _ = next(value for value in weights.values() if value.ndim == 4).shape
    block = ConvNorm(inputs, outputs, kernel, 2)
    block.bn.eps = case.config["bn_eps"]
    ours = {key: next(v for k, v in weights.items() if k.endswith(key)) for key in block.state_dict()}
    block.load_state_dict(ours)
    with torch.no_grad():
        found = {"basic_conv_out": block.eval()(x), "avgpool_exclude_pad": average(x), "maxpool_e2": maximum(x)}
    for name, value in found.items():
        assert_close(value, case.io[name], name=name)
    assert set(case.io) == set(found) | {"x"}
