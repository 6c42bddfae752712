"""Extractors on weights made on the spot: what they give, what they say of themselves, and files that do not fit."""

import pytest
import torch
from safetensors.torch import save_file

from vistok.errors import InputError, MismatchError, UnknownNameError, VistokError
from vistok.metrics.extractors import build_extractor
from vistok.nn.inception import FEATURES, FIDInception


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    save_file(FIDInception().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(0, 256, (2, 3, 40, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_inception_gives_named_features(weights, pixels):
    extractor = build_extractor("inception:torch-fidelity", weights)
    found = extractor(pixels, tuple(FEATURES))
    assert {name: value.shape for name, value in found.items()} == {n: (2, width) for n, width in FEATURES.items()}
    assert torch.equal(extractor(pixels)["2048"], found["2048"])
    assert torch.equal(extractor(pixels, ("spatial",))["spatial"], found["spatial"])


def test_ways_of_taking_pictures_differ_and_are_told(weights, pixels):
    clean, fidelity = (build_extractor(f"inception:{way}", weights) for way in ("clean-fid", "torch-fidelity"))
    assert clean.protocol["weights"] == fidelity.protocol["weights"] == clean.hash
    assert clean.protocol != fidelity.protocol
    assert not torch.allclose(clean(pixels, ("64",))["64"], fidelity(pixels, ("64",))["64"], atol=1e-6)


def test_dinov2_from_a_file(tmp_path, pixels):
    torch.manual_seed(0)
    width, grid = 64, 16
    state = {
        "cls_token": torch.randn(1, 1, width),
        "pos_embed": torch.randn(1, 1 + grid**2, width),
        "patch_embed.proj.weight": torch.randn(width, 3, 14, 14) * 0.02,
        "patch_embed.proj.bias": torch.zeros(width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    shapes = {"norm1": (width,), "norm2": (width,), "attn.proj": (width, width), "attn.qkv": (3 * width, width)}
    shapes |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for name, shape in shapes.items():
        state[f"blocks.0.{name}.weight"] = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.02
        state[f"blocks.0.{name}.bias"] = torch.zeros(shape[0])
    state |= {f"blocks.0.ls{place}.gamma": torch.ones(width) for place in (1, 2)}
    save_file(state, tmp_path / "dino.safetensors")
    extractor = build_extractor("dinov2-s14", tmp_path / "dino.safetensors")
    assert extractor(pixels)["features"].shape == (2, width)
    assert extractor.protocol["resize"] == "bicubic"


def test_clip_from_a_folder(tmp_path, pixels):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=16,
        patch_size=32,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    assert build_extractor("clip-b16", tmp_path)(pixels)["features"].shape == (2, 16)


def test_bad_input(weights, pixels, tmp_path):
    with pytest.raises(UnknownNameError, match="inception:clean-fid"):
        build_extractor("inception:cleanfid", weights)
    with pytest.raises(VistokError, match="no file"):
        build_extractor("inception:adm", tmp_path / "absent.pth")
    save_file({"some.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match=r"some\.weight"):
        build_extractor("inception:adm", tmp_path / "other.safetensors")
    extractor = build_extractor("inception:adm", weights)
    with pytest.raises(UnknownNameError, match="2048"):
        extractor(pixels, ("2049",))
    with pytest.raises(InputError, match="uint8"):
        extractor(pixels.float())
