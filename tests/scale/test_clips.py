"""Clips into stores and back into files: frames, rates and windows kept, damage listed, killed and run again."""

import time

import pytest
import torch

import tests.toy  # noqa: F401
import vistok
from tests.data.moving import assert_written, clips, cut_short, moving
from tests.data.pictures import folder
from tests.data.test_store import contents
from vistok.data.sources import open_source
from vistok.data.store import TokenStore
from vistok.data.video import open_clip, read_clip, write_clip
from vistok.errors import InputError, MismatchError
from vistok.scale.decode import decode_store
from vistok.scale.encode import EncodeOptions, encode_source
from vistok.scale.verify import verify_store

ONE = EncodeOptions(batch_size=1)


@pytest.fixture
def omni():
    torch.manual_seed(0)
    return vistok.create("omnitokenizer-tiny")


def test_a_store_holds_what_encode_gives_and_comes_back_as_clips(tmp_path, omni):
    source = open_source(clips(tmp_path / "c", [1, 4, 5, 13], rate=12.5))
    report = encode_source(source, omni, tmp_path / "s", ONE)
    assert (report.items, report.rows, report.quarantined) == (4, 4, 0)
    store = TokenStore(tmp_path / "s")
    for row, frames in enumerate([1, 4, 5, 13]):
        tokens = store[row].tokens
        pixels, rate = read_clip(tmp_path / "c" / f"{row:02d}.mp4")
        assert tokens.equal(omni.encode(pixels, rate=rate))
        canvas = tokens.canvas[0]
        assert (canvas.size, canvas.frames, canvas.rate, canvas.windows) == ((32, 48), frames, 12.5, -(-frames // 5))
    done = decode_store(store, omni, tmp_path / "out")
    assert (done.written, done.kept) == (4, 0)
    for row, frames in enumerate([1, 4, 5, 13]):
        pixels, rate = read_clip(tmp_path / "out" / f"{row:02d}.mp4")
        assert (pixels.shape, rate) == ((1, 3, frames, 32, 48), 12.5)
        wanted = omni.decode(store[row].tokens, dtype=torch.uint8)
        assert_written(tmp_path / "wanted.mp4", pixels, wanted, rate)
    (tmp_path / "out" / "02.mp4").unlink()
    cut_short(tmp_path / "out" / "03.mp4")
    again = decode_store(store, omni, tmp_path / "out")
    assert (again.written, again.kept) == (2, 2)
    assert open_clip(tmp_path / "out" / "03.mp4").size == (32, 48)


def test_damaged_clips_are_listed_and_the_rest_is_kept(tmp_path, omni):
    root = clips(tmp_path / "c", [5, 7, 6])
    cut_short(root / "01.mp4")
    (root / "03.mp4").write_bytes(b"no clip")
    report = encode_source(open_source(root), omni, tmp_path / "s", ONE)
    assert (report.rows, report.quarantined) == (2, 2)
    store = TokenStore(tmp_path / "s")
    assert [(entry["index"], entry["id"]) for entry in store.quarantine] == [(1, "01.mp4"), (3, "03.mp4")]
    assert not any(str(tmp_path) in entry["error"] for entry in store.quarantine)
    assert store.ids == ["00.mp4", "02.mp4"]
    with pytest.raises(InputError, match="more than the 1 allowed"):
        encode_source(open_source(root), omni, tmp_path / "t", EncodeOptions(batch_size=1, max_bad=1))


def test_interrupted_anywhere_the_store_comes_out_the_same(tmp_path, omni, monkeypatch):
    source = open_source(clips(tmp_path / "c", [5, 6, 3, 12, 5]))
    encode_source(source, omni, tmp_path / "whole", ONE)
    calls: list[int] = []
    plain = type(omni).encode_windows

    def failing(self, windows, **options):
        calls.append(1)
        if len(calls) in (2, 5):
            raise KeyboardInterrupt
        return plain(self, windows, **options)

    monkeypatch.setattr(type(omni), "encode_windows", failing)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            encode_source(source, omni, tmp_path / "torn", ONE)
    encode_source(source, omni, tmp_path / "torn", ONE)
    assert len(calls) < 9  # what was done is not done again
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")
    assert verify_store(tmp_path / "torn", source, omni, ONE).wrong == ()


def test_options_belong_to_the_store(tmp_path, omni):
    source = open_source(clips(tmp_path / "c", [5, 5], size=(40, 72)))
    crop = EncodeOptions(batch_size=1, crop=32)
    encode_source(source, omni, tmp_path / "s", crop)
    assert TokenStore(tmp_path / "s")[0].tokens.canvas[0].size == (32, 32)
    with pytest.raises(MismatchError, match="option crop"):
        encode_source(source, omni, tmp_path / "s", ONE)


def test_who_takes_what(tmp_path, omni):
    moving_pictures = open_source(clips(tmp_path / "c", [5]))
    with pytest.raises(InputError, match=r"needs a tokenizer of clips.*omnitokenizer"):
        encode_source(moving_pictures, vistok.create("toy"), tmp_path / "s")
    assert not (tmp_path / "s").exists()
    folder(tmp_path / "p", 2, (16, 32))
    encode_source(open_source(tmp_path / "p"), omni, tmp_path / "s")  # pictures are clips of one frame
    store = TokenStore(tmp_path / "s")
    assert store[0].tokens.equal(omni.encode(open_source(tmp_path / "p")[0].image))
    decode_store(store, omni, tmp_path / "out")
    assert (tmp_path / "out" / "0001.png").exists()
    encode_source(moving_pictures, omni, tmp_path / "clips", ONE)
    with pytest.raises(InputError, match=r"clips are written to \.mp4"):
        decode_store(TokenStore(tmp_path / "clips"), omni, tmp_path / "o", suffix=".png")


def test_a_window_at_a_time(tmp_path, monkeypatch):
    """However long a clip is, no more frames are held than the windows in work."""
    model = vistok.create("toy-video")
    write_clip(tmp_path / "long.mp4", (moving(5, 16, 24) for _ in range(40)), rate=10)
    from vistok.data import video

    made: list[int] = []
    encoded: list[int] = []
    ahead: list[int] = []
    upright = video._upright
    monkeypatch.setattr(video, "_upright", lambda frame: made.append(1) or upright(frame))
    tokenize = type(model).tokenize

    def slow(self, pixels, spec, **options):
        time.sleep(0.002)
        ahead.append(len(made) - sum(encoded))
        encoded.append(pixels.shape[2])
        return tokenize(self, pixels, spec, **options)

    monkeypatch.setattr(type(model), "tokenize", slow)
    encode_source(open_source(tmp_path / "long.mp4"), model, tmp_path / "s", ONE)
    assert sum(encoded) == 200
    assert max(ahead) <= 4 * 5 + 1  # one in work, one that waits, one being made, and the first frame for the size
