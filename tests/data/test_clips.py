"""Clips as a source and in batches: the same whatever came before, replaced where damaged, in turn with pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.moving import moving
from vistok.data.clips import Alternating, ClipLoader, ClipSource
from vistok.data.loader import PixelLoader
from vistok.data.sources import open_source
from vistok.data.video import write_clip
from vistok.errors import InputError


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    for index, frames in enumerate((9, 13, 7)):
        write_clip(folder / f"{'ab'[index % 2]}" / f"{index}.mp4", [moving(frames, 48, 64)], rate=10)
    return folder


def test_a_folder_of_clips_is_a_source(clips):
    source = open_source(clips)
    assert isinstance(source, ClipSource)
    assert [item.id for item in source] == ["a/0.mp4", "a/2.mp4", "b/1.mp4"]
    assert source.classes == ("a", "b")
    assert source[2].frames().shape == (13, 48, 64, 3)
    assert source[0].size == (48, 64)
    assert source[0].middle.size == (64, 48)
    with pytest.raises(InputError, match="is a clip"):
        _ = source[0].image
    assert source.fingerprint == ClipSource.below(clips).fingerprint


def test_batches_do_not_depend_on_what_came_before(clips):
    first = ClipLoader(clips, frames=5, size=32, batch_size=4, seed=3, workers=2)
    batches = first.batches(0)
    seen = [next(batches) for _ in range(4)]
    batches.close()
    assert seen[0]["pixels"].shape == (4, 3, 5, 32, 32)
    assert seen[0]["pixels"].min() >= 0
    assert seen[0]["pixels"].max() <= 1
    again = ClipLoader(clips, frames=5, size=32, batch_size=4, seed=3, workers=0)
    assert torch.equal(again.batch(3)["pixels"], seen[3]["pixels"])
    assert again.batch(3)["id"] == seen[3]["id"]
    halves = [ClipLoader(clips, frames=5, size=32, batch_size=4, seed=3, rank=rank, world=2) for rank in range(2)]
    assert torch.equal(torch.cat([half.batch(2)["pixels"] for half in halves]), seen[2]["pixels"])
    assert not torch.equal(seen[0]["pixels"], seen[3]["pixels"])


def test_frames_are_consecutive_and_cut_alike(clips):
    """The bright square moves two pixels a frame, so frame t + 1 is frame t moved by two but for the background."""
    loader = ClipLoader(clips, frames=5, size=48, batch_size=2, crop="center", flip=False)
    clip = loader.batch(0)["pixels"][0]
    lefts = [(frame[0, 10:22] > 0.93).float().mean(0).gt(0.5).nonzero().min().item() for frame in clip.unbind(1)]
    steps = np.diff(lefts)
    assert ((steps >= 0) & (steps <= 3)).all()


def test_what_is_damaged_or_short_is_replaced_and_told(clips):
    (clips / "a" / "0.mp4").write_bytes(b"nothing")
    loader = ClipLoader(clips, frames=9, size=16, batch_size=3)
    assert set(loader.batch(0)["id"]) == {"b/1.mp4"}  # the third has 7 frames
    assert set(loader.bad) == {"a/0.mp4", "a/2.mp4"}
    assert "fewer than 9" in loader.bad["a/2.mp4"]
    with pytest.raises(InputError, match="not one of the 3"):
        ClipLoader(clips, frames=50, size=16, batch_size=1).batch(0)
    with pytest.raises(InputError, match="no clips"):
        ClipSource.below(clips.parent / "empty") if (clips.parent / "empty").mkdir() is None else None


def test_pictures_and_clips_in_turn(clips, tmp_path):
    (tmp_path / "photos").mkdir()
    for index in range(3):
        Image.fromarray(np.full((40, 40, 3), 50 * index, np.uint8)).save(tmp_path / "photos" / f"{index}.png")
    pictures = PixelLoader(tmp_path / "photos", size=16, batch_size=4)
    both = Alternating(pictures, ClipLoader(clips, frames=3, size=16, batch_size=2))
    for start in (0, 1, 4):
        batches = both.batches(start)
        for step in range(start, start + 3):
            batch = next(batches)
            assert batch["pixels"].ndim == (4 if step % 2 == 0 else 5)
            assert torch.equal(batch["pixels"], both.batch(step)["pixels"])
        batches.close()
    with pytest.raises(InputError, match="wanted"):
        ClipLoader(tmp_path / "photos", frames=2, size=16, batch_size=1, max_bad=0).batch(0)
