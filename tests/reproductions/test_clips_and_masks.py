"""The reproductions of OmniTokenizer and HiMTok: their data, what they measure, that they run to the end."""

from dataclasses import replace

import pytest
import torch

from tests.data.moving import clips
from tests.data.pictures import folder
from vistok.evaluation.reproducing import find_data, reproduce
from vistok.evaluation.reproduction import find, judged
from vistok.reproductions import himtok, omnitokenizer

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


HIM = {
    "prefixes": {"iou@4": 0.8, "iou@16": 0.9, "largest fall": 0.002, "box": 0.7, "codes": 120.0},
    "whole": {"iou@4": 0.5, "iou@16": 0.91, "box": 0.6, "codes": 110.0},
}


def test_himtok_is_judged_clause_by_clause():
    def verdict(numbers):
        return judged(find("himtok"), {arm: {0: values, 1: HIM[arm]} for arm, values in numbers.items()})

    assert verdict(HIM)["verdict"] == "shown"
    for arm, metric, value in (
        ("prefixes", "iou@4", 0.64),
        ("prefixes", "iou@16", 0.88),
        ("prefixes", "largest fall", 0.011),
        ("prefixes", "box", 0.64),
        ("prefixes", "codes", 49.0),
        ("whole", "codes", 49.0),
    ):
        worse = {name: dict(values) for name, values in HIM.items()}
        worse[arm][metric] = value
        found = verdict(worse)
        assert found["verdict"] == "not shown"
        assert sum(not clause["holds"] for clause in found["rule"]) == 1


@pytest.fixture
def meshes(tmp_path, monkeypatch):
    """Three meshes, few views."""
    import trimesh

    root = tmp_path / "meshes"
    root.mkdir()
    for name, mesh in {
        "ball": trimesh.creation.icosphere(subdivisions=1),
        "box": trimesh.creation.box((1, 2, 3)),
        "spot": trimesh.creation.cylinder(1, 3),
    }.items():
        mesh.export(root / f"{name}.obj")
    monkeypatch.setattr(himtok, "VIEWS", 12)
    monkeypatch.setattr(himtok, "TEST_VIEWS", 4)
    monkeypatch.setattr(himtok, "BOX_BATCH", 4)
    monkeypatch.setattr(himtok, "BOX_STEPS", 2)
    return tmp_path


def test_silhouettes_are_the_same_every_time_and_hold_shapes_out(meshes):
    data, again = find_data(find("himtok"), meshes), find_data(find("himtok"), meshes)
    assert data.facts() == again.facts()
    assert {item.id.split("-")[0] for item in data.train} == {"ball", "box"}
    assert {item.id.split("-")[0] for item in data.test} == {"spot"}
    masks = himtok.masks_of(data.train)
    assert masks.shape == (12, 1, 64, 64)
    assert masks.unique().tolist() == [0, 1]
    assert not torch.equal(masks[:4], himtok.masks_of(data.others["new views"]))


def test_boxes_fall_into_bins_and_a_reader_learns_them():
    boxes = torch.tensor([[0, 3, 64, 63]])
    assert himtok.bins_of(boxes).tolist() == [[0, 0, 15, 15]]
    torch.manual_seed(0)
    corners = torch.randint(0, 4, (256, 2)) * 8
    masks = torch.zeros(256, 1, 64, 64)
    for row, (top, left) in enumerate(corners.tolist()):
        masks[row, :, top : top + 32, left : left + 32] = 1
    told = torch.cat([corners // 8, corners // 8 + 4], 1)  # codes that say where the box is
    silent = torch.zeros_like(told)
    quiet = lambda text: None  # noqa: E731
    monkey = himtok.BOX_STEPS
    himtok.BOX_STEPS = 60
    try:
        good = himtok.boxes_read(told, masks, told, masks, 0, quiet)
        poor = himtok.boxes_read(silent, masks, silent, masks, 0, quiet)
    finally:
        himtok.BOX_STEPS = monkey
    assert good > poor + 0.2


def test_the_baseline_is_always_decoded_whole():
    import vistok

    rng = torch.Generator().manual_seed(0)
    assert vistok.create("himtok-whole").lengths(4, rng).tolist() == [16] * 4
    assert len(set(vistok.create("himtok-silhouettes").lengths(64, rng).tolist())) > 8


@pytest.mark.slow
def test_himtok_runs_to_the_end(meshes, tmp_path):
    short = replace(find("himtok"), steps=2, batch=4)
    result = reproduce(short, find_data(short, meshes), tmp_path / "run")
    assert {"iou@4", "boundary", "new views@4", "box", "codes"} <= result["arms"]["whole"]["numbers"].keys()
    assert result["data"]["new views"]["items"] == 4
