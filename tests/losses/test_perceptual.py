"""Perceptual distances: gradients, weights in the layouts that users have, and what the filter bank punishes."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vistok.errors import ConfigError, MismatchError, UnknownNameError, VistokError
from vistok.losses.perceptual import PERCEPTUALS, Logits, Lpips, build_perceptual
from vistok.losses.steerable import filters
from vistok.nn.convnext import ConvNeXt, ConvNeXtConfig, key_table

VGG = {0: (3, 4), 2: (4, 4), 5: (4, 6), 7: (6, 6), 10: (6, 8), 12: (8, 8), 14: (8, 8)}
VGG |= {17: (8, 8), 19: (8, 8), 21: (8, 8), 24: (8, 8), 26: (8, 8), 28: (8, 8)}
TAPPED = (4, 6, 8, 8, 8)


def vgg():
    g = torch.Generator().manual_seed(0)
    state = {}
    for index, (entering, leaving) in VGG.items():
        state[f"features.{index}.weight"] = torch.randn(leaving, entering, 3, 3, generator=g) * 0.3
        state[f"features.{index}.bias"] = torch.randn(leaving, generator=g) * 0.1
    return state


def heads():
    g = torch.Generator().manual_seed(1)
    return {f"lin{level}.model.1.weight": torch.rand(1, width, 1, 1, generator=g) for level, width in enumerate(TAPPED)}


def convnext():
    torch.manual_seed(0)
    net = ConvNeXt(ConvNeXtConfig((8, 12, 16, 20), (1, 1, 2, 1), 7))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)
    return net


@pytest.fixture
def files(tmp_path):
    save_file(vgg(), tmp_path / "vgg.safetensors")
    torch.save(heads(), tmp_path / "heads.pth")
    net = convnext()
    save_file(
        key_table({"features.0.0.weight": torch.ones(1)}).to_theirs(net.state_dict()), tmp_path / "cn.safetensors"
    )
    save_file(resnet_state(), tmp_path / "resnet.safetensors")
    lpips = [tmp_path / "vgg.safetensors", tmp_path / "heads.pth"]
    return lpips, tmp_path / "cn.safetensors", tmp_path / "resnet.safetensors"


def build(name, files):
    lpips, convnext, resnet = files
    if name == "lpips-vgg+convnext":
        return build_perceptual(name, lpips, convnext=convnext)
    return build_perceptual(
        name, {"lpips-vgg": lpips, "convnext-logits": convnext, "resnet50-logits": resnet}.get(name)
    )


def pictures():
    g = torch.Generator().manual_seed(3)
    low = torch.rand(2, 3, 12, 12, generator=g)
    return F.interpolate(low, size=(48, 48), mode="bilinear"), torch.rand(2, 3, 48, 48, generator=g)


NAMES = [name for name in PERCEPTUALS if name != "lpips-alex"]


@pytest.mark.parametrize("name", NAMES)
def test_distances_are_per_item_zero_at_home_and_differentiable(name, files):
    judge = build(name, files)
    target, other = pictures()
    assert judge(target, target).tolist() == [0, 0]
    far, near = judge(other, target), judge(target + 0.05 * (other - 0.5), target)
    assert far.shape == (2,)
    assert (far > near).all()
    torch.testing.assert_close(judge(other[:1], target[:1]), far[:1], rtol=1e-4, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in judge.parameters())
    assert judge.state_dict() == {}
    assert not judge.train().training


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_taken_at_once_is_the_gradient(name, files):
    judge = build(name, files)
    target, other = pictures()
    x = other.clone().requires_grad_()
    weights = torch.tensor([1.0, 3.0])
    (judge(x, target) * weights).sum().backward()
    y = other.clone().requires_grad_()
    parts = zip(judge.parts, (1, 0.1), strict=True) if name == "lpips-vgg+convnext" else ((judge, 1.0),)
    plain = sum(part.compare(part.features(y), part.features(target)) * share for part, share in parts)
    (plain / (1.1 if "+" in name else 1) * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_gives_nearly_the_same(name, files):
    judge = build(name, files)
    target, other = pictures()
    full, results = judge(other, target), []
    x = other.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        results.append(judge(x, target))
    results[0].sum().backward()
    assert results[0].dtype == torch.float32
    torch.testing.assert_close(results[0], full, rtol=0.05, atol=1e-4)
    assert torch.isfinite(x.grad).all()


def test_lpips_takes_the_lpips_packages_names_too():
    state, package = vgg(), heads()
    stages = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
    for stage, indices in enumerate(stages):
        for index in indices:
            for part in ("weight", "bias"):
                package[f"net.slice{stage + 1}.{index}.{part}"] = state[f"features.{index}.{part}"]
    target, other = pictures()
    assert torch.equal(Lpips("vgg", package)(other, target), Lpips("vgg", state | heads())(other, target))
    assert not torch.equal(Lpips("vgg", package, signed=False)(other, target), Lpips("vgg", package)(other, target))


def test_convnext_in_every_layout():
    net, x = convnext(), torch.randn(1, 3, 64, 64)
    mine = net.state_dict()
    for layout in ("features.0.0.weight", "stem.0.weight", "convnext.embeddings.patch_embeddings.weight"):
        table = key_table({layout: torch.ones(1)})
        theirs = table.to_theirs(mine)
        assert layout in theirs
        again = ConvNeXt(ConvNeXtConfig((8, 12, 16, 20), (1, 1, 2, 1), 7))
        again.load_state_dict(key_table(theirs).to_ours(theirs))
        assert torch.equal(again(x), net(x))


def test_weights_that_do_not_fit_or_are_not_there(files, tmp_path):
    (backbone, lins), _, _ = files
    with pytest.raises(MismatchError, match="heads"):
        build_perceptual("lpips-vgg", backbone)
    with pytest.raises(MismatchError, match=r"features.0.weight"):
        build_perceptual("lpips-vgg", lins)
    with pytest.raises(MismatchError, match="ConvNeXt"):
        build_perceptual("convnext-logits", backbone)
    with pytest.raises(VistokError, match="no file"):
        build_perceptual("lpips-vgg", tmp_path / "nothing.pt")
    with pytest.raises(ConfigError, match="weights"):
        build_perceptual("lpips-alex")
    with pytest.raises(UnknownNameError, match="lpips-vgg"):
        build_perceptual("lpips_vgg")
    with pytest.raises(ConfigError, match="scale"):
        build_perceptual("steerable", scale=3)
    with pytest.raises(ConfigError, match="no weights"):
        build_perceptual("steerable", weights="x")


def test_without_a_network_it_says_what_to_do(monkeypatch):
    import huggingface_hub

    def offline(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(VistokError, match=r"weights=PATH.*steerable"):
        build_perceptual("lpips-vgg")


def test_steerable_filters_are_blind_to_brightness_and_see_their_directions():
    bank = filters()
    assert bank.shape == (5, 1, 5, 5)
    assert bank.sum((1, 2, 3)).abs().max() < 1e-5
    ramp = torch.arange(5.0).expand(5, 5)[None, None]
    responses = F.conv2d(ramp, bank)[0, :, 0, 0]
    assert responses[0].abs() > 0.1
    assert responses[1].abs() < 1e-5


def test_steerable_punishes_blur_more_than_a_shift_of_brightness_of_equal_squared_error():
    judge = build_perceptual("steerable")
    g = torch.Generator().manual_seed(5)
    target = F.interpolate(torch.rand(1, 3, 24, 24, generator=g), size=(48, 48), mode="nearest")
    blurred = F.avg_pool2d(F.pad(target, (2, 2, 2, 2), mode="reflect"), 5, stride=1)
    brighter = target + (blurred - target).square().mean().sqrt()
    assert judge(blurred, target) > 10 * judge(brighter, target)


def test_steerable_texture_term_prefers_misplaced_texture_to_none():
    target = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    other = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    flat = torch.full_like(target, 0.5)
    judge = build_perceptual("steerable", texture=4.0)
    assert judge(other, target) < judge(flat, target)
    assert (other - target).square().mean() > (flat - target).square().mean()


def resnet_state():
    """torchvision's names and shapes, narrow: one block a level but for the second, which has two."""
    g = torch.Generator().manual_seed(0)
    state = {}

    def conv_norm(conv, norm, leaving, entering, kernel):
        state[f"{conv}.weight"] = (
            torch.randn(leaving, entering, kernel, kernel, generator=g) / (entering * kernel**2) ** 0.5
        )
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{norm}.{part}"] = torch.rand(leaving, generator=g) + 0.5

    conv_norm("conv1", "bn1", 4, 3, 7)
    entering = 4
    for level, depth in enumerate((1, 2, 1, 1)):
        width = 4 * 2**level
        for block in range(depth):
            name = f"layer{level + 1}.{block}"
            conv_norm(f"{name}.conv1", f"{name}.bn1", width, entering, 1)
            conv_norm(f"{name}.conv2", f"{name}.bn2", width, width, 3)
            conv_norm(f"{name}.conv3", f"{name}.bn3", 4 * width, width, 1)
            if block == 0:
                conv_norm(f"{name}.downsample.0", f"{name}.downsample.1", 4 * width, entering, 1)
            entering = 4 * width
    return state | {"fc.weight": 0.01 * torch.randn(7, entering, generator=g), "fc.bias": torch.randn(7, generator=g)}


def test_resnet_logits_against_another_implementation(tmp_path):
    """Transformers' ResNet with the same weights; with and without the counts of batches that files may have."""
    from transformers import ResNetConfig, ResNetForImageClassification

    state = resnet_state()
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[16, 32, 64, 128], depths=[1, 2, 1, 1], layer_type="bottleneck", num_labels=7
    )
    theirs = ResNetForImageClassification(config).eval()
    parts = {"convolution.weight": "conv{}.weight"}
    parts |= {f"normalization.{part}": "bn{}." + part for part in ("weight", "bias", "running_mean", "running_var")}
    mapped = {}
    for part, name in parts.items():
        mapped[f"resnet.embedder.embedder.{part}"] = state[name.format(1)]
        for level, depth in enumerate((1, 2, 1, 1)):
            for block in range(depth):
                mine, other = f"layer{level + 1}.{block}.", f"resnet.encoder.stages.{level}.layers.{block}."
                for number in range(3):
                    mapped[f"{other}layer.{number}.{part}"] = state[mine + name.format(number + 1)]
                if block == 0:
                    index = "0" if part.startswith("conv") else "1"
                    mapped[f"{other}shortcut.{part}"] = state[f"{mine}downsample.{index}.{name.split('.')[-1]}"]
    mapped |= {"classifier.1.weight": state["fc.weight"], "classifier.1.bias": state["fc.bias"]}
    counts = {key: value for key, value in theirs.state_dict().items() if key.endswith("num_batches_tracked")}
    theirs.load_state_dict(mapped | counts)
    torch.save(state | {"bn1.num_batches_tracked": torch.tensor(5)}, tmp_path / "resnet.pth")
    judge = build_perceptual("resnet50-logits", tmp_path / "resnet.pth", size=64)
    assert torch.equal(Logits("resnet50", state, size=64).features(pictures()[0]), judge.features(pictures()[0]))
    target, other = (F.interpolate(x, size=(64, 64)) for x in pictures())
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        expected = [theirs((x - mean) / deviation).logits for x in (target, other)]
    torch.testing.assert_close(judge.features(target), expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(judge(other, target), (expected[0] - expected[1]).square().mean(1), rtol=1e-3, atol=1e-4)
    with pytest.raises(MismatchError, match="bottleneck"):
        Logits("resnet50", {"fc.weight": torch.ones(2, 2)})
