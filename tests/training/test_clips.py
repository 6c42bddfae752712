"""Training on clips, and on pictures and clips in turn, after a stage of pictures."""

import torch

import vistok
from tests.data.test_clips import clips  # noqa: F401
from tests.training.test_trainer import exact, interrupted, photos, rows, same  # noqa: F401
from vistok.training.recipe import check
from vistok.training.trainer import train


def make(**sections):
    base = {
        "model": {"name": "omnitokenizer-tiny"},
        "data": {"size": 16, "validation": 1},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 6, "batch_size": 4, "log_every": 2, "checkpoint_every": 3, "validate_every": 3,
                  "sample_every": 3, "tensorboard": False},
    }  # fmt: skip
    return check(base | sections, "test")


def test_pictures_then_both_in_turn_with_judges_ends_in_the_same_bits(photos, clips, tmp_path, monkeypatch):  # noqa: F811
    judge = {"discriminator": {"name": "omnitokenizer-image", "width": 8}, "weight": 0.1, "adaptive": False}
    watch = judge | {"discriminator": {"name": "omnitokenizer-video", "width": 8}}
    recipe = make(
        model={"name": "omnitokenizer-tiny", "start_from": "pictures"},
        stages=[
            {"name": "pictures", "model": {"name": "omnitokenizer-tiny"}, "adversary": judge, "train": {"steps": 4}},
            {"name": "joint", "data": {"frames": 5, "clips": str(clips), "clip_batch": 2}, "clip_adversary": watch,
             "train": {"steps": 5}},
        ],
    )  # fmt: skip
    train(recipe, photos, tmp_path / "whole")
    interrupted(recipe, photos, tmp_path / "killed", [2, 5, 7], monkeypatch)
    assert same(exact(tmp_path / "whole"), exact(tmp_path / "killed"))
    log = rows(tmp_path / "whole" / "log.csv")
    assert any(row.get("clip_adversarial") for row in log)
    assert any(row.get("clip_discriminator_loss") for row in log)
    model = vistok.load(str(tmp_path / "whole" / "model"))
    clip = torch.rand(1, 3, 5, 16, 16)
    assert model.decode(model.encode(clip)).shape == clip.shape


def test_a_folder_of_clips_trains_alone(clips, tmp_path):  # noqa: F811
    path = train(make(data={"size": 16, "frames": 3, "validation": 1}), clips, tmp_path / "run")
    model = vistok.load(str(path))
    assert model.quantizer.codebook.norm(dim=1).max() <= 1 + 1e-4  # it began as latents, of unit length
    assert (tmp_path / "run" / "samples").exists()
