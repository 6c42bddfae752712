"""I3D: every tensor of the published layout, the sizes at every stage, and padding as TensorFlow pads."""

import pytest
import torch
import torch.nn.functional as F

from vistok.nn.i3d import FEATURES, I3D, Unit, max_pool, pad_same

# what the paper's figure 3 and table 1 of Inception-v1 say: inputs, then 1 | 1, 3 | 1, 3 | pool, 1
BLOCKS = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}


def published() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the ports' state dict."""
    convolutions = {
        "Conv3d_1a_7x7": (64, 3, 7),
        "Conv3d_2b_1x1": (64, 64, 1),
        "Conv3d_2c_3x3": (192, 64, 3),
    }
    for name, (inputs, first, narrow, wide, narrower, less, pooled) in BLOCKS.items():
        convolutions |= {
            f"{name}.b0": (first, inputs, 1),
            f"{name}.b1a": (narrow, inputs, 1),
            f"{name}.b1b": (wide, narrow, 3),
            f"{name}.b2a": (narrower, inputs, 1),
            f"{name}.b2b": (less, narrower, 3),
            f"{name}.b3b": (pooled, inputs, 1),
        }
    found: dict[str, tuple[int, ...]] = {}
    for name, (outputs, inputs, kernel) in convolutions.items():
        found[f"{name}.conv3d.weight"] = (outputs, inputs, kernel, kernel, kernel)
        found |= {f"{name}.bn.{part}": (outputs,) for part in ("weight", "bias", "running_mean", "running_var")}
        found[f"{name}.bn.num_batches_tracked"] = ()
    return found | {"logits.conv3d.weight": (400, 1024, 1, 1, 1), "logits.conv3d.bias": (400,)}


def test_keys_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        state = I3D().state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == published()
    learned = sum(value.numel() for key, value in state.items() if key.endswith(("weight", "bias")))
    assert learned == 12_697_264, "12.7 million parameters at 400 classes"


@pytest.mark.parametrize("size", [7, 8, 13, 14, 16, 17])
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 2), (2, 2), (3, 1), (1, 1)])
def test_padding_is_tensorflows(size, kernel, stride):
    """By hand: the windows need (places - 1) * stride + kernel; the smaller half of what is missing goes before."""
    places = -(-size // stride)
    missing = max((places - 1) * stride + kernel - size, 0)
    x = torch.arange(1.0, size + 1)
    padded = pad_same(x[None, None, :, None, None], (kernel, 1, 1), (stride, 1, 1)).flatten()
    assert padded.tolist() == [0.0] * (missing // 2) + x.tolist() + [0.0] * (missing - missing // 2)
    assert len(padded.unfold(0, kernel, stride)) == places
    wide = pad_same(x[None, None, None, None, :], (1, 1, kernel), (1, 1, stride)).flatten()
    assert torch.equal(wide, padded), "the last axis is padded as the first"


def test_a_unit_and_a_pool_by_hand():
    torch.manual_seed(0)
    unit = Unit(2, 3, 3, 2).eval()
    unit.bn.running_mean.uniform_(-1, 1)
    unit.bn.running_var.uniform_(0.5, 2)
    x = torch.randn(1, 2, 5, 6, 8)
    by_hand = F.conv3d(F.pad(x, (0, 1, 0, 1, 1, 1)), unit.conv3d.weight, stride=2)  # 5 is odd, 6 and 8 are even
    by_hand = (by_hand - unit.bn.running_mean[:, None, None, None]) / (
        unit.bn.running_var[:, None, None, None] + 1e-3
    ).sqrt()
    assert torch.allclose(unit(x), by_hand.relu(), atol=1e-5)
    pooled = max_pool(x.relu(), (3, 3, 3), (2, 2, 2))
    assert pooled.shape == (1, 2, 3, 3, 4)
    assert torch.equal(pooled[0, :, 0, 0, 0], x.relu()[0, :, :2, :3, :3].amax((1, 2, 3)))
    assert torch.equal(pooled[0, :, 2, 2, 3], x.relu()[0, :, 3:, 4:, 6:].amax((1, 2, 3)))


@pytest.mark.parametrize("side", [64, pytest.param(224, marks=pytest.mark.slow)])
def test_sizes_at_every_stage(side):
    model, found = I3D().eval(), {}
    for name, part in model.named_children():
        part.register_forward_hook(lambda _, __, out, name=name: found.__setitem__(name, tuple(out.shape[1:])))
    with torch.no_grad():
        out = model(torch.zeros(1, 3, 16, side, side), ("logits", "pooled"))
    assert found["Conv3d_1a_7x7"] == (64, 8, side // 2, side // 2)
    assert found["Conv3d_2c_3x3"] == (192, 8, side // 4, side // 4)
    assert found["Mixed_3c"] == (480, 8, side // 8, side // 8)
    assert found["Mixed_4f"] == (832, 4, side // 16, side // 16)
    assert found["Mixed_5c"] == (1024, 2, side // 32, side // 32)
    assert found["logits"] == (400, 1, 1, 1)
    assert {name: tuple(value.shape) for name, value in out.items()} == {n: (1, w) for n, w in FEATURES.items()}


def test_features_are_means_over_time_and_belong_together():
    torch.manual_seed(0)
    model = I3D(classes=5).eval()
    x = torch.rand(2, 3, 9, 32, 32) * 2 - 1
    with torch.no_grad():
        found = model(x, ("logits", "pooled"))
        weight, bias = model.logits.conv3d.weight.flatten(1), model.logits.conv3d.bias
        assert torch.allclose(found["logits"], F.linear(found["pooled"], weight, bias), atol=1e-5)
        assert torch.allclose(model(x[1:])["logits"][0], found["logits"][1], atol=1e-5)
