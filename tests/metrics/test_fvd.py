"""The Frechet video distance: ways of taking frames, clips cut out of windows, the distance itself, and mistakes."""

from math import ceil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vistok.errors import InputError, MismatchError, UnknownNameError
from vistok.metrics.frechet import frechet_distance
from vistok.metrics.fvd import VIDEO_EXTRACTORS, ClipFeatures, build_video_extractor, fvd
from vistok.nn.i3d import I3D

SIDE = 32  # of a network that is told so: the published side takes seconds a clip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    network = I3D()
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm3d):
            part.running_var.fill_(0.05)  # or what is drawn so narrowly vanishes on its way
    path = tmp_path_factory.mktemp("i3d") / "i3d.safetensors"
    state = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def extractor(weights):
    return build_video_extractor("i3d:stylegan-v", weights, SIDE)


def clips(count, frames=16, size=(20, 28), seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, frames, *size), generator=draws, dtype=torch.uint8)


def test_ways_of_taking_frames(weights, extractor):
    given = clips(2, frames=3)
    by_hand = F.interpolate(given[1, :, 2][None].float(), (SIDE, SIDE), mode="bilinear", align_corners=False)
    assert torch.allclose(extractor.sized(given)[1, :, 2], by_hand[0] / 127.5 - 1)
    other = build_video_extractor("i3d:videogpt", weights, SIDE)
    wide = F.interpolate(given[1, :, 2][None].float(), (SIDE, ceil(28 * SIDE / 20)), mode="bilinear")
    left = (wide.shape[3] - SIDE) // 2
    assert torch.allclose(other.sized(given)[1, :, 2], wide[0, :, :, left : left + SIDE] / 127.5 - 1)
    square = clips(1, frames=2, size=(24, 24))
    assert torch.equal(other.sized(square), extractor.sized(square)), "of square frames both are the same"
    tensorflow = build_video_extractor("i3d:tensorflow", weights, SIDE)
    assert not torch.allclose(tensorflow.sized(square), extractor.sized(square), atol=0.01)
    assert {one.name for one in (extractor, other, tensorflow)} == set(VIDEO_EXTRACTORS)
    assert extractor.hash == other.hash == tensorflow.hash
    assert extractor.protocol != other.protocol


def test_features_and_their_distance(extractor):
    first, second = clips(6, 9, seed=1), clips(6, 9, seed=2)
    found = extractor(first, ("pooled", "logits"))
    assert {name: tuple(value.shape) for name, value in found.items()} == {"pooled": (6, 1024), "logits": (6, 400)}
    other = extractor(second)["logits"]
    assert fvd(first, second, extractor) == pytest.approx(frechet_distance(found["logits"], other), rel=1e-4)
    assert fvd(first, first, extractor) == pytest.approx(0, abs=1e-3 * float(found["logits"].square().mean()))


def test_clips_are_cut_out_of_windows(extractor):
    """Windows of 5 frames of two clips of 23 and 17: two 9-frame clips and one; what is left over is left out."""
    features, whole = ClipFeatures(extractor, 9), [clips(1, 23, seed=3), clips(1, 17, seed=4)]
    for clip in whole:
        for window in clip.split(5, 2):
            features.update(window)
        features.end()
    assert features.count == 3
    cut = torch.cat([whole[0][:, :, :9], whole[0][:, :, 9:18], whole[1][:, :, :9]])
    logits = extractor(cut)["logits"].double()
    found = features.gaussian()
    assert torch.allclose(found.mean, logits.mean(0), atol=1e-5)
    assert torch.allclose(found.covariance, torch.cov(logits.T), atol=1e-6)


def test_mistakes(weights, extractor, tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean"):
        build_video_extractor("i3d:videogp", weights)
    with pytest.raises(InputError, match="a file of your own"):
        build_video_extractor()
    state = {key: value for key, value in I3D().state_dict().items() if "Mixed_5c" not in key}
    save_file(state, tmp_path / "few.safetensors")
    with pytest.raises(MismatchError, match="are missing"):
        build_video_extractor(weights=tmp_path / "few.safetensors")
    save_file(I3D(classes=600).state_dict(), tmp_path / "k600.safetensors")
    with pytest.raises(MismatchError, match=r"\(600,"):
        build_video_extractor(weights=tmp_path / "k600.safetensors")
    with pytest.raises(InputError, match="uint8"):
        extractor(clips(1).float())
    features = ClipFeatures(extractor)
    features.update(clips(1))
    with pytest.raises(InputError, match="1 clips of 16 frames"):
        features.gaussian()
