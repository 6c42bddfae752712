"""Clips in files: sizes, rates and frame counts kept, damage told."""

import numpy as np
import pytest
import torch

import tests.toy  # noqa: F401
import vistok
from vistok.data.video import is_video_name, open_clip, read_clip, write_clip
from vistok.errors import FormatError, InputError, OutputError


def moving(frames=13, height=48, width=64):
    """A bright square that wanders over a gradient, uint8 (1, 3, T, H, W)."""
    grid = np.linspace(30, 200, width)[None, None, None] * np.ones((3, frames, height, 1))
    for index in range(frames):
        grid[:, index, 8:24, 2 * index : 2 * index + 16] = 250
    return torch.from_numpy(grid.astype(np.uint8))[None]


@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
@pytest.mark.parametrize("rate", [12.0, 30000 / 1001])
def test_written_clips_keep_size_count_rate_and_pictures(tmp_path, size, rate):
    pixels = moving(13, *size)
    parts = [pixels[:, :, :5], pixels[:, :, 5:10], pixels[:, :, 10:].float() / 255]
    assert write_clip(tmp_path / "clip.mp4", parts, rate=rate) == 13
    clip = open_clip(tmp_path / "clip.mp4")
    assert clip.size == size
    assert clip.rate == pytest.approx(rate, rel=1e-4)
    back, told = read_clip(tmp_path / "clip.mp4")
    assert back.shape == pixels.shape
    assert told == clip.rate
    assert (back.float() - pixels.float()).abs().mean() < 3
    assert [window.shape[2] for window in clip.windows(5)] == [5, 5, 3]
    assert read_clip(tmp_path / "clip.mp4", frames=4)[0].shape[2] == 4


def test_through_a_tokenizer_window_by_window(tmp_path):
    write_clip(tmp_path / "in.mp4", [moving()], rate=10)
    model = vistok.create("toy-video")
    clip = open_clip(tmp_path / "in.mp4")
    tokens = model.encode_windows(clip.windows(model.spec.window), rate=clip.rate)
    assert torch.equal(tokens.codes, model.encode(read_clip(tmp_path / "in.mp4")[0], rate=clip.rate).codes)
    write_clip(tmp_path / "out.mp4", model.decode_windows(tokens, dtype=torch.uint8), rate=tokens.canvas[0].rate)
    out = open_clip(tmp_path / "out.mp4")
    assert (out.size, out.rate, sum(1 for _ in out.frames())) == (clip.size, clip.rate, 13)


def test_damage(tmp_path):
    write_clip(tmp_path / "whole.mp4", [moving()], rate=10)
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.mp4").write_text("no clip")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("cut", "text", "empty"):
        with pytest.raises(FormatError, match=name):
            read_clip(tmp_path / f"{name}.mp4")
    with pytest.raises(InputError, match="does not exist"):
        open_clip(tmp_path / "none.mp4")
    with pytest.raises(InputError, match="limit"):
        open_clip(tmp_path / "whole.mp4", max_pixels=100)


def test_nothing_half_written(tmp_path):
    def breaks():
        yield moving()
        raise InputError("stopped")

    with pytest.raises(InputError, match="stopped"):
        write_clip(tmp_path / "out.mp4", breaks(), rate=10)
    with pytest.raises(InputError, match="no frames"):
        write_clip(tmp_path / "out.mp4", [], rate=10)
    with pytest.raises(InputError, match=r"\.mp4"):
        write_clip(tmp_path / "out.png", [moving()], rate=10)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_clip(tmp_path / "file" / "out.mp4", [moving()], rate=10)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_names():
    assert is_video_name("a/B.MP4")
    assert not is_video_name("a/.b.mp4")
    assert not is_video_name("b.gif")
