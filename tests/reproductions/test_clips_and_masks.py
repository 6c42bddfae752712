"""The reproductions of OmniTokenizer and HiMTok: their data, what they measure, that they run to the end."""

from dataclasses import replace

import pytest
import torch

from tests.data.moving import clips
from tests.data.pictures import folder
from vistok.evaluation.reproducing import find_data, reproduce
from vistok.evaluation.reproduction import find, judged
from vistok.reproductions import omnitokenizer

OMNI = {
    "clips alone": {"clips": 18.0, "photographs": 14.0},
    "images first": {"clips": 19.0, "photographs": 17.0, "picture is a clip": 1.0},
    "joint": {"clips": 18.6, "photographs": 16.0},
}


@pytest.fixture
def scenes(tmp_path):
    """Photographs and clips in the places that the reproduction looks for."""
    root = tmp_path / "data"
    folder(root / "imagenet-samples" / "train", 20, (70, 80))
    folder(root / "imagenet-samples" / "val", 6, (70, 80))
    clips(root / "clips", [9, 7], size=(64, 80))
    (root / "clips" / "01.mp4").rename(root / "clips" / "store-aisle-detection.mp4")
    return root


def test_omnitokenizer_is_judged_clause_by_clause():
    def verdict(numbers):
        return judged(find("omnitokenizer"), {arm: {0: values, 1: OMNI[arm]} for arm, values in numbers.items()})

    assert verdict(OMNI)["verdict"] == "shown"
    for arm, metric, value in (
        ("images first", "clips", 18.4),
        ("images first", "photographs", 15.9),
        ("joint", "clips", 19.4),
        ("joint", "photographs", 17.4),
        ("images first", "picture is a clip", 0.0),
    ):
        worse = {name: dict(values) for name, values in OMNI.items()}
        worse[arm][metric] = value
        found = verdict(worse)
        assert found["verdict"] == "not shown"
        assert sum(not clause["holds"] for clause in found["rule"]) == 1


def test_omnitokenizer_holds_whole_scenes_out(scenes):
    data = find_data(find("omnitokenizer"), scenes)
    assert [item.id for item in data.others["held-out clips"]] == ["store-aisle-detection.mp4"]
    assert [item.id for item in data.others["clips"]] == ["00.mp4"]
    assert set(data.facts()) == {"train", "test", "clips", "held-out clips"}


def test_omnitokenizer_arms_differ_in_what_they_see(scenes):
    import vistok
    from vistok.evaluation.reproducing import Context

    short = replace(find("omnitokenizer"), steps=4, batch=2)
    context = Context(short, find_data(short, scenes), scenes, "joint", 0, None)
    model = vistok.create("omnitokenizer-clips")

    def axes(kind):
        stream = omnitokenizer.batches(kind, model, context, 0)
        return [next(stream)["pixels"].ndim for _ in range(4)]

    assert axes("clips alone") == [5, 5, 5, 5]
    assert axes("joint") == [4, 5, 4, 5]
    assert axes("images first") == [4, 4, 4, 5]


def test_psnr_over_what_moves():
    class Same:
        def encode(self, pixels):
            self.pixels = pixels
            return type("Tokens", (), {"codes": torch.zeros(1)})

        def decode(self, tokens):
            return (self.pixels.float() / 255 + 0.1).clamp(0, 1)

    still = torch.zeros(2, 3, 5, 8, 8, dtype=torch.uint8)
    still[:, :, 2:, 4:] = 255  # error 0.1 where black, none where white
    found = omnitokenizer.quality(Same(), still)
    assert found["moving"] > 60
    assert found["psnr"] == pytest.approx(20 - 10 * torch.tensor(0.7).log10().item(), abs=1e-3)


@pytest.mark.slow
def test_omnitokenizer_runs_to_the_end(scenes, tmp_path):
    short = replace(find("omnitokenizer"), steps=2, batch=2)
    result = reproduce(short, find_data(short, scenes), tmp_path / "run")
    assert set(result["arms"]) == {"clips alone", "images first", "joint"}
    assert {"clips", "moving", "seen clips", "photographs", "codes"} <= result["arms"]["joint"]["numbers"].keys()
    assert result["data"]["clips"]["items"] == 1
