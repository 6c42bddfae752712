"""Clips through the contract: windows, padding, rates, streams, and models of pictures that see frame by frame."""

import pytest
import torch

import tests.toy  # noqa: F401  registers the toys
import vistok
from vistok import Tokens
from vistok.errors import InputError
from vistok.layout import Canvas, Clips


def clip(frames, height=16, width=24, seed=0, items=1):
    coarse = torch.rand(items, 3, frames, height // 4, width // 4, generator=torch.Generator().manual_seed(seed))
    return (coarse * 7).round().div(7).repeat_interleave(4, 3).repeat_interleave(4, 4)


def test_frame_counts():
    rule = Clips(first=1, step=4, maximum=17)
    assert [rule.window(frames) for frames in (1, 2, 5, 6, 17, 18, 100)] == [1, 5, 5, 9, 17, 17, 17]
    assert [frames for frames in range(20) if rule.legal(frames)] == [1, 5, 9, 13, 17]
    canvas = Canvas((8, 8), frames=40, window=17, tiles=(2, 3))
    assert canvas.windows == 3
    assert canvas.pieces == 18
    assert Canvas.from_json(canvas.to_json()) == canvas


@pytest.mark.parametrize(("frames", "window", "windows"), [(1, 1, 1), (3, 3, 1), (4, 5, 1), (5, 5, 1), (13, 5, 3)])
def test_a_clip_comes_back_with_every_frame(frames, window, windows):
    model = vistok.create("toy-video")
    pixels = clip(frames, items=2)
    tokens = model.encode(pixels, rate=12.0)
    canvas = tokens.canvas[0]
    assert (canvas.frames, canvas.window, canvas.windows, canvas.rate) == (frames, window, windows, 12.0)
    assert tokens.length == model.spec.of(canvas).length
    assert tokens.segments[0].shape == (1, 4, 6, *((windows,) * (windows > 1)))
    rebuilt = model.decode(tokens)
    assert rebuilt.shape == pixels.shape
    firsts = range(0, frames, window)
    assert torch.allclose(rebuilt[:, :, firsts], pixels[:, :, firsts], atol=1e-6)  # first frames stand alone
    if frames == 4:  # the last frame was repeated: its pair is itself
        assert torch.allclose(rebuilt[:, :, 3], pixels[:, :, 3], atol=1e-6)


def test_windows_are_encoded_alone_and_pictures_are_clips_of_one_frame():
    model = vistok.create("toy-video")
    pixels = clip(13)
    whole = model.encode(pixels)
    for index in range(3):
        part = model.encode(pixels[:, :, 5 * index : 5 * index + 5])
        if part.segments[-1].shape == (2, 4, 6):
            assert torch.equal(whole["rest"][..., index, :], part["rest"])
    still = model.encode(pixels[:, :, 0])
    assert still.canvas[0].frames is None
    assert torch.equal(still.codes, model.encode(pixels[:, :, :1]).codes)
    assert model.decode(still).shape == (1, 3, 16, 24)


def test_sizes_and_frames_are_padded_and_cut_back_together(tmp_path):
    model = vistok.create("toy-video")
    pixels = clip(7, 16, 24)[..., :13, :22]
    tokens = model.encode(pixels, rate=29.97)
    rebuilt = model.decode(tokens)
    assert rebuilt.shape == pixels.shape
    tokens.save(tmp_path / "clip.vtok")
    again = Tokens.load(tmp_path / "clip.vtok")
    assert again.canvas == tokens.canvas
    assert torch.equal(model.decode(again), rebuilt)


def test_a_model_with_fixed_sizes_takes_tiles_of_windows():
    model = vistok.create("toy-video", only=((16, 16),))
    pixels = clip(8, 32, 48)
    tokens = model.encode(pixels, on_size="tile")
    assert tokens.canvas[0].pieces == 2 * 6
    rebuilt = model.decode(tokens)
    assert rebuilt.shape == pixels.shape
    assert torch.allclose(rebuilt[:, :, [0, 5]], pixels[:, :, [0, 5]], atol=1e-6)


@pytest.mark.parametrize(("name", "size"), [("toy-video", (16, 24)), ("toy", (16, 24)), ("toy-16", (32, 16))])
@pytest.mark.parametrize("frames", [2, 5, 13])
def test_a_stream_gives_what_the_whole_gives(name, size, frames):
    model = vistok.create(name)
    on_size = "tile" if name == "toy-16" else "pad"
    pixels = clip(frames, *size)
    whole = model.encode(pixels, rate=10.0, on_size=on_size)
    window = model.spec.window
    parts = (pixels[:, :, start : start + window] for start in range(0, frames, window))
    streamed = model.encode_windows(parts, rate=10.0, on_size=on_size)
    assert streamed.segments == whole.segments
    assert streamed.canvas == whole.canvas
    assert torch.equal(streamed.codes, whole.codes)
    rebuilt = list(model.decode_windows(whole, dtype=torch.uint8))
    assert [part.shape[2] for part in rebuilt] == [min(window, frames - i) for i in range(0, frames, window)]
    assert torch.equal(torch.cat(rebuilt, 2), model.decode(whole, dtype=torch.uint8))


def test_models_of_pictures_see_frame_by_frame():
    model = vistok.create("toy")
    pixels = clip(3)
    tokens = model.encode(pixels)
    assert tokens.segments[0].shape == (4, 6, 3)
    assert torch.equal(tokens["grid"][..., 1, :], model.encode(pixels[:, :, 1])["grid"])
    assert torch.allclose(model.decode(tokens), pixels, atol=1e-6)


def test_clips_of_several_lengths_and_pictures_in_one_list():
    model = vistok.create("toy-video")
    items = [clip(5), clip(3, seed=1), clip(1)[:, :, 0]]
    found = model.encode(items)
    assert [tokens.canvas[0].frames for tokens in found] == [5, 3, None]
    assert all(torch.equal(a, b) for a, b in zip(model.decode(found), [model.decode(t)[0] for t in found], strict=True))


def test_what_is_not_a_clip():
    model = vistok.create("toy-video")
    with pytest.raises(InputError, match=r"1 \+ k \* 2 frames"):
        model.encode(clip(4), on_size="refuse")
    with pytest.raises(InputError, match="expected 5"):
        model.encode_windows([clip(3), clip(5)])
    with pytest.raises(InputError, match="expected 5"):
        model.encode_windows([clip(7)])
    with pytest.raises(InputError, match="no frames"):
        model.encode_windows([])
    with pytest.raises(InputError, match="one clip"):
        next(model.decode_windows(model.encode(clip(5)[:, :, 0])))
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        model.encode(clip(5) * 2 - 1)
