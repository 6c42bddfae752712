"""Clips in files: sizes, rates and frame counts kept, damage told."""

import av
import numpy as np
import pytest
import torch

import tests.toy  # noqa: F401
import vistok
from tests.data.moving import cut_short, moving
from vistok.data.images import is_video_name
from vistok.data.video import open_clip, read_clip, write_clip
from vistok.errors import FormatError, InputError, OutputError


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


@pytest.mark.parametrize(("name", "codec"), [("clip.mkv", "libx264"), ("clip.webm", "libvpx"), ("clip.avi", "mpeg4")])
def test_files_that_end_early_without_an_error_are_refused(tmp_path, name, codec):
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        noise = np.random.RandomState(0).randint(0, 99, (40, 48, 64, 3), dtype=np.uint8)  # so that frames take bytes
        for picture in moving(40)[0].permute(1, 2, 3, 0).numpy() // 2 + noise:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert read_clip(tmp_path / name)[0].shape == (1, 3, 40, 48, 64)
    cut_short(tmp_path / name, 0.8)
    with pytest.raises(FormatError, match=r"cut short: \d+ frames"):
        read_clip(tmp_path / name)


def test_windows_may_be_cut_to_a_crop(tmp_path):
    write_clip(tmp_path / "clip.mp4", [moving()], rate=10)
    whole = read_clip(tmp_path / "clip.mp4")[0]
    cut = list(open_clip(tmp_path / "clip.mp4").windows(5, lambda picture: np.asarray(picture)[:16, 8:24]))
    assert torch.equal(torch.cat(cut, 2), whole[..., :16, 8:24])
